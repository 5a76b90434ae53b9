"""The loss of one step: what the detector answered against what is known of the images."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn

from metr.losses.box import box_losses
from metr.losses.classification import presence_losses, query_losses
from metr.losses.config import CriterionConfig
from metr.losses.matcher import match_groups
from metr.losses.padded_targets import (
    PaddedTargets,
    QueryPredictions,
    denoising_predictions,
    matched_predictions,
    query_categories,
    supervised_layers,
)
from metr.structures import Categories, DetectorOutput, Losses, Matches, Targets

Terms = dict[str, Tensor]


class SetCriterion(nn.Module):
    """Presence, classification and box losses of one batch, each a named term, already weighted.

    Terms are called `presence/E` for extraction block E, `presence/shortlist` if the detector has a shortlist, and
    `LAYER/classification`, `LAYER/l1`, `LAYER/giou` for the layers `proposals`, `decoder.R` and, if the detector
    denoises, `denoising.R`; blocks and layers count from 0. All of them exist, and reach the network's outputs, in a
    batch without any object too.
    """

    def __init__(self, config: CriterionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, output: DetectorOutput, targets: Sequence[Targets], matches: Matches | None = None) -> Losses:
        """The loss terms, in float32 whatever the precision of the network.

        Args:
            output: The detector's answer.
            targets: What is known of each image.
            matches: Those of `match`, if the caller needs them besides; made here otherwise.
        """
        truth = PaddedTargets.of(targets)
        answers = matched_predictions(output, self._match(output, truth) if matches is None else matches)
        copies = None if output.denoising is None else denoising_predictions(output.denoising, output.categories)
        objects, copied = average_over_ranks(_counts(truth, copies)).unbind()

        terms = self._presence(output.categories, truth)
        terms |= self._proposals_and_decoder(answers, truth, objects)
        if copies is not None:
            terms |= self._denoising(copies, truth, copied)
        return Losses(terms=terms)

    def match(self, output: DetectorOutput, targets: Sequence[Targets]) -> Matches:
        """Which query stands for which object; layer 0 is the proposals, layer R + 1 the decoder's layer R."""
        return self._match(output, PaddedTargets.of(targets))

    def _match(self, output: DetectorOutput, truth: PaddedTargets) -> Matches:
        category = query_categories(output.slot, output.valid, output.categories)
        return match_groups(*supervised_layers(output), category, truth.boxes, truth.labels, self.config)

    def _presence(self, categories: Categories, truth: PaddedTargets) -> Terms:
        losses = self.config.weights.presence * presence_losses(categories.presence_logits, truth, self.config)
        terms = {f"presence/{block}": loss for block, loss in enumerate(losses.unbind())}
        if categories.shortlist_logits is not None:
            asked = categories.shortlist_logits.unsqueeze(0)
            terms["presence/shortlist"] = self.config.weights.presence * presence_losses(asked, truth, self.config)[0]
        return terms

    def _proposals_and_decoder(
        self, answers: QueryPredictions, truth: PaddedTargets, objects: Float[Tensor, ""]
    ) -> Terms:
        layers = ["proposals", *(f"decoder.{layer}" for layer in range(len(answers.logits) - 1))]
        scale = (1 / objects).repeat(len(layers))
        scale[0] *= self.config.weights.proposals
        return self._judged(layers, answers, truth, scale)

    def _denoising(self, answers: QueryPredictions, truth: PaddedTargets, copies: Float[Tensor, ""]) -> Terms:
        layers = [f"denoising.{layer}" for layer in range(len(answers.logits))]
        # Divided by the copies of objects, so that how many there are changes no balance.
        scale = (self.config.weights.denoising / copies).repeat(len(layers))
        return self._judged(layers, answers, truth, scale)

    def _judged(
        self, layers: Sequence[str], answers: QueryPredictions, truth: PaddedTargets, scale: Float[Tensor, "r"]
    ) -> Terms:
        """Classification and box terms of each layer, every layer's multiplied by its `scale`."""
        weights = self.config.weights
        boxes = box_losses(answers, truth)
        losses = {
            "classification": weights.classification * query_losses(answers, boxes.iou, truth, self.config),
            "l1": weights.l1 * boxes.l1,
            "giou": weights.giou * boxes.giou,
        }
        return {
            f"{layer}/{kind}": term
            for kind, loss in losses.items()
            for layer, term in zip(layers, (scale * loss).unbind(), strict=True)
        }


def _counts(truth: PaddedTargets, copies: QueryPredictions | None) -> Int[Tensor, "2"]:
    """How many objects the batch has, and how many positive denoising queries."""
    copied = torch.zeros_like(truth.objects) if copies is None else copies.positive[0].sum()
    return torch.stack([truth.objects, copied])


def average_over_ranks(counts: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Counts averaged over all processes of a distributed run (the counts themselves elsewhere), at least one each."""
    average = counts.to(torch.float32, copy=True)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(average)
        average = average / distributed.get_world_size()
    return average.clamp(min=1)
