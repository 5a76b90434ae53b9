"""How far the boxes of queries are from those of their objects."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from metr.boxes import cxcywh_to_xyxy, paired_giou, paired_iou
from metr.losses.padded_targets import PaddedTargets, QueryPredictions


class BoxLosses(NamedTuple):
    """Box losses of every layer, summed over the queries that stand for an object, unweighted.

    `l1` is on cxcywh, `giou` is one minus the generalised IoU. `iou` is that of every query's box with its object's,
    detached; it means nothing where a query stands for no object.
    """

    l1: Float[Tensor, "r"]
    giou: Float[Tensor, "r"]
    iou: Float[Tensor, "r b q"]


def box_losses(answers: QueryPredictions, truth: PaddedTargets) -> BoxLosses:
    """Compares the boxes of queries with those of the objects that they stand for."""
    positive = answers.positive
    wanted = truth.boxes_of(answers.target)
    # Where there is no object the prediction is replaced: it may be anything, and has a gradient of exactly zero.
    predicted = answers.boxes.where(positive.unsqueeze(-1), wanted)
    l1 = (predicted - wanted).abs().sum(-1)
    corners, wanted_corners = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)
    giou = 1 - paired_giou(corners, wanted_corners)
    return BoxLosses(
        l1=l1.where(positive, 0).sum((1, 2)),
        giou=giou.where(positive, 0).sum((1, 2)),
        iou=paired_iou(corners.detach(), wanted_corners),
    )
