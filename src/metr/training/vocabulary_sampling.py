"""Which names a step of training asks for, where the vocabulary is too large to ask for all."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metr.structures import Targets

# Above any rank in a list of names.
_NEVER = torch.inf


def sample_vocabulary(
    targets: Sequence[Targets], limit: int, generator: torch.Generator | None = None
) -> Int[Tensor, "n"]:
    """The rows of the vocabulary that a batch is asked for, in ascending order; at least one.

    First the names that the batch shows, all of them, be they more than the limit. Then negatives: names that are
    annotated, drawn so that every image has its say (in each round each image names one of its own at random). If room
    is left, names that are presumed absent in an image, drawn in the same manner. Names of which nothing is known in
    any image would teach nothing, and are left out.

    The loss of drawn negatives is not scaled up for those that were not drawn: presence losses are sums over names, so
    the fewer are drawn, the less negatives weigh against what is present.

    Args:
        targets: What is known of the images, in terms of the whole vocabulary.
        limit: Most names; 0 or the vocabulary's number takes all of them, and draws nothing.
        generator: Of the random numbers, on the CPU; by default torch's own.
    """
    annotated = torch.stack([target.annotated for target in targets])
    words, device = annotated.shape[1], annotated.device
    if not 0 < limit < words:
        return torch.arange(words, device=device)
    presumed = torch.stack([target.assumed_negatives for target in targets])
    present = torch.zeros_like(annotated[0])
    for image, target in enumerate(targets):
        present[target.labels] = True
        # of what only ignored boxes show, nothing is asked
        annotated[image, target.ignore_labels] = False
        presumed[image, target.ignore_labels] = False
    lots = torch.rand(3, *annotated.shape, generator=generator).to(device)
    turns = torch.stack([_turns(annotated, lots[0]), _turns(presumed, lots[1]) + words])
    # the lot, below 1, orders names of one turn
    priority = turns.amin(dim=(0, 1)) + lots[2, 0]
    priority = priority.masked_fill(present, -1)
    number = max(limit, int(present.sum()))
    best, rows = priority.topk(number, largest=False)
    chosen = rows[best < _NEVER].sort().values
    return chosen if len(chosen) else rows[:1]


def _turns(members: Bool[Tensor, "b v"], lots: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
    """In which round an image names each of its members, if it names them in the order of their lots."""
    order = lots.masked_fill(~members, 2).argsort(dim=1)
    return order.argsort(dim=1).float().masked_fill(~members, _NEVER)


def narrowed(targets: Sequence[Targets], rows: Int[Tensor, "n"]) -> tuple[Targets, ...]:
    """The targets in terms of those rows of the vocabulary alone; what concerns other rows is left out."""
    return tuple(_narrowed(target, rows) for target in targets)


def _narrowed(target: Targets, rows: Int[Tensor, "n"]) -> Targets:
    place = torch.full_like(target.annotated, -1, dtype=torch.int64)
    place[rows] = torch.arange(len(rows), device=rows.device)
    labels, ignore_labels = place[target.labels], place[target.ignore_labels]
    here, ignored = labels >= 0, ignore_labels >= 0
    return replace(
        target,
        boxes=target.boxes[here],
        labels=labels[here],
        annotated=target.annotated[rows],
        ignore_boxes=target.ignore_boxes[ignored],
        ignore_labels=ignore_labels[ignored],
        assumed_negative=target.assumed_negatives[rows],
    )
