"""Group bipartite matching: objects are matched only to queries of their own category, in all layers at once."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metr.boxes import cxcywh_to_xyxy, paired_giou, paired_iou
from metr.losses.classification import focal_cost
from metr.losses.config import CriterionConfig
from metr.structures import NO_OBJECT, DetectorOutput, Matches, Targets

_logger = logging.getLogger(__name__)

_WORST = 1e8
"""Replaces costs that are not finite: above all others, and small enough for exact sums in float64."""


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """All pairs of a query and an object that may match, ordered by image, category, query and object.

    So the pairs of one group (a category of an image) are a contiguous matrix [queries objects]. `starts_group` and
    `starts_query` are True at the first pair of each group and of each query.
    """

    image: Int[Tensor, "p"]
    query: Int[Tensor, "p"]
    target: Int[Tensor, "p"]
    starts_group: Bool[Tensor, "p"]
    starts_query: Bool[Tensor, "p"]


@torch.no_grad()
def match_groups(
    logits: Float[Tensor, "r b q"],
    boxes: Float[Tensor, "r b q 4"],
    category: Int[Tensor, "b q"],
    target_boxes: Float[Tensor, "b m 4"],
    target_labels: Int[Tensor, "b m"],
    config: CriterionConfig,
) -> Matches:
    """The matching of least total cost inside every group (layer, image, category).

    A group with n queries and m objects has min(n, m) matches, so all layers have the same number of them. Matches are
    ordered by layer, image, category and query.

    Args:
        logits: One logit for each query in each layer.
        boxes: The queries' cxcywh boxes in each layer.
        category: The category that each query looks for; negative for empty queries.
        target_boxes: cxcywh boxes of the objects.
        target_labels: Their categories; negative on padding.
        config: Factors of the costs, and the focal parameters.
    """
    pairs = _pairs(category, target_labels)
    costs = _costs(logits.float(), boxes.float(), pairs, target_boxes, config)
    # one transfer that the host does not wait for
    layer, pair = torch.from_numpy(np.stack(_assign(costs, pairs))).to(costs.device, non_blocking=True)
    return Matches(layer=layer, image=pairs.image[pair], query=pairs.query[pair], target=pairs.target[pair])


def _pairs(category: Int[Tensor, "b q"], labels: Int[Tensor, "b m"]) -> _Pairs:
    labels = labels.unsqueeze(1)
    may_match = (category.unsqueeze(2) == labels) & (labels > NO_OBJECT)
    image, query, target = may_match.nonzero().unbind(1)
    label = category[image, query]
    order = label.argsort(stable=True)
    order = order[image[order].argsort(stable=True)]
    image, query, target, label = image[order], query[order], target[order], label[order]
    starts_group = _changes(image) | _changes(label)
    return _Pairs(
        image=image,
        query=query,
        target=target,
        starts_group=starts_group,
        starts_query=starts_group | _changes(query),
    )


def _changes(values: Int[Tensor, "p"]) -> Bool[Tensor, "p"]:
    """True where a value differs from the one before it, and at the first."""
    changes = torch.ones_like(values, dtype=torch.bool)
    changes[1:] = values[1:] != values[:-1]
    return changes


def _costs(
    logits: Float[Tensor, "r b q"],
    boxes: Float[Tensor, "r b q 4"],
    pairs: _Pairs,
    target_boxes: Float[Tensor, "b m 4"],
    config: CriterionConfig,
) -> Float[Tensor, "r p"]:
    predicted = boxes[:, pairs.image, pairs.query]
    wanted = target_boxes.float()[pairs.image, pairs.target].expand_as(predicted)
    classification = focal_cost(logits, config.focal_alpha, config.focal_gamma)[:, pairs.image, pairs.query]
    l1 = (predicted - wanted).abs().sum(-1)
    giou = paired_giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
    weights = config.costs
    return weights.classification * classification + weights.l1 * l1 - weights.giou * giou


def _assign(costs: Float[Tensor, "r p"], pairs: _Pairs) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Layer and pair of each match. Costs and the bounds of the groups go to the CPU in one transfer."""
    packed = torch.cat([costs, torch.stack([pairs.starts_group, pairs.starts_query]).to(costs.dtype)])
    host = packed.cpu().numpy()
    matrix, starts_group, starts_query = _finite(host[:-2]), host[-2], host[-1]
    starts = np.flatnonzero(starts_group)
    if len(starts) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    queries = np.add.reduceat(starts_query, starts).astype(np.int64)
    sizes = np.diff(starts, append=matrix.shape[1])
    chosen = [
        start + _assign_group(matrix[:, start : start + size].reshape(len(matrix), count, -1))
        for start, size, count in zip(starts.tolist(), sizes.tolist(), queries.tolist(), strict=True)
    ]
    pair = np.concatenate(chosen, axis=1)
    layer = np.repeat(np.arange(len(matrix)), pair.shape[1])
    return layer, pair.reshape(-1)


def _assign_group(costs: Float[np.ndarray, "r queries objects"]) -> Int[np.ndarray, "r n"]:
    """Indices of the matched cells in one group's flattened cost matrices, ascending."""
    layers, queries, objects = costs.shape
    if min(queries, objects) == 1:  # most groups: the cheapest pair, the first of equal ones as in scipy
        best: Int[np.ndarray, "r"] = costs.reshape(layers, -1).argmin(axis=1)
        return best[:, None]
    assigned = (linear_sum_assignment(layer) for layer in costs)
    return np.stack([rows * objects + columns for rows, columns in assigned])


def _finite(costs: Float[np.ndarray, "r p"]) -> Float[np.ndarray, "r p"]:
    finite = np.isfinite(costs)
    if finite.all():
        return costs
    _logger.warning("%d of %d matching costs are not finite: their pairs go last", (~finite).sum(), finite.size)
    return np.where(finite, costs, _WORST)


@dataclass(frozen=True, kw_only=True)
class MatchStatistics:
    """How well a batch was matched, for the training log. Detached, on the device of the output.

    `iou` is the mean IoU of the last layer's matches (0 if there are none). Of all `objects`, `without_slot` counts
    those whose category has no slot in their image, and `crowded_out` those for which no query of their category was
    left.
    """

    iou: Float[Tensor, ""]
    objects: Int[Tensor, ""]
    without_slot: Int[Tensor, ""]
    crowded_out: Int[Tensor, ""]


@torch.no_grad()
def match_statistics(output: DetectorOutput, targets: Targets, matches: Matches) -> MatchStatistics:
    """Statistics of a batch's matches."""
    # all layers have the same number of matches, and the last layer's come last
    layers = len(output.logits) + (output.proposals is not None)
    first = matches.layer.shape[0] // layers * (layers - 1)
    image, query, target = matches.image[first:], matches.query[first:], matches.target[first:]
    boxes, wanted = output.boxes[-1, image, query].float(), targets.boxes[image, target]
    iou = paired_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    kept = output.categories.ids.where(output.categories.valid, NO_OBJECT)
    has_slot = (targets.labels.unsqueeze(2) == kept.unsqueeze(1)).any(2)
    objects, without_slot = targets.is_object.sum(), (targets.is_object & ~has_slot).sum()
    return MatchStatistics(
        iou=iou.sum() / max(len(iou), 1),
        objects=objects,
        without_slot=without_slot,
        crowded_out=objects - without_slot - len(iou),
    )
