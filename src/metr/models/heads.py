"""The heads: a logit that asks "is this my category?", and a box that refines another."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metr.layers.mlp import MLP
from metr.models.config import SimilarityConfig
from metr.structures import Categories


class SimilarityHead(nn.Module):
    """factor MLP(feature) . token / sqrt(d) + b: one logit for each pair of feature and token.

    With `objectness` a linear layer's word on the feature alone is added.

    Args:
        width: d.
        prior: The probability that the head answers before it has learnt anything.
        config: The factor, and whether there is objectness.
    """

    def __init__(self, width: int, prior: float, config: SimilarityConfig | None = None) -> None:
        super().__init__()
        config = config or SimilarityConfig()
        self.feature = MLP((width, width, width))
        self.bias = nn.Parameter(torch.tensor([math.log(prior / (1 - prior))]))
        self.objectness = nn.Linear(width, 1, bias=False) if config.objectness else None
        self.scale = config.factor / math.sqrt(width)
        with torch.no_grad():  # it starts as it would without the factor
            for parameter in self.feature.last.parameters():
                parameter.div_(config.factor)

    def forward(self, features: Float[Tensor, "*n d"], tokens: Float[Tensor, "*#n d"]) -> Float[Tensor, "*n"]:
        """One logit for each feature and the token beside it."""
        similarity: Tensor = (self.feature(features) * tokens).sum(-1)
        logit = similarity * self.scale + self.bias
        return logit if self.objectness is None else logit + self.objectness(features).squeeze(-1)


def similarity_tokens(categories: Categories, config: SimilarityConfig) -> Float[Tensor, "b k d"]:
    """What the features of each slot's places and queries are compared with."""
    # an empty slot's id is 0, and finds some text as well
    return categories.text[categories.ids] if config.token == "text" else categories.kept_tokens


class BoxHead(nn.Module):
    """Moves a reference box by what a feature says, in logit space. It starts by moving nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = MLP((width, width, width, 4))
        nn.init.zeros_(self.change.last.weight)
        nn.init.zeros_(self.change.last.bias)

    def forward(
        self, features: Float[Tensor, "*n d"], reference_logits: Float[Tensor, "*n 4"]
    ) -> Float[Tensor, "*n 4"]:
        """cxcywh boxes in 0..1, float32."""
        moved: Tensor = self.change(features).float() + reference_logits.float()
        return moved.sigmoid()


def box_logits(boxes: Float[Tensor, "*n 4"], margin: float = 1e-3) -> Float[Tensor, "*n 4"]:
    """The inverse of the sigmoid, with both a box number and its distance from 1 kept above `margin`."""
    boxes = boxes.clamp(0, 1)
    return (boxes.clamp(min=margin) / (1 - boxes).clamp(min=margin)).log()
