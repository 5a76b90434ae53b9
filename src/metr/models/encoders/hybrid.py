"""The encoders of RT-DETR, D-FINE and DEIMv2: convolutions that fuse levels down and up.

`HybridEncoder` attends on the coarsest level first. `LiteEncoder` has no attention, and makes two levels of one map.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from metr.layers.convolution import dense_gradient
from metr.layers.position_encoding import counted_encoding, grid_encoding
from metr.models.config import EncoderConfig
from metr.models.encoders.pyramid import SelfAttentionLayer, flatten, level_mask
from metr.structures import Memory


class FusingEncoder(nn.Module):
    """What these encoders share: fusion from coarse to fine and from fine to coarse, and a projection of each level."""

    laterals: nn.ModuleList
    down_fusions: nn.ModuleList
    strides: nn.ModuleList
    up_fusions: nn.ModuleList
    outputs: nn.ModuleList

    def forward(self, features: Sequence[Tensor], padding_mask: Bool[Tensor, "b h w"]) -> Memory:
        """Backbone maps (finest first) to memory."""
        maps = self._bottom_up(self._top_down(self._levels(features, padding_mask)))
        if self.outputs:
            maps = [project(level) for project, level in zip(self.outputs, maps, strict=True)]
        return flatten(maps, padding_mask)

    def _levels(self, features: Sequence[Tensor], padding_mask: Tensor) -> list[Tensor]:
        """The levels that are fused, of one width."""
        raise NotImplementedError

    def _top_down(self, maps: list[Tensor]) -> list[Tensor]:
        """Fuses coarse levels into finer ones. Every level but the finest also goes through its lateral convolution."""
        coarse = [maps[-1]]
        for fine, lateral, fuse in zip(maps[-2::-1], self.laterals, self.down_fusions, strict=True):
            coarse[-1] = lateral(coarse[-1])
            raised = interpolate(coarse[-1], size=fine.shape[2:], mode="nearest")
            coarse.append(fuse(raised, fine))
        return coarse[::-1]

    def _bottom_up(self, maps: list[Tensor]) -> list[Tensor]:
        """Fuses fine levels into coarser ones."""
        done = [maps[0]]
        for coarse, halve, fuse in zip(maps[1:], self.strides, self.up_fusions, strict=True):
            done.append(fuse(halve(done[-1]), coarse))
        return done


class HybridEncoder(FusingEncoder):
    """Projection, attention on the coarsest level, then fusion from coarse to fine and from fine to coarse."""

    def __init__(self, channels: Sequence[int], width: int, config: EncoderConfig) -> None:
        super().__init__()
        outer, width = width, config.width or width
        self.width, self.levels = width, min(config.levels, len(channels))
        self.positions = config.positions
        channels = tuple(channels)[-self.levels :]
        steps = range(self.levels - 1)
        # D-FINE has no activations between its fusions.
        elan = config.fusion == "elan"
        fusion = AggregatingFusion if elan else Fusion
        self.projections = nn.ModuleList(ConvNorm(c, width, 1, activate=False) for c in channels)
        self.layers = nn.ModuleList(SelfAttentionLayer(width, config, nn.GELU) for _ in range(config.layers))
        self.laterals = nn.ModuleList(ConvNorm(width, width, 1, activate=not elan) for _ in steps)
        self.down_fusions = nn.ModuleList(fusion(width, config) for _ in steps)
        self.strides = nn.ModuleList(
            SeparableStride(width) if elan else ConvNorm(width, width, 3, stride=2) for _ in steps
        )
        self.up_fusions = nn.ModuleList(fusion(width, config) for _ in steps)
        outputs = range(self.levels if config.project_memory or outer != width else 0)
        self.outputs = nn.ModuleList(ConvNorm(width, outer, 1, activate=False) for _ in outputs)

    def _levels(self, features: Sequence[Tensor], padding_mask: Tensor) -> list[Tensor]:
        features = list(features)[-self.levels :]
        maps = [project(feature) for project, feature in zip(self.projections, features, strict=True)]
        maps[-1] = self._attend(maps[-1], padding_mask)
        return maps

    def _attend(self, coarsest: Tensor, padding_mask: Tensor) -> Tensor:
        height, width = coarsest.shape[2:]
        mask = level_mask(padding_mask, (height, width))
        allowed = rearrange(~mask, "b h w -> b 1 (h w)")
        tokens = rearrange(coarsest, "b d h w -> b (h w) d")
        positions = self._encoded(mask) if self.positions != "none" else torch.zeros_like(tokens)
        for layer in self.layers:
            tokens = layer(tokens, positions, allowed)
        return rearrange(tokens, "b (h w) d -> b d h w", h=height)

    def _encoded(self, mask: Bool[Tensor, "b h w"]) -> Float[Tensor, "b s d"]:
        """The encoded place of every cell."""
        counted = self.positions == "counted"
        grid = counted_encoding(mask, self.width) if counted else grid_encoding(mask, self.width, 10_000.0)
        return rearrange(grid, "b h w d -> b (h w) d")


class LiteEncoder(FusingEncoder):
    """Two levels of the backbone's last map, as in the smallest DEIMv2: convolutions and means, no attention."""

    def __init__(self, channels: Sequence[int], width: int, config: EncoderConfig) -> None:
        super().__init__()
        outer, width = width, config.width or width
        self.width, self.levels = width, 2
        fusion = AggregatingFusion if config.fusion == "elan" else Fusion
        self.projections = nn.ModuleList([ConvNorm(channels[-1], width, 1, activate=False)])
        self.coarser = nn.Sequential(_halving(), ConvNorm(width, width, 1))
        self.whole = ConvNorm(width, width, 1)
        self.laterals = nn.ModuleList([nn.Identity()])
        self.down_fusions = nn.ModuleList([fusion(width, config)])
        self.strides = nn.ModuleList([nn.Sequential(_halving(), ConvNorm(width, width, 1))])
        self.up_fusions = nn.ModuleList([fusion(width, config)])
        outputs = range(self.levels if config.project_memory or outer != width else 0)
        self.outputs = nn.ModuleList(ConvNorm(width, outer, 1, activate=False) for _ in outputs)

    def _levels(self, features: Sequence[Tensor], padding_mask: Tensor) -> list[Tensor]:
        fine = self.projections[0](features[-1])
        coarse = self.coarser(fine)
        seen = ~level_mask(padding_mask, coarse.shape[2:]).unsqueeze(1)
        mean = (coarse * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True).clamp(min=1)
        return [fine, self.whole(coarse + mean)]


