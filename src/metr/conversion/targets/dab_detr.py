"""DAB-DETR: METR's `plain` family has its layers, all of them; its queries are learnt boxes.

A METR with learned boxes is one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DabDetrConfig

from metr.conversion.activation_statistics import inside, of_contents, of_normed_head
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
    given_layer,
    joined,
    linear,
    mlp,
    need_options,
)
from metr.conversion.targets.single_scale import (
    ASK_FOR_ALL,
    DECODER,
    adopted,
    common_options,
    encoder_rows,
    other_options,
    spread_logits,
    with_backbone,
)
from metr.models.config import BackboneConfig, DetectorConfig
from metr.models.learned_places import LearnedBoxes

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

_DECODER_LAYERS = joined(
    linear(*DECODER, _LAYER),
    linear("model.decoder", "decoder", {"layernorm": "norm"}),
    mlp("model.decoder.ref_point_head", "decoder.position", 2),
    mlp("model.decoder.query_scale", "decoder.scale", 2),
    mlp("model.decoder.ref_anchor_head", "decoder.extent", 2),
)
_SLOPES = {
    "encoder": Row(
        "model.encoder.layers.{i}.activation_fn.weight", "encoder.layers.{i}.feed_forward.activation.weight"
    ),
    "decoder": Row(
        "model.decoder.layers.{i}.mlp.activation_fn.weight", "decoder.layers.{i}.feed_forward.activation.weight"
    ),
}
_BOXES = "model.query_refpoint_embeddings.weight"
_PATTERNS = "model.patterns.weight"
# as good as none: DAB-DETR has none
_SMALLEST_SIDE = 1e-6


def _table(config: Any, metr: DetectorConfig) -> KeyTable:
    """Its table for such a METR."""
    learned = _learned_slopes(metr)
    slopes = {part: (row,) if learned[part] else () for part, row in _SLOPES.items()}
    scale = mlp("model.encoder.query_scale", "encoder.scale", 2) if metr.encoder.position_scale else ()
    boxes = (Row(_BOXES, "learned_places.box.weight"),) if metr.queries.places == "learned_boxes" else ()
    patterns = (Row(_PATTERNS, "learned_places.pattern.weight"),) if metr.queries.content == "patterns" else ()
    table = KeyTable(
        encoder=joined(encoder_rows("out_proj", "fc1", "fc2"), scale, slopes["encoder"]),
        decoder=joined(_DECODER_LAYERS, slopes["decoder"]),
        heads=joined(boxes, patterns, mlp("bbox_predictor", "decoder.box.change", 3)),
        copies=mlp("model.decoder.bbox_embed", "decoder.box.change", 3),
    )
    return with_backbone(table, _BACKBONE)(config, metr)


def _learned_slopes(config: DetectorConfig) -> dict[str, bool]:
    """Whether METR's encoder and decoder learn the slopes of their activations."""
    return {"encoder": config.encoder.activation == "prelu", "decoder": config.decoder.activation == "prelu"}


def _configure(spec: BuildSpec) -> Any:
    """What METR has; with proposals the content that its queries share is a pattern."""
    config = spec.config
    options = common_options(spec, "hidden_size") | {"auxiliary_loss": True}
    if spec.fits:
        temperature = config.encoder.temperature
        patterns = config.queries.patterns if config.queries.content != "none" else 0
        options |= {
            "temperature_height": temperature,
            "temperature_width": temperature,
            "num_patterns": patterns,
            "num_queries": config.queries.number // config.queries.patterns,
            "activation_function": "prelu" if any(_learned_slopes(config).values()) else "relu",
        }
    return DabDetrConfig(**options)


