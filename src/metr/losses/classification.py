"""Is this an object of my category? Is this category in the image? Losses of both answers, and who is asked."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from metr.boxes import cxcywh_to_xyxy, pairwise_coverage
from metr.losses.config import CriterionConfig
from metr.losses.padded_targets import NO_OBJECT, PaddedTargets, QueryPredictions


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
    """Varifocal loss (Zhang et al., 2021): a positive's target and weight are its quality, negatives are focal."""
    wanted = quality.where(positive, 0)
    weight = torch.where(positive, wanted, alpha * logits.detach().sigmoid() ** gamma)
    return weight * binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def matchability_loss(
    logits: Float[Tensor, "*n"], quality: Float[Tensor, "*n"], positive: Bool[Tensor, "*n"], gamma: float
) -> Float[Tensor, "*n"]:
    """Matchability-aware loss (Huang et al., 2025): poor positives count fully, towards their quality to a power."""
    wanted = (quality**gamma).where(positive, 0)
    weight = torch.where(positive, 1, logits.detach().sigmoid() ** gamma)
    return weight * binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def focal_cost(logits: Float[Tensor, "*n"], alpha: float, gamma: float) -> Float[Tensor, "*n"]:
    """What it would cost each query, in focal loss, to stand for an object instead of for none."""
    probability = logits.sigmoid()
    as_object = alpha * (1 - probability) ** gamma * -(probability + 1e-8).log()
    as_none = (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    return as_object - as_none


def asymmetric_loss(
    logits: Float[Tensor, "*n"], present: Bool[Tensor, "*n"], gamma_positive: float, gamma_negative: float
) -> Float[Tensor, "*n"]:
    """Asymmetric loss of each presence logit (Ridnik et al., 2021), without shifted negatives.

    Logarithms are cut at 1e-5; the focusing weights carry no gradient.
    """
    probability = logits.sigmoid()
    right = torch.where(present, probability, 1 - probability)
    missing = (1 - right).detach()
    focus = torch.where(present, missing**gamma_positive, missing**gamma_negative)
    return -focus * right.clamp(min=1e-5).log()


def known(answers: QueryPredictions, truth: PaddedTargets, ignore_coverage: float) -> Bool[Tensor, "r b q"]:
    """Where it is known what a query should say.

    A query that stands for an object should say "yes". "No" is known only of the categories that are annotated in the
    image or presumed absent, and not of a box that lies inside an ignored box of the query's category.
    """
    asked = answers.category != NO_OBJECT
    complete = (truth.annotated | truth.absent).gather(1, answers.category.clamp(min=0))
    absent = complete & ~_inside_ignored(answers, truth, ignore_coverage)
    return asked & (answers.positive | absent)


def _inside_ignored(answers: QueryPredictions, truth: PaddedTargets, ignore_coverage: float) -> Bool[Tensor, "r b q"]:
    inside = torch.zeros_like(answers.positive)
    if truth.ignore_labels.shape[1] == 0:
        return inside
    predicted = cxcywh_to_xyxy(answers.boxes.detach())
    ignored = cxcywh_to_xyxy(truth.ignore_boxes)
    same = answers.category.unsqueeze(2) == truth.ignore_labels.unsqueeze(1)
    for image in range(len(ignored)):
        share = pairwise_coverage(predicted[:, image].flatten(0, 1), ignored[image])
        covered = share.view(*inside[:, image].shape, -1) >= ignore_coverage
        inside[:, image] = (covered & same[image]).any(-1)
    return inside


def query_losses(
    answers: QueryPredictions, quality: Float[Tensor, "r b q"], truth: PaddedTargets, config: CriterionConfig
) -> Float[Tensor, "r"]:
    """The classification loss of every layer, summed over the queries whose answer is known, unweighted.

    Args:
        answers: What the queries said and were asked.
        quality: IoU of every query's box with its object's; read where a query stands for an object.
        truth: What is known of the images.
        config: Which loss, and its parameters.
    """
    asked = known(answers, truth, config.ignore_coverage)
    # Masked before as well as after: what is not asked may be infinite, and has a gradient of exactly zero.
    logits = answers.logits.where(asked, 0)
    return _each_query(logits, quality, answers.positive, config).where(asked, 0).sum((1, 2))


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


def presence_losses(
    logits: Float[Tensor, "e b v"], truth: PaddedTargets, config: CriterionConfig
) -> Float[Tensor, "e"]:
    """The presence loss of every extraction block, summed over categories and divided by the number of images.

    Asked are the categories that an image is known to show, and those that are annotated or presumed absent there; not
    those of which only ignored boxes are there.
    """
    asked = truth.present | truth.absent
    present = truth.present.expand(logits.shape)
    logits = logits.float().where(asked, 0)
    loss = asymmetric_loss(logits, present, config.presence_gamma_positive, config.presence_gamma_negative)
    return loss.where(asked, 0).sum((1, 2)) / logits.shape[1]
