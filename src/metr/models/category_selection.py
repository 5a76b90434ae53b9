"""Which categories get slots: the K most likely; in training the present ones always."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metr.structures import Categories, Targets


def select_categories(categories: Categories, kept: int, targets: Sequence[Targets] | None = None) -> Categories:
    """The categories with at most `kept` slots an image, in ascending order of their ids, empty slots last.

    With targets, present categories come first and only annotated ones may take a slot: of the others nothing can be
    learnt in this image.
    """
    scores = categories.presence_logits[-1].detach().float()
    if targets is not None:
        scores = _with_truth(scores, targets)
    best, ids = scores.topk(min(kept, scores.shape[1]), dim=1)
    valid = best > -torch.inf
    order = ids.masked_fill(~valid, scores.shape[1]).argsort(dim=1)
    valid = valid.gather(1, order)
    return replace(categories, ids=ids.gather(1, order).masked_fill(~valid, 0), valid=valid)


def _with_truth(scores: Float[Tensor, "b v"], targets: Sequence[Targets]) -> Float[Tensor, "b v"]:
    present = torch.stack([_present(target, scores.shape[1]) for target in targets])
    annotated = torch.stack([target.annotated for target in targets]) | present
    ahead = scores.amax(dim=1, keepdim=True) - scores.amin(dim=1, keepdim=True) + 1
    return (scores + ahead * present).masked_fill(~annotated, -torch.inf)


def _present(target: Targets, words: int) -> Bool[Tensor, "v"]:
    present = torch.zeros(words, dtype=torch.bool, device=target.labels.device)
    present[target.labels] = True
    return present
