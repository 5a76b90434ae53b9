"""The network's configuration: one class a part, a unit or meaning beside each field."""

from typing import Literal

from pydantic import Field, model_validator

from metr.config import Config
from metr.models.backbones.base import BackboneConfig


class EncoderConfig(Config):
    """From feature maps to memory."""

    kind: Literal["deformable", "hybrid", "plain"] = "deformable"
    """As in Deformable DETR and DINO, as in RT-DETR, or as in DETR."""
    layers: int = Field(6, ge=0)
    """Attention layers; `hybrid` has them on the coarsest level only."""
    levels: int = Field(4, ge=1)
    """Levels of the memory. `deformable` makes those past the backbone's by strided convolution; `hybrid` has at most
    the backbone's; `plain` has one, whatever is set: the backbone's last."""
    heads: int = Field(8, ge=1)
    points: int = Field(4, ge=1)
    """Sampling points a head and level (`deformable`)."""
    feed_forward: int = Field(2048, ge=1)
    """Hidden numbers of the feed-forward parts."""
    positions: Literal["scaled", "centred", "counted"] = "scaled"
    """How a cell's place is encoded: rows and columns counted from 1 and scaled so that the last is 2 pi (DINO), the
    centres of cells scaled alike (Deformable DETR; for `deformable`), or counts as they are (RT-DETR; for `hybrid`)."""
    fusion: Literal["csp", "elan"] = "csp"
    """How two levels become one: as in RT-DETR, or as in D-FINE (`hybrid`)."""
    fusion_blocks: int = Field(3, ge=1)
    """Convolution blocks of each fusion (`hybrid`)."""
    fusion_expansion: float = Field(1.0, gt=0)
    """Hidden channels of a fusion / width (`hybrid`)."""
    project_memory: bool = False
    """A 1x1 convolution after the fusion of each level, as between RT-DETR's encoder and decoder (`hybrid`)."""


class CategoryConfig(Config):
    """Category extraction, and how many categories are kept."""

    blocks: int = Field(2, ge=1)
    """Cross-attention blocks."""
    heads: int = Field(8, ge=1)
    feed_forward: int = Field(1024, ge=1)
    self_attention: bool = False
    """Among categories; without it an answer does not depend on the other names."""
    kept: int = Field(20, ge=1)
    """K, category slots an image."""
    threshold: float = Field(0.0, ge=0, lt=1)
    """Least presence probability with which a category takes a slot outside of training. Categories below it change
    nothing for the others, and leave them the queries."""
    negative_slots: int = Field(0, ge=0)
    """Most slots an image that categories presumed absent may take in training."""
    shortlist: int = Field(0, ge=0)
    """Most names an image that category extraction looks at, where there are more: chosen by a few dot products a name.
    0 builds no shortlist, and extraction looks at all names."""
    whitening: float = Field(0.0, ge=0)
    """Ridge, in mean variances, of the whitening by which the text projection starts, so that names which the language
    model takes for nearly the same are told apart from the first step. 0: it starts at random."""
    prior: float = Field(0.02, gt=0, lt=1)
    """Share of categories that are present, where training starts."""


class QueryConfig(Config):
    """Class-specific queries: how many, and how they are shared out among the kept categories."""

    layout: Literal["budget", "uniform", "shared"] = "uniform"
    """`uniform`: every kept category has the same count, and places of its own. `budget`: the likelier pairs of
    category and place have more. `shared`: the same places for every category, as the authors."""
    number: int = Field(300, ge=1)
    """Q, queries an image, whatever the vocabulary."""
    floor: int = Field(5, ge=0)
    """Least queries a kept category gets (`budget`)."""
    ceiling: int = Field(100, ge=1)
    """Most queries a category can get."""
    attention: Literal["group", "image"] = "group"
    """Whom a query attends to: its category's queries, or all."""
    content: Literal["learned", "place"] = "learned"
    """What joins the category's token: a learned query, or that and the features of the place where it starts."""


