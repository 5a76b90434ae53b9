"""DETR: METR's `plain` family has its encoder, and of its decoder what does not know places.

A METR whose decoder is `plain` too is one.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import DetrConfig

from metr.conversion.activation_statistics import after_norm, of_head, of_normed_head
from metr.conversion.classifier import Linear, names_classifier, normed_classifier
from metr.conversion.table import Row, State
from metr.conversion.targets.base import (
    FOLDED,
    Adopted,
    BuildSpec,
    Context,
    Derived,
    KeyTable,
    Target,
    attention,
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
    conditional_decoder,
    encoder_rows,
    name_logits,
    other_options,
    position_keys,
    query_positions,
    with_backbone,
)
from metr.models.config import BackboneConfig, DetectorConfig
from metr.models.detector import Detector
from metr.models.heads import ClassifierHead
from metr.models.plain_decoder import PlainDecoder

_DIFFERENCES = (
    "queries are learnt, the same for every image; METR's start from places that it proposes for a category",
    ASK_FOR_ALL,
    "content and place share their projections in its decoder, and boxes have no start: METR's content has moved",
)
_QUERIES, _CLASSES = "model.query_position_embeddings.weight", "class_labels_classifier"
_HEAD = "decoder.similarity"
# how far numbers of a label's classifier and of METR's rival for it may be apart, to be the same
_SAME_ROW = 1e-4
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


# of a METR that is one
_LEARNED = replace(
    _TABLE,
    decoder=joined(
        attention("model.decoder.layers.{i}.self_attn", "decoder.layers.{i}.among"),
        attention("model.decoder.layers.{i}.encoder_attn", "decoder.layers.{i}.cross"),
        linear(*DECODER, {"self_attn_layer_norm": "among_norm", "encoder_attn_layer_norm": "cross_norm"}),
        feed_forward(DECODER[0], f"{DECODER[1]}.feed_forward"),
        linear("model.decoder", "decoder", {"layernorm": "norm"}),
    ),
    heads=joined(mlp("bbox_predictor", "decoder.box.change", 3), (Row(_QUERIES, "learned_places.position.weight"),)),
)


def _table(config: Any, metr: DetectorConfig) -> KeyTable:
    """Its table for such a METR."""
    return with_backbone(_LEARNED if metr.decoder.kind == "plain" else _TABLE)(config, metr)


def _configure(spec: BuildSpec) -> Any:
    """Without auxiliary losses: transformers' layers would normalise what they pass on, as METR's do not."""
    return DetrConfig(**common_options(spec, "d_model"))


@torch.no_grad()
def _derive(context: Context) -> Mapping[str, Derived]:
    """The classifier, and for a METR with proposals the learnt queries, and queries of the content's half."""
    network = context.network
    if isinstance(network.decoder, PlainDecoder):
        names = normed_classifier(network, context.text, context.tokens)
        return given_layer(_CLASSES, _with_no_object(names, network), FOLDED, of_normed_head(network))
    derived = given_layer(_CLASSES, _with_no_object(name_logits(context), network), FOLDED, of_head(network))
    derived[_QUERIES] = Derived(
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


def _with_no_object(names: Linear, network: Detector) -> Linear:
    """The names' logits and one of "no object": of METR's rivals without a name, or 0 where it has no rivals.

    Of several the sum counts, as far as it is linear around the mean feature.
    """
    nameless = _nameless(network)
    if nameless is None:
        none = Linear(weight=torch.zeros_like(names.weight[:1]), bias=torch.zeros_like(names.bias[:1]))
    else:
        mean = after_norm(network.decoder.norm).mean
        logits = nameless(mean)
        weight = logits.softmax(0) @ nameless.weight
        none = Linear(weight=weight.unsqueeze(0), bias=(logits.logsumexp(0) - weight @ mean).unsqueeze(0))
    return Linear(weight=torch.cat([names.weight, none.weight]), bias=torch.cat([names.bias, none.bias]))


def _nameless(network: Detector) -> Linear | None:
    """METR's rivals that stand for no name, or for all there are if none is without; None where it has no rivals."""
    rivals = getattr(network.decoder.similarity, "rivals", None)
    if rivals is None:
        return None
    logits, without = Linear.of(rivals.logits), ~rivals.text.any(1)
    rows = without if without.any() else torch.ones_like(without)
    return Linear(weight=logits.weight[rows], bias=logits.bias[rows])


@torch.no_grad()
def _told(context: Context) -> tuple[str, ...]:
    """What its softmax compares otherwise than METR's rivals, by their weights."""
    head = context.network.decoder.similarity
    if not isinstance(head, ClassifierHead) or head.rivals is None:
        return ()
    same, names = head.rivals.stand_for(context.text), names_classifier(head, context.text)
    rivals, without = Linear.of(head.rivals.logits), ~head.rivals.text.any(1)
    if int(without.sum()) == 1 and bool((same.sum(1) == 1).all()) and bool((same.any(0) | without).all()):
        own = same.int().argmax(1)
        apart = torch.cat([rivals.weight[own] - names.weight, (rivals.bias[own] - names.bias).unsqueeze(1)], dim=1)
        if apart.abs().max() < _SAME_ROW:
            return ()
    return (f"a label competes with the other labels and one 'no object'; in this METR with {len(rivals.bias)} rivals",)


def _differences(config: DetectorConfig) -> tuple[str, ...]:
    """What DETR computes otherwise."""
    if config.queries.places == "proposed":
        return _DIFFERENCES + other_options(config, PLAIN_OPTIONS)
    wanted = {"queries.content": "none", "queries.point_layers": 0, "decoder.refine": "none"}
    said = other_options(config, wanted | PLAIN_OPTIONS)
    return said if config.similarity.rivals else (*said, "its labels compete in a softmax; METR's names do not")


def _adopt(config: Any, backbone: BackboneConfig, state: State) -> Adopted:
    """A METR with learned positions and names that compete, which computes all that it does.

    Raises:
        ModelError: an option is set for which METR has no counterpart.
    """
    # with auxiliary losses transformers' layers normalise what they pass on
    need_options(config, {"position_embedding_type": "sine", "activation_function": "relu", "auxiliary_loss": False})
    ours = adopted(
        config,
        config.d_model,
        backbone,
        decoder={"kind": "plain", "positions": "learned", "refine": "none"},
        queries={"places": "learned", "content": "none", "point_layers": 0},
        similarity={"rivals": len(state[f"{_CLASSES}.bias"])},
        denoising={"number": 0},
    )
    return Adopted(
        config=ours,
        derived=equal_presence(config.d_model),
        class_heads={_HEAD: _CLASSES},
        softmax=frozenset({_HEAD}),
    )


TARGET = Target(
    name="detr",
    title="DETR",
    encoder="plain",
    decoder="conditional",
    places=("proposed", "learned"),
    learned_decoder="plain",
    processor="DetrImageProcessor",
    configure=_configure,
    table=_table,
    derive=_derive,
    differences=_differences,
    told=_told,
    adopt=_adopt,
    single_map=True,
)
