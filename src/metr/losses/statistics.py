"""How matching went, for the training log."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metr.boxes import cxcywh_to_xyxy, paired_iou
from metr.losses.padded_targets import NO_OBJECT, PaddedTargets
from metr.structures import DetectorOutput, Matches, Targets


@dataclass(frozen=True, kw_only=True)
class MatchStatistics:
    """Figures of one batch, detached and left on their device.

    `iou` is the last layer's mean over its matches (0 where there is none). Of all `objects`, the category of
    `without_slot` was not kept in their image, and `crowded_out` found every query of their category taken.
    """

    iou: Float[Tensor, ""]
    objects: Int[Tensor, ""]
    without_slot: Int[Tensor, ""]
    crowded_out: Int[Tensor, ""]


@torch.no_grad()
def match_statistics(output: DetectorOutput, targets: Sequence[Targets], matches: Matches) -> MatchStatistics:
    """Figures of a batch's matches, as `SetCriterion.match` gives them."""
    truth = PaddedTargets.of(targets)
    last = matches.layer == len(output.logits)
    image, query, target = matches.image[last], matches.query[last], matches.target[last]
    iou = paired_iou(cxcywh_to_xyxy(output.boxes[-1, image, query].float()), cxcywh_to_xyxy(truth.boxes[image, target]))
    kept = output.categories.ids.where(output.categories.valid, NO_OBJECT)
    has_slot = (truth.labels.unsqueeze(2) == kept.unsqueeze(1)).any(2)
    without_slot = ((truth.labels != NO_OBJECT) & ~has_slot).sum()
    return MatchStatistics(
        iou=iou.sum() / max(len(iou), 1),
        objects=truth.objects,
        without_slot=without_slot,
        crowded_out=truth.objects - without_slot - len(iou),
    )
