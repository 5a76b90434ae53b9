"""Folders of transformers before they are loaded: what is refused, before weights are fetched or memory is taken."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from metr.errors import CheckpointError, ModelError
from metr.hub import built, loading
from metr.models.detector import MOST_PARAMETERS
from metr.serialization import read_json

WEIGHTS = "model.safetensors"
_INDEX = f"{WEIGHTS}.index.json"
# a network may have parts that the file has not, such as those of training; but not so many
_TIMES_AS_MANY, _MORE = 2, 1_000_000
_QUANTIZED = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F4")


def check_kind(values: Mapping[str, Any], where: object, known: Sequence[str]) -> str:
    """The detector that a configuration is of: its model_type, in which hyphens do not count.

    Args:
        values: What config.json says.
        where: The folder or repository, for messages.
        known: The types that METR has a counterpart of.

    Raises:
        ModelError: it needs code of its own, or METR has no counterpart of it.
    """
    kind = str(values.get("model_type") or "")
    hint = f"one of {', '.join(known)}"
    if _has_code(values):
        what = "this model brings code of its own (auto_map), which METR never runs; it was not loaded"
        raise ModelError(what, where=where, hint=f"a detector that transformers knows itself: {hint}")
    if kind.replace("-", "_") not in known:
        named = values.get("architectures")
        more = f" ({named[0]})" if isinstance(named, list) and named else ""
        what = f"METR takes no weights from a {kind} model{more}" if kind else "config.json names no model_type"
        raise ModelError(what, where=where, hint=hint)
    return kind


def _has_code(values: Mapping[str, Any]) -> bool:
    """Whether a configuration, or a part of it, names code that lies beside it."""
    parts = (value for value in values.values() if isinstance(value, Mapping))
    return bool(values.get("auto_map")) or any(map(_has_code, parts))


def check_size(config: Any, where: object, folder: Path | None = None) -> None:
    """Checks how large a network a configuration describes, without taking memory for it.

    Args:
        config: The configuration, of transformers.
        where: The folder or repository, for messages.
        folder: Where the weights lie, if they are here: the network may not be much larger than they are.

    Raises:
        CheckpointError: the weights are damaged.
        ModelError: it is too large, or cannot be built.
    """
    with loading(str(where)), torch.device("meta"):
        network = built("AutoModelForObjectDetection", config)
    count = sum(parameter.numel() for parameter in network.parameters())
    if count > MOST_PARAMETERS:
        what = f"its config.json describes {count:,} parameters; METR builds at most {MOST_PARAMETERS:,}"
        raise ModelError(what, where=where, hint="check its config.json, or name another model")
    stored = None if folder is None else _stored(folder)
    if stored is not None and count > _TIMES_AS_MANY * stored + _MORE:
        what = f"its config.json describes {count:,} parameters, and its weights are {stored:,} numbers"
        raise ModelError(what, where=where, hint="config.json and weights are not of one model: copy both again")


def _stored(folder: Path) -> int | None:
    """How many numbers the safetensors of a folder hold; None where it has no such file.

    Raises:
        CheckpointError: a file is missing or damaged, or holds quantized weights.
    """
    if (folder / WEIGHTS).is_file():
        return _numbers(folder / WEIGHTS)
    if not (folder / _INDEX).is_file():
        return None
    parts = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(parts, dict):
        what = "expected a weight_map of names and files"
        raise CheckpointError(what, where=folder / _INDEX, hint="copy the folder again")
    return sum(_numbers(folder / Path(part).name) for part in sorted(set(map(str, parts.values()))))


def _numbers(path: Path) -> int:
    if not path.is_file():
        raise CheckpointError("no such file", where=path, hint="the folder is incomplete: copy it again")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            _refuse_quantized({key: str(tensor.get_dtype()) for key, tensor in tensors.items()}, path)
            return sum(torch.Size(tensor.get_shape()).numel() for tensor in tensors.values())
    except (SafetensorError, OSError, ValueError) as error:
        # a file of the hub's cache is a link to what was downloaded
        remove = path.resolve()
        what = f"damaged, or cut short: not readable as safetensors ({error})"
        raise CheckpointError(what, where=path, hint=f"remove {remove} and download or copy it again") from None


def _refuse_quantized(types: Mapping[str, str], path: Path) -> None:
    """Refuses tensors that are of no use without the factors they were quantized by.

    Args:
        types: The type of each tensor, in the words of safetensors.
        path: Their file, for messages.

    Raises:
        CheckpointError: there are some.
    """
    if found := [key for key, kind in types.items() if kind in _QUANTIZED]:
        what = f"{len(found)} of its tensors are quantized, such as {found[0]} ({types[found[0]]})"
        hint = "take weights in float32, float16 or bfloat16"
        raise CheckpointError(what, where=path, hint=hint)
