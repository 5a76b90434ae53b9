"""The distribution of a network's features, estimated from its norms without any image.

After a layer norm or batch norm a channel has the norm's bias for a mean and its weight for a deviation; a normal
distribution with these is what the functions here go on with.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from metr.layers.position_encoding import box_encoding
from metr.models.detector import Detector
from metr.models.encoders import Encoder
from metr.models.encoders.deformable import DeformableEncoder
from metr.models.encoders.hybrid import (
    AggregatingFusion,
    ConvNorm,
    FusingEncoder,
    Fusion,
    HybridEncoder,
    RepVggBlock,
)
from metr.models.encoders.projector import ProjectorEncoder
from metr.models.encoders.pyramid import PlainEncoder

_TEXT = ("category_extraction.projection", "category_extraction.norm")
# with a memory of one token, queries and keys of cross-attention have no effect
_REFINING = ("among", "among_norm", "attention.value", "attention.out", "norm", "feed_forward")


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationStatistics:
    """Mean and deviation of each channel, and the norms that they were read from."""

    mean: Float[Tensor, "c"]
    deviation: Float[Tensor, "c"]
    norms: tuple[nn.Module, ...] = ()


def after_norm(norm: nn.Module) -> ActivationStatistics:
    """Statistics of the output of a layer norm, a batch norm or a norm without a bias."""
    deviation, bias = norm.get_parameter("weight").detach().abs(), getattr(norm, "bias", None)
    mean = torch.zeros_like(deviation) if bias is None else bias.detach().clone()
    return ActivationStatistics(mean=mean, deviation=deviation, norms=(norm,))


def after_silu(before: ActivationStatistics) -> ActivationStatistics:
    """Statistics after SiLU, for normally distributed input."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    at = torch.as_tensor(nodes, dtype=before.mean.dtype).unsqueeze(1)
    share = torch.as_tensor(weights / weights.sum(), dtype=before.mean.dtype).unsqueeze(1)
    values = silu(before.mean + at * before.deviation)
    mean = (share * values).sum(0)
    return ActivationStatistics(mean=mean, deviation=(share * (values - mean) ** 2).sum(0).sqrt(), norms=before.norms)


def added(first: ActivationStatistics, second: ActivationStatistics) -> ActivationStatistics:
    """Statistics of a sum, as if the two were independent."""
    deviation = torch.hypot(first.deviation, second.deviation)
    return ActivationStatistics(mean=first.mean + second.mean, deviation=deviation, norms=first.norms + second.norms)


def after_convolution(layer: ConvNorm) -> ActivationStatistics:
    """Statistics of the output of a convolution with its norm and activation."""
    before = after_norm(layer[1])
    return after_silu(before) if isinstance(layer[2], nn.SiLU) else before


def after_block(block: RepVggBlock) -> ActivationStatistics:
    """Statistics of the output of a RepVGG block."""
    return after_silu(added(after_convolution(block.wide), after_convolution(block.narrow)))


def inside_fusion(fusion: Fusion) -> ActivationStatistics:
    """Statistics at the end of the path of blocks inside a fusion."""
    last = fusion.blocks[-1]
    assert isinstance(last, RepVggBlock)
    return after_block(last)


def after_fusion(fusion: Fusion | AggregatingFusion) -> ActivationStatistics:
    """Statistics of the output of a fusion."""
    if isinstance(fusion, AggregatingFusion):
        return after_convolution(fusion.merge)
    if isinstance(fusion.out, ConvNorm):
        return after_convolution(fusion.out)
    return added(inside_fusion(fusion), after_convolution(fusion.side))


def of_memory(encoder: Encoder) -> list[ActivationStatistics]:
    """Statistics of each level of the memory, finest first."""
    if isinstance(encoder, ProjectorEncoder):
        return [after_norm(scale.norm) for scale in encoder.scales]  # type: ignore[arg-type]
    if not isinstance(encoder, FusingEncoder):
        return [_after_layers(encoder)] * encoder.levels
    if encoder.outputs:
        return [after_convolution(layer) for layer in encoder.outputs]  # type: ignore[arg-type]
    if isinstance(encoder, HybridEncoder) and encoder.levels == 1:
        return [_after_layers(encoder)]
    return [after_fusion(fusion) for fusion in (encoder.down_fusions[-1], *encoder.up_fusions)]


