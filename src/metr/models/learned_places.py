"""Queries whose places are learned: the same for every image, without proposals.

So are those of Deformable DETR of one stage and of Conditional DETR.
"""

import torch
from einops import repeat
from jaxtyping import Bool, Int
from torch import Tensor, nn

from metr.layers.mlp import MLP
from metr.models.config import QueryConfig
from metr.structures import Categories, Queries

# Boxes of points reach half the image to either side, where the logits of their sides are 0.
_SIDE = 0.5


class LearnedPlaces(nn.Module):
    """A position embedding and a content for each query; one or two layers make its point of the position.

    A query's first box has the point as its centre and sides of half the image, of which a decoder with
    `first_samples: cells` sees nothing. It stands for a place, at which every category with a slot is asked.

    Args:
        width: d.
        config: How many queries there are.
    """

    def __init__(self, width: int, config: QueryConfig) -> None:
        super().__init__()
        self.position = nn.Embedding(config.number, width)
        self.content = None if config.content == "none" else nn.Embedding(config.number, width)
        self.point = MLP((width, *[width] * (config.point_layers - 1), 2))
        for layer in self.point:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, categories: Categories) -> Queries:
        """The queries of each image; all of them attend to each other."""
        images = len(categories.ids)
        points = self.point(self.position.weight).float().sigmoid()
        boxes = torch.cat([points, torch.full_like(points, _SIDE)], dim=-1)
        known = torch.zeros_like(self.position.weight) if self.content is None else self.content.weight
        content, position, boxes = (
            repeat(rows, "q d -> b q d", b=images) for rows in (known, self.position.weight, boxes)
        )
        first = torch.zeros(content.shape[:2], dtype=torch.int64, device=content.device)
        valid = repeat(categories.valid.any(1), "b -> b q", q=content.shape[1])
        return Queries(
            content=content,
            reference_boxes=boxes,
            slot=first,
            group=first.masked_fill(~valid, -1),
            valid=valid,
            position=position,
        )


def every_pair(categories: Categories, queries: int) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Slot and validity of all pairs of slot and query, slot by slot; n = k * queries."""
    slots = torch.arange(categories.ids.shape[1], device=categories.ids.device).expand_as(categories.ids)
    slot, valid = (repeat(each, "b k -> b (k q)", q=queries) for each in (slots, categories.valid))
    return slot, valid
