"""The network's configuration: one class for each part."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from metr.config import Config, leave_options
from metr.models.decoder_config import DecoderConfig, DistributionConfig
from metr.models.query_config import (
    CategoryConfig,
    DenoisingConfig,
    OneToManyConfig,
    QueryConfig,
    SimilarityConfig,
)

__all__ = [
    "BackboneConfig",
    "CategoryConfig",
    "DecoderConfig",
    "DenoisingConfig",
    "DetectorConfig",
    "DistributionConfig",
    "EncoderConfig",
    "OneToManyConfig",
    "QueryConfig",
    "SimilarityConfig",
]

_STRIDES = (4, 8, 16, 32)
_ADAPTED = (8, 16, 32)

Colour = tuple[float, float, float]


class BackboneConfig(Config):
    """Which backbone, and which of its parts are trained."""

    name: str = "efficientnet_lite0"
    """`efficientnet_lite0`; `resnet18`, `resnet34`, `resnet50`, `resnet101` (microsoft/resnet-18, ...); the hub name or
    folder of any model that transformers' AutoBackbone knows; with `pretrained` off, a model type such as `swin`."""
    pretrained: bool = True
    """Start from ImageNet's (or the folder's) weights; otherwise from random ones."""
    revision: str | None = None
    """The hub's branch, tag or commit."""
    strides: tuple[int, ...] = (8, 16, 32)
    """Stride of each feature map in pixels, finest first; any of 4, 8, 16 and 32."""
    layers: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Of a plain vision transformer: the layers, counted from 1, whose outputs are the feature maps. All maps have the
    patch's stride, and `strides` has no effect. Empty: a pyramid of the wanted strides, made from the last layer."""
    adapter: int = Field(0, ge=0, le=4_096)
    """Beside a plain vision transformer with patches of 16 pixels: channels of a few convolutions whose maps of strides
    8, 16 and 32 join those of three `layers`, resized to them (DEIMv2's spatial tuning adapter). Their norms are
    trained whatever is frozen. 0: none."""
    freeze_stages: Annotated[int, Field(ge=0, le=4)] = 1
    """The stem and this many stages are frozen; 0 trains all of it, as random weights need. Stage 1 ends at stride 4,
    stage 2 at stride 8, ...; a stage of a plain vision transformer is a quarter of its layers."""
    freeze_batch_norm: bool = True
    """Batch norms are constant (statistics, scale and shift), as small batches and pretrained weights need."""
    pixel_mean: Colour | None = None
    """Mean colour in 0..1 that is subtracted; None takes that of the backbone's pretraining."""
    pixel_std: Colour | None = None
    """Standard deviation by which colours are then divided; None takes that of the backbone's pretraining."""
    options: dict[str, Any] = {}  # noqa: RUF012  (pydantic copies it)
    """Values of the transformers configuration (`drop_path_rate`, ...), or `width` and `depth` multipliers of
    `efficientnet_lite0`; without pretrained weights they define it."""

    @field_validator("strides")
    @classmethod
    def _known_and_ascending(cls, strides: tuple[int, ...]) -> tuple[int, ...]:
        if not strides or list(strides) != sorted(set(strides) & set(_STRIDES)):
            raise ValueError("expected some of 4, 8, 16 and 32 in this order")
        return strides

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if list(layers) != sorted(set(layers)):
            raise ValueError("expected layers in ascending order, each once")
        return layers

    @model_validator(mode="after")
    def _maps_of_the_adapter(self) -> "BackboneConfig":
        if self.adapter and (len(self.layers) != len(_ADAPTED) or self.strides != _ADAPTED):
            what = f"adapter joins three layers at strides {list(_ADAPTED)}: found layers {list(self.layers)}"
            raise ValueError(f"{what} and strides {list(self.strides)}")
        return self


