"""Class-specific queries: each looks for one category, from one place."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from metr.models.config import QueryConfig
from metr.structures import Categories, Proposals, Queries


class ClassQueries(nn.Module):
    """Content = learned query (by rank inside its category's group) + the category's refined token.

    With `content: place` the features of the place where the query starts are added, detached as in DINO and RT-DETR.
    """

    def __init__(self, width: int, config: QueryConfig) -> None:
        super().__init__()
        self.learned = nn.Embedding(config.ceiling, width)
        self.place = nn.Linear(width, width) if config.content == "place" else None
        self.together = config.attention == "image"

    def forward(self, proposals: Proposals, features: Float[Tensor, "b q d"], categories: Categories) -> Queries:
        """One query for each proposal; no gradient flows back into where it starts."""
        tokens = token_of(categories, proposals.slot)
        content = self.learned(proposals.rank) + tokens
        if self.place is not None:
            content = content + self.place(features.detach())
        group = torch.zeros_like(proposals.slot) if self.together else proposals.slot
        return Queries(
            content=content,
            reference_boxes=proposals.boxes.detach(),
            slot=proposals.slot,
            group=group.masked_fill(~proposals.valid, -1),
            valid=proposals.valid,
        )


def token_of(categories: Categories, slot: Tensor) -> Float[Tensor, "b q d"]:
    """The refined token of the category in each query's slot."""
    return rows(categories.kept_tokens, slot)


def rows(table: Float[Tensor, "b n c"], index: Int[Tensor, "b q"]) -> Float[Tensor, "b q c"]:
    """Rows of each image's table."""
    return table.gather(1, index.unsqueeze(-1).expand(-1, -1, table.shape[-1]))


def side_by_side(first: Queries, second: Queries) -> Queries:
    """Two sets of queries side by side."""
    return replace(
        first,
        content=torch.cat([first.content, second.content], dim=1),
        reference_boxes=torch.cat([first.reference_boxes, second.reference_boxes], dim=1),
        slot=torch.cat([first.slot, second.slot], dim=1),
        group=torch.cat([first.group, second.group], dim=1),
        valid=torch.cat([first.valid, second.valid], dim=1),
    )
