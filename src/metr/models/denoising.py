"""Contrastive denoising (DINO) inside category groups, with copies that carry a wrong category on purpose.

The decoder is shown each object three times: as a slightly moved box, for which it should say "yes" and find the
object; as a box moved too far, for which it should say "no"; and as the right box under another annotated category that
has no object there, for which it should also say "no".
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from metr.boxes import cxcywh_to_xyxy, pairwise_coverage, pairwise_iou, xyxy_to_cxcywh
from metr.models.config import DenoisingConfig
from metr.structures import Categories, DenoisingPlan, Queries, Targets, gather_rows

# A category is present in a box above this IoU with one of its objects, or this coverage by its ignored boxes.
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
    """Makes the denoising queries of a batch, in training only."""

    def __init__(self, width: int, config: DenoisingConfig) -> None:
        super().__init__()
        self.config = config
        self.learned = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.learned)

    def forward(self, targets: Targets, categories: Categories) -> tuple[Queries, DenoisingPlan]:
        """The queries and what they should predict; at least one (invalid) query, so that all weights get gradients."""
        own = (targets.labels.unsqueeze(2) == categories.ids.unsqueeze(1)) & categories.valid.unsqueeze(1)
        free = _free_slots(targets, categories)
        generators = _generators(targets)
        copies = [self._copies(*image) for image in zip(targets.boxes, own, free, generators, strict=True)]
        boxes, slot, group, target, positive, valid = (
            pad_sequence(list(parts), batch_first=True) for parts in zip(*copies, strict=True)
        )
        queries = Queries(
            content=self.learned + gather_rows(categories.kept_tokens, slot),
            reference_boxes=boxes,
            slot=slot,
            group=group.masked_fill(~valid, -1),
            valid=valid,
        )
        return queries, DenoisingPlan(slot=slot, target=target, positive=positive, valid=valid)

    @torch.no_grad()
    def _copies(
        self,
        boxes: Float[Tensor, "m 4"],
        own: Bool[Tensor, "m k"],
        free: Bool[Tensor, "m k"],
        random: torch.Generator | None,
    ) -> _Copies:
        """The copies of one image's objects: in every version each object is moved, moved too far, and flipped.

        Args:
            boxes: The objects.
            own: True at the slot of each object's category.
            free: True at slots whose category a flipped copy may get.
            random: Draws the noise; None is torch's own generator.
        """
        kinds = self.config.kinds
        index = own.any(1).nonzero().squeeze(1)
        index = index[torch.randperm(len(index), generator=random, device=index.device)][: self.config.number // kinds]
        if not len(index):
            return _no_copies(boxes)
        versions = max(1, min(self.config.number // (kinds * len(index)), self.config.groups))
        slots = own[index].int().argmax(1)
        lot = torch.rand(free[index].shape, generator=random, device=free.device).masked_fill(~free[index], -1.0)
        flipped, possible = lot.argmax(1), free[index].any(1)
        slot = [slots, slots] + ([flipped] if self.config.flips else [])
        sure = torch.ones_like(possible)
        shown = [sure, sure] + ([possible] if self.config.flips else [])
        kind = repeat(torch.arange(kinds, device=index.device), "kind -> (g kind m)", g=versions, m=len(index))
        every_slot = repeat(torch.stack(slot), "kind m -> (g kind m)", g=versions)
        version = repeat(torch.arange(versions, device=index.device), "g -> (g n)", n=kinds * len(index))
        noised = self._noised(repeat(boxes[index], "m x -> (g kind m) x", g=versions, kind=kinds), kind, random)
        return _Copies(
            boxes=noised,
            slot=every_slot,
            group=(1 + version) * own.shape[1] + every_slot,
            target=repeat(index, "m -> (g kind m)", g=versions, kind=kinds),
            positive=kind == 0,
            valid=repeat(torch.stack(shown), "kind m -> (g kind m)", g=versions),
        )

    def _noised(
        self, boxes: Float[Tensor, "n 4"], kind: Int[Tensor, "n"], random: torch.Generator | None
    ) -> Float[Tensor, "n 4"]:
        """Boxes whose corners are moved at random, by up to `box_noise` half sides of the box.

        Boxes that are moved too far (kind 1) get one to two times that noise, flipped ones (kind 2) a fifth of it.
        """
        drawn: dict[str, Any] = {"generator": random, "dtype": boxes.dtype, "device": boxes.device}
        size = torch.rand(boxes.shape, **drawn) + (kind == 1).unsqueeze(1)
        size = size * torch.where(kind == 2, 0.2, 1.0).unsqueeze(1)
        sign = torch.randint(2, boxes.shape, **drawn) * 2 - 1
        half = (boxes[:, 2:] / 2).repeat(1, 2)
        corners = cxcywh_to_xyxy(boxes) + size * sign * half * self.config.box_noise
        low, high = torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])
        return xyxy_to_cxcywh(torch.cat([low, high], dim=1).clamp(0, 1))


def _generators(targets: Targets) -> Sequence[torch.Generator | None]:
    """What draws the noise of each image: a generator of its own where it has a seed."""
    if not targets.noise_seeds:
        return [None] * len(targets.boxes)
    return [torch.Generator(targets.boxes.device).manual_seed(seed) for seed in targets.noise_seeds]


@torch.no_grad()
def _free_slots(targets: Targets, categories: Categories) -> Bool[Tensor, "b m k"]:
    """True where a slot holds an annotated category that has no object where object m is."""
    corners = cxcywh_to_xyxy(targets.boxes)
    near = pairwise_iou(corners, corners) > _SAME_PLACE
    crowded = pairwise_coverage(corners, cxcywh_to_xyxy(targets.ignore_boxes)) > _SAME_PLACE
    ids = categories.ids.unsqueeze(1)
    own = targets.labels.unsqueeze(2) == ids
    # A box without area has IoU 0 with itself, so the object's own category is excluded too.
    occupied = own | _any_of(near, own) | _any_of(crowded, targets.ignore_labels.unsqueeze(2) == ids)
    return (categories.valid & targets.annotated.gather(1, categories.ids)).unsqueeze(1) & ~occupied


def _any_of(there: Bool[Tensor, "b m o"], carries: Bool[Tensor, "b o k"]) -> Bool[Tensor, "b m k"]:
    """True where any box o that overlaps object m has the category of slot k."""
    return (there.float() @ carries.float()) > 0


def _no_copies(boxes: Float[Tensor, "_m 4"]) -> _Copies:
    """One invalid query, for an image without objects to show."""
    zero = torch.zeros(1, dtype=torch.int64, device=boxes.device)
    return _Copies(boxes.new_full((1, 4), 0.5), zero, zero, zero, zero.bool(), zero.bool())
