"""Contrastive denoising (DINO) inside category groups, with copies that carry a wrong category on purpose.

The decoder is shown each object three times: as a slightly moved box, for which it should say "yes" and find the
object; as a box moved too far, for which it should say "no"; and as a slightly moved box under another annotated
category that has no object there, for which it should also say "no".
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metr.boxes import cxcywh_to_xyxy, pairwise_coverage, pairwise_iou, xyxy_to_cxcywh
from metr.models.config import DenoisingConfig
from metr.structures import Categories, DenoisingPlan, Queries, Targets, gather_rows

# A category is present in a box above this IoU with one of its objects, or this coverage by its ignored boxes.
_SAME_PLACE = 0.3
# The kinds of copies.
_MOVED, _TOO_FAR, _FLIPPED = range(3)


class _Copies(NamedTuple):
    """The noised copies of every image's objects, in one row an image."""

    boxes: Float[Tensor, "b n 4"]
    slot: Int[Tensor, "b n"]
    group: Int[Tensor, "b n"]
    target: Int[Tensor, "b n"]
    positive: Bool[Tensor, "b n"]
    valid: Bool[Tensor, "b n"]


class _Drawn(NamedTuple):
    """Random numbers in 0..1: which way and how far corners move, which slots flipped copies get, who is shown."""

    size: Float[Tensor, "b n 4"]
    direction: Float[Tensor, "b n 4"]
    slots: Float[Tensor, "b c k"]
    objects: Float[Tensor, "b m"]


