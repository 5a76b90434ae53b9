"""The baseline that METR is measured against: one closed head over the concatenated labels of all datasets.

Backbone, encoder, decoder, denoising and losses are METR's; what differs is what METR changes. Queries look for
anything, their classification is a linear layer over the labels of all datasets side by side, matching is over the
whole image, and whatever an image's dataset does not annotate is absent from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from metr.boxes import cxcywh_to_xyxy, paired_giou
from metr.losses.classification import focal_cost
from metr.losses.criterion import LossCounts, SetCriterion
from metr.losses.predictions import QueryPredictions
from metr.models.backbones import build_backbone
from metr.models.config import DetectorConfig
from metr.models.decoder import Decoder
from metr.models.denoising import Denoising
from metr.models.encoders import build_encoder
from metr.models.heads import BoxHead
from metr.models.proposals import anchor_logits, side_by_side
from metr.structures import (
    NO_OBJECT,
    Categories,
    DenoisingPlan,
    DetectorOutput,
    Losses,
    Matches,
    Memory,
    Proposals,
    Queries,
    Targets,
)
from metr.text.vocabulary import Vocabulary

PRIOR = 0.01


@dataclass(frozen=True, kw_only=True)
class ClosedSetOutput(DetectorOutput):
    """METR's answers with each query's best label, and beside them what every label's are.

    Layer 0 of `every_logits` and `every_boxes` is the proposals. `denoised` are logits, boxes and plan of the denoising
    queries.
    """

    every_logits: Float[Tensor, "j b q c"]
    every_boxes: Float[Tensor, "j b q 4"]
    denoised: tuple[Tensor, Tensor, DenoisingPlan] | None


class ClassHead(nn.Linear):
    """Label logits of a query's feature."""

    def __init__(self, width: int, labels: int) -> None:
        super().__init__(width, labels)
        nn.init.constant_(self.bias, float(np.log(PRIOR / (1 - PRIOR))))

    def forward(self, features: Tensor) -> Tensor:
        """[... c] logits of [... d] features."""
        logits: Tensor = super().forward(features)
        return logits


