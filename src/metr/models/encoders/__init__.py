"""Encoders: feature maps to memory."""

from collections.abc import Sequence

from metr.models.config import EncoderConfig
from metr.models.encoders.deformable import DeformableEncoder
from metr.models.encoders.hybrid import HybridEncoder, LiteEncoder
from metr.models.encoders.projector import ProjectorEncoder
from metr.models.encoders.pyramid import PlainEncoder

Encoder = DeformableEncoder | HybridEncoder | LiteEncoder | PlainEncoder | ProjectorEncoder
_KINDS: dict[str, type[Encoder]] = {
    "deformable": DeformableEncoder,
    "hybrid": HybridEncoder,
    "lite": LiteEncoder,
    "plain": PlainEncoder,
    "projector": ProjectorEncoder,
}


def build_encoder(channels: Sequence[int], width: int, config: EncoderConfig) -> Encoder:
    """The encoder that the configuration names, for backbone maps of these channels, finest first."""
    return _KINDS[config.kind](channels, width, config)
