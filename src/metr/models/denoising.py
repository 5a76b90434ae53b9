"""Contrastive denoising (DINO) inside category groups, with copies that carry the wrong category on purpose.

Each object is shown to the decoder as a slightly moved box (which must answer "yes" and find the object), as a box
moved too far ("no"), and as the right box under another annotated category that has no object there ("no"): what
binary classification must learn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from metr.boxes import cxcywh_to_xyxy, pairwise_coverage, pairwise_iou, xyxy_to_cxcywh
from metr.models.class_queries import token_of
from metr.models.config import DenoisingConfig
from metr.structures import Categories, DenoisingPlan, Queries, Targets

# a category counts as present in a box where one of its own objects overlaps it by more than this IoU
_SAME_PLACE = 0.3


class _Copies(NamedTuple):
    """The noised copies of one image's objects, in one row."""

    boxes: Float[Tensor, "n 4"]
    slot: Int[Tensor, "n"]
    group: Int[Tensor, "n"]
    target: Int[Tensor, "n"]
    positive: Bool[Tensor, "n"]
    valid: Bool[Tensor, "n"]


class Denoising(nn.Module):
    """Builds the denoising queries of a batch; only training calls it."""

    def __init__(self, width: int, config: DenoisingConfig) -> None:
        super().__init__()
        self.config = config
        self.learned = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.learned)

    def forward(self, targets: Sequence[Targets], categories: Categories) -> tuple[Queries, DenoisingPlan]:
        """Queries of [b n] and what each must answer; at least one (invalid) query, so that nothing is unused."""
        copies = [self._copies(*image) for image in zip(targets, categories.ids, categories.valid, strict=True)]
        boxes, slot, group, target, positive, valid = (
            pad_sequence(list(parts), batch_first=True) for parts in zip(*copies, strict=True)
        )
        queries = Queries(
            content=self.learned + token_of(categories, slot),
            reference_boxes=boxes,
            slot=slot,
            group=group.masked_fill(~valid, -1),
            valid=valid,
        )
        return queries, DenoisingPlan(slot=slot, target=target, positive=positive, valid=valid)

    @torch.no_grad()
    def _copies(self, target: Targets, ids: Int[Tensor, "k"], valid: Bool[Tensor, "k"]) -> _Copies:
        """The copies of one image: `versions` rounds of (moved, moved too far, wrong category)."""
        kinds = self.config.kinds
        own = (target.labels.unsqueeze(1) == ids) & valid
        index = own.any(1).nonzero().squeeze(1)
        index = index[torch.randperm(len(index), device=index.device)][: self.config.number // kinds]
        if not len(index):
            return _nothing(target)
        versions = max(1, min(self.config.number // (kinds * len(index)), self.config.groups))
        boxes = target.boxes[index]
        slots = own[index].int().argmax(1)
        unannotated, possible = self._flipped(index, target, ids, valid)
        slot = [slots, slots] + ([unannotated] if self.config.flips else [])
        sure = torch.ones_like(possible)
        shown = [sure, sure] + ([possible] if self.config.flips else [])
        kind = repeat(torch.arange(kinds, device=index.device), "kind -> (g kind m)", g=versions, m=len(index))
        every_slot = repeat(torch.stack(slot), "kind m -> (g kind m)", g=versions)
        round_ = repeat(torch.arange(versions, device=index.device), "g -> (g n)", n=kinds * len(index))
        noised = self._noised(repeat(boxes, "m x -> (g kind m) x", g=versions, kind=kinds), kind)
        return _Copies(
            boxes=noised,
            slot=every_slot,
            group=(1 + round_) * len(ids) + every_slot,
            target=repeat(index, "m -> (g kind m)", g=versions, kind=kinds),
            positive=kind == 0,
            valid=repeat(torch.stack(shown), "kind m -> (g kind m)", g=versions),
        )

    def _noised(self, boxes: Float[Tensor, "n 4"], kind: Int[Tensor, "n"]) -> Float[Tensor, "n 4"]:
        """Each corner moved, by up to `box_noise` half sizes; by one to two times that for what must answer "no".

        Flipped copies (kind 2) keep nearly the right box: a fifth of the noise.
        """
        size = torch.rand_like(boxes) + (kind == 1).unsqueeze(1)
        size = size * torch.where(kind == 2, 0.2, 1.0).unsqueeze(1)
        sign = torch.randint_like(boxes, 2) * 2 - 1
        half = (boxes[:, 2:] / 2).repeat(1, 2)
        corners = cxcywh_to_xyxy(boxes) + size * sign * half * self.config.box_noise
        low, high = torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])
        return xyxy_to_cxcywh(torch.cat([low, high], dim=1).clamp(0, 1))

    def _flipped(
        self, index: Int[Tensor, "m"], target: Targets, ids: Int[Tensor, "k"], valid: Bool[Tensor, "k"]
    ) -> tuple[Int[Tensor, "m"], Bool[Tensor, "m"]]:
        """For each object the slot of a random category that has no object there, and whether there is one."""
        corners = cxcywh_to_xyxy(target.boxes[index])
        near = pairwise_iou(corners, cxcywh_to_xyxy(target.boxes)) > _SAME_PLACE
        crowded = pairwise_coverage(corners, cxcywh_to_xyxy(target.ignore_boxes)) > _SAME_PLACE
        occupied = _any_of(near, target.labels, ids) | _any_of(crowded, target.ignore_labels, ids)
        # an object without area does not even overlap itself
        occupied = occupied | (target.labels[index].unsqueeze(1) == ids)
        free = valid & target.annotated[ids] & ~occupied
        lot = torch.rand(free.shape, device=free.device).masked_fill(~free, -1.0)
        return lot.argmax(1), free.any(1)


def _any_of(there: Bool[Tensor, "m o"], labels: Int[Tensor, "o"], ids: Int[Tensor, "k"]) -> Bool[Tensor, "m k"]:
    """Whether any of the objects that are there carries the category of a slot."""
    carries = rearrange(labels, "o -> o 1") == ids
    return (there.float() @ carries.float()) > 0


def _nothing(target: Targets) -> _Copies:
    """One invalid query: an image without objects takes part without saying anything."""
    zero = target.labels.new_zeros(1)
    box = target.boxes.new_full((1, 4), 0.5)
    return _Copies(box, zero, zero, zero, zero.bool(), zero.bool())