@torch.no_grad()
def _derive(context: Context) -> Mapping[str, Derived]:
    """The classifier, and what METR lacks: learnt boxes and their content, and parts that change nothing."""
    config, network = context.config, context.network
    names = normed_classifier(network, context.text, context.tokens)
    derived = given_layer("class_embed", names, FOLDED, of_normed_head(network)) | _queries(context)
    still = "computed: changes nothing"
    if not network.config.encoder.position_scale:
        scale = Linear(weight=torch.zeros(config.hidden_size, config.hidden_size), bias=torch.ones(config.hidden_size))
        derived |= given_layer("model.encoder.query_scale.layers.1", scale, still, ())
    layers, learned = (
        {"encoder": config.encoder_layers, "decoder": config.decoder_layers},
        _learned_slopes(network.config),
    )
    for part, row in _SLOPES.items():
        if config.activation_function == "prelu" and not learned[part]:
            keys = (row.theirs.format(i=n) for n in range(layers[part]))
            derived |= {key: Derived(tensor=torch.zeros(1), how=still) for key in keys}
    return derived


def _queries(context: Context) -> dict[str, Derived]:
    """Learnt boxes and the content of all queries, for a METR that proposes places or has a content for each query."""
    network, derived = context.network, dict[str, Derived]()
    learned, source = network.learned_places, tuple[str, ...]()
    if isinstance(learned, LearnedBoxes):
        if learned.content is None:
            return {}
        content, source = learned.content.weight.mean(0), inside(network, "learned_places.content")
    else:
        spread = spread_logits(context.config.num_queries)
        derived[_BOXES] = Derived(tensor=spread, how="computed: boxes spread over the image")
        content, source = context.contents.mean(0), (*inside(network, "class_queries.learned"), *of_contents(network))
        rows = network.class_queries.learned
        if rows is not None:
            used = max(1, network.config.queries.number // network.config.categories.kept)
            content = content + rows.weight[:used].mean(0)
    how = "computed: what METR's queries have in common"
    return derived | {_PATTERNS: Derived(tensor=content.unsqueeze(0), how=how, source=source)}


def _differences(config: DetectorConfig) -> tuple[str, ...]:
    """What DAB-DETR computes otherwise."""
    wanted = {"decoder.extents": True, "decoder.refine": "each", "decoder.temperature": config.encoder.temperature}
    said = other_options(config, wanted)
    if config.queries.places == "proposed":
        return _DIFFERENCES + said
    if config.queries.content == "learned_only":
        said = (*said, "all queries of a pattern have one content; this METR's have each their own")
    if config.decoder.smallest_side > _SMALLEST_SIDE:
        side = f"{config.decoder.smallest_side:g}"
        said = (*said, f"boxes may be as small as they are; this METR's decoder.smallest_side is {side}")
    return said


def _adopt(config: Any, backbone: BackboneConfig, _: State) -> Adopted:
    """A METR with learned boxes that computes all that it does.

    Raises:
        ModelError: an option is set for which METR has no counterpart.
    """
    temperature, patterns = config.temperature_height, config.num_patterns
    wanted = {"temperature_width": temperature, "sine_position_embedding_scale": None}
    need_options(config, wanted | {"keep_query_pos": False, "normalize_before": False})
    if config.activation_function not in ("relu", "prelu"):
        need_options(config, {"activation_function": "prelu"})
    layers = {"activation": config.activation_function, "temperature": temperature}
    ours = adopted(
        config,
        config.hidden_size,
        backbone,
        encoder=layers | {"position_scale": True},
        decoder=layers | {"smallest_side": _SMALLEST_SIDE},
        queries={
            "places": "learned_boxes",
            "content": "patterns" if patterns else "none",
            "patterns": max(1, patterns),
            "number": config.num_queries * max(1, patterns),
        },
    )
    return Adopted(
        config=ours,
        derived=equal_presence(config.hidden_size),
        class_heads={"decoder.similarity": "class_embed"},
    )


TARGET = Target(
    name="dab_detr",
    title="DAB-DETR",
    encoder="plain",
    decoder="conditional",
    backbone=_BACKBONE,
    processor="ConditionalDetrImageProcessor",
    configure=_configure,
    table=_table,
    derive=_derive,
    differences=_differences,
    adopt=_adopt,
    places=("proposed", "learned_boxes"),
    single_map=True,
)
