"""A ResNet under torchvision's names, which timm and DINO use too, and under those of transformers."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metr.conversion.table import Row

_STAGES = range(1, 5)


def resnet_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """The table of a ResNet, basic or bottleneck.

    Args:
        theirs: What precedes torchvision's names, with its dot.
        ours: What precedes transformers' names, with its dot.
    """
    stem = f"{ours}embedder.embedder"
    rows = [
        Row(f"{theirs}conv1.weight", f"{stem}.convolution.weight"),
        Row(f"{theirs}bn1.{{n}}", f"{stem}.normalization.{{n}}"),
    ]
    for stage in _STAGES:
        block, own = f"{theirs}layer{stage}.{{i}}", f"{ours}encoder.stages.{stage - 1}.layers.{{i}}"
        for number in range(1, 4):
            layer = f"{own}.layer.{number - 1}"
            rows.append(Row(f"{block}.conv{number}.weight", f"{layer}.convolution.weight"))
            rows.append(Row(f"{block}.bn{number}.{{n}}", f"{layer}.normalization.{{n}}"))
        rows.append(Row(f"{block}.downsample.0.weight", f"{own}.shortcut.convolution.weight"))
        rows.append(Row(f"{block}.downsample.1.{{n}}", f"{own}.shortcut.normalization.{{n}}"))
    return tuple(rows)


def resnet_options(state: Mapping[str, Tensor], theirs: str) -> dict[str, Any] | None:
    """Depths and widths, as transformers' ResNetConfig takes them, of the ResNet whose keys begin with `theirs`.

    None where they are not those of a ResNet.
    """
    depths = [numbered(state, f"{theirs}layer{stage}") for stage in _STAGES]
    bottleneck = f"{theirs}layer1.0.conv3.weight" in state
    last = "conv3" if bottleneck else "conv2"
    ends = [f"{theirs}layer{stage}.0.{last}.weight" for stage in _STAGES]
    if not all(depths) or any(key not in state for key in (*ends, f"{theirs}conv1.weight")):
        return None
    return {
        "depths": depths,
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_sizes": [state[key].shape[0] for key in ends],
        "embedding_size": state[f"{theirs}conv1.weight"].shape[0],
    }


def numbered(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered modules a prefix has."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(found[1]) for key in state if (found := pattern.match(key))), default=-1)
