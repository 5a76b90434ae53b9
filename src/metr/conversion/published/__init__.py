"""Detectors as others published them. Their pickled checkpoints are read without running anything that they hold."""

import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metr.errors import CheckpointError

# where training scripts keep the network's state, the averaged one last
_STATES = ("model", "state_dict", "model_state_dict")


@dataclass(frozen=True, kw_only=True, eq=False)
class PickledCheckpoint:
    """A network's state, and the options that its training was given, as far as they are kept."""

    state: dict[str, Tensor]
    options: Mapping[str, Any]


def read_restricted(path: Path) -> PickledCheckpoint:
    """Reads a `.pth` file. Tensors, plain values and an `argparse.Namespace` are all that may be in it.

    Raises:
        CheckpointError: the file is missing, damaged, holds something else, or no state of a network.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=path, hint="check the path")
    _check_unpacked(path)
    try:
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual protocols, which are read or refused all the same
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(error), where=path, hint=_HINT) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        said = str(error).splitlines()[0] if str(error) else "it ends early"
        what = "not readable as a checkpoint of PyTorch" + ("" if isinstance(error, KeyError) else f": {said}")
        raise CheckpointError(what, where=path, hint="download or copy it again") from None
    if not isinstance(found, Mapping):
        what = f"expected a mapping with a network's state, found a {type(found).__name__}"
        raise CheckpointError(what, where=path, hint="save the network's state_dict, and beside it its args")
    state = next((found[key] for key in _STATES if isinstance(found.get(key), Mapping)), found)
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError("holds no state of a network", where=path, hint="name the file with the weights")
    return PickledCheckpoint(state=tensors, options=_options(found.get("args")))


def _check_unpacked(path: Path) -> None:
    """Checks that the file is about as large in memory as on disk. PyTorch never compresses; three megabytes of
    compressed zeros could be three gigabytes.

    Raises:
        CheckpointError: its parts are compressed, or declare more bytes than the file has.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):  # of PyTorch before 1.6, or no checkpoint
        return
    declared = sum(part.file_size for part in parts)
    if declared > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        what = f"{size:,} bytes that would unfold to {declared:,}: checkpoints of PyTorch are not compressed"
        raise CheckpointError(what, where=path, hint=_HINT)


def _options(args: object) -> dict[str, Any]:
    """The options of training, where the file tells them as scripts of DETR do; anything else is none."""
    if isinstance(args, Namespace):
        return vars(args)
    return {str(key): value for key, value in args.items()} if isinstance(args, Mapping) else {}


# what the refusal of PyTorch is about, such as "GLOBAL posix.mkdir"
_NAMED = re.compile(r"(?:GLOBAL|class|function) ([\w.]+\.\w+)")
_HINT = "get the weights from a source that you trust, as safetensors or as a plain state_dict"


def _refusal(error: Exception) -> str:
    """What was refused, without PyTorch's advice to allow it."""
    named = _NAMED.search(str(error))
    if named is None:
        return "not a checkpoint of PyTorch, or one that would have to run code to be read; it was not"
    return f"holds {named[1]}, which is no weight and would run code when it is read; it was not read"
