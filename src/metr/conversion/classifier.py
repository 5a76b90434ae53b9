"""Fits parts of other detectors to METR's, where the two differ in form."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from metr.conversion.activation_statistics import ActivationStatistics, after_norm, of_memory
from metr.models.category_extraction import ExtractionBlock
from metr.models.detector import Detector
from metr.models.heads import ClassifierHead, SimilarityHead


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """x to weight x + bias."""

    weight: Float[Tensor, "o i"]
    bias: Float[Tensor, "o"]

    def __call__(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """weight x + bias."""
        return x @ self.weight.T + self.bias

    def after(self, first: "Linear") -> "Linear":
        """The layer that applies `first` and then this one."""
        return Linear(weight=self.weight @ first.weight, bias=self.weight @ first.bias + self.bias)

    @staticmethod
    def of(layer: nn.Linear) -> "Linear":
        """A copy of a layer."""
        return Linear(weight=layer.weight.detach().clone(), bias=layer.bias.detach().clone())


@torch.no_grad()
def name_tokens(network: Detector, text: Float[Tensor, "v t"]) -> Float[Tensor, "v d"]:
    """The token of each name as queries are compared with it: the projected text, or what images make of it."""
    if network.config.similarity.token == "refined":
        return refined_tokens(network, text)
    extraction = network.category_extraction
    return extraction.project(text.to(extraction.projection.weight)).tokens


@torch.no_grad()
def refined_tokens(network: Detector, text: Float[Tensor, "v t"]) -> Float[Tensor, "v d"]:
    """The token of each name as queries contain it, for the mean of all images.

    An image refines tokens by attention to its memory. Here the memory is one token, the mean that the encoder's
    norms declare, so that what all images do to a name is kept, and what one does is not.
    """
    extraction = network.category_extraction
    tokens = extraction.project(text.to(extraction.projection.weight)).tokens.unsqueeze(0)
    mean = torch.stack([statistics.mean for statistics in of_memory(network.encoder)]).mean(0)
    memory = mean.expand(1, 1, -1)
    for block in extraction.blocks:
        assert isinstance(block, ExtractionBlock)
        if block.among is not None and block.among_norm is not None:
            tokens = block.among_norm(tokens + block.among(tokens, tokens, tokens))
        tokens = block.feed_forward(block.norm(tokens + block.attention(tokens, memory, memory)))
    refined: Tensor = tokens[0]
    return refined


@torch.no_grad()
def classifier(head: SimilarityHead, tokens: Float[Tensor, "v d"], features: ActivationStatistics) -> Linear:
    """One logit per name: the best linear fit to METR's similarity head for features with these statistics."""
    first, last = Linear.of(head.feature[0]), Linear.of(head.feature[2])  # type: ignore[arg-type]
    centre = first.weight @ features.mean + first.bias
    spread = (first.weight**2 @ features.deviation**2).sqrt().clamp(min=1e-6)
    ratio = centre / spread
    open_ = torch.special.ndtr(ratio)
    density = (-0.5 * ratio**2).exp() / math.sqrt(2 * math.pi)
    mean = centre * open_ + spread * density
    relu = Linear(weight=torch.diag(open_), bias=mean - open_ * centre)
    ask = Linear(weight=tokens * head.scale, bias=head.bias.detach().expand(len(tokens)))
    return _with_objectness(ask.after(last).after(relu).after(first), head.objectness)


def _with_objectness(ask: Linear, objectness: nn.Linear | None) -> Linear:
    """Adds the objectness logit of a feature to the logit of every name."""
    return ask if objectness is None else Linear(weight=ask.weight + objectness.weight.detach(), bias=ask.bias)


@torch.no_grad()
def norm_as_linear(norm: nn.LayerNorm, before: ActivationStatistics) -> Linear:
    """A layer norm for tokens of these statistics: it divides by the deviation that they amount to."""
    width = len(before.mean)
    energy = (before.mean**2 + before.deviation**2).mean() - before.mean.mean() ** 2
    scale = norm.weight / (energy + norm.eps).sqrt()
    centred = torch.eye(width).to(scale) - 1 / width
    return Linear(weight=scale.unsqueeze(1) * centred, bias=norm.bias.detach().clone())


@torch.no_grad()
def layer_classifier(network: Detector, text: Float[Tensor, "v t"], tokens: Float[Tensor, "v d"], layer: int) -> Linear:
    """One logit a name from what a decoder layer gives, for detectors without the norm that METR has there.

    Args:
        network: METR's.
        text: The names' embeddings.
        tokens: What these are compared as (`name_tokens`).
        layer: Which layer, counted from 0.
    """
    decoder = network.decoder
    head: Any = decoder.similarity[layer] if isinstance(decoder.similarity, nn.ModuleList) else decoder.similarity
    if isinstance(decoder.norm, nn.Identity):
        after = after_norm(decoder.layers[layer].feed_forward.norm)  # type: ignore[arg-type]
        return names_classifier(head, text) if isinstance(head, ClassifierHead) else classifier(head, tokens, after)
    norm = norm_as_linear(decoder.norm, after_norm(decoder.layers[layer].feed_forward.norm))  # type: ignore[arg-type]
    if isinstance(head, ClassifierHead):
        return names_classifier(head, text).after(norm)
    return classifier(head, tokens, after_norm(decoder.norm)).after(norm)


