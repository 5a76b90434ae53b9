"""The network's configuration: one class for each part."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from metr.config import Config

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
    positions: Literal["scaled", "centred", "counted", "none"] = "scaled"
    """What is encoded. `scaled`: rows and columns counted from 1, scaled so that the last is 2 pi (DINO). `centred`:
    cell centres, scaled alike (Deformable DETR; for `deformable`). `counted`: unscaled (RT-DETR; for `hybrid`). `none`:
    nothing, as transformers' detectors with an `eval_size` detect (for `hybrid`)."""
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


class CategoryConfig(Config):
    """Category extraction, and how many categories get a slot."""

    blocks: int = Field(2, ge=1, le=100)
    """Cross-attention blocks."""
    heads: int = Field(8, ge=1, le=256)
    feed_forward: int = Field(1024, ge=1, le=65_536)
    self_attention: bool = False
    """Categories attend to each other. Without it the prediction for a category does not depend on the other names."""
    kept: int = Field(20, ge=1, le=10_000)
    """K, category slots an image. With `queries.layout: places`, in training only: when detecting, every category that
    reaches the threshold has one."""
    threshold: float = Field(0.0, ge=0, lt=1)
    """Smallest presence probability with which a category gets a slot when detecting. Categories below it leave their
    queries to the others and do not affect them otherwise."""
    negative_slots: int = Field(0, ge=0, le=10_000)
    """Largest number of slots an image, in training, for categories that are assumed to be absent."""
    shortlist: int = Field(0, ge=0)
    """Largest number of names an image that category extraction looks at, chosen by a few dot products a name. 0 builds
    no shortlist: category extraction looks at all names."""
    whitening: float = Field(0.0, ge=0)
    """Ridge, in units of the mean variance, of the whitening that initialises the text projection. Whitening separates
    names that the language model embeds almost alike. 0 initialises at random."""
    prior: float = Field(0.02, gt=0, lt=1)
    """The presence probability that the untrained network predicts."""


class QueryConfig(Config):
    """Class-specific queries: how many, and how they are divided among the categories that have a slot."""

    layout: Literal["budget", "uniform", "shared", "places"] = "uniform"
    """`uniform`: every category has the same number of queries, at its own best places. `budget`: the number depends on
    how likely the pairs of category and place are. `shared`: all categories have the same places (the authors' way).
    `places`: the same, and what the decoder finds at a place is compared with every category, so that more categories
    cost a dot product each; queries contain no category then (`content`)."""
    number: int = Field(300, ge=1, le=100_000)
    """Q, queries an image, whatever the vocabulary. With `places`, a query stands for one place."""
    floor: int = Field(5, ge=0)
    """Smallest number of queries of a category (`budget`)."""
    ceiling: int = Field(100, ge=1, le=100_000)
    """Largest number of queries of a category."""
    attention: Literal["group", "image"] = "group"
    """A query attends to the queries of its category, or to all queries of its image."""
    content: Literal["learned", "place", "place_only", "learned_only", "box_only"] = "learned"
    """`learned`: a learned query and the category's token. `place`: the same and the feature of the query's place.
    `place_only`, `learned_only`: that feature, or the learned query, without the category's token. `box_only`: only
    what the decoder adds for the query's box (`decoder.positions: first`)."""
    start: Literal["proposal", "shifted"] = "proposal"
    """The box that a query starts from: its proposal's, or that moved by a learned shift of its rank (LW-DETR)."""


class SimilarityConfig(Config):
    """How places and queries are compared with their categories; the result is one logit each."""

    form: Literal["product", "classifier"] = "product"
    """`product`: the dot product of feature and token, both after a network of their own. `classifier`: a linear
    classifier of the feature, whose weight and bias are linear in the category's text embedding; so are the
    classifiers of other detectors taken over. `token`, `factor` and `objectness` are for `product`."""
    token: Literal["refined", "text"] = "refined"
    """Compare with the category's token as refined by the image (the authors' way), or with its projected text,
    which keeps the categories of one image further apart."""
    factor: float = Field(1.0, gt=0)
    """Factor of the dot product / sqrt(width). The larger it is, the sooner similar categories are separated."""
    objectness: bool = False
    """Adds a logit for "is there an object of any category?", predicted from the feature alone. Dot products then only
    have to separate categories."""

    @model_validator(mode="after")
    def _options_of_the_form(self) -> "SimilarityConfig":
        if self.form == "classifier":
            plain = {"token": "refined", "factor": 1.0, "objectness": False}
            for option, value in plain.items():
                if getattr(self, option) != value:
                    raise ValueError(f"{option} is for form 'product'; with 'classifier' leave it at {value!r}")
        return self


