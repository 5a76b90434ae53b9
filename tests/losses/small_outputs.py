"""Small random outputs and targets, for the tests of matching and losses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from metr.structures import Categories, DenoisingOutput, DenoisingPlan, DetectorOutput, Proposals, Targets

WIDTH = 4


def random_boxes(*shape: int) -> Tensor:
    """cxcywh boxes, sound but not always inside the image."""
    return torch.cat([torch.rand(*shape, 2), 0.05 + 0.45 * torch.rand(*shape, 2)], dim=-1)


def image_targets(
    labels: Sequence[int],
    vocabulary: int,
    *,
    annotated: Sequence[int] | None = None,
    ignore: Sequence[tuple[int, tuple[float, float, float, float]]] = (),
) -> Targets:
    """Objects of the given labels at random places; every category annotated unless said otherwise."""
    known = torch.zeros(1, vocabulary, dtype=torch.bool)
    known[0, list(range(vocabulary)) if annotated is None else list(annotated)] = True
    return Targets(
        boxes=random_boxes(1, len(labels)),
        labels=torch.tensor([labels], dtype=torch.long),
        ignore_boxes=torch.tensor([box for _, box in ignore]).reshape(1, -1, 4),
        ignore_labels=torch.tensor([[label for label, _ in ignore]], dtype=torch.long),
        annotated=known,
        assumed_negative=torch.zeros_like(known),
    )


def random_output(
    kept: Sequence[Sequence[int]],
    slots: Sequence[Sequence[int]],
    *,
    vocabulary: int,
    layers: int = 2,
    blocks: int = 2,
    denoising: DenoisingPlan | None = None,
) -> DetectorOutput:
    """An output with leaf tensors that want gradients.

    `kept` lists each image's categories, `slots` each query's slot (-1: not valid); rows may differ in length.
    """
    images, k, q = len(kept), max(map(len, kept)), max(map(len, slots))
    ids = torch.tensor([[*row, *[0] * (k - len(row))] for row in kept]).reshape(images, k)
    kept_valid = torch.tensor([[True] * len(row) + [False] * (k - len(row)) for row in kept]).reshape(images, k)
    slot = torch.tensor([[*row, *[-1] * (q - len(row))] for row in slots]).reshape(images, q)
    valid, slot = slot >= 0, slot.clamp(min=0)
    categories = Categories(
        presence_logits=torch.randn(blocks, images, vocabulary).requires_grad_(),
        text=torch.randn(vocabulary, WIDTH),
        tokens=torch.randn(images, vocabulary, WIDTH),
        ids=ids,
        valid=kept_valid,
    )
    proposals = Proposals(
        logits=torch.randn(images, q).requires_grad_(),
        boxes=random_boxes(images, q).requires_grad_(),
        place=torch.zeros(images, q, dtype=torch.long),
        slot=slot,
        rank=torch.arange(q).expand(images, q),
        valid=valid,
    )
    return DetectorOutput(
        logits=torch.randn(layers, images, q).requires_grad_(),
        boxes=random_boxes(layers, images, q).requires_grad_(),
        slot=slot,
        valid=valid,
        categories=categories,
        proposals=proposals,
        denoising=None if denoising is None else random_denoising(denoising, layers),
    )


def random_denoising(plan: DenoisingPlan, layers: int) -> DenoisingOutput:
    """Random predictions for a plan."""
    return DenoisingOutput(
        logits=torch.randn(layers, *plan.slot.shape).requires_grad_(),
        boxes=random_boxes(layers, *plan.slot.shape).requires_grad_(),
        plan=plan,
    )


def denoising_plan(rows: Sequence[Sequence[tuple[int, int, bool]]]) -> DenoisingPlan:
    """A plan from (slot, target, positive) of each query, rows padded with invalid ones."""
    n = max(map(len, rows))
    filled = [[*((*query, True) for query in row), *[(0, 0, False, False)] * (n - len(row))] for row in rows]
    table = torch.tensor(filled, dtype=torch.long).reshape(len(rows), n, 4)
    slot, target, positive, valid = table.unbind(-1)
    return DenoisingPlan(slot=slot, target=target, positive=positive.bool(), valid=valid.bool())
