"""What backbones share: normalised input, frozen stages and batch norms, the simple pyramid, the adapter."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import ceil, log2
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, max_pool2d, pad

from metr.models.config import BackboneConfig, Colour

_BackboneT = TypeVar("_BackboneT", bound="Backbone")


class Backbone(nn.Module):
    """Images to feature maps.

    A map of stride s covers the image from its top left corner in ceil(h / s) x ceil(w / s) cells. Images whose sides
    are multiples of the largest stride are covered exactly.

    Args:
        config: Stored in checkpoints. It rebuilds this network without pretrained weights and without the hub.
        channels: Channels of each map, finest first.
        strides: Stride of each map, in pixels.
        colours: Mean and standard deviation of the pretraining images.

    Attributes:
        pad_to: `forward` pads images with black, at the right and bottom, to multiples of this.
        multiple: Batches of images are best padded to multiples of this: the coarsest stride of most networks, or what
            the windows of a vision transformer need.
        pads_to_square: `forward` also pads images to squares.
        memory_format: Memory layout of images. Convolutions are faster channels last, on CPUs (a third off a training
            step of EfficientNet-Lite0) and GPUs alike.
    """

    mean: Tensor
    std: Tensor
    pad_to = 1
    multiple = 32
    pads_to_square = False
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
        images = self._padded(images)
        images = ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        maps = self.features(images)
        return tuple(
            level[..., : ceil(height / stride), : ceil(width / stride)]
            for level, stride in zip(maps, self.strides, strict=True)
        )

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """The feature maps of normalised, padded images."""
        raise NotImplementedError

    @property
    def pretrained_part(self) -> nn.Module:
        """The part whose weights come from a pretraining; what is made for detection lies beside it."""
        raise NotImplementedError

    def _padded(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 _h _w"]:
        if self.pad_to == 1 and not self.pads_to_square:
            return images
        height, width = images.shape[-2:]
        down, right = -height % self.pad_to, -width % self.pad_to
        if self.pads_to_square:
            side = max(height + down, width + right)
            down, right = side - height, side - width
        return pad(images, (0, right, 0, down))

    def train(self: _BackboneT, mode: bool = True) -> _BackboneT:
        """As `nn.Module.train`, but frozen stages stay in evaluation mode (batch statistics, stochastic depth)."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def freeze(self, modules: Iterable[nn.Module]) -> None:
        """Freezes modules for good. Autograd skips them if nothing before them is trained."""
        self._frozen = list(modules)
        for module in self._frozen:
            module.requires_grad_(False)
            module.eval()


class SimplePyramid(nn.Module):
    """The simple feature pyramid of ViTDet (Li et al., 2022): every level is made from the last map alone.

    Transposed convolutions make finer levels and halve the channels at each doubling; max pooling makes coarser levels.

    Args:
        channels: Channels of the map.
        stride: Stride of the map, in pixels.
        wanted: The wanted strides; each is met up to a factor of the square root of 2.
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


class SpatialAdapter(nn.Module):
    """Convolutions beside a vision transformer, for detail that its patches lack (DEIMv2's spatial tuning adapter).

    Args:
        planes: Channels of its first convolution; its maps have 2, 4 and 4 times as many.
        channels: Channels of the transformer's maps.
    """

    strides = (8, 16, 32)

    def __init__(self, planes: int, channels: Sequence[int]) -> None:
        super().__init__()
        widths = (planes, 2 * planes, 4 * planes, 4 * planes)
        self.channels = tuple(inner + own for inner, own in zip(channels, widths[1:], strict=True))
        self.stem = _halved(3, planes)
        self.steps = nn.ModuleList(_halved(inner, outer) for inner, outer in pairwise(widths))

    def forward(
        self, images: Float[Tensor, "b 3 h w"], maps: Sequence[Float[Tensor, "b _c _h _w"]]
    ) -> tuple[Float[Tensor, "b _d _i _j"], ...]:
        """The transformer's maps, finest first, each resized to the adapter's own map and joined with it."""
        detail, joined = max_pool2d(gelu(self.stem(images)), 3, stride=2, padding=1), []
        for number, (step, level) in enumerate(zip(self.steps, maps, strict=True)):
            detail = step(gelu(detail) if number else detail)
            resized = interpolate(level, size=detail.shape[2:], mode="bilinear", align_corners=False)
            joined.append(torch.cat([resized, detail], dim=1))
        return tuple(joined)


def _halved(inner: int, outer: int) -> nn.Sequential:
    """A convolution of stride 2 and its norm."""
    return nn.Sequential(nn.Conv2d(inner, outer, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outer))


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


# The layers of transformers that compute normalization(convolution(x)).
_FOLDABLE = frozenset(
    {"ResNetConvLayer", "ResNetShortCut", "RTDetrResNetConvLayer", "RTDetrResNetShortCut", "HGNetV2ConvLayer"}
)
_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class FrozenBatchNorm(nn.Module):
    """A batch norm whose statistics, scale and shift are constants. Its state has the keys of `nn.BatchNorm2d`."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, source: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = source.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(source, name).detach().clone())

    def scale_and_shift(self) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"]]:
        """The factor and the summand of each channel, in float32."""
        scale = self.weight.float() * torch.rsqrt(self.running_var.float() + self.eps)
        return scale, self.bias - self.running_mean * scale

    def fold(self, kernel: Float[Tensor, "c _i _kh _kw"]) -> tuple[Float[Tensor, "c _i _kh _kw"], Float[Tensor, "c"]]:
        """Kernel and bias of the one convolution that equals a convolution without bias followed by this norm."""
        scale, shift = self.scale_and_shift()
        return (kernel * scale[:, None, None, None]).to(kernel.dtype), shift.to(kernel.dtype)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Scales and shifts each channel."""
        scale, shift = (value.to(features.dtype)[:, None, None] for value in self.scale_and_shift())
        return features * scale + shift

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """Also loads the state of an `nn.BatchNorm2d`; its step count is dropped."""
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class FoldedBatchNorm(FrozenBatchNorm):
    """A frozen norm that the convolution before it applies. It only stores the values, under their usual keys."""

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Does nothing: see `FoldedConvolution`."""
        return features


class FoldedConvolution(nn.Conv2d):
    """A convolution whose kernel and bias include the frozen norm after it: one pass over the features less.

    The kernel is trained as before. The norm stays a child of the layer around both, so state keys do not change.
    """

    norm: FoldedBatchNorm

    def __init__(self, source: nn.Conv2d, norm: FoldedBatchNorm) -> None:
        how: dict[str, Any] = {name: getattr(source, name) for name in _CONVOLUTION}
        super().__init__(**how, bias=False, device="meta")
        self.weight = source.weight
        self.__dict__["norm"] = norm

    def forward(self, features: Float[Tensor, "b _i h w"]) -> Float[Tensor, "b c _h _w"]:
        """Convolution and norm in one."""
        convolved: Tensor = self._conv_forward(features, *self.norm.fold(self.weight))
        return convolved


def freeze_batch_norms(module: nn.Module) -> None:
    """Replaces every `nn.BatchNorm2d` inside a module by an equivalent frozen one."""
    for layer in module.modules():
        if type(layer).__name__ in _FOLDABLE:
            _fold(layer)
        for name, child in layer.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(layer, name, FrozenBatchNorm(child))


def _fold(layer: nn.Module) -> None:
    convolution, norm = layer.convolution, layer.normalization
    if type(convolution) is nn.Conv2d and convolution.bias is None and isinstance(norm, nn.BatchNorm2d):
        folded = FoldedBatchNorm(norm)
        layer.convolution, layer.normalization = FoldedConvolution(convolution, folded), folded
