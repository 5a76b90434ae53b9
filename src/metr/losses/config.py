"""Configuration of matching and losses."""

from typing import Annotated, Literal

from pydantic import Field

from metr.config import Config

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class LossWeights(Config):
    """Factors of the loss terms. `proposals`, `denoising` and `one_to_many` multiply the others for their queries."""

    classification: Weight = 2.0
    """Of the classification of queries."""
    l1: Weight = 5.0
    """Of the L1 distance between boxes."""
    giou: Weight = 2.0
    """Of 1 - GIoU between boxes."""
    presence: Weight = 1.0
    """Of the presence loss of every extraction block and of the shortlist."""
    proposals: Weight = 1.0
    """Multiplies the terms of the proposals."""
    denoising: Weight = 1.0
    """Multiplies the terms of the denoising queries."""
    one_to_many: Weight = 1.0
    """Multiplies the terms of the queries of `model.queries.one_to_many`."""


class MatchingCosts(Config):
    """Factors of the costs by which queries and objects are matched."""

    classification: Weight = 2.0
    """Of the classification cost."""
    l1: Weight = 5.0
    """Of the L1 distance between boxes."""
    giou: Weight = 2.0
    """Of 1 - GIoU between boxes."""


class CriterionConfig(Config):
    """Which losses, with which parameters and weights."""

    classification: Literal["focal", "quality", "matchability"] = "quality"
    """`focal`: targets are 0 and 1 (Lin et al., 2017). `quality`: the target of a matched query is the IoU of its box
    (varifocal loss, Zhang et al., 2021). `matchability`: that IoU to a power (Huang et al., 2025)."""
    focal_alpha: Fraction = 0.25
    """Weight of positives (that of negatives is one minus it), in the focal loss and in the matching cost."""
    focal_gamma: Weight = 2.0
    """Power by which the focal loss, and the matching cost, weigh easy examples less."""
    quality_alpha: Weight = 0.75
    """Weight of negatives in the varifocal loss."""
    quality_gamma: Weight = 2.0
    """Power by which the varifocal loss weighs easy negatives less."""
    matchability_gamma: Weight = 1.5
    """Power of the IoU as target, and of a negative's probability as weight, in the matchability-aware loss."""
    presence_gamma_positive: Weight = 0.0
    """Power by which the asymmetric presence loss weighs easy positives less."""
    presence_gamma_negative: Weight = 2.0
    """Power by which the asymmetric presence loss weighs easy negatives less."""
    ignore_coverage: Fraction = 0.5
    """A query is no negative if at least this fraction of its box is inside an ignored box of its category."""
    weights: LossWeights = LossWeights()
    """Factors of the loss terms."""
    costs: MatchingCosts = MatchingCosts()
    """Factors of the matching costs."""
