"""The loss of one step: the detector's predictions against the targets."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn

from metr.boxes import cxcywh_to_xyxy, paired_giou, paired_iou
from metr.losses.classification import presence_losses, query_losses
from metr.losses.config import CriterionConfig
from metr.losses.matcher import match_groups
from metr.losses.predictions import (
    QueryPredictions,
    denoising_predictions,
    one_to_many_predictions,
    query_predictions,
)
from metr.structures import Categories, DetectorOutput, Losses, Matches, OneToManyOutput, Targets

Terms = dict[str, Tensor]


class SetCriterion(nn.Module):
    """Presence, classification and box losses of one batch, each a named term, already weighted.

    Terms are called `presence/E` for extraction block E, `presence/shortlist` if the detector has a shortlist, and
    `LAYER/classification`, `LAYER/l1`, `LAYER/giou` for the layers `proposals` (unless places are learned), `decoder.R`
    and, if the detector denoises, `denoising.R`, if it has further queries, `one_to_many.R`; blocks and layers count
    from 0. A batch without objects has all of these terms too, each with gradients to the outputs.
    """

    def __init__(self, config: CriterionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, output: DetectorOutput, targets: Targets, counts: "LossCounts | None" = None
    ) -> tuple[Losses, Matches]:
        """The loss terms, in float32 whatever the precision of the network, and the matches they rest on.

        Args:
            output: Of the detector.
            targets: What it should have been.
            counts: What sums over queries are divided by; by default by the objects of this batch, of all processes.
        """
        predictions = query_predictions(output)
        matches = self.match(predictions, targets)
        return self.losses(output, predictions.matched(matches), targets, counts), matches

    def match(self, predictions: QueryPredictions, targets: Targets) -> Matches:
        """Which query is matched to which object, in every layer."""
        logits, boxes, category = predictions.logits, predictions.boxes, predictions.category
        return match_groups(logits, boxes, category, targets.boxes, targets.labels, self.config)

    def losses(
        self,
        output: DetectorOutput,
        predictions: QueryPredictions,
        targets: Targets,
        counts: "LossCounts | None" = None,
    ) -> Losses:
        """The loss terms, given the matched predictions of proposals and decoder."""
        noised = None if output.denoising is None else denoising_predictions(output.denoising, output.categories)
        objects, noised_objects = counts or LossCounts(*average_over_ranks(_counts(targets, noised)).unbind())

        terms = self._presence(output.categories, targets)
        terms |= self._proposals_and_decoder(predictions, targets, objects, output.proposals is not None)
        if noised is not None:
            terms |= self._denoising(noised, targets, noised_objects)
        if output.one_to_many is not None:
            terms |= self._one_to_many(output.one_to_many, output.categories, targets, objects)
        return Losses(terms=terms)

    def _presence(self, categories: Categories, targets: Targets) -> Terms:
        losses = self.config.weights.presence * presence_losses(categories.presence_logits, targets, self.config)
        terms = {f"presence/{block}": loss for block, loss in enumerate(losses.unbind())}
        if categories.shortlist_logits is not None:
            losses = presence_losses(categories.shortlist_logits.unsqueeze(0), targets, self.config)
            terms["presence/shortlist"] = self.config.weights.presence * losses[0]
        return terms

    def _proposals_and_decoder(
        self, predictions: QueryPredictions, targets: Targets, objects: Float[Tensor, ""], proposed: bool = True
    ) -> Terms:
        layers = [f"decoder.{layer}" for layer in range(len(predictions.logits) - proposed)]
        scale = (1 / objects).repeat(len(predictions.logits))
        if proposed:
            layers = ["proposals", *layers]
            scale[0] *= self.config.weights.proposals
        return self._layer_terms(layers, predictions, targets, scale)

    def _denoising(self, predictions: QueryPredictions, targets: Targets, objects: Float[Tensor, ""]) -> Terms:
        layers = [f"denoising.{layer}" for layer in range(len(predictions.logits))]
        # Divided by the number of positives, so that the number of copies does not change the weight.
        scale = (self.config.weights.denoising / objects).repeat(len(layers))
        return self._layer_terms(layers, predictions, targets, scale)

    def _one_to_many(
        self, output: OneToManyOutput, categories: Categories, targets: Targets, objects: Float[Tensor, ""]
    ) -> Terms:
        predictions = one_to_many_predictions(output, categories)
        matches = self.match(predictions, repeated(targets, output.repeats))
        own = replace(matches, target=matches.target % max(targets.labels.shape[1], 1))
        layers = [f"one_to_many.{layer}" for layer in range(len(predictions.logits))]
        scale = (self.config.weights.one_to_many / (objects * output.repeats)).repeat(len(layers))
        return self._layer_terms(layers, predictions.matched(own), targets, scale)

    def _layer_terms(
        self, layers: Sequence[str], predictions: QueryPredictions, targets: Targets, scale: Float[Tensor, "r"]
    ) -> Terms:
        """Classification and box terms of every layer, multiplied by the layer's `scale`."""
        weights = self.config.weights
        boxes = box_losses(predictions, targets)
        losses = {
            "classification": weights.classification * query_losses(predictions, boxes.iou, targets, self.config),
            "l1": weights.l1 * boxes.l1,
            "giou": weights.giou * boxes.giou,
        }
        return {
            f"{layer}/{kind}": term
            for kind, loss in losses.items()
            for layer, term in zip(layers, (scale * loss).unbind(), strict=True)
        }


