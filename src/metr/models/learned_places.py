"""Queries whose places are learned: the same for every image, without proposals.

So are the points of Deformable DETR of one stage and of Conditional DETR, the boxes of DAB-DETR, and DETR's queries.
"""

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from metr.layers.mlp import MLP
from metr.models.config import QueryConfig
from metr.structures import Categories, Queries

# Boxes of points reach half the image to either side, where the logits of their sides are 0.
_SIDE = 0.5


class LearnedPlaces(nn.Module):
    """A position embedding and a content for each query; one or two layers make its point of the position.

    A query's first box has the point as its centre and sides of half the image, of which a decoder with
    `first_samples: cells` sees nothing. Without layers it is the middle of the image, where all logits are 0. A query
    stands for a place, at which every category with a slot is asked.

    Args:
        width: d.
        config: How many queries there are.
    """

    def __init__(self, width: int, config: QueryConfig) -> None:
        super().__init__()
        self.position = nn.Embedding(config.number, width)
        self.content = None if config.content == "none" else nn.Embedding(config.number, width)
        layers = config.point_layers
        self.point = MLP((width, *[width] * (layers - 1), 2)) if layers else None
        for layer in self.point or ():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, categories: Categories) -> Queries:
        """The queries of each image; all of them attend to each other."""
        sides = torch.full((self.position.num_embeddings, 2), _SIDE, device=self.position.weight.device)
        points = sides if self.point is None else self.point(self.position.weight).float().sigmoid()
        boxes = torch.cat([points, sides], dim=-1)
        known = torch.zeros_like(self.position.weight) if self.content is None else self.content.weight
        return _in_every_image(categories, known, boxes, self.position.weight)


class LearnedBoxes(nn.Module):
    """Boxes, each for one query or, with patterns, for one query of each pattern; a query's content is its pattern.

    The numbers of a box are learned before the sigmoid. Arguments are those of `LearnedPlaces`.
    """

    def __init__(self, width: int, config: QueryConfig) -> None:
        super().__init__()
        self.width, self.patterns = width, config.patterns
        self.box = nn.Embedding(config.number // config.patterns, 4)
        self.content = nn.Embedding(config.number, width) if config.content == "learned_only" else None
        self.pattern = nn.Embedding(config.patterns, width) if config.content == "patterns" else None

    def forward(self, categories: Categories) -> Queries:
        """The queries of each image, those of one pattern in a row; all of them attend to each other."""
        boxes = repeat(self.box.weight.float().sigmoid(), "n four -> (p n) four", p=self.patterns)
        if self.pattern is not None:
            content = repeat(self.pattern.weight, "p d -> (p n) d", n=self.box.num_embeddings)
        else:
            content = boxes.new_zeros(len(boxes), self.width) if self.content is None else self.content.weight
        return _in_every_image(categories, content, boxes)


def _in_every_image(
    categories: Categories,
    content: Float[Tensor, "q d"],
    boxes: Float[Tensor, "q 4"],
    position: Float[Tensor, "q d"] | None = None,
) -> Queries:
    """The same queries in all images that ask for a category; they attend to each other."""
    # not its length, which would become a constant of an exported network
    images = categories.ids.shape[0]
    first = torch.zeros(images, len(content), dtype=torch.int64, device=content.device)
    valid = repeat(categories.valid.any(1), "b -> b q", q=len(content))
    return Queries(
        content=repeat(content, "q d -> b q d", b=images),
        reference_boxes=repeat(boxes, "q four -> b q four", b=images),
        slot=first,
        group=first.masked_fill(~valid, -1),
        valid=valid,
        position=None if position is None else repeat(position, "q d -> b q d", b=images),
    )


def build_learned_places(width: int, config: QueryConfig) -> LearnedPlaces | LearnedBoxes | None:
    """What makes the queries where their places are learned; None where these are proposed."""
    if config.places == "proposed":
        return None
    return LearnedPlaces(width, config) if config.places == "learned" else LearnedBoxes(width, config)


def every_pair(categories: Categories, queries: int) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Slot and validity of all pairs of slot and query, slot by slot; n = k * queries."""
    slots = torch.arange(categories.ids.shape[1], device=categories.ids.device).expand_as(categories.ids)
    slot, valid = (repeat(each, "b k -> b (k q)", q=queries) for each in (slots, categories.valid))
    return slot, valid
