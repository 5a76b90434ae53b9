"""Encoders: feature maps to memory."""

from collections.abc import Sequence

from torch import nn

from metr.models.config import EncoderConfig
from metr.models.encoders.deformable import DeformableEncoder
from metr.models.encoders.hybrid import HybridEncoder


def build_encoder(channels: Sequence[int], width: int, config: EncoderConfig) -> nn.Module:
    """The encoder that the configuration names, for backbone maps of these channels, finest first."""
    kinds = {"deformable": DeformableEncoder, "hybrid": HybridEncoder}
    return kinds[config.kind](channels, width, config)
