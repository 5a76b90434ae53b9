"""On what, and from which commit, a result was measured."""

import platform
import subprocess
from pathlib import Path

import torch

_CPU_FACTS = Path("/proc/cpuinfo")


def hardware(device: torch.device) -> str:
    """The accelerator's name, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    if _CPU_FACTS.is_file():
        facts = (line.partition(":") for line in _CPU_FACTS.read_text(encoding="utf-8").splitlines())
        names = [value.strip() for key, _, value in facts if key.strip() == "model name"]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, with "+" where files were changed since; "unknown" outside a checkout."""
    described = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"
