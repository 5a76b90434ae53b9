"""DAB-DETR: METR's `plain` family has its layers, all of them; its queries are learnt boxes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import DabDetrConfig

from metr.models.encoders.plain import TEMPERATURE
from metr.transfer.carriers import backbone_rows
from metr.transfer.targets.base import (
    AGREEMENT,
    FOLDED,
    Derived,
    KeyTable,
    Knowledge,
    Order,
    Target,
    feed_forward,
    joined,
    linear,
    mlp,
)
from metr.transfer.targets.single_scale import (
    DECODER,
    ENCODER,
    common_options,
    name_logits,
    named,
    projection,
    spread_logits,
)

_DIFFERENCES = (
    "queries start from learnt boxes, the same for every picture; METR's from places that it proposes for a category",
    "every query asks for every name; METR's each ask for one, and attend to those that ask for the same",
)
_LAYER = {
    "self_attn.self_attn_query_content_proj": "among.query_content",
    "self_attn.self_attn_query_pos_proj": "among.query_position",
    "self_attn.self_attn_key_content_proj": "among.key_content",
    "self_attn.self_attn_key_pos_proj": "among.key_position",
    "self_attn.self_attn_value_proj": "among.value",
    "self_attn.self_attn.output_proj": "among.out",
    "self_attn.self_attn_layer_norm": "among_norm",
    "cross_attn.cross_attn_query_content_proj": "cross.query_content",
    "cross_attn.cross_attn_query_pos_proj": "cross.query_position",
    "cross_attn.cross_attn_query_pos_sine_proj": "cross.query_place",
    "cross_attn.cross_attn_key_content_proj": "cross.key_content",
    "cross_attn.cross_attn_key_pos_proj": "cross.key_place",
    "cross_attn.cross_attn_value_proj": "cross.value",
    "cross_attn.cross_attn.output_proj": "cross.out",
    "cross_attn.cross_attn_layer_norm": "cross_norm",
    "mlp.fc1": "feed_forward.widen",
    "mlp.fc2": "feed_forward.narrow",
    "mlp.final_layer_norm": "feed_forward.norm",
}
_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}

_TABLE = KeyTable(
    encoder=joined(
        projection(),
        linear(f"{ENCODER[0]}.self_attn", f"{ENCODER[1]}.attention", _ATTENTION),
        linear(*ENCODER, {"self_attn_layer_norm": "norm"}),
        feed_forward(ENCODER[0], f"{ENCODER[1]}.feed_forward", "fc1", "fc2"),
    ),
    decoder=joined(
        linear(*DECODER, _LAYER),
        linear("model.decoder", "decoder", {"layernorm": "norm"}),
        mlp("model.decoder.ref_point_head", "decoder.position", 2),
        mlp("model.decoder.query_scale", "decoder.scale", 2),
        mlp("model.decoder.ref_anchor_head", "decoder.extent", 2),
    ),
    heads=mlp("bbox_predictor", "decoder.box.change", 3),
    copies=mlp("model.decoder.bbox_embed", "decoder.box.change", 3),
)


def _configure(order: Order) -> Any:
    """Positions have one temperature, as in METR; the content that METR's queries share is a pattern."""
    options = common_options(order, "hidden_size") | {"auxiliary_loss": True}
    if order.fits:
        temperature = int(TEMPERATURE)
        options |= {"temperature_height": temperature, "temperature_width": temperature, "num_patterns": 1}
    return DabDetrConfig(**options)


def _table(config: Any) -> KeyTable:
    return replace(_TABLE, backbone=backbone_rows(config.backbone_config, TARGET.backbone))


@torch.no_grad()
def _derive(knowledge: Knowledge) -> Mapping[str, Derived]:
    """The classifier, the learnt boxes and their content, and a scale of positions that changes nothing."""
    config, network = knowledge.config, knowledge.network
    learned = network.class_queries.learned.weight
    used = max(1, network.config.queries.number // network.config.categories.kept)
    content = learned[:used].mean(0) + knowledge.contents.mean(0)
    scale = "model.encoder.query_scale.layers.1"
    still = "computed: changes nothing"
    return {
        **named("class_embed", name_logits(knowledge), FOLDED, AGREEMENT),
        "model.query_refpoint_embeddings.weight": Derived(
            tensor=spread_logits(config.num_queries), how="computed: boxes spread over the picture"
        ),
        "model.patterns.weight": Derived(
            tensor=content.unsqueeze(0),
            how="computed: what METR's queries have in common",
            ours=("class_queries.learned.weight",),
        ),
        f"{scale}.weight": Derived(tensor=torch.zeros(config.hidden_size, config.hidden_size), how=still),
        f"{scale}.bias": Derived(tensor=torch.ones(config.hidden_size), how=still),
    }


TARGET = Target(
    name="dab_detr",
    title="DAB-DETR",
    encoder="plain",
    decoder="conditional",
    backbone="model.backbone.conv_encoder.model.",
    processor="ConditionalDetrImageProcessor",
    configure=_configure,
    table=_table,
    derive=_derive,
    differences=lambda _: _DIFFERENCES,
    single_map=True,
)
