"""Encoders: feature maps to memory."""

from collections.abc import Sequence

from metr.models.config import EncoderConfig
from metr.models.encoders.deformable import DeformableEncoder
from metr.models.encoders.hybrid import HybridEncoder


def build_encoder(channels: Sequence[int], width: int, config: EncoderConfig) -> DeformableEncoder | HybridEncoder:
    """The encoder that the configuration names, for backbone maps of these channels, finest first."""
    if config.kind == "deformable":
        return DeformableEncoder(channels, width, config)
    return HybridEncoder(channels, width, config)
