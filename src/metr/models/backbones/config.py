"""The backbone's configuration."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from metr.config import Config

_STRIDES = (4, 8, 16, 32)

Colour = tuple[float, float, float]


class BackboneConfig(Config):
    """Which backbone, and what of it learns."""

    name: str = "efficientnet_lite0"
    """`efficientnet_lite0`; `resnet18`, `resnet34`, `resnet50`, `resnet101` (microsoft/resnet-18, ...); the hub name or
    folder of any model that transformers' AutoBackbone knows; with `pretrained` off, a model type such as `swin`."""
    pretrained: bool = True
    """Start from ImageNet's (or the folder's) weights; otherwise from random ones, made from `options`."""
    revision: str | None = None
    """The hub's branch, tag or commit."""
    strides: tuple[int, ...] = (8, 16, 32)
    """Pixels a cell of each feature map, finest first; of 4, 8, 16 and 32."""
    freeze_stages: Annotated[int, Field(ge=0, le=4)] = 1
    """The stem and this many stages keep their weights (0: all learn, stem included). Stage 1 ends at stride 4, stage 2
    at stride 8, ...; of a plain vision transformer a stage is a quarter of the layers. 0 suits random weights."""
    freeze_batch_norm: bool = True
    """Batch norms keep their statistics and their scale and shift: right for small batches and pretrained weights."""
    pixel_mean: Colour | None = None
    """Mean colour in 0..1 that is subtracted; None: what the backbone was made for."""
    pixel_std: Colour | None = None
    """What colours are then divided by; None: what the backbone was made for."""
    options: dict[str, Any] = {}  # noqa: RUF012  (pydantic copies it)
    """Values of the transformers configuration (`drop_path_rate`, ...), or `width` and `depth` multipliers of
    `efficientnet_lite0`; without pretrained weights they make the network."""

    @field_validator("strides")
    @classmethod
    def _known_and_ascending(cls, strides: tuple[int, ...]) -> tuple[int, ...]:
        if not strides or list(strides) != sorted(set(strides) & set(_STRIDES)):
            raise ValueError("expected some of 4, 8, 16 and 32 in this order")
        return strides
