"""What every backbone has in common."""

from collections.abc import Iterable, Sequence
from math import ceil
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from metr.models.backbones.config import BackboneConfig, Colour

_BackboneT = TypeVar("_BackboneT", bound="Backbone")


class Backbone(nn.Module):
    """Images to feature maps.

    A map of stride s covers the image from its top left corner in ceil(h / s) x ceil(w / s) cells. Images whose sides
    are multiples of the largest stride are covered exactly.

    Args:
        config: Rebuilds this network, without pretrained weights and without the hub: what a checkpoint keeps.
        channels: Channels of each map, finest first.
        strides: Pixels a cell of each map.
        colours: Mean and standard deviation of the images that the network was made for.

    Attributes:
        pad_to: Images are padded with black, at the right and bottom, to multiples of this inside.
        memory_format: How images lie in memory. Convolutions are faster channels last, on CPUs (a third off a training
            step of EfficientNet-Lite0) and GPUs alike.
    """

    mean: Tensor
    std: Tensor
    pad_to = 1
    memory_format = torch.channels_last

    def __init__(
        self, config: BackboneConfig, channels: Sequence[int], strides: Sequence[int], colours: tuple[Colour, Colour]
    ) -> None:
        super().__init__()
        self.config = config
        self.channels, self.strides = tuple(channels), tuple(strides)
        mean, std = (config.pixel_mean or colours[0]), (config.pixel_std or colours[1])
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self._frozen: list[nn.Module] = []

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _c _h _w"], ...]:
        """The feature maps of RGB images in 0..1, finest first."""
        height, width = images.shape[-2:]
        if self.pad_to > 1:
            images = pad(images, (0, -width % self.pad_to, 0, -height % self.pad_to))
        images = ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        maps = self.features(images)
        return tuple(
            level[..., : ceil(height / stride), : ceil(width / stride)]
            for level, stride in zip(maps, self.strides, strict=True)
        )

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """The feature maps of normalised, padded images."""
        raise NotImplementedError

    def train(self: _BackboneT, mode: bool = True) -> _BackboneT:
        """As `nn.Module.train`, but frozen stages stay in evaluation mode (batch statistics, stochastic depth)."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def freeze(self, modules: Iterable[nn.Module]) -> None:
        """Takes modules out of training for good; autograd epochs them by where nothing before them learns."""
        self._frozen = list(modules)
        for module in self._frozen:
            module.requires_grad_(False)
            module.eval()
