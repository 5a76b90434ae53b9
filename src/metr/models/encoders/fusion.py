"""How the hybrid encoder makes one level of two: the convolution blocks of RT-DETR and of D-FINE."""

import torch
from torch import Tensor, nn

from metr.models.config import EncoderConfig


class ConvNorm(nn.Sequential):
    """Convolution, batch normalisation and, unless told otherwise, SiLU."""

    def __init__(
        self, inner: int, outer: int, kernel: int, stride: int = 1, activate: bool = True, groups: int = 1
    ) -> None:
        convolution = nn.Conv2d(inner, outer, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
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


class _Paths(nn.Module):
    """A path of RepVGG blocks, and one past them."""

    def __init__(self, inner: int, outer: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.main = ConvNorm(inner, hidden, 1)
        self.side = ConvNorm(inner, hidden, 1)
        self.blocks = nn.Sequential(*(RepVggBlock(hidden) for _ in range(blocks)))
        self.out = nn.Identity() if hidden == outer else ConvNorm(hidden, outer, 1)

    def through(self, level: Tensor) -> Tensor:
        """[b inner h w] to [b outer h w]."""
        out: Tensor = self.out(self.blocks(self.main(level)) + self.side(level))
        return out


class CrossStage(_Paths):
    """A cross-stage partial block (CSPRepLayer of RT-DETR)."""

    def forward(self, level: Tensor) -> Tensor:
        """[b inner h w] to [b outer h w]."""
        return self.through(level)


class Fusion(_Paths):
    """Two levels of one size to one, as in RT-DETR."""

    def __init__(self, width: int, config: EncoderConfig) -> None:
        super().__init__(2 * width, width, int(width * config.fusion_expansion), config.fusion_blocks)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """[b d h w] twice to [b d h w]."""
        return self.through(torch.cat([first, second], dim=1))


class AggregatingFusion(nn.Module):
    """Two levels of one size to one, as in D-FINE (RepNCSPELAN4): every stage of a path is seen by the last layer."""

    def __init__(self, width: int, config: EncoderConfig) -> None:
        super().__init__()
        hidden = int(width * config.fusion_expansion // 2)
        self.split = ConvNorm(2 * width, 2 * width, 1)
        self.stages = nn.ModuleList(
            CrossStage(inner, hidden, hidden, config.fusion_blocks) for inner in (width, hidden)
        )
        self.convolutions = nn.ModuleList(ConvNorm(hidden, hidden, 3) for _ in range(2))
        self.merge = ConvNorm(2 * width + 2 * hidden, width, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """[b d h w] twice to [b d h w]."""
        seen = list(self.split(torch.cat([first, second], dim=1)).chunk(2, dim=1))
        for stage, convolution in zip(self.stages, self.convolutions, strict=True):
            seen.append(convolution(stage(seen[-1])))
        merged: Tensor = self.merge(torch.cat(seen, dim=1))
        return merged


class SeparableStride(nn.Sequential):
    """Half the resolution: channels are mixed, then each is convolved (SCDown of D-FINE)."""

    def __init__(self, width: int) -> None:
        mix = ConvNorm(width, width, 1, activate=False)
        super().__init__(mix, ConvNorm(width, width, 3, stride=2, activate=False, groups=width))