class SimilarityConfig(Config):
    """How places and queries are compared with their categories, to one logit each."""

    token: Literal["refined", "text"] = "refined"
    """Compared with the category's token as the image refined it (the authors), or with its projected text: by that,
    categories of one image remain further apart."""
    factor: float = Field(1.0, gt=0)
    """Of the dot product / sqrt(width): the larger, the sooner categories that look alike are told apart."""
    objectness: bool = False
    """Adds what a feature says of there being an object, whatever its category: dot products then have but to tell
    categories apart."""


class DenoisingConfig(Config):
    """Contrastive and category-flipped denoising, in training only."""

    number: int = Field(100, ge=0)
    """Denoising queries an image, at most; 0 switches denoising off."""
    groups: int = Field(5, ge=1)
    """Most noised versions of one object."""
    box_noise: float = Field(1.0, gt=0)
    """Largest shift of a corner of a positive, in half sizes of its box."""
    flips: bool = True
    """Add the right box under another annotated category, which must answer "no"."""

    @property
    def kinds(self) -> int:
        """Copies of an object in one version: moved, moved too far, and perhaps under another category."""
        return 3 if self.flips else 2

    @model_validator(mode="after")
    def _holds_an_object(self) -> "DenoisingConfig":
        if 0 < self.number < self.kinds:
            raise ValueError(f"number {self.number} holds no object: expected 0, or at least {self.kinds}")
        return self


class DecoderConfig(Config):
    """From queries to answers."""

    kind: Literal["deformable", "conditional"] = "deformable"
    """Queries sample a few places of every level, as in DINO, or attend to the whole memory, as in DAB-DETR: meant for
    the memory of a `plain` encoder."""
    layers: int = Field(6, ge=1)
    heads: int = Field(8, ge=1)
    points: int = Field(4, ge=1)
    """Sampling points a head and level (`deformable`)."""
    feed_forward: int = Field(2048, ge=1)
    padded_positions: bool = False
    """Encode a query's box in units of the padded image, as DINO and the authors (`deformable`)."""
    positions: Literal["sine", "plain"] = "sine"
    """A query's box enters as sines and cosines (DINO), or as four numbers (RT-DETR; `deformable`)."""


class DetectorConfig(Config):
    """The whole network."""

    width: int = Field(256, ge=8)
    """Numbers a token, d."""
    backbone: BackboneConfig = BackboneConfig()
    encoder: EncoderConfig = EncoderConfig()
    categories: CategoryConfig = CategoryConfig()
    queries: QueryConfig = QueryConfig()
    similarity: SimilarityConfig = SimilarityConfig()
    denoising: DenoisingConfig = DenoisingConfig()
    decoder: DecoderConfig = DecoderConfig()

    @model_validator(mode="after")
    def _positions_suit_the_encoder(self) -> "DetectorConfig":
        kinds = {"centred": "deformable", "counted": "hybrid"}
        wanted = kinds.get(self.encoder.positions, self.encoder.kind)
        if wanted != self.encoder.kind:
            raise ValueError(f"encoder.positions {self.encoder.positions!r} is for encoder.kind {wanted!r}")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> "DetectorConfig":
        for part in (self.encoder, self.categories, self.decoder):
            if self.width % part.heads:
                raise ValueError(f"width {self.width} is not divisible by {part.heads} heads")
        if self.width % 8:
            raise ValueError(f"width {self.width} is not divisible by 8, which the position encodings need")
        if self.queries.floor > self.queries.ceiling:
            raise ValueError(f"queries.floor {self.queries.floor} is above queries.ceiling {self.queries.ceiling}")
        if 0 < self.categories.shortlist < self.categories.kept:
            what = f"categories.shortlist {self.categories.shortlist} is below categories.kept {self.categories.kept}"
            raise ValueError(f"{what}: expected 0, or at least that")
        if self.queries.number < self.categories.kept:
            raise ValueError(f"queries.number {self.queries.number} is below categories.kept {self.categories.kept}")
        return self
