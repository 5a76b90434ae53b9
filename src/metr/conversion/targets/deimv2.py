"""DEIMv2 (Huang et al., 2025): D-FINE with summed fusions, other norms and gated feed-forward parts."""

from dataclasses import replace
from typing import Any

import torch

from metr.conversion.activation_statistics import box_position, inside
from metr.conversion.classifier import Linear, fit_box_mlp
from metr.conversion.table import ADAPTED, Row, State, backbone_rows
from metr.conversion.targets import d_fine, rt_detr
from metr.conversion.targets.base import (
    Adopted,
    BuildSpec,
    Context,
    Derived,
    KeyTable,
    feed_forward,
    given_layer,
    joined,
    layer_heads,
    linear,
    need_options,
)
from metr.conversion.targets.identity_layers import BLOCKS
from metr.conversion.targets.place_starts import places_and_names
from metr.conversion.targets.rt_detr import convolution
from metr.errors import ModelError
from metr.models.backbones.base import SpatialAdapter
from metr.models.config import BackboneConfig, DetectorConfig
from metr.models.detector import Detector

# linear layers from a box's four numbers to a query's position
_POSITION_LAYERS = 3
_ACTIVATIONS = ("relu", "silu")
# levels of the encoder without attention, of one map of the backbone
_LITE_LEVELS = 2
_MAPS, _ENCODER, _DECODER = "model.conv_encoder", "model.encoder", "model.decoder"


def configure(spec: BuildSpec) -> Any:
    """A Deimv2Config with METR's options where METR's encoder and decoder are of its kind."""
    from transformers import Deimv2Config

    encoder, decoder = spec.config.encoder, spec.config.decoder
    values = d_fine.arguments(spec)
    if spec.config.backbone.adapter:
        # the maps behind the projections
        values["encoder_in_channels"] = values["decoder_in_channels"]
        values["spatial_tuning_adapter_inplanes"] = spec.config.backbone.adapter
    if spec.fits and encoder.kind == "lite":
        width = encoder.width or spec.config.width
        values |= {"encoder_type": "lite", "encoder_layers": 0}
        values |= {"num_feature_levels": _LITE_LEVELS, "decoder_in_channels": [width] * _LITE_LEVELS}
    values |= {
        "eval_size": values["eval_size"] and [values["eval_size"]] * 2,
        "encoder_has_trailing_conv": encoder.fusion_convolutions,
        "use_gateway": decoder.gate,
        "share_bbox_head": decoder.distribution.shared,
        # as positions are fitted where METR's are others
        "decoder_activation_function": decoder.position_activation if _same_positions(spec.config) else "relu",
        # half of it is the hidden width
        "decoder_ffn_dim": 2 * decoder.feed_forward,
    }
    return Deimv2Config(**values)


def table(config: Any, metr: DetectorConfig) -> KeyTable:
    """DEIMv2's; a METR of D-FINE's form has fewer of its parts."""
    heads, copies = d_fine.distribution_rows(config.decoder_layers, metr.decoder.distribution.shared)
    return KeyTable(
        backbone=_backbone_rows(config),
        encoder=joined(
            _lite_rows() if config.encoder_type == "lite" else _hybrid_rows(_is_adapted(config)),
            convolution("model.decoder_input_proj.{i}", "encoder.outputs.{i}"),
        ),
        decoder=_decoder_rows(config.use_gateway),
        heads=joined(rt_detr.proposal_rows(), heads, d_fine.box_rows(config.lqe_layers)),
        copies=copies,
    )


def _is_adapted(config: Any) -> bool:
    """Whether the backbone is a vision transformer with an adapter."""
    return bool(config.backbone_config.model_type == ADAPTED)


def _backbone_rows(config: Any) -> tuple[Row, ...]:
    if not _is_adapted(config):
        return backbone_rows(config.backbone_config, TARGET.backbone)
    theirs, ours = f"{_MAPS}.spatial_tuning_adapter", "backbone.adapter"
    steps = (convolution(f"{theirs}.conv{number + 2}", f"{ours}.steps.{number}") for number in range(3))
    return joined(
        backbone_rows(config.backbone_config, f"{_MAPS}.backbone."),
        convolution(f"{theirs}.stem_conv", f"{ours}.stem"),
        *steps,
    )