def _after_layers(encoder: DeformableEncoder | HybridEncoder | PlainEncoder) -> ActivationStatistics:
    """Statistics of the output of attention layers; unknown for an encoder without them."""
    if len(encoder.layers):
        return after_norm(encoder.layers[-1].feed_forward.norm)  # type: ignore[arg-type]
    width = torch.zeros(encoder.width)
    return ActivationStatistics(mean=width, deviation=torch.ones_like(width))


def inside(network: nn.Module, *parts: str) -> tuple[str, ...]:
    """The keys of a network's state that are these, or inside modules of these names; what it lacks has none."""
    modules = tuple(f"{part}." for part in parts)
    return tuple(key for key in network.state_dict() if key in parts or key.startswith(modules))


def mean_feature(network: Detector) -> tuple[Float[Tensor, "d"], tuple[str, ...]]:
    """What a query contains of its place's feature, averaged over places; and the keys that it is made of."""
    mean, place = network.proposals.norm.bias.detach(), network.class_queries.place
    if place is not None:
        return place(mean), (*inside(network, "class_queries.place"), "proposals.norm.bias")
    if network.config.queries.content == "place_only":
        return mean, ("proposals.norm.bias",)
    return torch.zeros_like(mean), ()


def of_norms(network: nn.Module, *statistics: ActivationStatistics) -> tuple[str, ...]:
    """The scales and shifts of norms that these statistics were read from."""
    names = {norm: name for name, norm in network.named_modules()}
    norms = dict.fromkeys(norm for known in statistics for norm in known.norms)
    return tuple(f"{names[norm]}.{part}" for norm in norms for part, _ in norm.named_parameters())


def of_tokens(network: Detector) -> tuple[str, ...]:
    """What makes the tokens that queries are compared with (`classifier.name_tokens`)."""
    return of_contents(network) if network.config.similarity.token == "refined" else inside(network, *_TEXT)


def of_contents(network: Detector) -> tuple[str, ...]:
    """What makes the tokens that queries contain (`classifier.refined_tokens`)."""
    blocks = range(len(network.category_extraction.blocks))
    refining = (f"category_extraction.blocks.{block}.{part}" for block in blocks for part in _REFINING)
    return inside(network, *_TEXT, *refining) + of_norms(network, *of_memory(network.encoder))


def of_head(network: Detector) -> tuple[str, ...]:
    """What makes a classification head for the decoder's normalised output (`classifier.classifier`)."""
    return inside(network, "decoder.similarity", "decoder.norm") + of_tokens(network)


def of_normed_head(network: Detector) -> tuple[str, ...]:
    """The same for any form of the head (`classifier.normed_classifier`)."""
    return of_head(network) if network.config.similarity.form == "product" else inside(network, "decoder.similarity")


def of_layer_head(network: Detector, layer: int) -> tuple[str, ...]:
    """What makes a classification head for what a decoder layer gives (`classifier.layer_classifier`)."""
    if network.config.decoder.predictors != "shared":
        own, product = f"decoder.similarity.{layer}", network.config.similarity.form == "product"
        normed = product or network.config.decoder.predictors == "normed_layer"
        read = (f"decoder.layers.{layer}.feed_forward.norm", "decoder.norm") if normed else ()
        return inside(network, own, *read) + (of_tokens(network) if product else ())
    return inside(network, f"decoder.layers.{layer}.feed_forward.norm") + of_head(network)


def of_places(network: Detector) -> tuple[str, ...]:
    """What makes a head that scores places (`classifier.place_classifier`)."""
    if network.proposals.classifier is not None:
        return inside(network, "proposals.classifier")
    return inside(network, *(f"proposals.{part}" for part in ("category", "bias", "objectness"))) + of_tokens(network)


def box_position(network: Detector) -> Callable[[Tensor], Tensor] | None:
    """From cxcywh boxes [n 4] to positions [n d]; None where RT-DETR's two layers do that."""
    decoder, width, position = network.config.decoder, network.config.width, network.decoder.position
    if decoder.positions == "plain":
        as_there = (decoder.position_layers, decoder.position_activation) == (2, "relu")
        return None if as_there else position
    # where queries keep their position, the same layer makes a part of their content
    return lambda boxes: position(box_encoding(boxes, width))[..., :width]


def four_encodings(boxes: Float[Tensor, "n 4"], width: int) -> Float[Tensor, "n c"]:
    """As METR encodes boxes, with x before y: Deformable DETR's order."""
    y, x, w, h = box_encoding(boxes, width).chunk(4, dim=-1)
    return rearrange(torch.stack([x, y, w, h], dim=1), "n four c -> n (four c)")


# nodes of the Gauss-Hermite quadrature: means of smooth functions to five digits
_NODES = 33
