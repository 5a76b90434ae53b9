"""A classification head for fixed names, from METR's similarity head and the names' tokens.

METR asks MLP(norm(x)) . token / sqrt(d) + b (and may add a linear word on there being an object), and other detectors
ask w . x + b. With a name's token held fixed, the MLP's last layer folds into w; the layer before it has a ReLU, which
does not. Of all linear functions the one nearest to it in the mean square is taken, for normally distributed x:
relu(z) becomes E[relu(z)] + P(z > 0) (z - E[z]) (Bussgang's theorem), and how x is distributed is known from the norm
before it (see `activation_statistics`).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metr.conversion.activation_statistics import ActivationStatistics, after_norm, of_memory
from metr.models.category_extraction import ExtractionBlock
from metr.models.detector import Detector
from metr.models.heads import SimilarityHead


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """x to weight x + bias."""

    weight: Float[Tensor, "o i"]
    bias: Float[Tensor, "o"]

    def __call__(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """weight x + bias."""
        return x @ self.weight.T + self.bias

    def after(self, first: "Linear") -> "Linear":
        """The layer that does the work of another and then of this one."""
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
    mean = torch.stack([activation_statistics.mean for activation_statistics in of_memory(network.encoder)]).mean(0)
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
    """One logit a name, nearest to METR's similarity head for features with these activation_statistics."""
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
    """What a feature says of there being an object is said of every name."""
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
def layer_classifier(network: Detector, tokens: Float[Tensor, "v d"], layer: int) -> Linear:
    """One logit a name from what a decoder layer gives, for detectors without the norm that METR has there."""
    decoder = network.decoder
    norm = norm_as_linear(decoder.norm, after_norm(decoder.layers[layer].feed_forward.norm))  # type: ignore[arg-type]
    return classifier(decoder.similarity, tokens, after_norm(decoder.norm)).after(norm)


@torch.no_grad()
def place_classifier(network: Detector, tokens: Float[Tensor, "v d"]) -> Linear:
    """One logit a name from the features of a place, as the proposals score it: exact."""
    proposals = network.proposals
    ask = Linear(weight=tokens * proposals.scale, bias=proposals.bias.detach().expand(len(tokens)))
    return _with_objectness(ask.after(Linear.of(proposals.category)), proposals.objectness)
