"""What is known of a batch as padded tensors, and what each query is asked."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metr.structures import Categories, DenoisingOutput, DetectorOutput, Matches, Targets

NO_OBJECT = -1
"""In `labels` padding, in `category` "asked for nothing", in `target` "no object"."""


@dataclass(frozen=True, kw_only=True)
class PaddedTargets:
    """The targets of a batch, padded to one number of objects (at least one) and of ignored boxes.

    `labels` and `ignore_labels` are `NO_OBJECT` on padding, whose boxes are arbitrary but sound. `absent` is annotated
    or     presumed absent, and has neither object nor ignored box in the image; `present` has an object there.
    """

    boxes: Float[Tensor, "b m 4"]
    labels: Int[Tensor, "b m"]
    ignore_boxes: Float[Tensor, "b i 4"]
    ignore_labels: Int[Tensor, "b i"]
    annotated: Bool[Tensor, "b v"]
    present: Bool[Tensor, "b v"]
    absent: Bool[Tensor, "b v"]

    @staticmethod
    def of(targets: Sequence[Targets]) -> "PaddedTargets":
        """Pads the targets of the batch's images."""
        annotated = torch.stack([target.annotated for target in targets])
        present = torch.zeros_like(annotated)
        absent = annotated | torch.stack([target.assumed_negatives for target in targets])
        for image, target in enumerate(targets):
            # ignored boxes alone: a crowd, or the sliver that a crop left of an object
            absent[image, target.ignore_labels] = False
            absent[image, target.labels] = False
            present[image, target.labels] = True
        boxes, labels = _padded([(target.boxes, target.labels) for target in targets], at_least=1)
        ignored = _padded([(target.ignore_boxes, target.ignore_labels) for target in targets], at_least=0)
        return PaddedTargets(
            boxes=boxes,
            labels=labels,
            ignore_boxes=ignored[0],
            ignore_labels=ignored[1],
            annotated=annotated,
            present=present,
            absent=absent,
        )

    @property
    def objects(self) -> Int[Tensor, ""]:
        """The number of objects in the batch."""
        return (self.labels != NO_OBJECT).sum()

    def boxes_of(self, target: Int[Tensor, "r b q"]) -> Float[Tensor, "r b q 4"]:
        """The boxes of the objects that queries answer for (arbitrary ones for `NO_OBJECT`)."""
        image = torch.arange(target.shape[1], device=target.device).unsqueeze(-1)
        return self.boxes[image, target.clamp(min=0)]


def _padded(
    images: Sequence[tuple[Float[Tensor, "_ 4"], Int[Tensor, "_"]]], at_least: int
) -> tuple[Float[Tensor, "b m 4"], Int[Tensor, "b m"]]:
    first_boxes, first_labels = images[0]
    longest = max(at_least, *(len(labels) for _, labels in images))
    boxes = first_boxes.new_full((len(images), longest, 4), 0.5, dtype=torch.float32)
    labels = first_labels.new_full((len(images), longest), NO_OBJECT)
    for row, (image_boxes, image_labels) in enumerate(images):
        boxes[row, : len(image_boxes)] = image_boxes
        labels[row, : len(image_labels)] = image_labels
    return boxes, labels


@dataclass(frozen=True, kw_only=True)
class QueryPredictions:
    """What queries answered at every judged layer, beside what they were asked, in float32.

    `category` is the row of the vocabulary that a query looks for, or `NO_OBJECT`. `target` is the object of its image
    that it stands for, or `NO_OBJECT` where it should say "no".
    """

    logits: Float[Tensor, "r b q"]
    boxes: Float[Tensor, "r b q 4"]
    category: Int[Tensor, "b q"]
    target: Int[Tensor, "r b q"]

    @property
    def positive(self) -> Bool[Tensor, "r b q"]:
        """Where a query stands for an object."""
        return self.target != NO_OBJECT


def query_categories(
    slot: Int[Tensor, "b q"], valid: Bool[Tensor, "b q"], categories: Categories
) -> Int[Tensor, "b q"]:
    """The row of the vocabulary that each query looks for; `NO_OBJECT` where query or slot is empty."""
    slot = slot.clamp(min=0)
    asked = valid & categories.valid.gather(1, slot)
    return categories.ids.gather(1, slot).where(asked, NO_OBJECT)


def supervised_layers(output: DetectorOutput) -> tuple[Float[Tensor, "r b q"], Float[Tensor, "r b q 4"]]:
    """Logits and boxes of the proposals (layer 0) and of every decoder layer, in float32."""
    logits = torch.cat([output.proposals.logits.unsqueeze(0), output.logits])
    boxes = torch.cat([output.proposals.boxes.unsqueeze(0), output.boxes])
    return logits.float(), boxes.float()


def matched_predictions(output: DetectorOutput, matches: Matches) -> QueryPredictions:
    """The answers of proposals and decoder, each asked for the object that it was matched to."""
    logits, boxes = supervised_layers(output)
    target = torch.full(logits.shape, NO_OBJECT, dtype=matches.target.dtype, device=logits.device)
    target[matches.layer, matches.image, matches.query] = matches.target
    category = query_categories(output.slot, output.valid, output.categories)
    return QueryPredictions(logits=logits, boxes=boxes, category=category, target=target)


def denoising_predictions(denoising: DenoisingOutput, categories: Categories) -> QueryPredictions:
    """The answers to denoising queries, each asked for the object that it was made from, or for "no"."""
    plan = denoising.plan
    category = query_categories(plan.slot, plan.valid, categories)
    target = plan.target.where(plan.positive & (category != NO_OBJECT), NO_OBJECT)
    return QueryPredictions(
        logits=denoising.logits.float(),
        boxes=denoising.boxes.float(),
        category=category,
        target=target.expand(denoising.logits.shape),
    )