class ClosedSetDetector(nn.Module):
    """The closed-set detector.

    In training it is called like METR's network; in evaluation too, with rows of the identity for text: row n stands
    for the n-th of `names`, whose logit is the highest of the labels that are called so.

    Args:
        config: METR's, as far as it applies.
        labels: The name of each concatenated label.
        names: The names that evaluation asks for.
    """

    name_of_label: Tensor

    def __init__(self, config: DetectorConfig, labels: Sequence[str], names: Sequence[str]) -> None:
        super().__init__()
        width, self.number = config.width, config.queries.number
        self.backbone = build_backbone(config.backbone)
        self.encoder = build_encoder(self.backbone.channels, width, config.encoder)
        self.feature, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.classes, self.box = ClassHead(width, len(labels)), BoxHead(width)
        self.learned, self.place = nn.Embedding(self.number, width), nn.Linear(width, width)
        self.label = nn.Embedding(len(labels), width)
        plain = config.denoising.model_copy(update={"flips": False})
        self.denoising = Denoising(width, plain) if config.denoising.number else None
        self.decoder = Decoder(width, self.encoder.levels, config.decoder, PRIOR, text_width=1)
        self.decoder.similarity = ClassHead(width, len(labels))
        self.register_buffer("name_of_label", torch.tensor([list(names).index(name) for name in labels]))

    def forward(
        self, images: Tensor, padding_mask: Tensor, text: Float[Tensor, "v t"], targets: Targets | None = None
    ) -> ClosedSetOutput | DetectorOutput:
        """Predictions for the criterion in training, and as METR gives them in evaluation."""
        memory = self.encoder(self.backbone(images), padding_mask)
        categories = self._categories(len(images))
        logits, boxes, queries = self._proposals(memory)
        if not self.training or targets is None or self.denoising is None:
            decoded = self.decoder(queries, memory)
            denoised = None
        else:
            noised, plan = self.denoising(targets, categories)
            # one group a version of the objects, whatever their labels
            noised = replace(noised, group=torch.where(noised.valid, noised.group // len(self.name_of_label), -1))
            decoded = self.decoder(side_by_side(queries, noised), memory)
            copies = decoded.rows(self.number)
            denoised = (self.decoder.similarity(copies.features), copies.boxes, plan)
        found = decoded.rows(0, self.number)
        every_logits = torch.cat([logits.unsqueeze(0), self.decoder.similarity(found.features)])
        every_boxes = torch.cat([boxes.unsqueeze(0), found.boxes])
        best = every_logits.amax(-1)
        output = ClosedSetOutput(
            logits=best[1:],
            boxes=every_boxes[1:],
            slot=queries.slot,
            valid=queries.valid,
            categories=categories,
            proposals=_proposed(best[0], boxes, queries.slot, queries.valid),
            every_logits=every_logits,
            every_boxes=every_boxes,
            denoised=denoised,
        )
        return output if self.training else self._as_answers(output, text)

    def _proposals(self, memory: Memory) -> tuple[Tensor, Tensor, Queries]:
        """Label logits and boxes of the likeliest places, and the queries that start there."""
        anchors, usable = anchor_logits(memory)
        features = self.norm(self.feature(memory.tokens * usable.unsqueeze(-1)))
        with torch.no_grad():
            places = self.classes(features).amax(-1).masked_fill(~usable, -torch.inf).topk(self.number).indices
        features = features.gather(1, repeat(places, "b q -> b q d", d=features.shape[-1]))
        boxes = self.box(features, anchors.gather(1, repeat(places, "b q -> b q x", x=4)))
        zero = torch.zeros_like(places)
        queries = Queries(
            content=self.learned.weight + self.place(features.detach()),
            reference_boxes=boxes.detach(),
            slot=zero,
            group=zero,
            valid=torch.ones_like(places, dtype=torch.bool),
        )
        return self.classes(features), boxes, queries

    def _categories(self, batch: int) -> Categories:
        """Every label in a slot of its own; its token is the label's embedding, which denoising reads."""
        labels = self.label.weight
        ids = torch.arange(len(labels), device=labels.device).expand(batch, -1)
        return Categories(
            presence_logits=labels.new_zeros(1, batch, len(labels)),
            text=labels,
            tokens=labels.expand(batch, -1, -1),
            ids=ids,
            valid=torch.ones_like(ids, dtype=torch.bool),
        )

    def _as_answers(self, output: ClosedSetOutput, text: Float[Tensor, "v t"]) -> DetectorOutput:
        """The best pairs of query and name as METR's answers; a name is present as far as its best query says."""
        logits = output.every_logits[-1]
        of_names = logits.new_full((*logits.shape[:2], text.shape[1]), -torch.inf)
        of_names = of_names.scatter_reduce(2, self.name_of_label.expand_as(logits), logits, "amax")
        asked = of_names[..., text.argmax(1)]
        batch, names = len(asked), asked.shape[-1]
        best, pair = rearrange(asked, "b q v -> b (q v)").topk(min(300, asked[0].numel()))
        query, slot = pair // names, pair % names
        boxes = output.boxes[-1].gather(1, repeat(query, "b q -> b q x", x=4))
        ids, valid = torch.arange(names, device=slot.device).expand(batch, -1), torch.ones_like(slot, dtype=torch.bool)
        categories = Categories(
            presence_logits=asked.amax(1).unsqueeze(0),
            text=text,
            tokens=text.expand(batch, -1, -1),
            ids=ids,
            valid=torch.ones_like(ids, dtype=torch.bool),
        )
        return DetectorOutput(
            logits=best.unsqueeze(0),
            boxes=boxes.unsqueeze(0),
            slot=slot,
            valid=valid,
            categories=categories,
            proposals=_proposed(best, boxes, slot, valid),
        )


class ClosedSetCriterion(SetCriterion):
    """METR's losses, each pair of query and label being one binary question; matched over the whole image."""

    def forward(  # type: ignore[override]
        self, output: ClosedSetOutput, targets: Targets, counts: LossCounts | None = None
    ) -> tuple[Losses, Matches]:
        """The loss terms of METR's criterion without those of presence, and the matches that they rest on."""
        # every label is annotated everywhere
        targets = replace(targets, annotated=torch.ones_like(targets.annotated))
        matches = self.match(output, targets)
        target = torch.full(output.every_logits.shape[:3], NO_OBJECT, device=output.every_boxes.device)
        target[matches.layer, matches.image, matches.query] = matches.target
        answers = _questions(output.every_logits, output.every_boxes, target, targets)
        objects = targets.is_object.sum().clamp(min=1).float() if counts is None else counts.objects
        terms = self._proposals_and_decoder(answers, targets, objects)
        if output.denoised is not None:
            logits, boxes, plan = output.denoised
            wanted = plan.target.where(plan.positive & plan.valid, NO_OBJECT).expand(logits.shape[:3])
            copies = _questions(logits, boxes, wanted, targets, asked=plan.valid)
            copied = (wanted[0] != NO_OBJECT).sum().clamp(min=1).float()
            terms |= self._denoising(copies, targets, copied)  # `counts` knows of METR's copies only
        return Losses(terms=terms), matches

    @torch.no_grad()
    def match(self, output: ClosedSetOutput, targets: Targets) -> Matches:  # type: ignore[override]
        """The assignment of least cost in every layer and image."""
        found: list[tuple[int, int, Tensor, Tensor]] = []
        costs, config = self.config.costs, self.config
        for image, here in enumerate(targets.is_object):
            labels, objects = targets.labels[image, here], targets.boxes[image, here]
            logits, boxes = output.every_logits[:, image].float(), output.every_boxes[:, image].float()
            for layer in range(len(logits)):
                cost = costs.classification * focal_cost(
                    logits[layer][:, labels], config.focal_alpha, config.focal_gamma
                )
                cost += costs.l1 * torch.cdist(boxes[layer], objects, p=1)
                corners, wanted = cxcywh_to_xyxy(boxes[layer]), cxcywh_to_xyxy(objects)
                cost -= costs.giou * paired_giou(corners.unsqueeze(1), wanted.unsqueeze(0))
                query, index = linear_sum_assignment(cost.cpu().numpy())
                found.append((layer, image, torch.from_numpy(query), here.nonzero().squeeze(1).cpu()[index]))
        device = output.every_boxes.device
        return Matches(
            layer=torch.cat([torch.full_like(query, layer) for layer, _, query, _ in found]).to(device),
            image=torch.cat([torch.full_like(query, image) for _, image, query, _ in found]).to(device),
            query=torch.cat([query for _, _, query, _ in found]).to(device),
            target=torch.cat([index for _, _, _, index in found]).to(device),
        )


def _proposed(
    logits: Float[Tensor, "b q"], boxes: Float[Tensor, "b q 4"], slot: Int[Tensor, "b q"], valid: Bool[Tensor, "b q"]
) -> Proposals:
    """Proposals of which nobody will ask for place and rank."""
    return Proposals(logits=logits, boxes=boxes, place=slot, slot=slot, rank=slot, valid=valid)


def concatenated(vocabulary: Vocabulary) -> tuple[Vocabulary, tuple[str, ...]]:
    """The labels of all datasets side by side, none shared, as a vocabulary; and the name of each label."""
    labels = {
        dataset: tuple(f"{dataset}: {name}" for name in dict.fromkeys(names))
        for dataset, names in vocabulary.datasets.items()
    }
    every = {dataset: tuple(f"{dataset}: {name}" for name in names) for dataset, names in vocabulary.datasets.items()}
    names = tuple(name for names in vocabulary.datasets.values() for name in dict.fromkeys(names))
    flat = tuple(label for own in labels.values() for label in own)
    return Vocabulary(names=flat, datasets=every), names


def _questions(
    logits: Float[Tensor, "r b q c"],
    boxes: Float[Tensor, "r b q 4"],
    target: Int[Tensor, "r b q"],
    targets: Targets,
    asked: Tensor | None = None,
) -> QueryPredictions:
    """Each pair of query and label as one binary question; it stands for the query's object if that has its label."""
    labels = logits.shape[-1]
    image = torch.arange(logits.shape[1], device=logits.device).unsqueeze(-1)
    wanted = targets.labels[image, target.clamp(min=0)].where(target != NO_OBJECT, NO_OBJECT).unsqueeze(-1)
    label = torch.arange(labels, device=logits.device)
    stands = torch.where(wanted == label, target.unsqueeze(-1), NO_OBJECT)
    category = label.expand(*logits.shape[1:3], -1)
    if asked is not None:
        category = category.where(asked.unsqueeze(-1), NO_OBJECT)
    return QueryPredictions(
        logits=rearrange(logits, "r b q c -> r b (q c)").float(),
        boxes=repeat(boxes, "r b q x -> r b (q c) x", c=labels).float(),
        category=rearrange(category, "b q c -> b (q c)"),
        target=rearrange(stands, "r b q c -> r b (q c)"),
    )
