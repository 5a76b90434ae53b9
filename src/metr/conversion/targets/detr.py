"""DETR: METR's `plain` family has its encoder, and of its decoder what does not know places."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DetrConfig

from metr.conversion.activation_statistics import of_head
from metr.conversion.classifier import Linear
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
    conditional_decoder,
    encoder_rows,
    name_logits,
    position_keys,
    query_positions,
    with_backbone,
)

_DIFFERENCES = (
    "queries are learnt, the same for every image; METR's start from places that it proposes for a category",
    ASK_FOR_ALL,
    "content and place share their projections in its decoder, and boxes have no start: METR's content has moved",
)
_LAYER = {
    "self_attn.q_proj": "among.query_content",
    "self_attn.k_proj": "among.key_content",
    "self_attn.v_proj": "among.value",
    "self_attn.o_proj": "among.out",
    "self_attn_layer_norm": "among_norm",
    "encoder_attn.k_proj": "cross.key_content",
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
    ),
    # the last layer moves boxes in METR, and says where they are in DETR
    heads=mlp("bbox_predictor", "decoder.box.change", 2),
)


def _configure(spec: BuildSpec) -> Any:
    """Without auxiliary losses: transformers' layers would normalise what they pass on, as METR's do not."""
    return DetrConfig(**common_options(spec, "d_model"))


@torch.no_grad()
def _derive(context: Context) -> Mapping[str, Derived]:
    """The classifier, with "no object" at a logit of 0, the learnt queries, and queries of the content's half."""
    names = name_logits(context)
    weight = torch.cat([names.weight, torch.zeros_like(names.weight[:1])])
    bias = torch.cat([names.bias, torch.zeros_like(names.bias[:1])])
    source = of_head(context.network)
    derived = given_layer("class_labels_classifier", Linear(weight=weight, bias=bias), FOLDED, source)
    derived["model.query_position_embeddings.weight"] = Derived(
        tensor=query_positions(context),
        how="computed: embedded boxes spread over the image",
        source=position_keys(context),
    )
    for index, layer in enumerate(conditional_decoder(context).layers):
        for part in ("weight", "bias"):
            own = f"cross.query_content.{part}"
            # METR's heads are twice as wide: they hold the place as well
            derived[f"model.decoder.layers.{index}.encoder_attn.q_proj.{part}"] = Derived(
                tensor=layer.get_parameter(own) / math.sqrt(2),
                how="scaled for narrower heads",
                source=(f"decoder.layers.{index}.{own}",),
            )
    return derived


TARGET = Target(
    name="detr",
    title="DETR",
    encoder="plain",
    decoder="conditional",
    processor="DetrImageProcessor",
    configure=_configure,
    table=with_backbone(_TABLE),
    derive=_derive,
    differences=lambda _: _DIFFERENCES,
    single_map=True,
)