def repeated(targets: Targets, times: int) -> Targets:
    """The same with all objects again and again: object m comes back as m + (their number), and so on."""
    return replace(targets, boxes=targets.boxes.repeat(1, times, 1), labels=targets.labels.repeat(1, times))


class LossCounts(NamedTuple):
    """What sums over queries are divided by: a number of objects, and of positive denoising queries."""

    objects: Float[Tensor, ""]
    noised_objects: Float[Tensor, ""]


class BoxLosses(NamedTuple):
    """Box losses of every layer, unweighted sums over the queries with an object.

    `l1` compares cxcywh, `giou` is one minus the generalised IoU. `iou` is the detached IoU of every query's box with
    that of its object; it means nothing for queries without an object.
    """

    l1: Float[Tensor, "r"]
    giou: Float[Tensor, "r"]
    iou: Float[Tensor, "r b q"]


def box_losses(predictions: QueryPredictions, targets: Targets) -> BoxLosses:
    """Compares the boxes of queries with those of their objects."""
    positive = predictions.positive
    wanted = targets.boxes_of(predictions.target)
    # Where there is no object the prediction is replaced: it may be anything, and gets a gradient of exactly zero.
    predicted = predictions.boxes.where(positive.unsqueeze(-1), wanted)
    l1 = (predicted - wanted).abs().sum(-1)
    corners, wanted_corners = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)
    giou = 1 - paired_giou(corners, wanted_corners)
    return BoxLosses(
        l1=l1.where(positive, 0).sum((1, 2)),
        giou=giou.where(positive, 0).sum((1, 2)),
        iou=paired_iou(corners.detach(), wanted_corners),
    )


def _counts(targets: Targets, noised: QueryPredictions | None) -> Int[Tensor, "2"]:
    """How many objects the batch has, and how many positive denoising queries."""
    objects = targets.is_object.sum()
    noised_objects = torch.zeros_like(objects) if noised is None else noised.positive[0].sum()
    return torch.stack([objects, noised_objects])


def average_over_ranks(counts: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """What each process divides its sums by, so that their mean over processes is the loss of all images together.

    This is the count of all processes, at least one, divided by their number; a single process keeps its own.
    """
    total = counts.to(torch.float32, copy=True)
    if not (distributed.is_available() and distributed.is_initialized()):
        return total.clamp(min=1)
    distributed.all_reduce(total)
    return total.clamp(min=1) / distributed.get_world_size()
