"""RT-DETR (Zhao et al., 2024): METR's hybrid encoder, and a decoder that starts from the features of places."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from metr.conversion.activation_statistics import (
    box_position,
    inside,
)
from metr.conversion.classifier import fit_box_mlp
from metr.conversion.table import Row, State, backbone_rows
from metr.conversion.targets.base import (
    ADOPTED_QUERIES,
    Adopted,
    BuildSpec,
    Context,
    Derived,
    KeyTable,
    Target,
    around,
    attention,
    box_heads,
    deformable_attention,
    encoder_values,
    equal_presence,
    feed_forward,
    given_layer,
    joined,
    layer_heads,
    linear,
    mlp,
    need_options,
)
from metr.conversion.targets.identity_layers import BLOCKS, memory_projection, passing_blocks
from metr.conversion.targets.place_starts import places_and_names
from metr.conversion.targets.sampling_points import even_sampling
from metr.errors import ModelError
from metr.models.config import BackboneConfig, DetectorConfig, EncoderConfig, SimilarityConfig
from metr.models.detector import Detector
from metr.models.encoders.hybrid import HybridEncoder

ADDED = "its fusions concatenate two levels; this METR's add them, and the convolutions before them start afresh"
# the least distance from 0 and 1 of a box's numbers that it refines
_MARGIN = 1e-5
# an `eval_size`: with any of them transformers 5.23.0 detects without positions in the encoder
_WITHOUT_POSITIONS = 640
_ENCODER, _DECODER = "model.encoder", "model.decoder"


def configure(spec: BuildSpec) -> Any:
    """An RTDetrConfig."""
    from transformers import RTDetrConfig

    return RTDetrConfig(**arguments(spec))


def arguments(spec: BuildSpec) -> dict[str, Any]:
    """What RT-DETR and its successors are configured with.

    Raises:
        ModelError: its strides are not those of one step each.
    """
    config, width, levels = spec.config, spec.config.width, len(spec.channels)
    if any(coarse != 2 * fine for fine, coarse in zip(spec.strides, spec.strides[1:], strict=False)):
        what = f"needs maps of strides that double, found {list(spec.strides)}"
        raise ModelError(what, where="backbone.strides", hint="train with backbone.strides=[8,16,32]")
    ours = config if spec.fits else config.model_copy(update={"encoder": EncoderConfig(kind="hybrid", layers=1)})
    inside = ours.encoder.width or width
    return {
        "backbone_config": spec.backbone,
        "freeze_backbone_batch_norms": config.backbone.freeze_batch_norm,
        "d_model": width,
        "encoder_hidden_dim": inside,
        "encoder_in_channels": list(spec.channels),
        "feat_strides": list(spec.strides),
        "encode_proj_layers": [levels - 1],
        "encoder_layers": ours.encoder.layers,
        "encoder_ffn_dim": ours.encoder.feed_forward,
        "encoder_attention_heads": ours.encoder.heads,
        "hidden_expansion": ours.encoder.fusion_expansion,
        "decoder_in_channels": [inside] * levels,
        "num_feature_levels": levels,
        "decoder_layers": config.decoder.layers,
        "decoder_ffn_dim": config.decoder.feed_forward,
        "decoder_attention_heads": config.decoder.heads,
        "decoder_n_points": config.decoder.points,
        "num_queries": config.queries.number,
        "num_denoising": config.denoising.number,
        "anchor_image_size": None,
        "eval_size": _WITHOUT_POSITIONS if ours.encoder.positions == "none" else None,
        **spec.labels,
    }


def convolution(theirs: str, ours: str) -> tuple[Row, ...]:
    """A convolution and its batch norm."""
    return (Row(f"{theirs}.conv.weight", f"{ours}.0.weight"), Row(f"{theirs}.norm.{{n}}", f"{ours}.1.{{n}}"))


def sequence(theirs: str, ours: str) -> tuple[Row, ...]:
    """A convolution and its batch norm that have no names."""
    return (Row(f"{theirs}.0.weight", f"{ours}.0.weight"), Row(f"{theirs}.1.{{n}}", f"{ours}.1.{{n}}"))


def attention_rows() -> tuple[Row, ...]:
    """The attention on the coarsest level, without what follows it."""
    theirs, ours = f"{_ENCODER}.aifi.0.layers.{{i}}", "encoder.layers.{i}"
    return joined(
        attention(f"{theirs}.self_attn", f"{ours}.attention"),
        linear(theirs, ours, {"self_attn_layer_norm": "norm"}),
    )


def projection_rows() -> tuple[Row, ...]:
    """The projections of the backbone's maps."""
    return sequence("model.encoder_input_proj.{i}", "encoder.projections.{i}")


