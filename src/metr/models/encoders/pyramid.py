"""What encoders share: further levels by strided convolution, self-attention, flattening to memory, cells of levels."""

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from metr.layers.attention import Attention
from metr.layers.mlp import FeedForward, activation_named, unit_scale
from metr.layers.position_encoding import grid_encoding
from metr.models.config import EncoderConfig
from metr.structures import Memory


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
        self.temperature = float(config.temperature)
        self.scale = unit_scale(width) if config.position_scale and config.layers else None
        activation = activation_named(config.activation)
        self.layers = nn.ModuleList(SelfAttentionLayer(width, config, activation) for _ in range(config.layers))

    def forward(self, features: Sequence[Tensor], padding_mask: Bool[Tensor, "b h w"]) -> Memory:
        """Backbone maps (finest first) to a memory of one level."""
        return self.refine(flatten([self.projection(features[-1])], padding_mask))

    def refine(self, memory: Memory) -> Memory:
        """The attention layers alone, on projected tokens."""
        tokens, places = memory.tokens, token_places(memory, self.width, self.temperature)
        allowed = ~memory.padding_mask.unsqueeze(1)
        for layer in self.layers:
            scaled = places if self.scale is None else places * self.scale(tokens)
            tokens = layer(tokens, scaled, allowed)
        return replace(memory, tokens=tokens)


def token_places(memory: Memory, width: int, temperature: float = 10_000.0) -> Float[Tensor, "b s d"]:
    """The position encoding of each token in its image, of size `width`. Padding does not affect it."""
    sizes = [height * width for height, width in memory.level_shapes]
    levels = []
    for (height, _), mask in zip(memory.level_shapes, torch.split(memory.padding_mask, sizes, dim=1), strict=True):
        cells = rearrange(mask, "b (h w) -> b h w", h=height)
        levels.append(rearrange(grid_encoding(cells, width, temperature), "b h w d -> b (h w) d"))
    return torch.cat(levels, dim=1)


def level_mask(padding_mask: Bool[Tensor, "b h w"], shape: tuple[int, int]) -> Bool[Tensor, "b hl wl"]:
    """The padding mask at a level's resolution (nearest neighbour)."""
    return interpolate(padding_mask.unsqueeze(1).float(), size=shape)[:, 0] > 0.5


def valid_ratio(mask: Bool[Tensor, "b h w"]) -> Float[Tensor, "b 2"]:
    """The fraction of a level, in x and in y, that is image; padding is at the right and the bottom."""
    width = (~mask[:, 0, :]).float().mean(-1)
    height = (~mask[:, :, 0]).float().mean(-1)
    return torch.stack([width, height], dim=-1)


class Projection(nn.Module):
    """Backbone maps to `levels` maps of one width: 1x1 convolutions, then 3x3 ones of stride 2 for further levels."""

    def __init__(self, channels: Sequence[int], width: int, levels: int) -> None:
        super().__init__()
        self.maps = min(levels, len(channels))
        channels = tuple(channels)[-self.maps :]
        steps = [_step(c, width, kernel=1) for c in channels]
        inner = channels[-1]
        for _ in range(levels - self.maps):
            steps.append(_step(inner, width, kernel=3, stride=2))
            inner = width
        self.steps = nn.ModuleList(steps)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of [b d h w], finest first; the first further level is made from the backbone's own last map."""
        features = list(features)[-self.maps :]
        maps = [step(feature) for step, feature in zip(self.steps, features, strict=False)]
        source = features[-1]
        for step in self.steps[self.maps :]:
            source = step(source)
            maps.append(source)
        return maps


def _step(inner: int, width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution and a group norm of at most 32 groups, each of at least four channels."""
    convolution = nn.Conv2d(inner, width, kernel, stride, padding=kernel // 2)
    nn.init.xavier_uniform_(convolution.weight)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, nn.GroupNorm(gcd(32, width // 4), width))


def flatten(maps: Sequence[Float[Tensor, "b d _h _w"]], padding_mask: Bool[Tensor, "b h w"]) -> Memory:
    """All cells of all levels as one row of tokens, with the shapes and masks of the levels."""
    shapes = [(int(level.shape[2]), int(level.shape[3])) for level in maps]
    masks = [level_mask(padding_mask, shape) for shape in shapes]
    return Memory(
        tokens=torch.cat([rearrange(level, "b d h w -> b (h w) d") for level in maps], dim=1),
        padding_mask=torch.cat([rearrange(mask, "b h w -> b (h w)") for mask in masks], dim=1),
        level_shapes=tuple(shapes),
        valid_ratios=torch.stack([valid_ratio(mask) for mask in masks], dim=1),
    )


def cell_centres(memory: Memory) -> Float[Tensor, "b s 2"]:
    """The centre of each token's cell as (x, y) in 0..1 of its image."""
    ratios = memory.valid_ratios
    centres = []
    for level, (height, width) in enumerate(memory.level_shapes):
        x = (torch.arange(width, device=ratios.device) + 0.5) / (ratios[:, level, :1] * width)
        y = (torch.arange(height, device=ratios.device) + 0.5) / (ratios[:, level, 1:] * height)
        cells = torch.stack([x.unsqueeze(1).expand(-1, height, -1), y.unsqueeze(2).expand(-1, -1, width)], dim=-1)
        centres.append(rearrange(cells, "b h w x -> b (h w) x"))
    return torch.cat(centres, dim=1)


class SelfAttentionLayer(nn.Module):
    """Self-attention among all tokens, then a feed-forward part; both residual, post-norm."""

    def __init__(self, width: int, config: EncoderConfig, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.attention = Attention(width, config.heads)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward, activation)

    def forward(
        self, tokens: Float[Tensor, "b s d"], places: Float[Tensor, "b s d"], allowed: Bool[Tensor, "b 1 s"]
    ) -> Float[Tensor, "b s d"]:
        """The tokens, refined once; `allowed` excludes padding."""
        placed = tokens + places
        refined: Tensor = self.feed_forward(self.norm(tokens + self.attention(placed, placed, tokens, allowed)))
        return refined
