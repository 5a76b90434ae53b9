"""Key tables: which parameter of one network is which of another.

A table is a list of `Row`s. A row pairs key templates; `{i}` stands for a layer's number (`{j}` for that of a part
inside the layer), `{p}` for `weight` or `bias`, `{n}` for what a batch norm has, and `{k}` for whatever is left of a
key. Where `ours` holds several templates, the other side keeps them in one tensor, stacked along its first axis (the
query, key and value projections of PyTorch's attention). A count of batches is one number for all of them.
"""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from metr.errors import CheckpointError, ModelError
from metr.models.backbones.base import Backbone
from metr.models.backbones.efficientnet_lite import STAGE_OF_STRIDE, EfficientNetLiteBackbone
from metr.models.backbones.hugging_face import WINDOWED, HuggingFaceBackbone
from metr.models.backbones.registered import EfficientNetLiteConfig
from metr.models.config import BackboneConfig

State = dict[str, Tensor]

_STATISTICS = "running_mean|running_var|num_batches_tracked"
_PLACEHOLDERS = {"i": r"\d+", "j": r"\d+", "p": "weight|bias", "n": f"weight|bias|{_STATISTICS}", "k": ".+"}


@dataclass(frozen=True)
class Row:
    """One line of a table: their key template and ours (or ours in the order in which they are stacked)."""

    theirs: str
    ours: str | tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Our templates."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def match(self, key: str) -> dict[str, str] | None:
        """What the placeholders stand for where the row's first part is this key of ours; None where it is not."""
        found = _pattern(self.parts[0]).fullmatch(key)
        return None if found is None else found.groupdict()


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What moved: the new state, which of the source's keys went into it, and which were left over."""

    state: State
    used: tuple[str, ...]
    left_over: tuple[str, ...]


def to_ours(theirs: Mapping[str, Tensor], table: Sequence[Row]) -> Conversion:
    """Another network's state under METR's names.

    Raises:
        CheckpointError: two of their keys claim the same name of ours, or a tensor is no stack of as many parts as
            its row names.
    """
    patterns = [(_pattern(row.theirs), row) for row in table]
    state: State = {}
    used, left_over = [], []
    for key, tensor in theirs.items():
        found = next(((m, row) for pattern, row in patterns if (m := pattern.fullmatch(key))), None)
        if found is None:
            left_over.append(key)
            continue
        match, row = found
        for template, piece in zip(row.parts, _pieces(key, tensor, len(row.parts)), strict=True):
            name = template.format(**match.groupdict())
            if name in state:
                raise CheckpointError(f"two keys become {name!r}", where=key, hint="check the key table")
            state[name] = piece
        used.append(key)
    return Conversion(state=state, used=tuple(used), left_over=tuple(left_over))


def to_theirs(ours: Mapping[str, Tensor], table: Sequence[Row]) -> Conversion:
    """METR's state under another network's names.

    Raises:
        CheckpointError: a part of one of their stacked tensors is missing.
    """
    state: State = {}
    used: set[str] = set()
    for row in table:
        for key in ours:
            match = row.match(key)
            if match is None:
                continue
            parts = [template.format(**match) for template in row.parts]
            name = row.theirs.format(**match)
            if missing := [part for part in parts if part not in ours]:
                raise CheckpointError(f"needs {', '.join(missing)} besides {key}", where=name)
            stacks = len(parts) > 1 and not _is_count(ours[key])
            state[name] = torch.cat([ours[part] for part in parts]) if stacks else ours[key].clone()
            used.update(parts)
    moved, left_over = ([k for k in ours if (k in used) is wanted] for wanted in (True, False))
    return Conversion(state=state, used=tuple(moved), left_over=tuple(left_over))


