"""Configuration from memory to queries: categories, queries, how both are compared, denoising."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from metr.config import Config, leave_options


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


class OneToManyConfig(Config):
    """Further queries in training, of which several are taught one object (the hybrid branch of H-DETR)."""

    number: int = Field(0, ge=0, le=100_000)
    """Further queries an image, at the next best places of its names; they and the other queries do not see each other.
    0: none. (Not with `layout: shared` and `places: learned`.)"""
    repeats: int = Field(6, ge=1, le=1_000)
    """How many of them are matched to an object."""


class QueryConfig(Config):
    """Class-specific queries: how many, and how they are divided among the categories that have a slot."""

    layout: Literal["budget", "uniform", "shared", "places"] = "uniform"
    """`uniform`: every category has the same number of queries, at its own best places. `budget`: the number depends on
    how likely the pairs of category and place are. `shared`: all categories have the same places (the authors' way).
    `places`: the same, and what the decoder finds at a place is compared with every category, so that more categories
    cost a dot product each; queries contain no category then (`content`)."""
    places: Literal["proposed", "learned", "learned_boxes"] = "proposed"
    """Where queries start. `proposed`: where the encoder's memory promises objects. `learned`: at points that are
    learned, the same for every image, without proposals and their losses (Deformable DETR of one stage, Conditional
    DETR, and DETR, which has no points; with `layout: places`, `content: learned_only` or `none`, `decoder.positions:
    learned` and no denoising).
    `learned_boxes`: the same with boxes, of which the decoder makes positions as it does of proposed ones (DAB-DETR;
    also with `content: patterns`, and with denoising)."""
    point_layers: Literal[0, 1, 2] = 1
    """Linear layers from a learned position to its point: 1 (Deformable DETR) or 2 (Conditional DETR; `places:
    learned`). 0: there are no points, and all boxes start as the middle of the image (DETR; `decoder.kind: plain`)."""
    number: int = Field(300, ge=1, le=100_000)
    """Q, queries an image, whatever the vocabulary. With `places`, a query stands for one place."""
    floor: int = Field(5, ge=0)
    """Smallest number of queries of a category (`budget`)."""
    ceiling: int = Field(100, ge=1, le=100_000)
    """Largest number of queries of a category."""
    varied: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    """Smallest and largest number of queries of a name in training, drawn for each image on a logarithmic scale; never
    fewer than the most objects of a name in the image. Where not all names then fit in `number`, the least likely ones
    without objects get none, as in detection. None: what the names of the image share, always (`uniform`)."""
    attention: Literal["group", "image"] = "group"
    """A query attends to the queries of its category, or to all queries of its image."""
    patterns: int = Field(1, ge=1, le=1_000)
    """How many queries start from each learned box, each with another learned content, which it shares with one query
    of every other box (DAB-DETR; `content: patterns`)."""
    content: Literal["learned", "place", "place_only", "learned_only", "box_only", "none", "patterns"] = "learned"
    """`learned`: a learned query and the category's token. `place`: the same and a linear layer of the feature of the
    query's place. `place_only`, `learned_only`: that feature itself, or the learned query, and nothing else.
    `box_only`: only what the decoder adds for the query's box (`decoder.positions: first`). `none`: zeros (`places:
    learned` and `learned_boxes`). `patterns`: a learned one that many queries share (`places: learned_boxes`)."""
    start: Literal["proposal", "shifted"] = "proposal"
    """The box that a query starts from: its proposal's, or that moved by a learned shift of its rank (LW-DETR)."""
    one_to_many: OneToManyConfig = OneToManyConfig()

    @model_validator(mode="after")
    def _varies_shares(self) -> "QueryConfig":
        if self.varied is not None:
            if self.layout != "uniform":
                raise ValueError(f"varied is for layout 'uniform'; with {self.layout!r} leave it at None")
            if not self.varied[0] <= self.varied[1] <= self.ceiling:
                what = f"varied {list(self.varied)} is no range up to the ceiling, {self.ceiling}"
                raise ValueError(f"{what}: expected [smallest, largest]")
        return self

    @model_validator(mode="after")
    def _has_next_best_places(self) -> "QueryConfig":
        for option, value in {"layout": "shared", "places": "learned"}.items():
            if self.one_to_many.number and getattr(self, option) == value:
                what = f"one_to_many.number {self.one_to_many.number} takes each name's next best places"
                raise ValueError(f"{what}; {option} {value!r} has none: leave it at 0")
        return self

    @model_validator(mode="after")
    def _options_of_learned_places(self) -> "QueryConfig":
        if self.places != "learned":
            leave_options(self, ("point_layers",), "is for places 'learned'; otherwise leave it at")
        if self.content != "patterns":
            leave_options(self, ("patterns",), "is for content 'patterns'; otherwise leave it at")
        if self.number % self.patterns:
            raise ValueError(f"number {self.number} is not divisible by {self.patterns} patterns")
        return self


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
    rivals: int = Field(0, ge=0, le=100_000)
    """Linear classifiers with which every name competes in a softmax, as with the other labels and "no object" of DETR:
    a name's logit is lowered by the logarithm of the sum of their exponentials. Of those that stand for a name of the
    detector that was taken over, its own does not count (`classifier` with `decoder.kind: plain`)."""
    objectness: bool = False
    """Adds a logit for "is there an object of any category?", predicted from the feature alone. Dot products then only
    have to separate categories."""

    @model_validator(mode="after")
    def _options_of_the_form(self) -> "SimilarityConfig":
        if self.form == "classifier":
            options = ("token", "factor", "objectness")
            leave_options(self, options, "is for form 'product'; with 'classifier' leave it at")
        else:
            leave_options(self, ("rivals",), "is for form 'classifier'; with 'product' leave it at")
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
    flip_noise: float = Field(0.2, ge=0, le=2)
    """Largest shift of a corner of such a copy / `box_noise`. Below 1 a box that fits its object says "no" by itself;
    with 1 the box does not tell such a copy from a positive."""

    @property
    def kinds(self) -> int:
        """Copies of an object in one version: moved, moved too far and, with `flips`, under another category."""
        return 3 if self.flips else 2

    @model_validator(mode="after")
    def _holds_an_object(self) -> "DenoisingConfig":
        if 0 < self.number < self.kinds:
            raise ValueError(f"number {self.number} holds no object: expected 0, or at least {self.kinds}")
        return self
