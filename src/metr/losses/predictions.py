"""What the queries of a batch predicted, beside what they should have predicted."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metr.structures import NO_OBJECT, Categories, DenoisingOutput, DetectorOutput, Matches, OneToManyOutput


@dataclass(frozen=True, kw_only=True)
class QueryPredictions:
    """The predictions of queries in every supervised layer, in float32.

    `category` is the row of the vocabulary that a query looks for, or `NO_OBJECT` for an empty query. `target` is the
    index of the object, in its image, that a query should predict, or `NO_OBJECT` where it should say "no".
    """

    logits: Float[Tensor, "r b q"]
    boxes: Float[Tensor, "r b q 4"]
    category: Int[Tensor, "b q"]
    target: Int[Tensor, "r b q"]

    @property
    def positive(self) -> Bool[Tensor, "r b q"]:
        """Where a query should predict an object."""
        return self.target != NO_OBJECT

    def matched(self, matches: Matches) -> "QueryPredictions":
        """The same, with the matched objects as targets."""
        target = torch.full_like(self.target, NO_OBJECT)
        target[matches.layer, matches.image, matches.query] = matches.target
        return replace(self, target=target)


def query_predictions(output: DetectorOutput) -> QueryPredictions:
    """The predictions of every decoder layer, not yet matched to any object; those of proposals come first."""
    logits, boxes = output.logits, output.boxes
    if output.proposals is not None:
        logits = torch.cat([output.proposals.logits.unsqueeze(0), logits])
        boxes = torch.cat([output.proposals.boxes.unsqueeze(0), boxes])
    logits = logits.float()
    return QueryPredictions(
        logits=logits,
        boxes=boxes.float(),
        category=query_categories(output.slot, output.valid, output.categories),
        target=torch.full(logits.shape, NO_OBJECT, device=logits.device),
    )


def denoising_predictions(denoising: DenoisingOutput, categories: Categories) -> QueryPredictions:
    """The predictions of denoising queries; their targets are the objects that they were made from, if positive."""
    plan = denoising.plan
    category = query_categories(plan.slot, plan.valid, categories)
    target = plan.target.where(plan.positive & (category != NO_OBJECT), NO_OBJECT)
    return QueryPredictions(
        logits=denoising.logits.float(),
        boxes=denoising.boxes.float(),
        category=category,
        target=target.expand(denoising.logits.shape),
    )


def one_to_many_predictions(output: OneToManyOutput, categories: Categories) -> QueryPredictions:
    """The predictions of the queries of which several are matched to one object, not yet matched to any."""
    return QueryPredictions(
        logits=output.logits.float(),
        boxes=output.boxes.float(),
        category=query_categories(output.slot, output.valid, categories),
        target=torch.full(output.logits.shape, NO_OBJECT, device=output.logits.device),
    )


def query_categories(
    slot: Int[Tensor, "b q"], valid: Bool[Tensor, "b q"], categories: Categories
) -> Int[Tensor, "b q"]:
    """The row of the vocabulary that each query looks for; `NO_OBJECT` where the query or its slot is empty."""
    slot = slot.clamp(min=0)
    used = valid & categories.valid.gather(1, slot)
    return categories.ids.gather(1, slot).where(used, NO_OBJECT)