class Denoising(nn.Module):
    """Makes the denoising queries of a batch, in training only.

    No shape depends on values on the device, so nothing here makes the host wait for it.
    """

    def __init__(self, width: int, config: DenoisingConfig) -> None:
        super().__init__()
        self.config = config
        self.learned = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.learned)

    def forward(self, targets: Targets, categories: Categories) -> tuple[Queries, DenoisingPlan]:
        """The queries and what they should predict; at least one (invalid) query, so that all weights get gradients."""
        copies = self._copies(targets, categories) if targets.labels.shape[1] else _no_copies(targets.boxes)
        queries = Queries(
            content=self.learned + gather_rows(categories.kept_tokens, copies.slot),
            reference_boxes=copies.boxes,
            slot=copies.slot,
            group=copies.group.masked_fill(~copies.valid, -1),
            valid=copies.valid,
        )
        plan = DenoisingPlan(slot=copies.slot, target=copies.target, positive=copies.positive, valid=copies.valid)
        return queries, plan

    @torch.no_grad()
    def positives(self, targets: Targets) -> Int[Tensor, "b"]:
        """How many copies of each image will be positives, provided that the names of all objects get slots."""
        shown = targets.is_object.sum(1).clamp(max=self._most)
        return shown * self._versions(shown)

    @torch.no_grad()
    def _copies(self, targets: Targets, categories: Categories) -> _Copies:
        """The copies of each image's objects: in every version each object is moved, moved too far, and flipped.

        Versions follow each other in a row, in a version the kinds, in a kind the objects.
        """
        own = (targets.labels.unsqueeze(2) == categories.ids.unsqueeze(1)) & categories.valid.unsqueeze(1)
        has_slot = own.any(2)
        drawn = self._drawn(targets, own.shape[2])
        # the objects that are shown, in the order of their lots; after them come objects that are not
        rank = (has_slot.cumsum(1) - 1).clamp(min=0)
        lots = drawn.objects.gather(1, rank).masked_fill(~has_slot, 2.0)
        shown = lots.argsort(dim=1)[:, : self._most]
        version, kind, place, valid = self._layout(has_slot.sum(1, keepdim=True), has_slot.shape[1])
        target = shown.gather(1, place)

        free = _free_slots(targets, categories).gather(1, shown.unsqueeze(2).expand(-1, -1, own.shape[2]))
        lots = drawn.slots[:, : shown.shape[1]].masked_fill(~free, -1.0)
        flipped = kind == _FLIPPED
        slot = lots.argmax(2).gather(1, place).where(flipped, own.int().argmax(2).gather(1, target))
        boxes = self._noised(gather_rows(targets.boxes, target), kind, drawn)
        free_there = free.any(2).gather(1, place) & ~_has_category(boxes, categories.ids.gather(1, slot), targets)
        valid = valid & (free_there | ~flipped)
        return _Copies(
            boxes=boxes,
            slot=slot,
            group=(1 + version) * own.shape[2] + slot,
            target=target,
            positive=(kind == _MOVED) & valid,
            valid=valid,
        )

    @property
    def _most(self) -> int:
        """The largest number of objects of an image that are shown."""
        return self.config.number // self.config.kinds

    def _layout(
        self, objects: Int[Tensor, "b 1"], most: int
    ) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"], Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Version, kind and object of each copy, and whether it exists; objects are counted from 0.

        Args:
            objects: How many objects of each image have a slot.
            most: The largest number that these may be, which decides n.
        """
        kinds, number = self.config.kinds, self.config.number
        counts = range(1, min(most, self._most) + 1)
        width = max(kinds * count * max(1, min(number // (kinds * count), self.config.groups)) for count in counts)
        index = torch.arange(width, device=objects.device)
        shown = objects.clamp(max=self._most)
        count, versions = shown.clamp(min=1), self._versions(shown)
        version, rest = index // (kinds * count), index % (kinds * count)
        return version, rest // count, rest % count, (version < versions) & (shown > 0)

    def _versions(self, shown: Int[Tensor, "*b"]) -> Int[Tensor, "*b"]:
        """How often each object is shown where so many are."""
        return (self.config.number // (self.config.kinds * shown.clamp(min=1))).clamp(1, self.config.groups)

    def _noised(self, boxes: Float[Tensor, "b n 4"], kind: Int[Tensor, "b n"], drawn: _Drawn) -> Float[Tensor, "b n 4"]:
        """Boxes whose corners are moved at random, by up to `box_noise` half sides of the box.

        Boxes that are moved too far get one to two times that noise, flipped ones `flip_noise` times it.
        """
        number = boxes.shape[1]
        size = drawn.size[:, :number] + (kind == _TOO_FAR).unsqueeze(2)
        size = size * torch.where(kind == _FLIPPED, self.config.flip_noise, 1.0).unsqueeze(2)
        sign = torch.where(drawn.direction[:, :number] < 0.5, -1.0, 1.0)
        half = (boxes[..., 2:] / 2).repeat(1, 1, 2)
        corners = cxcywh_to_xyxy(boxes) + size * sign * half * self.config.box_noise
        low, high = torch.minimum(corners[..., :2], corners[..., 2:]), torch.maximum(corners[..., :2], corners[..., 2:])
        return xyxy_to_cxcywh(torch.cat([low, high], dim=-1).clamp(0, 1))

    def _drawn(self, targets: Targets, slots: int) -> _Drawn:
        """The random numbers of a batch: of each image by its own seed where there are seeds.

        They are drawn on the CPU then, so that all devices get the same ones. An image's do not depend on how many
        objects others have: what depends on that is drawn last.
        """
        images, objects = targets.labels.shape
        number, most, device = self.config.number, self._most, targets.boxes.device
        sizes = [number * 4, number * 4, most * slots, objects]
        if targets.noise_seeds:
            generators = [torch.Generator().manual_seed(seed) for seed in targets.noise_seeds]
            rows = torch.stack([torch.rand(sum(sizes), generator=one, device="cpu") for one in generators])
            drawn = rows.to(device, non_blocking=True)
        else:
            drawn = torch.rand(images, sum(sizes), device=device)
        size, direction, chosen, shown = torch.split(drawn, sizes, dim=1)
        return _Drawn(
            size=size.reshape(images, number, 4),
            direction=direction.reshape(images, number, 4),
            slots=chosen.reshape(images, most, slots),
            objects=shown,
        )


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


def _has_category(boxes: Float[Tensor, "b n 4"], label: Int[Tensor, "b n"], targets: Targets) -> Bool[Tensor, "b n"]:
    """True where a box has moved to an object, or into a crowd, of the category that it claims."""
    corners = cxcywh_to_xyxy(boxes)
    near = pairwise_iou(corners, cxcywh_to_xyxy(targets.boxes)) > _SAME_PLACE
    crowded = pairwise_coverage(corners, cxcywh_to_xyxy(targets.ignore_boxes)) > _SAME_PLACE
    same, ignored = (label.unsqueeze(2) == rows.unsqueeze(1) for rows in (targets.labels, targets.ignore_labels))
    return (near & same).any(2) | (crowded & ignored).any(2)


def _any_of(there: Bool[Tensor, "b m o"], carries: Bool[Tensor, "b o k"]) -> Bool[Tensor, "b m k"]:
    """True where any box o that overlaps object m has the category of slot k."""
    return (there.float() @ carries.float()) > 0


def _no_copies(boxes: Float[Tensor, "b _m 4"]) -> _Copies:
    """One invalid query an image, for a batch without objects."""
    zero = torch.zeros(len(boxes), 1, dtype=torch.int64, device=boxes.device)
    nowhere = boxes.new_full((len(boxes), 1, 4), 0.5)
    return _Copies(nowhere, zero, zero, zero, zero.bool(), zero.bool())
