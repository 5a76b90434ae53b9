"""Convolution, bias and ReLU6 in one pass over the features, with a gradient that keeps to quick kernels; for CPUs."""

import logging
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, pad, relu6

_logger = logging.getLogger(__name__)
_RIGHT = {torch.float32: 1e-4, torch.bfloat16: 0.1}
_LIMITS = (0.0, 6.0)  # of ReLU6
_COLUMNS = 3  # oneDNN is quick at the gradient of depthwise kernels of so many columns at most


def fuses(features: Float[Tensor, "b c h w"], kernel: Float[Tensor, "d _c _h _w"]) -> bool:
    """Whether `fused_convolution` can take the place of a convolution here: same result, same precision."""
    if features.device.type != "cpu" or kernel.dtype != torch.float32 or type(features) is not Tensor:
        return False
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return _is_right(_precision(features))


def fused_convolution(
    features: Float[Tensor, "b c h w"],
    kernel: Float[Tensor, "d _c _h _w"],
    bias: Float[Tensor, "d"] | None,
    *,
    stride: int,
    padding: tuple[int, int],
    groups: int,
    relu6: bool = False,
) -> Float[Tensor, "b d _h2 _w2"]:
    """A convolution with a bias and, if wanted, ReLU6, by oneDNN, which writes each number once.

    It is the operator that torch's own compiler uses for inference on CPUs. Under autocast all is in its precision.
    """
    features = features.to(_precision(features))
    with torch.autocast("cpu", enabled=False):
        convolved: Tensor = _Fused.apply(features, kernel, bias, stride, padding, groups, relu6)  # type: ignore[no-untyped-call]
    return convolved