def two_branches(theirs: str, ours: str) -> tuple[Row, ...]:
    """A fusion's two branches, one of them a chain of blocks."""
    return joined(
        convolution(f"{theirs}.conv1", f"{ours}.main"),
        convolution(f"{theirs}.conv2", f"{ours}.side"),
        block_rows(theirs, ours),
    )


def block_rows(theirs: str, ours: str) -> tuple[Row, ...]:
    """A chain of blocks."""
    block, own = f"{theirs}.bottlenecks.{{j}}", f"{ours}.blocks.{{j}}"
    return joined(convolution(f"{block}.conv1", f"{own}.wide"), convolution(f"{block}.conv2", f"{own}.narrow"))


def _fusion(theirs: str, ours: str) -> tuple[Row, ...]:
    return joined(two_branches(theirs, ours), convolution(f"{theirs}.conv3", f"{ours}.out"))


def encoder_rows() -> tuple[Row, ...]:
    """The hybrid encoder, and the projection of its levels if METR has that."""
    return joined(
        projection_rows(),
        attention_rows(),
        feed_forward(f"{_ENCODER}.aifi.0.layers.{{i}}", "encoder.layers.{i}.feed_forward"),
        convolution(f"{_ENCODER}.lateral_convs.{{i}}", "encoder.laterals.{i}"),
        _fusion(f"{_ENCODER}.fpn_blocks.{{i}}", "encoder.down_fusions.{i}"),
        convolution(f"{_ENCODER}.downsample_convs.{{i}}", "encoder.strides.{i}"),
        _fusion(f"{_ENCODER}.pan_blocks.{{i}}", "encoder.up_fusions.{i}"),
        sequence("model.decoder_input_proj.{i}", "encoder.outputs.{i}"),
    )


def self_attention_rows() -> tuple[Row, ...]:
    """What precedes the attention to the memory in each layer of the decoder."""
    theirs, ours = f"{_DECODER}.layers.{{i}}", "decoder.layers.{i}"
    return joined(
        attention(f"{theirs}.self_attn", f"{ours}.among"),
        linear(theirs, ours, {"self_attn_layer_norm": "among_norm"}),
    )


def position_rows(layers: int = 2) -> tuple[Row, ...]:
    """From a box to a query's position, where METR takes its four numbers."""
    return mlp(f"{_DECODER}.query_pos_head", "decoder.position", layers)


def proposal_rows() -> tuple[Row, ...]:
    """The features and boxes of places."""
    return joined(
        linear("model.enc_output", "proposals", {"0": "feature", "1": "norm"}),
        mlp("model.enc_bbox_head", "proposals.box.change", 3),
    )


def table(config: Any, metr: DetectorConfig) -> KeyTable:
    """RT-DETR's; the position of METR's queries has a place where it is made of the box's four numbers."""
    theirs, ours = f"{_DECODER}.layers.{{i}}", "decoder.layers.{i}"
    heads, copies = box_heads(f"{_DECODER}.bbox_embed", config.decoder_layers, metr)
    return KeyTable(
        backbone=backbone_rows(config.backbone_config, TARGET.backbone),
        encoder=encoder_rows(),
        decoder=joined(
            self_attention_rows(),
            deformable_attention(f"{theirs}.encoder_attn", f"{ours}.cross"),
            linear(theirs, ours, {"encoder_attn_layer_norm": "cross_norm"}),
            feed_forward(theirs, f"{ours}.feed_forward"),
            position_rows(),
        ),
        heads=joined(proposal_rows(), heads),
        copies=copies,
    )


