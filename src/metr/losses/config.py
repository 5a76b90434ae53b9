"""Configuration of matching and losses."""

from typing import Annotated, Literal

from pydantic import Field

from metr.config import Config

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class LossWeights(Config):
    """Factors of the loss terms. `proposals` and `denoising` multiply those of their classification and boxes."""

    classification: Weight = 2.0
    l1: Weight = 5.0
    giou: Weight = 2.0
    presence: Weight = 1.0
    """Of the presence loss of every extraction block and of the shortlist."""
    proposals: Weight = 1.0
    denoising: Weight = 1.0


class MatchingCosts(Config):
    """Factors of the costs by which queries and objects are matched."""

    classification: Weight = 2.0
    l1: Weight = 5.0
    giou: Weight = 2.0


class CriterionConfig(Config):
    """Which losses, with which parameters and weights."""

    classification: Literal["focal", "quality", "matchability"] = "quality"
    """`focal`: targets are 0 and 1 (Lin et al., 2017). `quality`: the target of a matched query is the IoU of its box
    (varifocal loss, Zhang et al., 2021). `matchability`: that IoU to a power (Huang et al., 2025)."""
    focal_alpha: Fraction = 0.25
    """Weight of positives (that of negatives is one minus it), in the focal loss and in the matching cost."""
    focal_gamma: Weight = 2.0
    quality_alpha: Weight = 0.75
    """Weight of negatives in the varifocal loss."""
    quality_gamma: Weight = 2.0
    matchability_gamma: Weight = 1.5
    presence_gamma_positive: Weight = 0.0
    presence_gamma_negative: Weight = 2.0
    ignore_coverage: Fraction = 0.5
    """A predicted box is no negative if at least this fraction of it is inside an ignored box of its category."""
    weights: LossWeights = LossWeights()
    costs: MatchingCosts = MatchingCosts()