class EncoderConfig(Config):
    """From feature maps to memory."""

    kind: Literal["deformable", "hybrid", "lite", "plain", "projector"] = "deformable"
    """As in Deformable DETR and DINO, as in RT-DETR, as in the smallest DEIMv2 (convolutions only, two levels of the
    backbone's one map), as in DETR, or as in LW-DETR and RF-DETR (convolutions only, on backbone maps of one stride:
    `backbone.layers`)."""
    layers: int = Field(6, ge=0, le=100)
    """Attention layers; `hybrid` has them on the coarsest level only, `lite` and `projector` have none."""
    levels: int = Field(4, ge=1, le=8)
    """Levels of the memory. `deformable` adds levels to the backbone's by strided convolution; `hybrid` has at most
    as many as the backbone. Whatever is set, `lite` has two, `plain` has only the backbone's last, and `projector` one
    a scale."""
    heads: int = Field(8, ge=1, le=256)
    points: int = Field(4, ge=1, le=64)
    """Sampling points a head and level (`deformable`)."""
    feed_forward: int = Field(2048, ge=1, le=65_536)
    """Hidden width of the feed-forward parts."""
    activation: Literal["relu", "prelu"] = "relu"
    """Inside the feed-forward parts. `prelu`: what is below zero is multiplied by a number that each layer learns
    (DAB-DETR; `plain`)."""
    positions: Literal["scaled", "centred", "counted", "none"] = "scaled"
    """What is encoded. `scaled`: rows and columns counted from 1, scaled so that the last is 2 pi (DINO). `centred`:
    cell centres, scaled alike (Deformable DETR; for `deformable`). `counted`: unscaled (RT-DETR; for `hybrid`). `none`:
    nothing, as transformers' detectors with an `eval_size` detect (for `hybrid`)."""
    temperature: int = Field(10_000, ge=1, le=1_000_000)
    """The longest wave of the encoded positions, in units of the shortest: 10,000 (DETR) or 20 (DAB-DETR; `plain`)."""
    position_scale: bool = False
    """Each layer multiplies the encoded positions by factors that are predicted from the tokens (DAB-DETR; `plain`)."""
    fusion: Literal["csp", "elan"] = "csp"
    """How two levels are fused: as in RT-DETR, or as in D-FINE (`hybrid`, `lite`)."""
    fusion_inputs: Literal["cat", "sum"] = "cat"
    """Two levels are concatenated before their fusion, or added, as in DEIMv2 (`hybrid`, `lite`)."""
    fusion_convolutions: bool = True
    """A 3x3 convolution after each stage of a fusion; the large DEIMv2 have none (`elan`)."""
    fusion_blocks: int = Field(3, ge=1, le=100)
    """Convolution blocks of each fusion (`hybrid`, `lite`, `projector`)."""
    fusion_expansion: float = Field(1.0, gt=0, le=16)
    """Hidden channels of a fusion / width (`hybrid`, `lite`, `projector`)."""
    width: int | None = Field(None, ge=8, le=16_384)
    """Channels inside the encoder; None means the network's width. With another width a 1x1 convolution after the
    fusion of each level leads to the network's (`hybrid`, `lite`)."""
    project_memory: bool = False
    """A 1x1 convolution after the fusion of each level, as between RT-DETR's encoder and decoder (`hybrid`, `lite`)."""
    scales: tuple[float, ...] = (1.0,)
    """Cells of each level / cells of a backbone map, along one side, finest level first: 2, 1 or 0.5 (`projector`)."""
    norm: Literal["batch", "layer"] = "batch"
    """What follows a convolution: a batch norm (LW-DETR), or a layer norm over the channels of each cell (RF-DETR;
    `projector`)."""
    norm_eps: float = Field(1e-5, gt=0, le=1)
    """Added to the variance in these norms (`projector`)."""

    @field_validator("scales")
    @classmethod
    def _finest_first(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if not scales or list(scales) != sorted(set(scales) & {2.0, 1.0, 0.5}, reverse=True):
            raise ValueError("expected some of 2, 1 and 0.5 in this order")
        return scales

    @model_validator(mode="after")
    def _options_of_the_plain_kind(self) -> "EncoderConfig":
        if self.kind != "plain":
            options = ("activation", "temperature", "position_scale")
            leave_options(self, options, f"is for kind 'plain'; with {self.kind!r} leave it at")
        return self


class DetectorConfig(Config):
    """The whole network."""

    width: int = Field(256, ge=8, le=16_384)
    """Size of a token, d."""
    backbone: BackboneConfig = BackboneConfig()
    encoder: EncoderConfig = EncoderConfig()
    categories: CategoryConfig = CategoryConfig()
    queries: QueryConfig = QueryConfig()
    similarity: SimilarityConfig = SimilarityConfig()
    denoising: DenoisingConfig = DenoisingConfig()
    decoder: DecoderConfig = DecoderConfig()

    @model_validator(mode="after")
    def _positions_suit_the_encoder(self) -> "DetectorConfig":
        kinds = {"centred": "deformable", "counted": "hybrid", "none": "hybrid"}
        wanted = kinds.get(self.encoder.positions, self.encoder.kind)
        if wanted != self.encoder.kind:
            raise ValueError(f"encoder.positions {self.encoder.positions!r} is for encoder.kind {wanted!r}")
        return self

    @model_validator(mode="after")
    def _width_suits_the_encoder(self) -> "DetectorConfig":
        if self.encoder.width is not None and self.encoder.kind not in ("hybrid", "lite"):
            what = f"encoder.width is for encoder.kind 'hybrid' and 'lite'; {self.encoder.kind!r} has the network's"
            raise ValueError(what)
        return self

    @model_validator(mode="after")
    def _maps_suit_the_encoder(self) -> "DetectorConfig":
        adapted = self.backbone.adapter > 0
        one_stride = (bool(self.backbone.layers) and not adapted) or len(self.backbone.strides) == 1
        if self.encoder.kind == "projector" and not one_stride:
            what = (
                "encoder.kind 'projector' takes backbone maps of one stride: expected backbone.layers, as [3,6,9,12] of"
            )
            raise ValueError(f"{what} a plain vision transformer, or one backbone.strides")
        if self.encoder.kind == "lite" and not one_stride:
            what = (
                f"encoder.kind 'lite' makes two levels of one backbone map: found strides {list(self.backbone.strides)}"
            )
            raise ValueError(f"{what}, expected one of backbone.strides, as [16]")
        if self.encoder.kind != "projector" and len(self.backbone.layers) > 1 and not adapted:
            what = "several backbone.layers have one stride, and are for encoder.kind 'projector'"
            raise ValueError(f"{what} or need backbone.adapter")
        return self

    @model_validator(mode="after")
    def _boxes_suit_the_decoder(self) -> "DetectorConfig":
        decoder = self.decoder
        if decoder.kind in ("conditional", "plain") and decoder.boxes != "logit":
            raise ValueError("decoder.boxes is for decoder.kind 'deformable'")
        return self

    @model_validator(mode="after")
    def _positions_suit_the_decoder(self) -> "DetectorConfig":
        positions, kind = self.decoder.positions, self.decoder.kind
        if positions == "first" and kind != "deformable":
            raise ValueError(f"decoder.positions 'first' is for decoder.kind 'deformable', not {kind!r}")
        if positions == "learned" and kind == "distribution":
            raise ValueError("decoder.positions 'learned' is for decoder.kind 'deformable', 'conditional' and 'plain'")
        if kind == "plain" and positions != "learned":
            what = f"decoder.kind 'plain' needs decoder.positions 'learned', found {positions!r}"
            raise ValueError(f"{what}: it looks at no boxes")
        if kind != "plain" and not self.queries.point_layers:
            raise ValueError(f"queries.point_layers 0 is for decoder.kind 'plain', not {kind!r}, which looks at points")
        if kind != "plain" and self.similarity.rivals:
            raise ValueError(f"similarity.rivals is for decoder.kind 'plain', not {kind!r}: leave it at 0")
        if self.decoder.first_samples == "cells" and kind != "deformable":
            raise ValueError(f"decoder.first_samples 'cells' is for decoder.kind 'deformable', not {kind!r}")
        if self.queries.content == "box_only" and positions != "first":
            raise ValueError(f"queries.content 'box_only' needs decoder.positions 'first', found {positions!r}")
        return self

    @model_validator(mode="after")
    def _learned_places(self) -> "DetectorConfig":
        queries, found = self.queries, self.decoder.positions
        if (queries.places == "learned") != (found == "learned"):
            what = f"found {queries.places!r} and {found!r}, expected both 'learned' or none"
            raise ValueError(f"queries.places and decoder.positions belong together: {what}")
        if queries.places == "learned" and self.denoising.number:
            what = f"queries.places 'learned' needs denoising.number 0, found {self.denoising.number}"
            raise ValueError(f"{what}: noised boxes have no learned position")
        return self

    @model_validator(mode="after")
    def _queries_of_learned_places(self) -> "DetectorConfig":
        queries = self.queries
        if queries.places == "proposed":
            if queries.content in ("none", "patterns"):
                what = f"queries.content {queries.content!r} is for queries.places 'learned' and 'learned_boxes'"
                raise ValueError(what)
            return self
        contents = {"learned": ("learned_only", "none"), "learned_boxes": ("learned_only", "none", "patterns")}
        wanted = {"layout": ("places",), "content": contents[queries.places], "start": ("proposal",)}
        for option, values in wanted.items():
            if getattr(queries, option) not in values:
                what = f"queries.places {queries.places!r} needs queries.{option} {' or '.join(map(repr, values))}"
                raise ValueError(f"{what}, found {getattr(queries, option)!r}")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> "DetectorConfig":
        inside = self.encoder.width or self.width
        for width, part in ((inside, self.encoder), (self.width, self.categories), (self.width, self.decoder)):
            if width % part.heads:
                raise ValueError(f"width {width} is not divisible by {part.heads} heads")
            if width % 8:
                raise ValueError(f"width {width} is not divisible by 8, which the position encodings need")
        if self.decoder.cross_heads and self.width % self.decoder.cross_heads:
            raise ValueError(f"width {self.width} is not divisible by {self.decoder.cross_heads} heads")
        if self.queries.floor > self.queries.ceiling:
            raise ValueError(f"queries.floor {self.queries.floor} is above queries.ceiling {self.queries.ceiling}")
        if 0 < self.categories.shortlist < self.categories.kept:
            what = f"categories.shortlist {self.categories.shortlist} is below categories.kept {self.categories.kept}"
            raise ValueError(f"{what}: expected 0, or at least that")
        if self.queries.layout == "places" and self.queries.content in ("learned", "place"):
            what = f"queries.content {self.queries.content!r} contains a category; queries.layout 'places' needs one of"
            raise ValueError(f"{what} 'place_only', 'learned_only', 'box_only', 'none' and 'patterns'")
        if self.decoder.kind in ("conditional", "plain") and self.decoder.predictors != "shared":
            raise ValueError(f"decoder.predictors {self.decoder.predictors!r} is for decoder.kind 'deformable'")
        if self.decoder.kind == "distribution" and self.decoder.predictors == "normed_layer":
            raise ValueError("decoder.predictors 'normed_layer' is for decoder.kind 'deformable'")
        if self.queries.layout != "places" and self.queries.number < self.categories.kept:
            raise ValueError(f"queries.number {self.queries.number} is below categories.kept {self.categories.kept}")
        return self
