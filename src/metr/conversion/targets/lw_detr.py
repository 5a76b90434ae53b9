"""LW-DETR (Chen et al., 2024): a plain vision transformer, a convolutional projector, and fixed reference boxes."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metr.conversion.activation_statistics import (
    mean_feature,
    of_contents,
    of_layer_head,
    of_normed_head,
    of_places,
)
from metr.conversion.classifier import layer_classifier, normed_classifier, place_classifier
from metr.conversion.table import Row, State, backbone_rows
from metr.conversion.targets.base import (
    FOLDED,
    FOLDED_PLACES,
    Adopted,
    BuildSpec,
    Context,
    Derived,
    KeyTable,
    Target,
    attention,
    deformable_attention,
    equal_presence,
    given_layer,
    joined,
    linear,
    mlp,
    need_options,
)
from metr.conversion.targets.rt_detr import convolution
from metr.errors import ModelError
from metr.models.config import (
    BackboneConfig,
    DecoderConfig,
    DetectorConfig,
    EncoderConfig,
    QueryConfig,
    SimilarityConfig,
)

_DECODER = "model.decoder"
_PROJECTOR = "model.backbone.projector"
# of LW-DETR and RF-DETR as published
_EXPANSION = 0.5
_CONTENTS = "queries start from learned contents by rank alone; METR's also from the category's token or their place"
QUERIES, SHIFTS = "model.query_feat.weight", "model.reference_point_embed.weight"
"""What queries start with, and how their boxes are moved from the proposals'."""


def configure(spec: BuildSpec) -> Any:
    """An LwDetrConfig.

    Raises:
        ModelError: METR has another backbone.
    """
    from transformers import LwDetrConfig

    encoder = projector_of(spec)
    return LwDetrConfig(
        projector_scale_factors=list(encoder.scales),
        batch_norm_eps=encoder.norm_eps,
        **arguments(spec, TARGET.title, "lw_detr_vit"),
    )


def projector_of(spec: BuildSpec) -> EncoderConfig:
    """METR's encoder, or the one that is published where METR's is of another kind."""
    return spec.config.encoder if spec.fits else EncoderConfig(kind="projector", fusion_expansion=_EXPANSION)


def arguments(spec: BuildSpec, title: str, backbone: str) -> dict[str, Any]:
    """What LW-DETR and RF-DETR are configured with.

    Raises:
        ModelError: METR has another backbone.
    """
    if spec.backbone.model_type != backbone:
        what = f"{title} has a {backbone} backbone and no other, this METR has a {spec.backbone.model_type}"
        hint = f"train a METR with model.backbone.name={backbone}, or transfer to deformable_detr or rt_detr"
        raise ModelError(what, where="model.backbone", hint=hint)
    config, encoder = spec.config, projector_of(spec)
    return {
        "backbone_config": spec.backbone,
        "hidden_expansion": encoder.fusion_expansion,
        "c2f_num_blocks": encoder.fusion_blocks,
        "d_model": config.width,
        "dropout": 0.0,
        "decoder_layers": config.decoder.layers,
        "decoder_ffn_dim": config.decoder.feed_forward,
        "decoder_self_attention_heads": config.decoder.heads,
        "decoder_cross_attention_heads": config.decoder.cross_heads or config.decoder.heads,
        "decoder_n_points": config.decoder.points,
        "num_queries": config.queries.number,
        # more groups would start alike, and learn alike
        "group_detr": 1,
        **spec.labels,
    }


def projector_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """The convolutions that make one level of joined maps."""
    layer, join = f"{theirs}.projector_layer", f"{ours}.join"
    return joined(
        convolution(f"{layer}.conv1", f"{join}.split"),
        convolution(f"{layer}.bottlenecks.{{j}}.conv1", f"{join}.blocks.{{j}}.0"),
        convolution(f"{layer}.bottlenecks.{{j}}.conv2", f"{join}.blocks.{{j}}.1"),
        convolution(f"{layer}.conv2", f"{join}.merge"),
        linear(theirs, ours, {"layer_norm": "norm"}),
    )


