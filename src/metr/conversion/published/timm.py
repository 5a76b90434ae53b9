"""Folders of transformers whose detector carries a ResNet of timm: read without timm, as if it were transformers' own.

Those of DETR and its successors up to DAB-DETR, published ones too, are of this kind.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from metr.conversion.published import read_restricted
from metr.conversion.table import Row, State, to_ours
from metr.errors import CheckpointError, ModelError
from metr.serialization import read_json, read_tensors

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


_KIND = "timm_backbone"
# names of plain ResNets: no deeper stem (50d), groups (resnext50), attention (seresnet50) or the like
_PLAIN = re.compile(r"(tv_)?resnet\d+(\.\w+)?")
# what precedes the network's own names: versions of transformers have wrapped it differently
_FIRST = re.compile(r"((?:model\.)?backbone\.(?:conv_encoder\.)?model\.)(_backbone\.)?conv1\.weight")
# how configurations named a backbone before they all held its own configuration
_OLDER = ("backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs", "dilation")
# detectors whose backbone has been a ResNet-50 of timm where nothing else is said; all but one read its last map only
_SEVERAL_MAPS, _ONE_MAP = "deformable_detr", ("conditional_detr", "dab_detr", "detr")
# a ResNet's, of whatever makes no map of it
_COARSEST = 32
_READ = "of timm's networks METR reads plain ResNets"
_HINT = "take a detector with timm's resnet50 or with a backbone of transformers (use_timm_backbone=False)"
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True, kw_only=True)
class TimmNetwork:
    """A network of timm, as a detector's configuration names it.

    Attributes:
        name: timm's.
        stages: Whose maps the detector reads.
        stride: Of the last map, in pixels.
    """

    name: str
    stages: tuple[int, ...]
    stride: int


def timm_network(values: Mapping[str, Any]) -> TimmNetwork | None:
    """The network of timm that a detector's configuration (the values of `config.json`) names, if it does.

    Raises:
        ModelError: what is said of its maps is not understood.
    """
    own = values.get("backbone_config")
    if own is None:
        kind = str(values.get("model_type")).replace("-", "_")
        default = kind in (_SEVERAL_MAPS, *_ONE_MAP)
        name = values.get("backbone") or ("resnet50" if default else None)
        if name is None or not values.get("use_timm_backbone", default):
            return None
        maps = [2, 3, 4] if kind not in _ONE_MAP and values.get("num_feature_levels", 4) > 1 else [4]
        stride = {"output_stride": 16} if values.get("dilation") else {}
        own = {"model_type": _KIND, "backbone": name, "out_indices": maps, **stride}
        own |= {key: value for key, value in (values.get("backbone_kwargs") or {}).items() if value is not None}
    if not isinstance(own, Mapping) or own.get("model_type") != _KIND:
        return None
    indices = own.get("out_indices") or [-1]
    if not isinstance(indices, list) or not all(isinstance(index, int) for index in indices):
        raise ModelError(f"expected out_indices as numbers, found {indices!r}", where="backbone_config", hint=_HINT)
    # a negative one counts from the last of five, the stem before the four stages
    stages = tuple(sorted(index % 5 for index in indices))
    return TimmNetwork(name=str(own.get("backbone")), stages=stages, stride=own.get("output_stride") or _COARSEST)


def check_network(network: TimmNetwork, where: object) -> None:
    """Checks that METR has a counterpart of a network of timm.

    Raises:
        ModelError: it is no plain ResNet.
    """
    if not _PLAIN.fullmatch(network.name) or network.stride != _COARSEST or 0 in network.stages:
        raise ModelError(f"carries timm's {_described(network)}; {_READ}", where=where, hint=_HINT)


def without_timm(values: Mapping[str, Any], network: TimmNetwork, folder: Path) -> tuple[dict[str, Any], State]:
    """The configuration's values and the weights with transformers' ResNet in place of timm's.

    Raises:
        CheckpointError: the folder holds no weights, or they are damaged.
        ModelError: the network is no plain ResNet.
    """
    from transformers import ResNetConfig

    check_network(network, folder)
    state = _read_state(folder)
    first = next((found for key in state if (found := _FIRST.fullmatch(key))), None)
    prefix, inner = (first[1], first[2] or "") if first else ("", "")
    options = resnet_options(state, prefix + inner)
    theirs = {key: tensor for key, tensor in state.items() if key.startswith(prefix + inner)}
    moved = to_ours(theirs, resnet_rows(prefix + inner, prefix))
    if not prefix or options is None or moved.left_over:
        odd = f"it has {moved.left_over[0]}" if prefix and moved.left_over else "its weights are not those of one"
        raise ModelError(f"carries timm's {network.name}, but {odd}; {_READ}", where=folder, hint=_HINT)
    made: Any = ResNetConfig  # partly without types
    resnet = made(**options, out_features=[f"stage{stage}" for stage in network.stages])
    changed = {key: value for key, value in values.items() if key not in _OLDER}
    rest = {key: tensor for key, tensor in state.items() if key not in theirs}
    return changed | {"backbone_config": resnet.to_dict()}, rest | moved.state


def _described(network: TimmNetwork) -> str:
    """Its name, and what is unusual about it."""
    dilated = f" with maps of stride {network.stride}, by dilation (a variant dc5)"
    stride = dilated if network.stride != _COARSEST else ""
    return f"{network.name}{stride}" + (" with a map of its stem" if 0 in network.stages else "")


def _read_state(folder: Path) -> State:
    """The weights of a folder, in one file or in several.

    Raises:
        CheckpointError: there are none, or a file is missing or damaged.
    """
    whole, index, pickled = (folder / name for name in _FILES)
    if whole.is_file():
        return read_tensors(whole)
    if index.is_file():
        parts = read_json(index).get("weight_map")
        if not isinstance(parts, dict):
            raise CheckpointError("expected a weight_map of names and files", where=index, hint="copy the folder again")
        return {
            key: tensor
            for part in sorted(set(map(str, parts.values())))
            for key, tensor in read_tensors(folder / part).items()
        }
    if pickled.is_file():
        return read_restricted(pickled).state
    raise CheckpointError("holds no weights", where=folder, hint=f"copy it again: it needs {_FILES[0]}")
