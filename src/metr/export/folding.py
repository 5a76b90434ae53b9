"""A network rewritten for inference: the same answers with fewer operations, and constants in place of arithmetic."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.fusion import fuse_conv_bn_eval

from metr.layers.attention import Attention, ConditionalAttention, attend
from metr.layers.groups import QueryGroups
from metr.models.backbones.base import FoldedBatchNorm, FoldedConvolution, FrozenBatchNorm
from metr.models.backbones.efficientnet_lite import ConvNorm
from metr.models.category_extraction import ExtractionBlock
from metr.models.category_selection import Shortlist
from metr.models.decoder import ConditionalDecoderLayer
from metr.models.detector import Detector
from metr.models.encoders.hybrid import RepVggBlock
from metr.models.encoders.pyramid import SelfAttentionLayer
from metr.models.plain_decoder import PlainDecoderLayer


def folded(network: Detector, *, padded: bool = True) -> Detector:
    """A copy on the CPU in float32 and evaluation mode, whose convolutions include the norms after them.

    Sides of its images must be multiples of the backbone's coarsest stride: odd sides would be padded differently.

    Args:
        network: The network.
        padded: Whether images may have padding. Without, attention to the image needs no mask.
    """
    copied = copy.deepcopy(network).to("cpu", torch.float32).eval().requires_grad_(False)
    _fold_children(copied)
    for module in copied.modules() if not padded else ():
        attention = getattr(module, _TO_THE_IMAGE.get(type(module), ""), None)
        if attention is not None:
            attention.__class__ = _UNMASKED[type(attention)]
    return copied


class _Unmasked(Attention):
    """Attention to all keys, whatever is allowed."""

    def gather(
        self, query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | QueryGroups | None = None
    ) -> Tensor:
        """As `Attention.gather`, without a mask."""
        del allowed
        return super().gather(query, keys, values)


class _UnmaskedConditional(ConditionalAttention):
    """Conditional attention to all tokens, whatever is allowed."""

    def attended(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
        """As `ConditionalAttention.attended`, without a mask."""
        del allowed
        return attend(queries, keys, values, None)


_UNMASKED: dict[type[nn.Module], type[nn.Module]] = {Attention: _Unmasked, ConditionalAttention: _UnmaskedConditional}
# where the only mask of attention is the padding of images
_TO_THE_IMAGE: dict[type[nn.Module], str] = {
    ExtractionBlock: "attention",
    Shortlist: "attention",
    SelfAttentionLayer: "attention",
    ConditionalDecoderLayer: "cross",
    PlainDecoderLayer: "cross",
}


class SameConvolution(nn.Conv2d):
    """A convolution of stride 2 with TensorFlow's "same" padding of even sides: more zeros at the bottom and right.

    The zeros stand outside of the convolution, since runtimes join them. A kernel enlarged by zeros, as in training,
    would cost them a third more.
    """

    def forward(self, features: Float[Tensor, "b _c h w"]) -> Float[Tensor, "b _d _h _w"]:
        """Features of half the size."""
        total = self.kernel_size[0] - 2
        before, after = total // 2, total - total // 2
        convolved: Tensor = super().forward(pad(features, (before, after, before, after)))
        return convolved


class ChannelScale(nn.Module):
    """Multiplies each channel by a constant and adds another one."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: FrozenBatchNorm) -> None:
        super().__init__()
        scale, shift = norm.scale_and_shift()
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Scales and shifts each channel."""
        return features * self.scale + self.shift


def _fold_children(module: nn.Module) -> None:
    """Folds what is inside a module, the innermost first."""
    for name, child in module.named_children():
        _fold_children(child)
        setattr(module, name, _folded(child))
    if isinstance(module, nn.Sequential):
        _fuse_norms(module)


def _folded(module: nn.Module) -> nn.Module:
    """The module that takes the place of one; itself for most."""
    if isinstance(module, ConvNorm):
        return _without_norm(module)
    if isinstance(module, RepVggBlock):
        return _one_branch(module)
    if isinstance(module, FoldedConvolution):
        return _convolution(module, *module.norm.fold(module.weight))
    if isinstance(module, FoldedBatchNorm):
        return nn.Identity()
    if isinstance(module, FrozenBatchNorm):
        return ChannelScale(module)
    return module


def _fuse_norms(layers: nn.Sequential) -> None:
    """Joins batch norms with the convolutions before them, in place."""
    for index in range(len(layers) - 1):
        convolution, norm = layers[index], layers[index + 1]
        if type(convolution) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d):
            layers[index], layers[index + 1] = fuse_conv_bn_eval(convolution, norm), nn.Identity()


def _without_norm(layer: ConvNorm) -> nn.Module:
    """The layer of EfficientNet-Lite as one convolution and its activation."""
    source, norm = layer.convolution, layer.normalization
    if isinstance(norm, ChannelScale):  # it was folded before this layer
        kernel, bias = source.weight * norm.scale.unsqueeze(-1), norm.shift.flatten()
    else:
        assert isinstance(norm, nn.BatchNorm2d)
        fused = fuse_conv_bn_eval(source, norm)
        assert fused.bias is not None
        kernel, bias = fused.weight, fused.bias
    same = source.kernel_size[0] // 2 if layer.stride == 1 else 0
    kind = nn.Conv2d if layer.stride == 1 else SameConvolution
    convolution = _convolution(source, kernel, bias, kind=kind, padding=same)
    return nn.Sequential(convolution, nn.ReLU6()) if layer.activate else convolution


def _one_branch(block: RepVggBlock) -> nn.Module:
    """The two convolutions of the block, whose norms are joined already, as one."""
    wide, narrow = block.wide[0], block.narrow[0]
    assert isinstance(wide, nn.Conv2d)
    assert isinstance(narrow, nn.Conv2d)
    assert wide.bias is not None
    assert narrow.bias is not None
    kernel = wide.weight + pad(narrow.weight, (1, 1, 1, 1))
    joined = _convolution(wide, kernel, wide.bias + narrow.bias, padding=1)
    return nn.Sequential(joined, block.activation)


def _convolution(
    source: nn.Conv2d,
    kernel: Tensor,
    bias: Tensor | None,
    *,
    kind: type[nn.Conv2d] = nn.Conv2d,
    padding: int | None = None,
) -> nn.Conv2d:
    """A convolution like `source` with another kernel and bias."""
    made = kind(
        source.in_channels,
        source.out_channels,
        kernel.shape[-1],
        source.stride,  # type: ignore[arg-type]
        source.padding if padding is None else padding,  # type: ignore[arg-type]
        source.dilation,  # type: ignore[arg-type]
        source.groups,
        device="meta",
    )
    made.weight = nn.Parameter(kernel.detach(), requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return made
