"""Counts the operations that would make the host wait for an accelerator, on a machine that has none.

On a GPU the host runs ahead of the device: it queues kernels and goes on. Some operations make it wait until the device
has done all that was queued, because the host needs a value (`item`, `bool(tensor)`, `tolist`, `cpu`) or the size of a
result that depends on values (`nonzero`, an index of truth values, `unique`). They are the same operations on a CPU,
so counting them here says what a GPU would wait for. What the package does on CPUs alone is switched off meanwhile.
"""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metr.layers import groups

_VALUES = {"_local_scalar_dense", "is_nonzero", "equal"}
_SIZES = {
    "nonzero", "nonzero_numpy", "masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive",
    "unique_dim_consecutive", "bincount",
}  # fmt: skip
_COPIES = {Tensor.cpu: "cpu", Tensor.tolist: "tolist"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
_MASKS = {torch.bool, torch.uint8}


class DeviceWaits:
    """Counts waits in its block, by operation and place: `counted["item metr/training/trainer.py:train_step"]`."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self._modes = (_Dispatched(self), _Called(self))
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "DeviceWaits":
        self._patch.setattr(groups, "_layout", lambda numbers: None)
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        self._patch.undo()

    @property
    def number(self) -> int:
        """All waits."""
        return self.counted.total()

    def without(self, place: str) -> int:
        """The number of waits elsewhere than in files or functions of that name."""
        return sum(count for where, count in self.counted.items() if place not in where)

    def add(self, operation: str) -> None:
        """Counts one wait at the place of the package that is running."""
        self.counted[f"{operation} {_place()}"] += 1


class _Dispatched(TorchDispatchMode):
    """Sees what reaches a device: C++ code's own operations, and the backward pass, too."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":
            self.waits.add("item")
        elif name in _VALUES | _SIZES or (
            name == "repeat_interleave" and func._overloadname != "self_int" and not kwargs.get("output_size")
        ):
            self.waits.add(name)
        elif name in _INDEXED and any(index is not None and index.dtype in _MASKS for index in args[1]):
            self.waits.add("index by mask")
        return func(*args, **kwargs)


class _Called(TorchFunctionMode):
    """Sees copies to the host, which do nothing on a CPU."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COPIES:
            self.waits.add(_COPIES[func])
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """File and function of the innermost frame inside metr, or of the innermost one outside torch and this file."""
    frame: FrameType | None = sys._getframe(1)
    other = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if "/metr/" in path:
            return f"metr/{path.rpartition('/metr/')[2]}:{frame.f_code.co_name}"
        if not other and path != __file__ and "/torch/" not in path:
            other = f"{path.rpartition('/')[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return other