def decoder_rows() -> tuple[Row, ...]:
    """The layers of the decoder, the norm after them, and a query's position."""
    theirs, ours = f"{_DECODER}.layers.{{i}}", "decoder.layers.{i}"
    norms = {"self_attn_layer_norm": "among_norm", "cross_attn_layer_norm": "cross_norm"}
    last = {"mlp.fc1": "feed_forward.widen", "mlp.fc2": "feed_forward.narrow", "layer_norm": "feed_forward.norm"}
    return joined(
        attention(f"{theirs}.self_attn", f"{ours}.among"),
        deformable_attention(f"{theirs}.cross_attn", f"{ours}.cross"),
        linear(theirs, ours, norms | last),
        linear(_DECODER, "decoder", {"layernorm": "norm"}),
        mlp(f"{_DECODER}.ref_point_head", "decoder.position", 2),
    )


def head_rows(metr: DetectorConfig) -> tuple[Row, ...]:
    """The features and boxes of places, of the first group, and the boxes of queries."""
    box = f"decoder.box.{metr.decoder.layers - 1}" if metr.decoder.predictors != "shared" else "decoder.box"
    return joined(
        linear("model", "proposals", {"enc_output.0": "feature", "enc_output_norm.0": "norm"}),
        mlp("model.enc_out_bbox_embed.0", "proposals.box.change", 3),
        mlp("bbox_embed", f"{box}.change", 3),
    )


def table(config: Any, metr: DetectorConfig) -> KeyTable:
    """LW-DETR's; of Group DETR's groups the first, which alone detects."""
    sampling, own = f"{_PROJECTOR}.scale_layers.{{i}}.sampling_layers.{{j}}.layers", "encoder.scales.{i}.sampling.{j}"
    return KeyTable(
        backbone=backbone_rows(config.backbone_config, TARGET.backbone),
        encoder=joined(
            convolution(f"{sampling}.0", f"{own}.0"),
            # a transposed convolution comes first, or after the convolution that narrows wide maps
            (Row(f"{sampling}.0.{{p}}", f"{own}.0.{{p}}"), Row(f"{sampling}.1.{{p}}", f"{own}.1.{{p}}")),
            projector_rows(f"{_PROJECTOR}.scale_layers.{{i}}", "encoder.scales.{i}"),
        ),
        decoder=decoder_rows(),
        heads=head_rows(metr),
    )


def derive(context: Context) -> Mapping[str, Derived]:
    """The classification heads, and what queries start from."""
    network, last = context.network, context.network.config.decoder.layers - 1
    places = place_classifier(network, context.text, context.tokens)
    if network.config.decoder.predictors == "layer":
        classes = layer_classifier(network, context.text, context.tokens, last)
        heads = given_layer("class_embed", classes, FOLDED, of_layer_head(network, last))
    else:
        classes = normed_classifier(network, context.text, context.tokens)
        heads = given_layer("class_embed", classes, FOLDED, of_normed_head(network))
    heads |= given_layer("model.enc_out_class_embed.0", places, FOLDED_PLACES, of_places(network))
    return heads | _queries(context)


@torch.no_grad()
def _queries(context: Context) -> dict[str, Derived]:
    """The content and shift of the query at each place, by the place's rank among all places.

    Where METR counts ranks inside a category they end earlier: later queries take the last one's.
    """
    network, own, number = context.network, context.network.class_queries, context.config.num_queries
    content, source = torch.zeros(number, network.config.width), list[str]()
    if own.learned is not None:
        content = _by_rank(own.learned, number)
        source.append("class_queries.learned.weight")
    if network.config.queries.content in ("learned", "place"):
        content = content + context.contents.mean(0)
        source += of_contents(network)
    feature, of_feature = mean_feature(network)
    content = content + feature
    source += of_feature
    whole = own.learned is not None and own.learned.num_embeddings == number and len(source) == 1
    how = "" if whole else "computed: learned queries, names and places"
    queries = {QUERIES: Derived(tensor=content, how=how, source=tuple(source))}
    if own.shift is None:
        return queries | {SHIFTS: Derived(tensor=torch.zeros(number, 4), how="no shift")}
    how = "" if own.shift.num_embeddings == number else "by rank"
    shifts = _by_rank(own.shift, number)
    return queries | {SHIFTS: Derived(tensor=shifts, how=how, source=("class_queries.shift.weight",))}


