"""Configuration of the decoder."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from metr.config import Config, leave_options


class DistributionConfig(Config):
    """How a box is refined by distributions of its edges (D-FINE)."""

    bins: int = Field(32, ge=4, le=1_024, multiple_of=2)
    """An edge has `bins` + 1 possible shifts, each with a probability; their mean counts."""
    reach: float = Field(0.5, gt=0, le=16)
    """The largest shift in sides of the box, apart from the two outermost, which are twice as large (D-FINE's `up`)."""
    flatness: float = Field(4.0, gt=0, le=1_024)
    """The larger, the closer the small shifts lie together (D-FINE's `reg_scale`)."""
    quality_bins: int = Field(4, ge=1, le=1_024)
    """How many of the largest probabilities of each edge tell the quality of the box."""
    quality_width: int = Field(64, ge=1, le=65_536)
    """Hidden width of the network that reads them."""
    quality_layers: int = Field(2, ge=1, le=16)
    """Its linear layers."""
    shared: bool = False
    """All layers have one head for distributions (the small DEIMv2), instead of one each."""

    @model_validator(mode="after")
    def _as_many_probabilities(self) -> "DistributionConfig":
        if self.quality_bins > self.bins + 1:
            raise ValueError(f"quality_bins {self.quality_bins} is above the {self.bins + 1} values of an edge")
        return self


class DecoderConfig(Config):
    """From queries to predictions."""

    kind: Literal["deformable", "conditional", "plain", "distribution"] = "deformable"
    """`deformable`: queries sample a few places of every level, as in DINO. `conditional`: they attend to the whole
    memory, around their boxes, as in DAB-DETR; this is meant for the memory of a `plain` encoder. `plain`: they attend
    to the whole memory by content and learned position, whatever their boxes are, as in DETR (`queries.places:
    learned`). `distribution`: they sample as in `deformable`, and each layer refines distributions of the edges of a
    box, as in D-FINE."""
    layers: int = Field(6, ge=1, le=100)
    heads: int = Field(8, ge=1, le=256)
    cross_heads: Annotated[int, Field(ge=1, le=256)] | None = None
    """Heads of the attention to the memory; None: as many as `heads` (`deformable`)."""
    points: int = Field(4, ge=1, le=64)
    """Sampling points a head and level (`deformable`, `distribution`)."""
    feed_forward: int = Field(2048, ge=1, le=65_536)
    """Hidden width of the feed-forward parts."""
    activation: Literal["relu", "swiglu", "prelu"] = "relu"
    """Inside the feed-forward parts. `swiglu`: the hidden channels are multiplied by the SiLU of a gate (DEIMv2;
    `distribution`). `prelu`: what is below zero is multiplied by a number that each layer learns (DAB-DETR;
    `conditional`)."""
    norm: Literal["layer", "rms"] = "layer"
    """What the layers normalise by: mean and variance, or the root mean square alone (DEIMv2; `distribution`)."""
    gate: bool = True
    """Weighs what a query was and what it sees in the memory; without it the two are added (`distribution`)."""
    boxes: Literal["logit", "reparametrised"] = "logit"
    """How boxes are refined, those of proposals too. `logit`: changes are added to the inverse sigmoid of each
    coordinate. `reparametrised`: a centre moves by multiples of the box's sides, and the sides are multiplied by
    exponentials; boxes may leave the image (LW-DETR, RF-DETR; `deformable`)."""
    refine: Literal["each", "none"] = "each"
    """Each layer starts from the box that the layer before found, or all start from the query's own (LW-DETR, RF-DETR;
    `deformable`)."""
    padded_positions: bool = False
    """Encode a query's box in units of the padded image, as DINO and the authors (`deformable`)."""
    positions: Literal["sine", "plain", "first", "learned"] = "sine"
    """`sine`: a query's box is encoded as sines and cosines (DINO). `plain`: it is used as four numbers (RT-DETR;
    `deformable` and `distribution`). `first`: a query keeps the position of its first box, which is encoded as sines
    and cosines, and which its content contains too (Deformable DETR; `deformable`). `learned`: it is
    learned for each query, whose place follows from it (`queries.places: learned`; `deformable`,
    `conditional` and `plain`)."""
    extents: bool = True
    """Attention to the memory falls off more sharply around smaller boxes (DAB-DETR); without it, it knows centres only
    (Conditional DETR; `conditional`)."""
    smallest_side: float = Field(1e-3, gt=0, lt=0.1)
    """The smallest side of a box, in 0..1 of the image, that this attention distinguishes: 1e-6 is as good as none
    (DAB-DETR; `conditional` with `extents`)."""
    temperature: int = Field(10_000, ge=1, le=1_000_000)
    """The longest wave of the encoded places of the memory, in units of the shortest: 10,000 (DETR) or 20 (DAB-DETR).
    The places of queries have 10,000 (`conditional` and `plain`)."""
    first_samples: Literal["box", "cells"] = "box"
    """How far from a query's own box points are sampled. `box`: by multiples of its sides. `cells`: by cells of each
    level around its centre, whatever its sides, until a layer has refined it (Deformable DETR of one stage;
    `deformable`)."""
    position_layers: Literal[2, 3] = 2
    """With `positions: plain`, the linear layers from the four numbers: 2 (RT-DETR) or 3 (DEIMv2)."""
    position_activation: Literal["relu", "silu"] = "relu"
    """What is between them."""
    predictors: Literal["shared", "layer", "normed_layer"] = "shared"
    """`shared`: all layers have one class head and one box head, which read the layer's output after one more norm
    (DINO). `layer`: each layer has its own, which read its output as it is (RT-DETR; `deformable` and `distribution`).
    `normed_layer`: each has its own after that norm (a DINO whose layers share nothing; `deformable`). In
    `distribution` each layer refines boxes by itself, whatever is set."""
    box_margin: float = Field(1e-3, gt=0, lt=0.1)
    """The least distance from 0 and 1 of a coordinate that is refined: 1e-3 (DINO) or 1e-5 (RT-DETR)."""
    distribution: DistributionConfig = DistributionConfig()

    @model_validator(mode="after")
    def _options_of_the_kind(self) -> "DecoderConfig":
        plain: dict[str, Any] = {"position_layers": 2, "position_activation": "relu"}
        if self.positions != "plain" or self.kind in ("conditional", "plain"):
            for option, value in plain.items():
                if getattr(self, option) != value:
                    raise ValueError(f"{option} is for positions 'plain'; otherwise leave it at {value!r}")
        if self.kind != "distribution":
            leave_options(self, ("norm", "gate"), f"is for kind 'distribution'; with {self.kind!r} leave it at")
        if self.kind not in ("conditional", "plain"):
            why = f"is for kind 'conditional' and 'plain'; with {self.kind!r} leave it at"
            leave_options(self, ("temperature",), why)
        if self.kind != "conditional":
            options = ("extents", "smallest_side")
            leave_options(self, options, f"is for kind 'conditional'; with {self.kind!r} leave it at")
        elif not self.extents:
            leave_options(self, ("smallest_side",), "is for extents; without them leave it at")
        kinds = {"swiglu": "distribution", "prelu": "conditional"}
        if self.kind != kinds.get(self.activation, self.kind):
            what = f"activation {self.activation!r} is for kind {kinds[self.activation]!r}"
            raise ValueError(f"{what}; with {self.kind!r} leave it at 'relu'")
        return self
