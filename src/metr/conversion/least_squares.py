"""Parts of other detectors that METR has in another form, fitted to do what METR's do."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu

from metr.conversion.classifier import Linear

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
        """In a few words."""
        return f"fitted: {self.explained:.1%} of the variance"


def sample_boxes(number: int = _SAMPLES, seed: int = 0) -> Float[Tensor, "n 4"]:
    """cxcywh boxes of all places and sizes, in 0..1: sides from 1/50 of the image to all of it, evenly by octaves."""
    draw = torch.Generator().manual_seed(seed)
    uniform = torch.rand(number, 4, generator=draw)
    sides = (uniform[:, 2:] * math.log(50)).exp() / 50
    return torch.cat([uniform[:, :2], sides], dim=1)


@torch.no_grad()
def least_squares(inputs: Float[Tensor, "n i"], wanted: Float[Tensor, "n o"]) -> Linear:
    """The linear layer that comes nearest, with a little ridge."""
    mean, goal = inputs.mean(0), wanted.mean(0)
    centred = (inputs - mean).double()
    gram = centred.T @ centred
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, centred.T @ (wanted - goal).double()).T.to(wanted)
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