class DenoisingConfig(Config):
    """Contrastive and category-flipped denoising, in training only."""

    number: int = Field(100, ge=0, le=10_000)
    """Largest number of denoising queries an image; 0 switches denoising off."""
    groups: int = Field(5, ge=1, le=1_000)
    """Largest number of noised versions of one object."""
    box_noise: float = Field(1.0, gt=0)
    """Largest shift of a corner of a positive, in half sizes of its box."""
    flips: bool = True
    """Adds copies with the right box and another annotated category, for which the query should say "no"."""

    @property
    def kinds(self) -> int:
        """Copies of an object in one version: moved, moved too far and, with `flips`, under another category."""
        return 3 if self.flips else 2

    @model_validator(mode="after")
    def _holds_an_object(self) -> "DenoisingConfig":
        if 0 < self.number < self.kinds:
            raise ValueError(f"number {self.number} holds no object: expected 0, or at least {self.kinds}")
        return self


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

    kind: Literal["deformable", "conditional", "distribution"] = "deformable"
    """`deformable`: queries sample a few places of every level, as in DINO. `conditional`: they attend to the whole
    memory, as in DAB-DETR; this is meant for the memory of a `plain` encoder. `distribution`: they sample as in
    `deformable`, and each layer refines distributions of the edges of a box, as in D-FINE."""
    layers: int = Field(6, ge=1, le=100)
    heads: int = Field(8, ge=1, le=256)
    cross_heads: Annotated[int, Field(ge=1, le=256)] | None = None
    """Heads of the attention to the memory; None: as many as `heads` (`deformable`)."""
    points: int = Field(4, ge=1, le=64)
    """Sampling points a head and level (`deformable`, `distribution`)."""
    feed_forward: int = Field(2048, ge=1, le=65_536)
    """Hidden width of the feed-forward parts."""
    activation: Literal["relu", "swiglu"] = "relu"
    """Inside the feed-forward parts. `swiglu`: the hidden channels are multiplied by the SiLU of a gate (DEIMv2;
    `distribution`)."""
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
    positions: Literal["sine", "plain", "first"] = "sine"
    """`sine`: a query's box is encoded as sines and cosines (DINO). `plain`: it is used as four numbers (RT-DETR;
    `deformable` and `distribution`). `first`: a query keeps the position of its first box, which is encoded as sines
    and cosines, and which its content contains too (Deformable DETR; `deformable`)."""
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
        if self.positions != "plain" or self.kind == "conditional":
            for option, value in plain.items():
                if getattr(self, option) != value:
                    raise ValueError(f"{option} is for positions 'plain'; otherwise leave it at {value!r}")
        gated: dict[str, Any] = {"activation": "relu", "norm": "layer", "gate": True}
        if self.kind != "distribution":
            for option, value in gated.items():
                if getattr(self, option) != value:
                    what = f"{option} is for kind 'distribution'; with {self.kind!r} leave it at {value!r}"
                    raise ValueError(what)
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
        if decoder.kind == "conditional" and (decoder.boxes, decoder.refine) != ("logit", "each"):
            raise ValueError("decoder.boxes and decoder.refine are for decoder.kind 'deformable'")
        return self

    @model_validator(mode="after")
    def _positions_suit_the_decoder(self) -> "DetectorConfig":
        positions, kind = self.decoder.positions, self.decoder.kind
        if positions == "first" and kind != "deformable":
            raise ValueError(f"decoder.positions 'first' is for decoder.kind 'deformable', not {kind!r}")
        if self.queries.content == "box_only" and positions != "first":
            raise ValueError(f"queries.content 'box_only' needs decoder.positions 'first', found {positions!r}")
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
            raise ValueError(f"{what} 'place_only', 'learned_only' and 'box_only'")
        if self.decoder.kind == "conditional" and self.decoder.predictors != "shared":
            raise ValueError(f"decoder.predictors {self.decoder.predictors!r} is for decoder.kind 'deformable'")
        if self.decoder.kind == "distribution" and self.decoder.predictors == "normed_layer":
            raise ValueError("decoder.predictors 'normed_layer' is for decoder.kind 'deformable'")
        if self.queries.layout != "places" and self.queries.number < self.categories.kept:
            raise ValueError(f"queries.number {self.queries.number} is below categories.kept {self.categories.kept}")
        return self
