"""Which categories get slots: the K most likely; in training the present ones always."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metr.models.config import CategoryConfig
from metr.structures import Categories, Targets


def select_categories(
    categories: Categories, config: CategoryConfig, targets: Sequence[Targets] | None = None
) -> Categories:
    """The categories with at most `kept` slots an image, in ascending order of their ids, empty slots last.

    Without targets, categories below the threshold take no slot. With targets, present categories come first, and of
    the others those that are annotated, with at most `negative_slots` of those presumed absent: of the rest nothing can
    be learnt in this image.
    """
    scores = categories.presence_logits[-1].detach().float()
    if targets is None:
        scores = scores.masked_fill(scores.sigmoid() < config.threshold, -torch.inf)
    else:
        scores = _with_truth(scores, targets, config.negative_slots)
    best, ids = scores.topk(min(config.kept, scores.shape[1]), dim=1)
    valid = best > -torch.inf
    order = ids.masked_fill(~valid, scores.shape[1]).argsort(dim=1)
    valid = valid.gather(1, order)
    return replace(categories, ids=ids.gather(1, order).masked_fill(~valid, 0), valid=valid)


def _with_truth(scores: Float[Tensor, "b v"], targets: Sequence[Targets], negative_slots: int) -> Float[Tensor, "b v"]:
    present = torch.stack([_present(target, scores.shape[1]) for target in targets])
    allowed = torch.stack([target.annotated for target in targets]) | present
    if negative_slots:
        unannotated = torch.stack([target.assumed_negatives for target in targets]) & ~allowed
        allowed = allowed | _best(scores.masked_fill(~unannotated, -torch.inf), negative_slots)
    # names that were not shortlisted are at -inf, and stay there
    lowest = scores.masked_fill(scores.isneginf(), torch.inf).amin(dim=1, keepdim=True)
    ahead = scores.amax(dim=1, keepdim=True) - lowest + 1
    return (scores + ahead * present).masked_fill(~allowed, -torch.inf)


def _best(scores: Float[Tensor, "b v"], number: int) -> Bool[Tensor, "b v"]:
    """Where each row's `number` highest finite scores are."""
    best, index = scores.topk(min(number, scores.shape[1]), dim=1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, best > -torch.inf)


def _present(target: Targets, words: int) -> Bool[Tensor, "v"]:
    present = torch.zeros(words, dtype=torch.bool, device=target.labels.device)
    present[target.labels] = True
    return present
