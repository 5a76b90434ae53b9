"""The encoder of LW-DETR and RF-DETR: convolutions join maps of one stride and make levels of them; no attention."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from metr.models.config import EncoderConfig
from metr.models.encoders.pyramid import flatten
from metr.structures import Memory

# Maps with more channels are narrowed before they are doubled in size.
_WIDE = 512
# of the norm of each level, in LW-DETR and RF-DETR alike
_EPS = 1e-6


class ProjectorEncoder(nn.Module):
    """One level for each scale, each made of all maps of the backbone (Chen et al., 2024).

    Args:
        channels: Channels of the backbone's maps, which all have one stride.
        width: d.
        config: `scales`, `norm`, `norm_eps`, `fusion_blocks` and `fusion_expansion` are used.
    """

    def __init__(self, channels: Sequence[int], width: int, config: EncoderConfig) -> None:
        super().__init__()
        self.width, self.levels = width, len(config.scales)
        self.scales = nn.ModuleList(ScaleProjector(channels, width, scale, config) for scale in config.scales)

    def forward(self, features: Sequence[Tensor], padding_mask: Bool[Tensor, "b h w"]) -> Memory:
        """Backbone maps of one shape to memory."""
        return flatten([scale(features) for scale in self.scales], padding_mask)


class ScaleProjector(nn.Module):
    """One level: every map is resampled by convolution, and all are joined."""

    def __init__(self, channels: Sequence[int], width: int, scale: float, config: EncoderConfig) -> None:
        super().__init__()
        self.sampling = nn.ModuleList(_Sampling(inner, scale, config) for inner in channels)
        joined = sum(sampling.channels for sampling in self.sampling)  # type: ignore[misc]
        self.join = PartialStages(joined, width, config)
        self.norm = ChannelNorm(width, eps=_EPS)

    def forward(self, features: Sequence[Tensor]) -> Float[Tensor, "b d _h _w"]:
        """Maps of one shape to a level."""
        sampled = [sample(feature) for sample, feature in zip(self.sampling, features, strict=True)]
        level: Tensor = self.norm(self.join(torch.cat(sampled, dim=1)))
        return level


class _Sampling(nn.Sequential):
    """Doubles a map's size, halves it, or leaves it as it is. `channels` are those of the result."""

    def __init__(self, inner: int, scale: float, config: EncoderConfig) -> None:
        steps: list[nn.Module] = []
        self.channels = inner
        if scale > 1:
            if inner > _WIDE:
                steps.append(ConvNorm(inner, inner // 2, 1, config, activation=nn.ReLU))
                inner //= 2
            self.channels = inner // 2
            steps.append(nn.ConvTranspose2d(inner, self.channels, 2, stride=2))
        elif scale < 1:
            steps.append(ConvNorm(inner, inner, 3, config, stride=2, activation=nn.ReLU))
        super().__init__(*steps)


class PartialStages(nn.Module):
    """Half of the channels pass through a chain of blocks; all that appears on the way is joined (C2f of YOLOv8)."""

    def __init__(self, inner: int, width: int, config: EncoderConfig) -> None:
        super().__init__()
        hidden = int(width * config.fusion_expansion)
        self.split = ConvNorm(inner, 2 * hidden, 1, config)
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvNorm(hidden, hidden, 3, config), ConvNorm(hidden, hidden, 3, config))
            for _ in range(config.fusion_blocks)
        )
        self.merge = ConvNorm((2 + config.fusion_blocks) * hidden, width, 1, config)

    def forward(self, level: Float[Tensor, "b _c h w"]) -> Float[Tensor, "b d h w"]:
        """A level with another number of channels."""
        seen = list(self.split(level).chunk(2, dim=1))
        for block in self.blocks:
            seen.append(block(seen[-1]))
        merged: Tensor = self.merge(torch.cat(seen, dim=1))
        return merged


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of each cell."""

    def forward(self, level: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalises every cell by itself."""
        return rearrange(super().forward(rearrange(level, "b c h w -> b h w c")), "b h w c -> b c h w")


class ConvNorm(nn.Sequential):
    """Convolution, the norm that the configuration names, and an activation."""

    def __init__(
        self,
        inner: int,
        outer: int,
        kernel: int,
        config: EncoderConfig,
        *,
        stride: int = 1,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        convolution = nn.Conv2d(inner, outer, kernel, stride, padding=kernel // 2, bias=False)
        norm = nn.BatchNorm2d if config.norm == "batch" else ChannelNorm
        super().__init__(convolution, norm(outer, eps=config.norm_eps), activation())