@torch.no_grad()
def normed_classifier(network: Detector, text: Float[Tensor, "v t"], tokens: Float[Tensor, "v d"]) -> Linear:
    """One logit a name from the decoder's normalised output, by the last layer's head where layers have their own.

    It is exact where METR has linear classifiers. The arguments are those of `layer_classifier`.
    """
    heads = network.decoder.similarity
    head = heads[-1] if isinstance(heads, nn.ModuleList) else heads
    if isinstance(head, ClassifierHead):
        return names_classifier(head, text)
    assert isinstance(head, SimilarityHead)
    return classifier(head, tokens, after_norm(network.decoder.norm))


@torch.no_grad()
def names_classifier(head: ClassifierHead, text: Float[Tensor, "v t"]) -> Linear:
    """One logit a name, as a head of linear classifiers gives it: exact."""
    text = text.to(head.weight.weight)
    return Linear(weight=head.weight(text), bias=head.bias(text).squeeze(1))


@torch.no_grad()
def place_classifier(network: Detector, text: Float[Tensor, "v t"], tokens: Float[Tensor, "v d"]) -> Linear:
    """One logit a name from the features of a place, as the proposals score it: exact."""
    proposals = network.proposals
    if proposals.classifier is not None:
        return names_classifier(proposals.classifier, text)
    ask = Linear(weight=tokens * proposals.scale, bias=proposals.bias.detach().expand(len(tokens)))
    return _with_objectness(ask.after(Linear.of(proposals.category)), proposals.objectness)


_SAMPLES = 4096
_RIDGE = 1e-4
# of what both halves of a stacked norm are made to have in common
_ANCHOR = 3.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """Layers in a row, and the share of the variance that they explain on boxes which they were not fitted to."""

    layers: tuple[Linear, ...]
    explained: float

    def __str__(self) -> str:
        """A short description."""
        return f"fitted: {self.explained:.1%} of the variance"


def sample_boxes(number: int = _SAMPLES, seed: int = 0) -> Float[Tensor, "n 4"]:
    """cxcywh boxes of all places and sizes, in 0..1: sides from 1/50 of the image to all of it, evenly by octaves."""
    draw = torch.Generator().manual_seed(seed)
    uniform = torch.rand(number, 4, generator=draw)
    sides = (uniform[:, 2:] * math.log(50)).exp() / 50
    return torch.cat([uniform[:, :2], sides], dim=1)


@torch.no_grad()
def least_squares(
    inputs: Float[Tensor, "n i"], wanted: Float[Tensor, "n o"], weights: Float[Tensor, "n"] | None = None
) -> Linear:
    """The linear layer of least squared error, with a little ridge regularisation; rows count by their weights."""
    counts = (torch.ones(len(inputs)) if weights is None else weights).to(inputs).unsqueeze(1)
    mean, goal = ((counts * rows).sum(0) / counts.sum() for rows in (inputs, wanted))
    centred = (inputs - mean).double()
    counted = (counts * centred).T
    gram = counted @ centred
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, counted @ (wanted - goal).double()).T.to(wanted)
    return Linear(weight=weight, bias=goal - weight @ mean)


def explained(answer: Float[Tensor, "n o"], wanted: Float[Tensor, "n o"]) -> float:
    """The share of the variance that is explained."""
    return float(1 - (answer - wanted).var(0).sum() / wanted.var(0).sum())


@torch.no_grad()
def fit_box_mlp(position: Callable[[Tensor], Tensor], hidden: int) -> Fit:
    """Two layers with a ReLU between them, from a box's four numbers to what `position` makes of the box.

    The first layer folds the space of boxes at random places and in random directions; least squares do the rest.
    """
    boxes, unseen = sample_boxes(), sample_boxes(seed=1)
    draw = torch.Generator().manual_seed(2)
    directions = torch.randn(hidden, 4, generator=draw)
    folds = boxes[torch.randint(len(boxes), (hidden,), generator=draw)]
    first = Linear(weight=directions, bias=-(directions * folds).sum(1))
    second = least_squares(relu(first(boxes)), position(boxes))
    share = explained(second(relu(first(unseen))), position(unseen))
    return Fit(layers=(first, second), explained=share)


@torch.no_grad()
def fit_stacked_norm(
    position: Callable[[Tensor], Tensor], content: Float[Tensor, "d"], encode: Callable[[Tensor], Tensor]
) -> Fit:
    """A linear layer and the affine part of a layer norm that give [position(box), content] from encode(box).

    The half of the content is anchored at constants of both signs: they outweigh the other half, so that the norm
    divides by nearly the same for every box, and the half of the position stays linear.
    """
    boxes, unseen = sample_boxes(), sample_boxes(seed=1)
    wanted = position(boxes)
    mean, deviation = wanted.mean(0), wanted.std(0).clamp(min=1e-6)
    half = least_squares(encode(boxes), (wanted - mean) / deviation)
    width = len(content)
    anchors = torch.where(torch.arange(width) % 2 == 0, _ANCHOR, -_ANCHOR).to(content)
    weight = torch.cat([half.weight, torch.zeros_like(half.weight)])
    stacked = Linear(weight=weight, bias=torch.cat([half.bias, anchors]))
    spread = stacked(encode(boxes)).var(1, unbiased=False).sqrt().mean()
    scale = torch.cat([deviation * spread, torch.ones_like(content)])
    norm = Linear(weight=torch.diag(scale), bias=torch.cat([mean, content - anchors / spread]))
    raw = stacked(encode(unseen))
    normed = norm((raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True, unbiased=False))
    return Fit(layers=(stacked, norm), explained=explained(normed[:, :width], position(unseen)))
