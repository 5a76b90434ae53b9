"""Losses of the two classifications: is this an object of the query's category, and is a category in the image?

Both are computed only where targets are known.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from metr.boxes import cxcywh_to_xyxy, pairwise_coverage
from metr.losses.config import CriterionConfig
from metr.losses.predictions import QueryPredictions
from metr.structures import NO_OBJECT, Targets


def focal_loss(
    logits: Float[Tensor, "*n"], positive: Bool[Tensor, "*n"], alpha: float, gamma: float
) -> Float[Tensor, "*n"]:
    """Focal loss of each binary logit (Lin et al., 2017)."""
    wanted = positive.to(logits.dtype)
    probability = logits.sigmoid()
    missing = torch.where(positive, 1 - probability, probability)
    balance = torch.where(positive, alpha, 1 - alpha)
    return balance * missing**gamma * binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def varifocal_loss(
    logits: Float[Tensor, "*n"], quality: Float[Tensor, "*n"], positive: Bool[Tensor, "*n"], alpha: float, gamma: float
) -> Float[Tensor, "*n"]:
    """Varifocal loss (Zhang et al., 2021): a positive's quality is target and weight; negatives get focal weights."""
    wanted = quality.where(positive, 0)
    weight = torch.where(positive, wanted, alpha * logits.detach().sigmoid() ** gamma)
    return weight * binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def matchability_loss(
    logits: Float[Tensor, "*n"], quality: Float[Tensor, "*n"], positive: Bool[Tensor, "*n"], gamma: float
) -> Float[Tensor, "*n"]:
    """Matchability-aware loss (Huang et al., 2025): a positive has a power of its quality as target, and weight 1."""
    wanted = (quality**gamma).where(positive, 0)
    weight = torch.where(positive, 1, logits.detach().sigmoid() ** gamma)
    return weight * binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def focal_cost(logits: Float[Tensor, "*n"], alpha: float, gamma: float) -> Float[Tensor, "*n"]:
    """The focal loss of each query if it is matched to an object, minus that if it is not."""
    probability = logits.sigmoid()
    as_object = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    as_none = (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    return as_object - as_none


def asymmetric_loss(
    logits: Float[Tensor, "*n"], present: Bool[Tensor, "*n"], gamma_positive: float, gamma_negative: float
) -> Float[Tensor, "*n"]:
    """Asymmetric loss of each presence logit (Ridnik et al., 2021), without its probability shift.

    Probabilities are clamped at 1e-5 before the logarithm; the focusing weights carry no gradient.
    """
    probability = logits.sigmoid()
    right = torch.where(present, probability, 1 - probability)
    missing = (1 - right).detach()
    focus = torch.where(present, missing**gamma_positive, missing**gamma_negative)
    return -focus * right.clamp(min=1e-5).log()


def supervised(predictions: QueryPredictions, targets: Targets, ignore_coverage: float) -> Bool[Tensor, "r b q"]:
    """Where the targets say what a query should predict.

    A query with an object should say "yes". Another one should say "no" if its category is annotated in the image or
    counts as absent there, unless its box lies inside an ignored box of that category.
    """
    complete = (targets.annotated | targets.absent).gather(1, predictions.category.clamp(min=0))
    negative = complete & ~_inside_ignored(predictions, targets, ignore_coverage)
    return (predictions.category != NO_OBJECT) & (predictions.positive | negative)


def _inside_ignored(predictions: QueryPredictions, targets: Targets, ignore_coverage: float) -> Bool[Tensor, "r b q"]:
    inside = torch.zeros_like(predictions.positive)
    if targets.ignore_labels.shape[1] == 0:
        return inside
    predicted = cxcywh_to_xyxy(predictions.boxes.detach())
    ignored = cxcywh_to_xyxy(targets.ignore_boxes)
    same = predictions.category.unsqueeze(2) == targets.ignore_labels.unsqueeze(1)
    # image by image, as all queries times all ignored boxes of a batch can be many
    for image in range(len(ignored)):
        covered = pairwise_coverage(predicted[:, image], ignored[image]) >= ignore_coverage
        inside[:, image] = (covered & same[image]).any(-1)
    return inside


def query_losses(
    predictions: QueryPredictions, quality: Float[Tensor, "r b q"], targets: Targets, config: CriterionConfig
) -> Float[Tensor, "r"]:
    """The classification loss of every layer, an unweighted sum over the supervised queries.

    Args:
        predictions: The queries' predictions and targets.
        quality: IoU of every query's box with its object's; used only for queries with an object.
        targets: What is known of the images.
        config: Which loss, and its parameters.
    """
    used = supervised(predictions, targets, config.ignore_coverage)
    # Masked before the loss as well: unsupervised logits may be infinite, and get a gradient of exactly zero.
    logits = predictions.logits.where(used, 0)
    return _each_query(logits, quality, predictions.positive, config).where(used, 0).sum((1, 2))


def _each_query(
    logits: Float[Tensor, "*n"], quality: Float[Tensor, "*n"], positive: Bool[Tensor, "*n"], config: CriterionConfig
) -> Float[Tensor, "*n"]:
    match config.classification:
        case "focal":
            return focal_loss(logits, positive, config.focal_alpha, config.focal_gamma)
        case "quality":
            return varifocal_loss(logits, quality, positive, config.quality_alpha, config.quality_gamma)
        case "matchability":
            return matchability_loss(logits, quality, positive, config.matchability_gamma)


def presence_losses(logits: Float[Tensor, "e b v"], targets: Targets, config: CriterionConfig) -> Float[Tensor, "e"]:
    """The presence loss of every extraction block: summed over categories, divided by the number of images.

    It covers the categories that have an object in the image, and those that are absent from it; not those that
    have only ignored boxes.
    """
    used = targets.present | targets.absent
    present = targets.present.expand(logits.shape)
    logits = logits.float().where(used, 0)
    loss = asymmetric_loss(logits, present, config.presence_gamma_positive, config.presence_gamma_negative)
    return loss.where(used, 0).sum((1, 2)) / logits.shape[1]
