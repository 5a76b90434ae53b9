"""The encoder of Deformable DETR and DINO: every token attends to a few places on all levels."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metr.layers.deformable_attention import DeformableAttention
from metr.layers.mlp import FeedForward
from metr.layers.position_encoding import grid_encoding
from metr.models.config import EncoderConfig
from metr.models.encoders.pyramid import Projection, cell_centres, flatten, level_mask
from metr.structures import Memory

# as DINO, and as Deformable DETR in transformers
_ENCODINGS = {"scaled": {"temperature": 20.0, "first": 1.0}, "centred": {"temperature": 10_000.0, "first": 0.5}}


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention, then a feed-forward part; both residual, post-norm."""

    def __init__(self, width: int, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, config.heads, config.levels, config.points)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward)

    def forward(self, memory: Memory, positions: Tensor, reference: Tensor) -> Memory:
        """The memory with its tokens refined once."""
        tokens = memory.tokens
        gathered = self.attention(tokens + positions, reference, tokens, memory.padding_mask, memory.level_shapes)
        return replace(memory, tokens=self.feed_forward(self.norm(tokens + gathered)))


class DeformableEncoder(nn.Module):
    """Projection to one width, then layers of multi-scale deformable self-attention."""

    def __init__(self, channels: Sequence[int], width: int, config: EncoderConfig) -> None:
        super().__init__()
        self.width, self.levels = width, config.levels
        self._encoding = _ENCODINGS[config.positions]
        self.projection = Projection(channels, width, config.levels)
        self.level_embedding = nn.Parameter(torch.empty(config.levels, width))
        self.layers = nn.ModuleList(DeformableEncoderLayer(width, config) for _ in range(config.layers))
        nn.init.normal_(self.level_embedding)

    def forward(self, features: Sequence[Tensor], padding_mask: Bool[Tensor, "b h w"]) -> Memory:
        """Backbone maps (finest first) to memory."""
        return self.refine(flatten(self.projection(features), padding_mask), padding_mask)

    def refine(self, memory: Memory, padding_mask: Bool[Tensor, "b h w"]) -> Memory:
        """The attention layers alone, on projected tokens."""
        positions = self._positions(memory, padding_mask)
        reference = reference_points(memory)
        for layer in self.layers:
            memory = layer(memory, positions, reference)
        return memory

    def _positions(self, memory: Memory, padding_mask: Tensor) -> Tensor:
        """The encoding of each token's place and level: [b s d]."""
        levels = []
        for shape, embedding in zip(memory.level_shapes, self.level_embedding, strict=True):
            grid = grid_encoding(level_mask(padding_mask, shape), self.width, **self._encoding)
            levels.append(rearrange(grid, "b h w d -> b (h w) d") + embedding)
        return torch.cat(levels, dim=1)


def reference_points(memory: Memory) -> Float[Tensor, "b s l 2"]:
    """The centre of each token as (x, y) in 0..1 of every padded level."""
    return cell_centres(memory).unsqueeze(2) * memory.valid_ratios.unsqueeze(1)
