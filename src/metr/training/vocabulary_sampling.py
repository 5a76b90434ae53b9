"""Which names a training step uses, where the vocabulary is too large to use all of them."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metr.structures import NO_OBJECT, Targets

# Above any rank in a list of names.
_NEVER = torch.inf


def sample_vocabulary(targets: Targets, limit: int, generator: torch.Generator | None = None) -> Int[Tensor, "n"]:
    """The rows of the vocabulary that a step uses, in ascending order; at least one.

    All present names come first, even if they are more than the limit. Then negatives are sampled from the annotated
    names, in rounds: in each round every image adds one of its own names at random. If room is left, names that are
    assumed to be absent are sampled in the same way. Names of which nothing is known in any image teach nothing, and
    are left out.

    The loss of the sampled negatives is not scaled up. Presence losses are sums over names, so a smaller sample gives
    negatives less weight against what is present.

    Args:
        targets: What is known of the images, in terms of the whole vocabulary.
        limit: Largest number of names; 0, or the size of the vocabulary, takes all of them and samples nothing.
        generator: Source of the random numbers, on the CPU; by default torch's own.
    """
    images, vocabulary_size = targets.annotated.shape
    device = targets.annotated.device
    if not 0 < limit < vocabulary_size:
        return torch.arange(vocabulary_size, device=device)
    present = targets.present.any(0)
    lots = torch.rand(3, images, vocabulary_size, generator=generator).to(device)
    # a name of which only ignored boxes are there is no negative
    annotated = _rounds(targets.annotated & ~targets.ignored, lots[0])
    assumed = _rounds(targets.assumed_negative & ~targets.ignored, lots[1]) + vocabulary_size
    # lots are below 1: they order the names of one round
    priority = torch.stack([annotated, assumed]).amin(dim=(0, 1)) + lots[2, 0]
    priority = priority.masked_fill(present, -1)
    number = max(limit, int(present.sum()))
    best, rows = priority.topk(number, largest=False)
    chosen = rows[best < _NEVER].sort().values
    return chosen if len(chosen) else rows[:1]


def _rounds(members: Bool[Tensor, "b v"], lots: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
    """The round in which each image adds each of its members, if it adds them in the order of their lots."""
    order = lots.masked_fill(~members, 2).argsort(dim=1)
    return order.argsort(dim=1).float().masked_fill(~members, _NEVER)


def narrowed(targets: Targets, rows: Int[Tensor, "n"]) -> Targets:
    """The targets in terms of those rows of the vocabulary alone; objects of other rows become padding."""
    # the last place is that of padding, which label -1 finds
    place = torch.full((targets.annotated.shape[1] + 1,), NO_OBJECT, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    return replace(
        targets,
        labels=place[targets.labels],
        ignore_labels=place[targets.ignore_labels],
        annotated=targets.annotated[:, rows],
        assumed_negative=targets.assumed_negative[:, rows],
    )
