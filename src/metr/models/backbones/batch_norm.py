"""Frozen batch norms, folded into the convolution before them where there is one."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
        """The two numbers a channel that are left of a frozen norm, in single precision."""
        scale = self.weight.float() * torch.rsqrt(self.running_var.float() + self.eps)
        return scale, self.bias - self.running_mean * scale

    def fold(self, kernel: Float[Tensor, "c _i _kh _kw"]) -> tuple[Float[Tensor, "c _i _kh _kw"], Float[Tensor, "c"]]:
        """Kernel and bias of the convolution that does the work of a convolution without bias and this norm."""
        scale, shift = self.scale_and_shift()
        return (kernel * scale[:, None, None, None]).to(kernel.dtype), shift.to(kernel.dtype)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Scales and shifts each channel."""
        scale, shift = (value.to(features.dtype)[:, None, None] for value in self.scale_and_shift())
        return features * scale + shift

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """Also takes the state of a norm that was trained, whose step count means nothing here."""
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class FoldedBatchNorm(FrozenBatchNorm):
    """A frozen norm that the convolution before it applies; it only keeps the numbers, under their usual names."""

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Does nothing: see `FoldedConvolution`."""
        return features


class FoldedConvolution(nn.Conv2d):
    """A convolution that applies the frozen norm after it, by scaling its kernel: one pass over the features less.

    The kernel learns as before. The norm stays a part of the layer around both, so that the names in its state stay.
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
    """Replaces every `nn.BatchNorm2d` inside a module by a frozen one; exact, up to rounding."""
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
