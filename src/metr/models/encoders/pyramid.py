"""What encoders share: masks of levels, further levels by strided convolution, flattening to memory."""

from collections.abc import Sequence
from math import gcd

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from metr.structures import Memory

LevelMask = Bool[Tensor, "b h w"]


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
