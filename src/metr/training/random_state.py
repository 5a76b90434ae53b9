"""The random numbers of training: seeded once, saved as tensors, put back bit by bit."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

_PYTHON_VERSION = 3  # of the tuple that random.getstate gives
_NUMPY_KIND = "MT19937"


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators, those of all devices included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries underneath may draw from the global generator
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of all generators as tensors on the CPU; their shapes never change."""
    _, words, gauss = random.getstate()
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))  # noqa: NPY002
    words_of = numpy["state"]
    state = {
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy.words": torch.tensor([*words_of["key"].tolist(), words_of["pos"], numpy["has_gauss"]]),
        "numpy.gauss": torch.tensor(numpy["gauss"], dtype=torch.float64),
        "torch.cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["torch.device"] = torch.get_device_module(device).get_rng_state(device).cpu()
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts back what `random_state` gave; a state from the CPU leaves the device's generator alone."""
    has_gauss, gauss = state["python.gauss"].tolist()
    random.setstate((_PYTHON_VERSION, tuple(state["python.words"].tolist()), gauss if has_gauss else None))
    *keys, position, has_gauss = state["numpy.words"].tolist()
    words = np.array(keys, dtype=np.uint32)
    np.random.set_state((_NUMPY_KIND, words, position, has_gauss, state["numpy.gauss"].item()))  # noqa: NPY002
    torch.set_rng_state(state["torch.cpu"].clone())
    if device.type != "cpu" and "torch.device" in state:
        torch.get_device_module(device).set_rng_state(state["torch.device"].clone(), device)


@contextmanager
def undisturbed_random_state(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, the random numbers after it are those that would have come without it."""
    state = random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)


def gathered_random_state(accelerator: Accelerator) -> dict[str, Tensor]:
    """The states of all processes' generators, a row each; every process asks for them at once."""
    device = accelerator.device
    rows = {name: value.unsqueeze(0) for name, value in random_state(device).items()}
    if accelerator.num_processes == 1:
        return rows
    return {name: accelerator.gather(row.to(device)).cpu() for name, row in rows.items()}
