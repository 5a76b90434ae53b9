"""Feature maps of several strides from the one map of a plain vision transformer."""

from collections.abc import Sequence
from math import log2

from jaxtyping import Float
from torch import Tensor, nn


class SimplePyramid(nn.Module):
    """The simple feature pyramid of ViTDet (Li et al., 2022): every level is made from the last map alone.

    Finer levels by transposed convolutions, which halve the channels at each doubling; coarser ones by max pooling.

    Args:
        channels: Channels of the map.
        stride: Pixels a cell of the map.
        wanted: Strides to come close to; each is reached within a factor of the square root of 2.
    """

    def __init__(self, channels: int, stride: int, wanted: Sequence[int]) -> None:
        super().__init__()
        doublings = [round(log2(stride / level)) for level in wanted]
        self.strides = tuple(int(stride / 2**times) for times in doublings)
        self.channels = tuple(max(channels >> max(times, 0), 1) for times in doublings)
        self.levels = nn.ModuleList(_level(channels, times) for times in doublings)

    def forward(self, features: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b _c _h _w"], ...]:
        """One map a level, finest first."""
        return tuple(level(features) for level in self.levels)


def _level(channels: int, doublings: int) -> nn.Module:
    if doublings < 0:
        size = 2**-doublings
        return nn.MaxPool2d(size, size, ceil_mode=True)
    steps: list[nn.Module] = []
    for _ in range(doublings):
        halved = max(channels // 2, 1)
        steps += [nn.GELU()] if steps else []
        steps += [nn.ConvTranspose2d(channels, halved, 2, stride=2)]
        channels = halved
    return nn.Sequential(*steps)
