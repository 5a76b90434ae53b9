"""Convolution, bias and ReLU6 in one pass over the features, for CPUs and where no gradient is wanted."""

import logging
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv2d, relu6

_logger = logging.getLogger(__name__)
_RIGHT = 1e-4


def fuses(features: Float[Tensor, "b c h w"], kernel: Float[Tensor, "d _c _h _w"]) -> bool:
    """Whether `fused_convolution` can take the place of a convolution here: same result, but no gradient."""
    if features.device.type != "cpu" or features.dtype != torch.float32 or kernel.dtype != torch.float32:
        return False
    if torch.is_grad_enabled() and (features.requires_grad or kernel.requires_grad):
        return False
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.is_autocast_enabled("cpu"):
        return False
    return type(features) is Tensor and _is_right()


def fused_convolution(
    features: Float[Tensor, "b c h w"],
    kernel: Float[Tensor, "d _c _h _w"],
    bias: Float[Tensor, "d"],
    *,
    stride: int,
    padding: tuple[int, int],
    groups: int,
    relu6: bool,
) -> Float[Tensor, "b d _h2 _w2"]:
    """A convolution with a bias and, if wanted, ReLU6, by oneDNN, which writes each number once.

    It is the operator that torch's own compiler uses for inference on CPUs.
    """
    after, limits = ("hardtanh", [0.0, 6.0]) if relu6 else ("none", [])
    convolved: Tensor = torch.ops.mkldnn._convolution_pointwise(
        features, kernel, bias, list(padding), [stride] * 2, [1, 1], groups, after, limits, ""
    )
    return convolved


@cache
def _is_right() -> bool:
    """Whether this torch has the operator, and it gives what the plain way gives."""
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            features = torch.arange(2 * 8 * 7 * 7).sin().mul(4).reshape(2, 8, 7, 7)
            features = features.contiguous(memory_format=torch.channels_last)
            kernel, bias = torch.arange(8 * 9).cos().reshape(8, 1, 3, 3), torch.arange(8).sin()
            found = fused_convolution(features, kernel, bias, stride=2, padding=(1, 1), groups=8, relu6=True)
            return torch.allclose(found, relu6(conv2d(features, kernel, bias, 2, 1, 1, 8)), atol=_RIGHT)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as failure:
        _logger.debug("convolutions are not fused: %s", failure)
        return False