def _pieces(key: str, tensor: Tensor, number: int) -> Sequence[Tensor]:
    """A stacked tensor's parts, each with a storage of its own."""
    if number == 1:
        return [tensor.contiguous()]
    if _is_count(tensor):
        return [tensor.clone() for _ in range(number)]
    if not tensor.ndim or tensor.shape[0] % number:
        shape = list(tensor.shape)
        raise CheckpointError(f"expected {number} equal parts along the first axis, found {shape}", where=key)
    return [piece.clone() for piece in tensor.chunk(number)]


def _is_count(tensor: Tensor) -> bool:
    """Whether it is a batch norm's count of batches, which is the same for all parts of a stack."""
    return not tensor.ndim and not tensor.is_floating_point()


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression."""
    escaped = re.escape(template)
    for name, pattern in _PLACEHOLDERS.items():
        escaped = escaped.replace(rf"\{{{name}\}}", f"(?P<{name}>{pattern})")
    return re.compile(escaped)


ADAPTED = "dinov3_vit"
"""The vision transformer beside which a detector of transformers may have METR's adapter."""
_NOT_OPTIONS = frozenset({"out_features", "out_indices", "stage_names", "architectures", "dtype", "model_type"})


def backbone_config(backbone: Backbone, maps: int, adapted: bool = False) -> Any:
    """The configuration with which transformers builds a network of METR's backbone.

    Args:
        backbone: METR's.
        maps: How many of its maps are read, the coarsest ones.
        adapted: Whether the network has METR's adapter, beside a DINOv3.

    Raises:
        ModelError: no backbone of transformers gives its maps (a plain vision transformer with a pyramid on top).
    """
    if isinstance(backbone, EfficientNetLiteBackbone):
        stages = [STAGE_OF_STRIDE[stride] for stride in backbone.strides[-maps:]]
        options: dict[str, Any] = dict(backbone.config.options)
        return EfficientNetLiteConfig(
            **options, freeze_batch_norm=backbone.config.freeze_batch_norm, out_features=stages
        )
    assert isinstance(backbone, HuggingFaceBackbone)
    if backbone.pyramid is not None:
        what = f"no backbone of transformers makes {len(backbone.strides)} maps from a plain vision transformer"
        raise ModelError(what, where=backbone.config.name, hint="transfer from a run with a hierarchical backbone")
    config = deepcopy(backbone.network.config)
    whole = adapted and config.model_type == ADAPTED and maps == len(backbone.strides)
    if backbone.adapter is not None and not whole:
        what = "only DEIMv2 has maps of a vision transformer with an adapter, all three, and of a DINOv3"
        raise ModelError(what, where=backbone.config.name, hint="transfer to deimv2 from a run with encoder.levels=3")
    config.out_features = list(config.out_features)[-maps:]
    return config


def backbone_rows(config: Any, prefix: str) -> tuple[Row, ...]:
    """The rows of a backbone, whose keys start with `prefix` in the detector of transformers."""
    own = "trunk" if config.model_type == EfficientNetLiteConfig.model_type else "network"
    theirs = f"{prefix}trunk." if own == "trunk" else prefix
    return (Row(f"{theirs}{{k}}", f"backbone.{own}.{{k}}"),)


def adopted_backbone(config: Any, strides: tuple[int, ...], frozen_norms: bool) -> BackboneConfig:
    """METR's configuration of the backbone that a detector of transformers carries, to be built without its weights."""
    common: dict[str, Any] = {"pretrained": False, "strides": strides, "freeze_batch_norm": frozen_norms}
    if config.model_type == EfficientNetLiteConfig.model_type:
        options = {"width": config.width, "depth": config.depth}
        return BackboneConfig(name="efficientnet_lite0", options=options, **common)
    values: Mapping[str, Any] = config.to_diff_dict()
    known = type(config)().to_dict().keys()
    options = {key: value for key, value in values.items() if key in known and key not in _NOT_OPTIONS}
    options = {key: value for key, value in options.items() if not key.startswith(("id2label", "label2id"))}
    if config.model_type in WINDOWED:
        common["layers"] = tuple(config.out_indices)
    return BackboneConfig(name=config.model_type, options=options, **common)
