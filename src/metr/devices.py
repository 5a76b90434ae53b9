"""What the hardware offers: device, precision and memory, alike for all vendors."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from inspect import signature

import torch

from metr.errors import ConfigError
from metr.processes import is_kept_to_cpu

# torch's questions, since 2.4 and 2.6, and parts of oneDNN's names of what has these products
_BF16_PRODUCTS = {"_is_amx_tile_supported": ("AMX",), "_is_avx512_bf16_supported": ("BF16", "FP16", "AVX10", "AMX")}
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
        return "bf16" if _multiplies_bf16() else "fp32"
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    if supported is None:
        return "fp32"
    # emulated bf16 is slower than fp32: only support in hardware counts
    own = {"including_emulation": False} if "including_emulation" in signature(supported).parameters else {}
    return "bf16" if supported(**own) else "fp32"


def _multiplies_bf16() -> bool:
    """Whether this processor multiplies bf16 itself, faster than float32 (AMX, AVX512_BF16), and oneDNN may use it."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    for question, needed in _BF16_PRODUCTS.items():
        has = getattr(torch.cpu, question, None)
        if has is not None and has() and (most in {"", "ALL", "DEFAULT"} or any(part in most for part in needed)):
            return True
    return False


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
