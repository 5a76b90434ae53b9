"""DAB-DETR: METR's `plain` family has its layers, all of them; its queries are learnt boxes."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DabDetrConfig

from metr.conversion.activation_statistics import inside, of_contents, of_head
from metr.conversion.targets.base import (
    FOLDED,
    BuildSpec,
    Context,
    Derived,
    KeyTable,
    Target,
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
    spread_logits,
    with_backbone,
)
from metr.models.encoders.pyramid import TEMPERATURE

_DIFFERENCES = (
    "queries start from learnt boxes, the same for every image; METR's from places that it proposes for a category",
    ASK_FOR_ALL,
)
_BACKBONE = "model.backbone.conv_encoder.model."
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

_TABLE = KeyTable(
    encoder=encoder_rows("out_proj", "fc1", "fc2"),
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


def _configure(spec: BuildSpec) -> Any:
    """Positions have one temperature, as in METR; the content that METR's queries share is a pattern."""
    options = common_options(spec, "hidden_size") | {"auxiliary_loss": True}
    if spec.fits:
        temperature = int(TEMPERATURE)
        options |= {"temperature_height": temperature, "temperature_width": temperature, "num_patterns": 1}
    return DabDetrConfig(**options)


@torch.no_grad()
def _derive(context: Context) -> Mapping[str, Derived]:
    """The classifier, the learnt boxes and their content, and a scale of positions that changes nothing."""
    config, network = context.config, context.network
    content, learned = context.contents.mean(0), network.class_queries.learned
    if learned is not None:
        used = max(1, network.config.queries.number // network.config.categories.kept)
        content = content + learned.weight[:used].mean(0)
    scale = "model.encoder.query_scale.layers.1"
    still = "computed: changes nothing"
    return {
        **given_layer("class_embed", name_logits(context), FOLDED, of_head(network)),
        "model.query_refpoint_embeddings.weight": Derived(
            tensor=spread_logits(config.num_queries), how="computed: boxes spread over the image"
        ),
        "model.patterns.weight": Derived(
            tensor=content.unsqueeze(0),
            how="computed: what METR's queries have in common",
            source=(*inside(network, "class_queries.learned"), *of_contents(network)),
        ),
        f"{scale}.weight": Derived(tensor=torch.zeros(config.hidden_size, config.hidden_size), how=still),
        f"{scale}.bias": Derived(tensor=torch.ones(config.hidden_size), how=still),
    }


TARGET = Target(
    name="dab_detr",
    title="DAB-DETR",
    encoder="plain",
    decoder="conditional",
    backbone=_BACKBONE,
    processor="ConditionalDetrImageProcessor",
    configure=_configure,
    table=with_backbone(_TABLE, _BACKBONE),
    derive=_derive,
    differences=lambda _: _DIFFERENCES,
    single_map=True,
)