def derive(context: Context) -> Mapping[str, Derived]:
    """The classification heads, the positions of queries, and what METR's encoder has no counterpart of."""
    network, fresh = context.network, queries_and_heads(context)
    assert isinstance(network.encoder, HybridEncoder)
    if not network.encoder.outputs:
        fresh |= memory_projection(network, network.encoder)
    return fresh | passing_blocks(network, network.encoder)


def queries_and_heads(context: Context) -> dict[str, Derived]:
    """The classification heads, and the positions and contents of queries."""
    heads = layer_heads(context, f"{_DECODER}.class_embed")
    return heads | places_and_names(context) | _positions(context.network)


def _positions(network: Detector) -> dict[str, Derived]:
    """A network that turns a box's four numbers into a query's position, as METR does from its encoding.

    A METR that takes the four numbers itself in two layers needs none: its own is copied.
    """
    position = box_position(network)
    if position is None:
        return {}
    fit = fit_box_mlp(position, 2 * network.config.width)
    given, source = dict[str, Derived](), inside(network, "decoder.position")
    for number, layer in enumerate(fit.layers):
        given |= given_layer(f"{_DECODER}.query_pos_head.layers.{number}", layer, str(fit), source)
    return given


def differences(config: DetectorConfig) -> tuple[str, ...]:
    """What RT-DETR computes otherwise."""
    said = [*queries_differ(config), *positions_differ(config)]
    if config.decoder.kind == "distribution":
        said += [
            "attention to the memory has values and outputs of its own, and no gate: these start afresh",
            "boxes are refined without distributions: of this METR's heads only the first layer's is a start",
        ]
    said += decoder_differs(config)
    if config.encoder.fusion != "csp":
        said.append("its fusions are those of RT-DETR; this METR's are those of D-FINE, and start afresh")
    elif config.encoder.fusion_inputs != "cat":
        said.append(ADDED)
    elif config.encoder.fusion_blocks > BLOCKS:
        said.append(f"a fusion has {BLOCKS} blocks; this METR's others have no place")
    elif config.encoder.fusion_blocks < BLOCKS:
        state = "let everything pass at first" if _lets_pass(config) else "start afresh"
        said.append(f"{_few_blocks(config)}: the others {state}")
    return tuple(said)


def made_up_for(config: DetectorConfig) -> tuple[str, ...]:
    """Those of the differences that hardly change an answer once the start of queries is fitted to images."""
    passing = (f"{_few_blocks(config)}: the others let everything pass at first",)
    return (*queries_differ(config), *positions_differ(config), *passing)


def _few_blocks(config: DetectorConfig) -> str:
    return f"a fusion has {BLOCKS} blocks, this METR's {config.encoder.fusion_blocks}"


def _lets_pass(config: DetectorConfig) -> bool:
    """Whether a fusion's blocks have a way around them."""
    return int(config.width * config.encoder.fusion_expansion) != config.width


def decoder_differs(config: DetectorConfig) -> tuple[str, ...]:
    """What is said of a decoder with the layers of DEIMv2."""
    if (config.decoder.norm, config.decoder.activation) == ("layer", "relu"):
        return ()
    return ("its decoder has layer norms and feed-forward parts without a gate, which this METR's has not",)


def queries_differ(config: DetectorConfig) -> tuple[str, ...]:
    """What is said of queries that neither start nor end as those of RT-DETR and its successors."""
    content, said = config.queries.content, list[str]()
    if content != "place_only":
        said.append(
            f"queries start from the features of places alone; this METR's otherwise (queries.content {content!r})"
        )
    elif config.decoder.predictors != "layer":
        said.append("heads read a layer's output as it is; this METR's read it after a norm (decoder.predictors layer)")
    return tuple(said)


