"""The encoder of RT-DETR: attention on the coarsest level, convolutions that fuse levels down and up again."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.functional import interpolate

from metr.layers.attention import Attention
from metr.layers.mlp import FeedForward
from metr.layers.position_encoding import grid_encoding
from metr.models.config import EncoderConfig
from metr.models.encoders.pyramid import flatten, level_mask
from metr.structures import Memory


class ConvNorm(nn.Sequential):
    """Convolution, batch normalisation and, unless told otherwise, SiLU."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int = 1, activate: bool = True) -> None:
        convolution = nn.Conv2d(inner, outer, kernel, stride, padding=kernel // 2, bias=False)
        activation = nn.SiLU(inplace=True) if activate else nn.Identity()
        super().__init__(convolution, nn.BatchNorm2d(outer), activation)


class RepVggBlock(nn.Module):
    """A 3x3 and a 1x1 convolution side by side (Ding et al., 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = ConvNorm(width, width, 3, activate=False)
        self.narrow = ConvNorm(width, width, 1, activate=False)
        self.activation = nn.SiLU(inplace=True)

    def forward(self, level: Tensor) -> Tensor:
        """[b d h w] to the same shape."""
        out: Tensor = self.activation(self.wide(level) + self.narrow(level))
        return out


class Fusion(nn.Module):
    """Two levels of one size to one: a cross-stage partial block (CSPRepLayer of RT-DETR)."""

    def __init__(self, width: int, config: EncoderConfig) -> None:
        super().__init__()
        hidden = int(width * config.fusion_expansion)
        self.main = ConvNorm(2 * width, hidden, 1)
        self.side = ConvNorm(2 * width, hidden, 1)
        self.blocks = nn.Sequential(*(RepVggBlock(hidden) for _ in range(config.fusion_blocks)))
        self.out = nn.Identity() if hidden == width else ConvNorm(hidden, width, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """[b d h w] twice to [b d h w]."""
        both = torch.cat([first, second], dim=1)
        fused: Tensor = self.out(self.blocks(self.main(both)) + self.side(both))
        return fused


class CoarseLayer(nn.Module):
    """Self-attention among the cells of the coarsest level (AIFI of RT-DETR)."""

    def __init__(self, width: int, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = Attention(width, config.heads)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward, nn.GELU)

    def forward(self, tokens: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        """[b s d] to the same shape; padded cells are not looked at."""
        placed = tokens + positions
        refined: Tensor = self.feed_forward(self.norm(tokens + self.attention(placed, placed, tokens, allowed)))
        return refined


class HybridEncoder(nn.Module):
    """Projection, attention on the coarsest level, then fusion from coarse to fine and from fine to coarse."""

    def __init__(self, channels: Sequence[int], width: int, config: EncoderConfig) -> None:
        super().__init__()
        self.width, self.levels = width, min(config.levels, len(channels))
        channels = tuple(channels)[-self.levels :]
        steps = range(self.levels - 1)
        self.projections = nn.ModuleList(ConvNorm(c, width, 1, activate=False) for c in channels)
        self.layers = nn.ModuleList(CoarseLayer(width, config) for _ in range(config.layers))
        self.laterals = nn.ModuleList(ConvNorm(width, width, 1) for _ in steps)
        self.down_fusions = nn.ModuleList(Fusion(width, config) for _ in steps)
        self.strides = nn.ModuleList(ConvNorm(width, width, 3, stride=2) for _ in steps)
        self.up_fusions = nn.ModuleList(Fusion(width, config) for _ in steps)

    def forward(self, features: Sequence[Tensor], padding_mask: Bool[Tensor, "b h w"]) -> Memory:
        """Backbone maps (finest first) to memory."""
        features = list(features)[-self.levels :]
        maps = [project(feature) for project, feature in zip(self.projections, features, strict=True)]
        maps[-1] = self._attend(maps[-1], padding_mask)
        return flatten(self._bottom_up(self._top_down(maps)), padding_mask)

    def _attend(self, coarsest: Tensor, padding_mask: Tensor) -> Tensor:
        height, width = coarsest.shape[2:]
        mask = level_mask(padding_mask, (height, width))
        positions = rearrange(grid_encoding(mask, self.width, 10_000.0), "b h w d -> b (h w) d")
        allowed = rearrange(~mask, "b h w -> b 1 (h w)")
        tokens = rearrange(coarsest, "b d h w -> b (h w) d")
        for layer in self.layers:
            tokens = layer(tokens, positions, allowed)
        return rearrange(tokens, "b (h w) d -> b d h w", h=height)

    def _top_down(self, maps: list[Tensor]) -> list[Tensor]:
        """Coarse levels inform finer ones; each level is then the lateral form of itself, the finest excepted."""
        coarse = [maps[-1]]
        for fine, lateral, fuse in zip(maps[-2::-1], self.laterals, self.down_fusions, strict=True):
            coarse[-1] = lateral(coarse[-1])
            raised = interpolate(coarse[-1], size=fine.shape[2:], mode="nearest")
            coarse.append(fuse(raised, fine))
        return coarse[::-1]

    def _bottom_up(self, maps: list[Tensor]) -> list[Tensor]:
        """Fine levels inform coarser ones."""
        done = [maps[0]]
        for coarse, halve, fuse in zip(maps[1:], self.strides, self.up_fusions, strict=True):
            done.append(fuse(halve(done[-1]), coarse))
        return done
