"""Tensors and plain values on disk, as safetensors and JSON; errors name the file and the reason."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from metr.errors import CheckpointError, counted

_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """Which keys fitted and which did not; `misshapen` holds the key, the network's shape and the file's."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def complete(self) -> bool:
        """Whether every key fitted."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        """A few readable lines: how many keys of each kind, and the first of them."""
        shapes = [f"{key}: expected {list(ours)}, found {list(theirs)}" for key, ours, theirs in self.misshapen]
        lines = [
            _listed("of another shape", shapes),
            _listed("missing from the weights", self.missing),
            _listed("unknown to the network", self.unexpected),
        ]
        return "\n".join([f"{counted(len(self.loaded), 'weight fits', 'weights fit')}", *filter(None, lines)])


def check_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    strict: bool = True,
    where: object = None,
    hint: str | None = None,
) -> WeightReport:
    """Compares weights with a network, which may be on the meta device, by keys and shapes. See `load_weights`.

    Raises:
        CheckpointError: `strict` and some do not fit; the message lists them.
    """
    own = network.state_dict()
    shared = [key for key in own if key in weights]
    report = WeightReport(
        loaded=tuple(key for key in shared if own[key].shape == weights[key].shape),
        missing=tuple(key for key in own if key not in weights),
        unexpected=tuple(key for key in weights if key not in own),
        misshapen=tuple(
            (key, tuple(own[key].shape), tuple(weights[key].shape))
            for key in shared
            if own[key].shape != weights[key].shape
        ),
    )
    if strict and not report.complete:
        raise CheckpointError(f"the weights do not fit the network: {report}", where=where, hint=hint or _hint(report))
    return report


def load_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    strict: bool = True,
    where: object = None,
    hint: str | None = None,
) -> WeightReport:
    """Copies weights into a network, converting them to its precision and device.

    Args:
        network: Receives them.
        weights: By the keys of `network.state_dict()`.
        strict: Refuse, and change nothing, unless all keys and shapes agree; otherwise load those that do.
        where: The file that an error message names.
        hint: What the error message suggests to try; by default what suits a checkpoint.

    Raises:
        CheckpointError: `strict` and some do not fit; the message lists them.
    """
    report = check_weights(network, weights, strict=strict, where=where, hint=hint)
    network.load_state_dict({key: weights[key] for key in report.loaded}, strict=False)
    return report


def _listed(kind: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    more = f"\n    ... and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"  {len(items)} {kind}:\n    " + "\n    ".join(items[:_SHOWN]) + more


def _hint(report: WeightReport) -> str:
    if report.misshapen:
        return "the checkpoint is of another size or text encoder: build the network from the config.json beside it"
    if not report.loaded:
        return "these are another network's weights: look at the keys, or convert them first"
    return "build the network from the config.json beside the weights"


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
    """Writes plain values, readably. What is not UTF-8, as some names of files, is escaped, and read back as it was."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds something else than a mapping.
    """
    _require(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"not readable as JSON: {error}", where=path, hint=_INCOMPLETE) from None
    if not isinstance(values, dict):
        what = f"expected keys and values, found a {type(values).__name__}"
        raise CheckpointError(what, where=path, hint=_INCOMPLETE)
    return values


def _require(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError("no such file", where=path, hint=_INCOMPLETE)