def positions_differ(config: DetectorConfig) -> tuple[str, ...]:
    """What is said of an encoder with other positions."""
    if config.encoder.positions in ("counted", "none"):
        return ()
    return (f"the encoder's positions are counted in cells; this METR's are {config.encoder.positions}",)


def adopt(config: Any, backbone: BackboneConfig, state: State) -> Adopted:
    """A METR that computes what RT-DETR does, so that all of it fits.

    Raises:
        ModelError: an option is set for which METR has no counterpart.
    """
    return adopted(config, backbone, state, {"fusion_blocks": BLOCKS, "project_memory": True})


def adopted(
    config: Any,
    backbone: BackboneConfig,
    state: State,
    fusions: Mapping[str, Any],
    decoder: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Adopted:
    """A METR that computes what RT-DETR or one of its successors does.

    Args:
        config: Theirs.
        backbone: METR's configuration of its backbone.
        state: Their weights.
        fusions: Options of the encoder that differ from RT-DETR's, as those of its fusions.
        decoder: Options of the decoder that differ from RT-DETR's.
        options: What their options must be, where it is not what RT-DETR's must be.

    Raises:
        ModelError: an option is set for which METR has no counterpart.
    """
    _refuse(config, options or {})
    common = {
        "kind": "hybrid",
        "positions": "counted" if config.eval_size is None else "none",
        "width": None if config.encoder_hidden_dim == config.d_model else config.encoder_hidden_dim,
        "fusion_expansion": config.hidden_expansion,
        **encoder_values(config),
    }
    encoder = EncoderConfig.model_validate(common | dict(fusions))
    exact = {"positions": "plain", "predictors": "layer", "box_margin": _MARGIN} | dict(decoder or {})
    similarity = SimilarityConfig(form="classifier")
    width = config.d_model
    layers = {f"decoder.similarity.{n}": f"{_DECODER}.class_embed.{n}" for n in range(config.decoder_layers)}
    return Adopted(
        config=around(encoder, config, backbone, exact, ADOPTED_QUERIES, similarity),
        derived=even_sampling(config, state) | equal_presence(width),
        class_heads={"proposals.classifier": "model.enc_score_head"} | layers,
    )


def _refuse(config: Any, options: Mapping[str, Any]) -> None:
    """Stops where METR has no counterpart of an option.

    Args:
        config: Theirs.
        options: What options must be, where it is not what RT-DETR's must be.

    Raises:
        ModelError: naming the option.
    """
    wanted = {
        "decoder_in_channels": [config.encoder_hidden_dim] * config.num_feature_levels,
        "normalize_before": False,
        "learn_initial_query": False,
        "num_feature_levels": len(config.encoder_in_channels),
        "encode_proj_layers": [len(config.encoder_in_channels) - 1],
        "encoder_activation_function": "gelu",
        "activation_function": "silu",
        "decoder_activation_function": "relu",
        "positional_encoding_temperature": 10_000,
        "layer_norm_eps": 1e-5,
        "batch_norm_eps": 1e-5,
    }
    # RT-DETR itself has no choice of it
    method = {"decoder_method": "default"} if "decoder_method" in config.to_dict() else {}
    need_options(config, wanted | method | dict(options))


TARGET = Target(
    name="rt_detr",
    title="RT-DETR",
    encoder="hybrid",
    similar_decoders=("distribution",),
    processor="RTDetrImageProcessor",
    configure=configure,
    table=table,
    derive=derive,
    differences=differences,
    adopt=adopt,
    multiple=32,
    square=True,
    made_up_for=made_up_for,
)


def _configure_v2(spec: BuildSpec) -> Any:
    """An RTDetrV2Config (Lv et al., 2024): RT-DETR with another way to write the same sampling."""
    from transformers import RTDetrV2Config

    return RTDetrV2Config(**arguments(spec), decoder_n_levels=len(spec.channels))


TARGET_V2 = replace(TARGET, name="rt_detr_v2", title="RT-DETRv2", configure=_configure_v2)