def _hybrid_rows(adapted: bool) -> tuple[Row, ...]:
    projections = "fusion_proj" if adapted else "encoder_input_proj"
    return joined(
        convolution(f"{_MAPS}.{projections}.{{i}}", "encoder.projections.{i}"),
        d_fine.level_rows(),
        _fusion(f"{_ENCODER}.fpn_blocks.{{i}}", "encoder.down_fusions.{i}"),
        _fusion(f"{_ENCODER}.pan_blocks.{{i}}", "encoder.up_fusions.{i}"),
    )


def _lite_rows() -> tuple[Row, ...]:
    return joined(
        convolution(f"{_ENCODER}.input_proj.{{i}}", "encoder.projections.{i}"),
        convolution(f"{_ENCODER}.down_conv1", "encoder.coarser.1"),
        convolution(f"{_ENCODER}.bi_fusion_conv", "encoder.whole"),
        convolution(f"{_ENCODER}.down_conv2", "encoder.strides.0.1"),
        _fusion(f"{_ENCODER}.fpn_block", "encoder.down_fusions.0"),
        _fusion(f"{_ENCODER}.pan_block", "encoder.up_fusions.0"),
    )


def _fusion(theirs: str, ours: str) -> tuple[Row, ...]:
    stages = (
        joined(
            # one convolution: first for the path around the blocks, then for the path through them
            _stacked(f"{theirs}.csp_rep{number + 1}.conv1", f"{ours}.stages.{number}"),
            rt_detr.block_rows(f"{theirs}.csp_rep{number + 1}", f"{ours}.stages.{number}"),
            convolution(f"{theirs}.csp_rep{number + 1}.conv2", f"{ours}.convolutions.{number}"),
        )
        for number in range(2)
    )
    return joined(
        convolution(f"{theirs}.conv1", f"{ours}.split"), *stages, convolution(f"{theirs}.conv2", f"{ours}.merge")
    )


def _stacked(theirs: str, ours: str) -> tuple[Row, ...]:
    parts = (f"{ours}.side", f"{ours}.main")
    return (
        Row(f"{theirs}.conv.weight", tuple(f"{part}.0.weight" for part in parts)),
        Row(f"{theirs}.norm.{{n}}", tuple(f"{part}.1.{{n}}" for part in parts)),
    )


def _decoder_rows(gated: bool) -> tuple[Row, ...]:
    theirs, ours = f"{_DECODER}.layers.{{i}}", "decoder.layers.{i}"
    gate = {"gateway.gate": "gate", "gateway.norm": "cross_norm"}
    return joined(
        rt_detr.self_attention_rows(),
        d_fine.sampling_rows(),
        linear(theirs, ours, gate if gated else {"encoder_attn_layer_norm": "cross_norm"}),
        linear(theirs, ours, {"mlp.gate_proj": "feed_forward.gate"}),
        feed_forward(theirs, f"{ours}.feed_forward", "mlp.up_proj", "mlp.down_proj"),
        rt_detr.position_rows(_POSITION_LAYERS),
    )


def derive(context: Context) -> dict[str, Derived]:
    """The classification heads, and the positions and contents of queries."""
    heads = layer_heads(context, f"{_DECODER}.class_embed")
    return heads | places_and_names(context) | _positions(context.network)


def _positions(network: Detector) -> dict[str, Derived]:
    """Three layers from a box's four numbers to a query's position, fitted where METR has others."""
    if _same_positions(network.config):
        return {}
    width = network.config.width
    fit = fit_box_mlp(box_position(network) or network.decoder.position, width)
    first, last = fit.layers
    # what a ReLU gave, another ReLU leaves as it is
    passing = Linear(weight=torch.eye(width), bias=torch.zeros(width))
    given, source = dict[str, Derived](), inside(network, "decoder.position")
    for number, layer in enumerate((first, passing, last)):
        given |= given_layer(f"{_DECODER}.query_pos_head.layers.{number}", layer, str(fit), source)
    return given