def _halving() -> nn.Module:
    """The mean of 3x3 cells at every second one."""
    return nn.AvgPool2d(3, stride=2, padding=1)


class ConvNorm(nn.Sequential):
    """Convolution, batch normalisation and, if `activate`, SiLU."""

    def __init__(
        self, inner: int, outer: int, kernel: int, stride: int = 1, activate: bool = True, groups: int = 1
    ) -> None:
        convolution = nn.Conv2d(inner, outer, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        activation = nn.SiLU(inplace=True) if activate else nn.Identity()
        super().__init__(convolution, nn.BatchNorm2d(outer), activation)

    def forward(self, level: Tensor) -> Tensor:
        """[b inner h w] to [b outer h2 w2]."""
        convolution, norm, activation = self
        convolved: Tensor = activation(norm(convolution(level)))
        return dense_gradient(convolved)


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
    """A path through RepVGG blocks, added to a path around them."""

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
    """Fuses two levels of equal size, as in RT-DETR."""

    def __init__(self, width: int, config: EncoderConfig) -> None:
        added = config.fusion_inputs == "sum"
        inner = width if added else 2 * width
        super().__init__(inner, width, int(width * config.fusion_expansion), config.fusion_blocks)
        self.added = added

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """[b d h w] twice to [b d h w]."""
        return self.through(first + second if self.added else torch.cat([first, second], dim=1))


class AggregatingFusion(nn.Module):
    """Fuses two levels of equal size, as in D-FINE and DEIMv2: the last layer gets the output of every stage."""

    def __init__(self, width: int, config: EncoderConfig) -> None:
        super().__init__()
        hidden = int(width * config.fusion_expansion // 2)
        self.added = config.fusion_inputs == "sum"
        self.split = ConvNorm(width if self.added else 2 * width, 2 * width, 1)
        self.stages = nn.ModuleList(
            CrossStage(inner, hidden, hidden, config.fusion_blocks) for inner in (width, hidden)
        )
        self.convolutions = nn.ModuleList(
            ConvNorm(hidden, hidden, 3) if config.fusion_convolutions else nn.Identity() for _ in range(2)
        )
        self.merge = ConvNorm(2 * width + 2 * hidden, width, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """[b d h w] twice to [b d h w]."""
        both = first + second if self.added else torch.cat([first, second], dim=1)
        seen = list(self.split(both).chunk(2, dim=1))
        for stage, convolution in zip(self.stages, self.convolutions, strict=True):
            seen.append(convolution(stage(seen[-1])))
        merged: Tensor = self.merge(torch.cat(seen, dim=1))
        return merged


class SeparableStride(nn.Sequential):
    """Halves the resolution: mixes the channels, then convolves each channel (SCDown of D-FINE)."""

    def __init__(self, width: int) -> None:
        mix = ConvNorm(width, width, 1, activate=False)
        super().__init__(mix, ConvNorm(width, width, 3, stride=2, activate=False, groups=width))
