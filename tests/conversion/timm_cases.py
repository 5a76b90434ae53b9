"""Folders of transformers whose detector carries a ResNet of timm, made of folders with transformers' own."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

# what each part of transformers' names is with timm
_RENAMED = (
    (r"embedder\.embedder\.convolution", "conv1"),
    (r"embedder\.embedder\.normalization", "bn1"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.convolution", r"layer[\1+1].\2.conv[\3+1]"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.normalization", r"layer[\1+1].\2.bn[\3+1]"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.convolution", r"layer[\1+1].\2.downsample.0"),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.normalization", r"layer[\1+1].\2.downsample.1"),
)


def timm_name(key: str) -> str:
    """timm's name of a weight, from transformers'."""
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    return re.sub(r"\[(\d)\+1\]", lambda found: str(int(found[1]) + 1), key)


def timm_state(folder: Path, wrapped: bool = False) -> dict[str, Tensor]:
    """A folder's weights with the names that its backbone has as one of timm."""
    state = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        before, found, own = key.partition(".model.") if ".backbone." in key else ("", "", "")
        inner = f"_backbone.{timm_name(own)}" if wrapped else timm_name(own)
        state[f"{before}{found}{inner}" if found else key] = tensor
    return state


def rewritten(folder: Path, changes: Mapping[str, object], wrapped: bool = False) -> None:
    """Makes a folder of one with transformers' ResNet that has timm's."""
    save_file(timm_state(folder, wrapped), folder / "model.safetensors", metadata={"format": "pt"})
    reconfigured(folder, changes)


def reconfigured(folder: Path, changes: Mapping[str, object]) -> None:
    values = json.loads((folder / "config.json").read_text())
    del values["backbone_config"]
    (folder / "config.json").write_text(json.dumps(values | changes))
