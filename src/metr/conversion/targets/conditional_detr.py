"""Conditional DETR: METR's `plain` family has its layers; it moves points instead of boxes, and only at the end."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import ConditionalDetrConfig

from metr.conversion.activation_statistics import of_head
from metr.conversion.classifier import Linear
from metr.conversion.table import Row
from metr.conversion.targets.base import (
    FOLDED,
    BuildSpec,
    Context,
    Derived,
    KeyTable,
    Target,
    feed_forward,
    given_layer,
    joined,
    linear,
    mlp,
)
from metr.conversion.targets.single_scale import (
    ASK_FOR_ALL,
    DECODER,
    common_options,
    encoder_rows,
    name_logits,
    position_keys,
    query_positions,
    spread_logits,
    with_backbone,
)

_DIFFERENCES = (
    "queries start from learnt points, the same for every image; METR's from places that it proposes for a category",
    ASK_FOR_ALL,
    "where a query looks follows neither its box's size nor what earlier layers found; METR's follows both",
)
# how large points' logits are written into queries
_FAINT = 0.1
_LAYER = {
    "self_attn.q_content_proj": "among.query_content",
    "self_attn.q_pos_proj": "among.query_position",
    "self_attn.k_content_proj": "among.key_content",
    "self_attn.k_pos_proj": "among.key_position",
    "self_attn.v_proj": "among.value",
    "self_attn.o_proj": "among.out",
    "self_attn_layer_norm": "among_norm",
    "encoder_attn.q_content_proj": "cross.query_content",
    "encoder_attn.q_pos_proj": "cross.query_position",
    "encoder_attn.q_pos_sine_proj": "cross.query_place",
    "encoder_attn.k_content_proj": "cross.key_content",
    "encoder_attn.k_pos_proj": "cross.key_place",
    "encoder_attn.v_proj": "cross.value",
    "encoder_attn.o_proj": "cross.out",
    "encoder_attn_layer_norm": "cross_norm",
}

_TABLE = KeyTable(
    encoder=encoder_rows(),
    decoder=joined(
        linear(*DECODER, _LAYER),
        feed_forward(DECODER[0], f"{DECODER[1]}.feed_forward"),
        linear("model.decoder", "decoder", {"layernorm": "norm"}),
        mlp("model.decoder.query_scale", "decoder.scale", 2),
    ),
    heads=joined(
        mlp("bbox_predictor", "decoder.box.change", 2),
        (Row("bbox_predictor.layers.2.weight", "decoder.box.change.4.weight"),),
    ),
)


def _configure(spec: BuildSpec) -> Any:
    """Without auxiliary losses: transformers' layers would normalise what they pass on, as METR's do not."""
    return ConditionalDetrConfig(**common_options(spec, "d_model"))


@torch.no_grad()
def _derive(context: Context) -> Mapping[str, Derived]:
    """The classifier, the learnt queries, the points that they stand for, and the size from which boxes start."""
    start = spread_logits(context.config.num_queries)
    queries, first, last = _queries_and_points(query_positions(context), start[:, :2])
    bias = context.network.decoder.box.change.last.bias
    size = torch.cat([torch.zeros(2), start[0, 2:]])
    how, positions = "computed: embedded boxes spread over the image", position_keys(context)
    return {
        **given_layer("class_labels_classifier", name_logits(context), FOLDED, of_head(context.network)),
        "model.query_position_embeddings.weight": Derived(tensor=queries, how=how, source=positions),
        **given_layer("model.decoder.ref_point_head.layers.0", first, how, positions),
        **given_layer("model.decoder.ref_point_head.layers.1", last, how, positions),
        "bbox_predictor.layers.2.bias": Derived(
            tensor=bias + size, how="shifted to the size of the spread boxes", source=("decoder.box.change.4.bias",)
        ),
    }


def _queries_and_points(
    embedded: Float[Tensor, "n d"], points: Float[Tensor, "n 2"]
) -> tuple[Float[Tensor, "n d"], Linear, Linear]:
    """Queries from which two layers with a ReLU between read the points' logits.

    To read them from METR's embedding takes weights of hundreds, with which no optimiser gets along. The points are
    written, small, into the two directions that the embedding uses least, and read from there.
    """
    mean = embedded.mean(0)
    unused = torch.linalg.svd(embedded - mean).Vh[-2:]
    queries = embedded + _FAINT * points @ unused
    # raised above zero, where a ReLU does nothing
    raise_by = 1 - queries.amin(0)
    read = unused / _FAINT
    first = Linear(weight=torch.eye(len(mean)), bias=raise_by)
    return queries, first, Linear(weight=read, bias=-read @ (mean + raise_by))


TARGET = Target(
    name="conditional_detr",
    title="Conditional DETR",
    encoder="plain",
    decoder="conditional",
    processor="ConditionalDetrImageProcessor",
    configure=_configure,
    table=with_backbone(_TABLE),
    derive=_derive,
    differences=lambda _: _DIFFERENCES,
    single_map=True,
)
