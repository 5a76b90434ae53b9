"""DETR's decoder: queries attend to the whole image by content and learned position."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metr.layers.attention import Attention
from metr.layers.groups import QueryGroups, query_groups
from metr.layers.mlp import FeedForward
from metr.models.config import DecoderConfig, SimilarityConfig
from metr.models.decoder import LayeredDecoder
from metr.models.encoders.pyramid import token_places
from metr.structures import Decoded, Memory, Queries


class PlainDecoderLayer(nn.Module):
    """Self-attention inside each group, cross-attention to the whole memory, feed-forward."""

    def __init__(self, width: int, config: DecoderConfig) -> None:
        super().__init__()
        self.among = Attention(width, config.heads)
        self.among_norm = nn.LayerNorm(width)
        self.cross = Attention(width, config.heads)
        self.cross_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward)

    def forward(
        self,
        content: Float[Tensor, "b q d"],
        position: Float[Tensor, "b q d"],
        allowed: Bool[Tensor, "b q q"] | QueryGroups,
        memory: Memory,
        places: Float[Tensor, "b s d"],
    ) -> Float[Tensor, "b q d"]:
        """The queries' content, refined once.

        Args:
            content: The queries' features.
            position: Their learned positions.
            allowed: Which queries attend to which.
            memory: The images.
            places: The encoding of the memory tokens' places.
        """
        placed = content + position
        content = self.among_norm(content + self.among(placed, placed, content, allowed))
        image = ~memory.padding_mask.unsqueeze(1)
        seen = self.cross(content + position, memory.tokens + places, memory.tokens, image)
        refined: Tensor = self.feed_forward(self.cross_norm(content + seen))
        return refined


class PlainDecoder(LayeredDecoder):
    """Layers that look at no boxes (DETR, Carion et al., 2020).

    Where `refine` is off each layer says anew how far a box is from the query's first one, as in DETR, whose queries
    start in the middle of the image (`queries.point_layers: 0`).
    """

    def __init__(
        self,
        width: int,
        config: DecoderConfig,
        prior: float,
        text_width: int,
        similarity: SimilarityConfig | None = None,
    ) -> None:
        super().__init__(width, text_width, config, prior, similarity or SimilarityConfig())
        self.temperature = float(config.temperature)
        self.position: nn.Module = nn.Identity()
        self.layers = nn.ModuleList(PlainDecoderLayer(width, config) for _ in range(config.layers))

    def forward(self, queries: Queries, memory: Memory) -> Decoded:
        """Features and boxes after every layer; boxes are refined as in `Decoder`."""
        assert queries.position is not None
        content, boxes, allowed = queries.content, queries.reference_boxes, query_groups(queries.group)
        places = token_places(memory, self.width, self.temperature)
        features, reported = [], []
        for index, layer in enumerate(self.layers):
            content = layer(content, self.position(queries.position), allowed, memory, places)
            now = self.refined(index, content, boxes)
            boxes = now.boxes
            features.append(now.feature)
            reported.append(now.found)
        return Decoded(features=torch.stack(features), boxes=torch.stack(reported))
