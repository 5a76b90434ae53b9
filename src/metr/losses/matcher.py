"""Group bipartite matching: an object is matched only to queries of its own category, in every layer at once."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metr.boxes import cxcywh_to_xyxy, paired_giou
from metr.losses.classification import focal_cost
from metr.losses.config import CriterionConfig
from metr.losses.padded_targets import NO_OBJECT
from metr.structures import Matches

_logger = logging.getLogger(__name__)

_WORST = 1e8
"""Cost of a pair whose own is not a number: above any other, and small enough for exact sums in double precision."""


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """The pairs that may match, group after group; in a group query after query, and the objects of each in order.

    A group, one category of one image, is therefore one contiguous matrix [queries objects] of pairs. `starts_group`
    and `starts_query` mark the first pair of each.
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
    """The assignment of least cost inside every group (layer, image, category).

    As many pairs are matched as the smaller side of a group has members. Matches come ordered by layer, image,
    category and query. Layers share their pairs, so that every layer has equally many matches.

    Args:
        logits: One logit a query and judged layer.
        boxes: cxcywh boxes of the same.
        category: What each query looks for; negative: nothing.
        target_boxes: cxcywh boxes of the objects.
        target_labels: Their categories; negative: padding.
        config: Factors of the costs, and the focal parameters.
    """
    pairs = _pairs(category, target_labels)
    costs = _costs(logits.float(), boxes.float(), pairs, target_boxes, config)
    layer, pair = (torch.from_numpy(index).to(costs.device) for index in _assign(costs, pairs))
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
    """Where a value differs from the one before."""
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
    """Layers and pairs of the matches. What the host must know travels with the costs, in one transfer."""
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
    """The matched cells of one group's matrices, counted row by row, in ascending order."""
    layers, queries, objects = costs.shape
    if min(queries, objects) == 1:  # most groups: the best one takes it, the first of equals as in scipy
        best: Int[np.ndarray, "r"] = costs.reshape(layers, -1).argmin(axis=1)
        return best[:, None]
    assigned = (linear_sum_assignment(layer) for layer in costs)
    return np.stack([rows * objects + columns for rows, columns in assigned])


def _finite(costs: Float[np.ndarray, "r p"]) -> Float[np.ndarray, "r p"]:
    finite = np.isfinite(costs)
    if finite.all():
        return costs
    _logger.warning("%d of %d matching costs are not finite: they are matched last", (~finite).sum(), finite.size)
    return np.where(finite, costs, _WORST)
