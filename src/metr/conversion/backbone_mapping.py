"""METR's backbones as transformers' detectors carry them, and back."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from metr.conversion.table import Row
from metr.errors import ModelError
from metr.models.backbones.base import Backbone, BackboneConfig
from metr.models.backbones.efficientnet_lite import STAGE_OF_STRIDE, EfficientNetLiteBackbone, EfficientNetLiteConfig
from metr.models.backbones.hugging_face import HuggingFaceBackbone

_NOT_OPTIONS = frozenset({"out_features", "out_indices", "stage_names", "architectures", "dtype", "model_type"})


def backbone_config(backbone: Backbone, maps: int) -> Any:
    """The configuration with which transformers builds a network of METR's backbone.

    Args:
        backbone: METR's.
        maps: How many of its maps are read, the coarsest ones.

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
    return BackboneConfig(name=config.model_type, options=options, **common)
