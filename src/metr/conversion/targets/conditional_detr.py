"""Conditional DETR: METR's `plain` family has its layers; it moves points instead of boxes, and only at the end.

A METR with learned places is one.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import ConditionalDetrConfig

from metr.conversion.activation_statistics import of_head, of_normed_head
from metr.conversion.classifier import Linear, normed_classifier
from metr.conversion.table import Row, State
from metr.conversion.targets.base import (
    FOLDED,
    Adopted,
    BuildSpec,
    Context,
    Derived,
    KeyTable,
    Target,
    equal_presence,
    feed_forward,
    given_layer,
    joined,
    linear,
    mlp,
    need_options,
)
from metr.conversion.targets.single_scale import (
    ASK_FOR_ALL,
    DECODER,
    PLAIN_OPTIONS,
    adopted,
    common_options,
    encoder_rows,
    name_logits,
    other_options,
    position_keys,
    query_positions,
    spread_logits,
    with_backbone,
)
from metr.models.config import BackboneConfig, DetectorConfig

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
# of a METR with learned places, whose boxes start as Conditional DETR's
_LEARNED = replace(
    _TABLE,
    heads=joined(
        mlp("bbox_predictor", "decoder.box.change", 3),
        mlp("model.decoder.ref_point_head", "learned_places.point", 2),
        (Row("model.query_position_embeddings.weight", "learned_places.position.weight"),),
    ),
)


def _table(config: Any, metr: DetectorConfig) -> KeyTable:
    """Its table for such a METR."""
    return with_backbone(_LEARNED if metr.queries.places == "learned" else _TABLE)(config, metr)


def _configure(spec: BuildSpec) -> Any:
    """Without auxiliary losses: transformers' layers would normalise what they pass on, as METR's do not."""
    return ConditionalDetrConfig(**common_options(spec, "d_model"))


@torch.no_grad()
def _derive(context: Context) -> Mapping[str, Derived]:
    """The classifier; unless METR has them, the learnt queries, their points, and the size from which boxes start."""
    if context.network.learned_places is not None:
        names = normed_classifier(context.network, context.text, context.tokens)
        return given_layer("class_labels_classifier", names, FOLDED, of_normed_head(context.network))
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


def _differences(config: DetectorConfig) -> tuple[str, ...]:
    """What Conditional DETR computes otherwise."""
    if config.queries.places == "proposed":
        return _DIFFERENCES + other_options(config, PLAIN_OPTIONS)
    wanted = {"queries.content": "none", "queries.point_layers": 2, "decoder.extents": False, "decoder.refine": "none"}
    return other_options(config, wanted | PLAIN_OPTIONS)


def _adopt(config: Any, backbone: BackboneConfig, _: State) -> Adopted:
    """A METR with learned places that computes all that it does.

    Raises:
        ModelError: an option is set for which METR has no counterpart.
    """
    # with auxiliary losses transformers' layers normalise what they pass on
    need_options(config, {"position_embedding_type": "sine", "activation_function": "relu", "auxiliary_loss": False})
    ours = adopted(
        config,
        config.d_model,
        backbone,
        decoder={"positions": "learned", "extents": False, "refine": "none"},
        queries={"places": "learned", "content": "none", "point_layers": 2},
        denoising={"number": 0},
    )
    return Adopted(
        config=ours,
        derived=equal_presence(config.d_model),
        class_heads={"decoder.similarity": "class_labels_classifier"},
    )


TARGET = Target(
    name="conditional_detr",
    title="Conditional DETR",
    encoder="plain",
    decoder="conditional",
    processor="ConditionalDetrImageProcessor",
    configure=_configure,
    table=_table,
    derive=_derive,
    differences=_differences,
    adopt=_adopt,
    places=("proposed", "learned"),
    single_map=True,
)