def _by_rank(learned: nn.Embedding, number: int) -> Float[Tensor, "n d"]:
    ranks = torch.arange(number).clamp(max=learned.num_embeddings - 1)
    return learned.weight.detach()[ranks]


def differences(config: DetectorConfig) -> tuple[str, ...]:
    """What LW-DETR computes otherwise."""
    said = projector_differences(config)
    if config.encoder.norm != "batch":
        said += ("its projector has batch norms; this METR's layer norms, whose scales alone move",)
    return said


def projector_differences(config: DetectorConfig) -> tuple[str, ...]:
    """What LW-DETR and RF-DETR compute otherwise."""
    said = [] if config.queries.content == "learned_only" else [_CONTENTS]
    if config.decoder.boxes != "reparametrised":
        said.append("boxes are reparametrised; this METR's are refined as logits, and their heads have to learn anew")
    if config.decoder.predictors == "layer":
        said.append(
            "layers share heads, behind a norm; this METR's last layer gives its own, and the norm starts afresh"
        )
    if config.decoder.refine != "none":
        said.append("all layers start from a query's first box; this METR's from the box of the layer before")
    if not config.decoder.padded_positions:
        said.append("positions of queries count padding as image; this METR's do not")
    return tuple(said)


def adopt(config: Any, backbone: BackboneConfig, state: State) -> Adopted:
    """A METR with LW-DETR's projector, and its decoder.

    Raises:
        ModelError: an option is set for which METR has no counterpart.
    """
    encoder = {"scales": tuple(config.projector_scale_factors), "norm": "batch", "norm_eps": config.batch_norm_eps}
    return adopted(config, backbone, state, encoder)


def adopted(config: Any, backbone: BackboneConfig, state: State, encoder: Mapping[str, Any]) -> Adopted:
    """A METR with the decoder of LW-DETR and RF-DETR.

    Args:
        config: Theirs.
        backbone: METR's configuration of their backbone.
        state: Their weights.
        encoder: The options of METR's encoder in which the two differ.

    Raises:
        ModelError: an option is set for which METR has no counterpart.
    """
    need_options(config, {"activation_function": "silu", "decoder_activation_function": "relu", "attention_bias": True})
    base, number, heads = DetectorConfig(), config.num_queries, config.decoder_self_attention_heads
    ours = DetectorConfig(
        width=config.d_model,
        backbone=backbone,
        encoder=EncoderConfig(
            kind="projector",
            heads=heads,
            fusion_blocks=config.c2f_num_blocks,
            fusion_expansion=config.hidden_expansion,
            **encoder,
        ),
        decoder=DecoderConfig(
            layers=config.decoder_layers,
            heads=heads,
            cross_heads=config.decoder_cross_attention_heads,
            points=config.decoder_n_points,
            feed_forward=config.decoder_ffn_dim,
            padded_positions=True,
            boxes="reparametrised",
            refine="none",
        ),
        categories=base.categories.model_copy(update={"heads": heads}),
        queries=QueryConfig(
            layout="places", content="learned_only", attention="image", start="shifted", number=config.num_queries
        ),
        similarity=SimilarityConfig(form="classifier"),
    )
    how = f"cut: the first of {config.group_detr} groups" if config.group_detr > 1 else ""
    cut = {"class_queries.learned.weight": QUERIES, "class_queries.shift.weight": SHIFTS}
    first = {own: Derived(tensor=_first(state[key], number), how=how, source=(key,)) for own, key in cut.items()}
    return Adopted(
        config=ours,
        derived=first | equal_presence(config.d_model),
        class_heads={"proposals.classifier": "model.enc_out_class_embed.0", "decoder.similarity": "class_embed"},
    )


def _first(rows: Float[Tensor, "n d"], number: int) -> Float[Tensor, "m d"]:
    return rows[:number].clone()


TARGET = Target(
    name="lw_detr",
    title="LW-DETR",
    encoder="projector",
    backbone="model.backbone.backbone.",
    processor="DeformableDetrImageProcessor",
    configure=configure,
    table=table,
    derive=derive,
    differences=differences,
    in_training=("in training it has one group of queries (group_detr); published ones have 13",),
    adopt=adopt,
    windowed=True,
)
