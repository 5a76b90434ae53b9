"""Queries whose places are learned: the same for every image, without proposals (Deformable DETR of one stage)."""

import torch
from einops import repeat
from jaxtyping import Bool, Int
from torch import Tensor, nn

from metr.models.config import QueryConfig
from metr.structures import Categories, Queries

# Boxes of points reach half the image to either side, where the logits of their sides are 0.
_SIDE = 0.5


class LearnedPlaces(nn.Module):
    """A position embedding and a content for each query; its point is a linear layer of the position.

    A query's first box has the point as its centre and sides of half the image, of which a decoder with
    `first_samples: cells` sees nothing. It stands for a place, at which every category with a slot is asked.

    Args:
        width: d.
        config: How many queries there are.
    """

    def __init__(self, width: int, config: QueryConfig) -> None:
        super().__init__()
        self.position = nn.Embedding(config.number, width)
        self.content = nn.Embedding(config.number, width)
        self.point = nn.Linear(width, 2)
        nn.init.xavier_uniform_(self.point.weight)
        nn.init.zeros_(self.point.bias)

    def forward(self, categories: Categories) -> Queries:
        """The queries of each image; all of them attend to each other."""
        images = len(categories.ids)
        points = self.point(self.position.weight).float().sigmoid()
        boxes = torch.cat([points, torch.full_like(points, _SIDE)], dim=-1)
        content, position, boxes = (
            repeat(rows, "q d -> b q d", b=images) for rows in (self.content.weight, self.position.weight, boxes)
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
