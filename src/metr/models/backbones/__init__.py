"""Backbones: images to feature maps."""

from metr.models.backbones.base import Backbone
from metr.models.backbones.efficientnet_lite import EfficientNetLiteBackbone
from metr.models.config import BackboneConfig

__all__ = ["Backbone", "BackboneConfig", "build_backbone"]


def build_backbone(config: BackboneConfig) -> Backbone:
    """The backbone that the configuration names.

    Raises:
        ModelError: there is no such backbone, the hub is out of reach, or it has no map of a wanted stride.
        ConfigError: an option is unknown.
        DependencyError: packaged weights are missing or altered.
    """
    if config.name == "efficientnet_lite0":
        return EfficientNetLiteBackbone(config)
    # transformers takes seconds to import, and the backbone above does not need it
    from metr.models.backbones.hugging_face import HuggingFaceBackbone

    return HuggingFaceBackbone(config)
