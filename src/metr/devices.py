"""What the hardware offers: device, precision and memory, alike for all vendors."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from inspect import signature

import torch

from metr.errors import ConfigError
from metr.processes import is_kept_to_cpu

_GIB = 2**30


def resolved_device(wanted: str | torch.device) -> torch.device:
    """The device of that name; "auto" is an accelerator where there is one, else the CPU.

    `accelerate launch --cpu` makes "auto" the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if wanted == "auto":
        if is_kept_to_cpu():
            return torch.device("cpu")
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:  # the latter is how a build without CUDA says so
        what = f"no device {str(wanted)!r}: {str(error).strip().splitlines()[0]}"
        raise ConfigError(what, where="device", hint="auto, or cpu") from None


def resolved_precision(wanted: str, device: torch.device) -> str:
    """The precision, "fp32" or "bf16": what `auto` means on a device, or what was asked for."""
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        return "bf16" if _multiplies_tiles() else "fp32"
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if supported is None:
        return "fp32"
    # emulated bf16 is slower than fp32: only support in hardware counts
    own = {"including_emulation": False} if "including_emulation" in signature(supported).parameters else {}
    return "bf16" if supported(**own) else "fp32"


def _multiplies_tiles() -> bool:
    """Whether this processor has AMX, whose bf16 is several times as fast as float32, and oneDNN may use it."""
    has = getattr(torch.cpu, "_is_amx_tile_supported", None)  # since torch 2.4
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return has is not None and bool(has()) and (most in {"", "ALL", "DEFAULT"} or "AMX" in most)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which the network computes."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def peak_memory(device: torch.device) -> float:
    """The most memory used so far, in GiB: the device's, or the process's on a CPU."""
    if device.type == "cpu":
        try:
            import resource
        except ImportError:  # Windows
            return 0.0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
    peak = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return 0.0 if peak is None else float(peak(device)) / _GIB