def _same_positions(config: DetectorConfig) -> bool:
    """Whether METR makes positions as DEIMv2 does."""
    return (config.decoder.positions, config.decoder.position_layers) == ("plain", _POSITION_LAYERS)


def differences(config: DetectorConfig) -> tuple[str, ...]:
    """What DEIMv2 computes otherwise."""
    encoder, decoder = config.encoder, config.decoder
    said = [*rt_detr.queries_differ(config), *rt_detr.positions_differ(config)]
    if (encoder.fusion, encoder.fusion_inputs) != ("elan", "sum"):
        said.append("its fusions add two levels and aggregate all stages; this METR's do not, and start afresh")
    if (decoder.norm, decoder.activation) != ("rms", "swiglu"):
        said.append("its decoder has norms without a mean and gated feed-forward parts, which this METR's has not")
    if encoder.project_memory and encoder.width in (None, config.width):
        said.append("its memory is not projected once more after the encoder, as this METR's is")
    return tuple(said)


def adopt(config: Any, backbone: BackboneConfig, state: State) -> Adopted:
    """A METR with DEIMv2's encoder and decoder.

    Raises:
        ModelError: an option is set for which METR has no counterpart.
    """
    activation = config.decoder_activation_function
    encoder = {
        "fusion": "elan",
        "fusion_inputs": "sum",
        "fusion_convolutions": config.encoder_has_trailing_conv,
        "fusion_blocks": round(BLOCKS * config.depth_mult),
    }
    decoder = {
        "kind": TARGET.decoder,
        "activation": "swiglu",
        "norm": "rms",
        "gate": config.use_gateway,
        "feed_forward": config.decoder_ffn_dim // 2,
        "position_layers": _POSITION_LAYERS,
        "position_activation": activation,
        "distribution": d_fine.distribution(config, state) | {"shared": config.share_bbox_head},
    }
    options = {
        "encoder_fuse_op": "sum",
        "decoder_activation_function": activation if activation in _ACTIVATIONS else _ACTIVATIONS[0],
    }
    if config.encoder_type == "lite":
        encoder |= {"kind": "lite", "positions": "scaled"}
        options |= {"encoder_in_channels": list(config.encoder_in_channels[:1]), "num_feature_levels": _LITE_LEVELS}
        options |= {"encode_proj_layers": list(config.encode_proj_layers)}
    d_fine.need_last_layer(config)
    if _is_adapted(config):
        backbone = _adapted(config, backbone)
    return rt_detr.adopted(config, backbone, state, encoder, decoder, options)


def _adapted(config: Any, backbone: BackboneConfig) -> BackboneConfig:
    """METR's configuration of a vision transformer with an adapter.

    Raises:
        ModelError: its patches or layers are others than the adapter's maps fit.
    """
    transformer = config.backbone_config
    need_options(transformer, {"patch_size": SpatialAdapter.strides[1]})
    layers = tuple(transformer.out_indices)
    if len(layers) != len(SpatialAdapter.strides) or tuple(config.feat_strides) != SpatialAdapter.strides:
        what = f"METR needs three layers at strides {list(SpatialAdapter.strides)}, found layers {list(layers)}"
        raise ModelError(f"{what} at {list(config.feat_strides)}", where=transformer.model_type)
    more = {"layers": layers, "adapter": config.spatial_tuning_adapter_inplanes}
    return BackboneConfig.model_validate(backbone.model_dump() | more)


TARGET = replace(
    d_fine.TARGET,
    name="deimv2",
    title="DEIMv2",
    other_encoders=("lite",),
    similar_decoders=(),
    backbone=f"{_MAPS}.model.",
    configure=configure,
    table=table,
    derive=derive,
    differences=differences,
    adopt=adopt,
    adapted=True,
)
