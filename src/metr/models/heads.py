"""The heads: a logit that asks "is this my category?", and a box that refines another."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metr.layers.mlp import MLP


class AgreementHead(nn.Module):
    """MLP(feature) . text / sqrt(d) + b: one logit for each pair of feature and text token.

    Args:
        width: d.
        prior: The probability that the head answers before it has learnt anything.
    """

    def __init__(self, width: int, prior: float) -> None:
        super().__init__()
        self.feature = MLP((width, width, width))
        self.bias = nn.Parameter(torch.tensor([math.log(prior / (1 - prior))]))
        self.scale = 1 / math.sqrt(width)

    def forward(self, features: Float[Tensor, "*n d"], text: Float[Tensor, "*#n d"]) -> Float[Tensor, "*n"]:
        """One logit for each feature and the token beside it."""
        agreement: Tensor = (self.feature(features) * text).sum(-1)
        return agreement * self.scale + self.bias


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