class _Fused(torch.autograd.Function):
    """The fused operator, which has no gradient of its own. The kernel's and bias's gradients are in float32."""

    @staticmethod
    def forward(
        context: Any,
        features: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: tuple[int, int],
        groups: int,
        relu6: bool,
    ) -> Tensor:
        """Convolves, adds and cuts off."""
        after, limits = ("hardtanh", list(_LIMITS)) if relu6 else ("none", [])
        low = features.dtype
        convolved: Tensor = torch.ops.mkldnn._convolution_pointwise(
            features,
            kernel.to(low),
            None if bias is None else bias.to(low),
            list(padding),
            [stride] * 2,
            [1, 1],
            groups,
            after,
            limits,
            "",
        )
        context.save_for_backward(features, kernel, convolved if relu6 else None)
        context.stride, context.padding, context.groups = stride, padding, groups
        return convolved

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of features, kernel and bias."""
        features, kernel, convolved = context.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        if convolved is not None:
            gradient = torch.ops.aten.hardtanh_backward(gradient, convolved, *_LIMITS)
        settings = context.stride, context.padding, context.groups
        for_features, for_kernel, for_bias, *_ = context.needs_input_grad
        if context.groups == 1:
            wanted = for_features, for_kernel
            features_gradient, kernel_gradient = _gradients(gradient, features, kernel, *settings, wanted=wanted)
        else:
            features_gradient, kernel_gradient = None, None
            if for_features:  # oneDNN is slow at it in bf16 where there are strides
                exact = gradient.float() if context.stride > 1 else gradient
                features_gradient, _ = _gradients(exact, features, kernel, *settings, wanted=(True, False))
            if for_kernel:
                kernel_gradient = _kernel_gradient(gradient, features, kernel, *settings)
        bias_gradient = gradient.sum((0, 2, 3), dtype=torch.float32) if for_bias else None
        return features_gradient, kernel_gradient, bias_gradient, None, None, None, None


def dense_gradient(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """The features themselves, whose gradient comes in one piece of memory on CPUs.

    There a norm takes several times as long over a gradient that is a part of a larger one.
    """
    if features.device.type != "cpu" or not features.requires_grad or torch.compiler.is_compiling():
        return features
    dense: Tensor = _Dense.apply(features)  # type: ignore[no-untyped-call]
    return dense


class _Dense(torch.autograd.Function):
    """`dense_gradient`."""

    @staticmethod
    def forward(_context: object, features: Tensor) -> Tensor:
        """A view."""
        return features.view_as(features)

    @staticmethod
    def backward(_context: object, gradient: Tensor) -> Tensor:
        """The same numbers, channels last."""
        return gradient.contiguous(memory_format=torch.channels_last)


def _gradients(
    gradient: Float[Tensor, "b d _h2 _w2"],
    features: Float[Tensor, "b c h w"],
    kernel: Float[Tensor, "d _c _h _w"],
    stride: int,
    padding: tuple[int, int],
    groups: int,
    *,
    wanted: tuple[bool, bool],
) -> tuple[Float[Tensor, "b c h w"] | None, Float[Tensor, "d _c _h _w"] | None]:
    """Those gradients of a convolution, of its features and of its kernel, that are wanted."""
    of_features, of_kernel, _ = torch.ops.aten.convolution_backward(
        gradient,
        features.to(gradient.dtype) if wanted[1] else torch.empty_like(features, dtype=gradient.dtype),
        kernel.to(gradient.dtype),
        None,
        [stride] * 2,
        padding,
        [1, 1],
        False,
        [0, 0],
        groups,
        [*wanted, False],
    )
    return of_features, None if of_kernel is None else of_kernel.to(kernel.dtype)


def _kernel_gradient(
    gradient: Float[Tensor, "b d _h2 _w2"],
    features: Float[Tensor, "b d h w"],
    kernel: Float[Tensor, "d 1 _h _w"],
    stride: int,
    padding: tuple[int, int],
    groups: int,
) -> Float[Tensor, "d 1 _h _w"]:
    """The gradient of a depthwise kernel, a few of its columns at a time.

    Columns of a kernel are kernels themselves, of features that are shifted.
    """
    down, right = padding
    width, across = features.shape[-1], (gradient.shape[-1] - 1) * stride
    parts = []
    for columns in _runs(kernel.shape[-1]):
        first, last = columns.start - right, columns.stop - right + across
        # oneDNN is slow at paddings that are large beside the features: they are made here
        before, behind = (min(max(beyond, 0), last - first) for beyond in (-first, last - width))
        seen = pad(features[..., max(first, 0) : max(last, 0)], (before, behind, down, down))
        part = kernel[..., columns.start : columns.stop]
        _, of_part = _gradients(gradient, seen, part, stride, (0, 0), groups, wanted=(False, True))
        assert of_part is not None
        parts.append(of_part)
    return torch.cat(parts, -1)


def _runs(columns: int) -> Iterator[range]:
    """Runs of columns, about as long as each other and none longer than `_COLUMNS`."""
    number = -(-columns // _COLUMNS)
    ends = [columns * n // number for n in range(number + 1)]
    return (range(start, stop) for start, stop in pairwise(ends))


def _precision(features: Tensor) -> torch.dtype:
    """The precision of a convolution of these features: that of autocast, where it is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else features.dtype


@cache
def _is_right(precision: torch.dtype) -> bool:
    """Whether this torch has the operator for this precision, quick, and it gives what the plain way gives."""
    if precision not in _RIGHT or (precision == torch.bfloat16 and not _has_bf16()):
        return False
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            features = torch.arange(2 * 8 * 7 * 7).sin().mul(4).reshape(2, 8, 7, 7)
            features = features.contiguous(memory_format=torch.channels_last)
            kernel, bias = torch.arange(8 * 9).cos().reshape(8, 1, 3, 3), torch.arange(8).sin()
            found = _Fused.apply(features.to(precision), kernel, bias, 2, (1, 1), 8, True)  # type: ignore[no-untyped-call]
            return torch.allclose(
                found.float(), relu6(conv2d(features, kernel, bias, 2, 1, 1, 8)), atol=_RIGHT[precision]
            )
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as failure:
        _logger.debug("convolutions in %s are not fused: %s", precision, failure)
        return False


def _has_bf16() -> bool:
    """Whether the processor multiplies bf16, which oneDNN would otherwise imitate, slowly."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (RuntimeError, AttributeError):
        return False
