"""Tensors and plain values on disk, as safetensors and JSON; errors name the file and the reason."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from metr.errors import CheckpointError

_INCOMPLETE = "the folder is incomplete or damaged: copy it again, or take another checkpoint"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Writes named tensors; floating-point ones as `dtype`, if one is given."""
    # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if dtype is not None:
        plain = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in plain.items()}
    # not save_file, whose files only their owner may read, whatever the folder allows
    path.write_bytes(save(plain, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: the file is missing, cut short, or something else.
    """
    _require(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"not readable as safetensors: {error}", where=path, hint=_INCOMPLETE) from None


def type_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The type of the floating-point tensors, such as "float16"; None where there are none, or several types."""
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    return kinds.pop() if len(kinds) == 1 else None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes plain values, readably."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds something else than a mapping.
    """
    _require(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"not readable as JSON: {error}", where=path, hint=_INCOMPLETE) from None
    if not isinstance(values, dict):
        what = f"expected keys and values, found a {type(values).__name__}"
        raise CheckpointError(what, where=path, hint=_INCOMPLETE)
    return values


def _require(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError("no such file", where=path, hint=_INCOMPLETE)
