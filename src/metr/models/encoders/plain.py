"""The encoder of DETR: full self-attention among the cells of one level."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metr.layers.position_encoding import grid_encoding
from metr.models.config import EncoderConfig
from metr.models.encoders.pyramid import SelfAttentionLayer, flatten
from metr.structures import Memory

# as in DETR and Conditional DETR; DAB-DETR's can be set to it
TEMPERATURE = 10_000.0


class PlainEncoder(nn.Module):
    """Projection of the backbone's last map to one width, then layers of self-attention.

    Its cost grows with the square of the number of cells, so it is meant for maps of stride 32, or of stride 16 for
    small images (`backbone.strides=[16]`).
    """

    levels = 1

    def __init__(self, channels: Sequence[int], width: int, config: EncoderConfig) -> None:
        super().__init__()
        self.width = width
        self.projection = nn.Conv2d(channels[-1], width, kernel_size=1)
        self.layers = nn.ModuleList(SelfAttentionLayer(width, config) for _ in range(config.layers))

    def forward(self, features: Sequence[Tensor], padding_mask: Bool[Tensor, "b h w"]) -> Memory:
        """Backbone maps (finest first) to a memory of one level."""
        return self.refine(flatten([self.projection(features[-1])], padding_mask))

    def refine(self, memory: Memory) -> Memory:
        """The attention layers alone, from projected tokens on."""
        tokens, places = memory.tokens, token_places(memory, self.width)
        allowed = ~memory.padding_mask.unsqueeze(1)
        for layer in self.layers:
            tokens = layer(tokens, places, allowed)
        return replace(memory, tokens=tokens)


def token_places(memory: Memory, width: int) -> Float[Tensor, "b s d"]:
    """The encoded place of each token in its image, `width` numbers; padding changes nothing."""
    sizes = [height * width for height, width in memory.level_shapes]
    levels = []
    for (height, _), mask in zip(memory.level_shapes, torch.split(memory.padding_mask, sizes, dim=1), strict=True):
        cells = rearrange(mask, "b (h w) -> b h w", h=height)
        levels.append(rearrange(grid_encoding(cells, width, TEMPERATURE), "b h w d -> b (h w) d"))
    return torch.cat(levels, dim=1)
