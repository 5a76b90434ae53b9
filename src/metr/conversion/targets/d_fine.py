"""D-FINE (Peng et al., 2024): RT-DETR with other fusions, a gate, and boxes refined as distributions."""

from dataclasses import replace
from typing import Any

from metr.conversion.table import Row, State, backbone_rows
from metr.conversion.targets import rt_detr
from metr.conversion.targets.base import (
    Adopted,
    BuildSpec,
    KeyTable,
    feed_forward,
    joined,
    linear,
    mlp,
    need_options,
)
from metr.conversion.targets.identity_layers import BLOCKS
from metr.conversion.targets.rt_detr import convolution, two_branches
from metr.errors import ModelError
from metr.models.config import BackboneConfig, DetectorConfig

# transformers ties its heads from the second layer on
_LEAST_LAYERS = 2
_FIRST, _SECOND = "mlp.layers.0", "mlp.layers.1"
_ENCODER, _DECODER = "model.encoder", "model.decoder"


def configure(spec: BuildSpec) -> Any:
    """A DFineConfig."""
    from transformers import DFineConfig

    return DFineConfig(**arguments(spec))


def arguments(spec: BuildSpec) -> dict[str, Any]:
    """What D-FINE and DEIMv2 are configured with; the depth of fusions is METR's where METR's are of their kind.

    Raises:
        ModelError: METR's decoder has one layer only, or its strides are not those of one step each.
    """
    if spec.config.decoder.layers < _LEAST_LAYERS:
        what = f"needs {_LEAST_LAYERS} decoder layers, found {spec.config.decoder.layers}"
        raise ModelError(what, where="model.decoder.layers", hint="train a METR with more")
    encoder, boxes = spec.config.encoder, spec.config.decoder.distribution
    values = rt_detr.arguments(spec) | {
        "max_num_bins": boxes.bins,
        "up": boxes.reach,
        "reg_scale": boxes.flatness,
        "top_prob_values": boxes.quality_bins,
        "lqe_hidden_dim": boxes.quality_width,
        "lqe_layers": boxes.quality_layers,
    }
    if spec.fits and encoder.fusion == "elan":
        values["depth_mult"] = encoder.fusion_blocks / BLOCKS
    return values


def _fusion(theirs: str, ours: str) -> tuple[Row, ...]:
    return joined(
        convolution(f"{theirs}.conv1", f"{ours}.split"),
        two_branches(f"{theirs}.csp_rep1", f"{ours}.stages.0"),
        convolution(f"{theirs}.conv2", f"{ours}.convolutions.0"),
        two_branches(f"{theirs}.csp_rep2", f"{ours}.stages.1"),
        convolution(f"{theirs}.conv3", f"{ours}.convolutions.1"),
        convolution(f"{theirs}.conv4", f"{ours}.merge"),
    )


def encoder_rows() -> tuple[Row, ...]:
    """The hybrid encoder with D-FINE's fusions."""
    return joined(
        rt_detr.projection_rows(),
        level_rows(),
        _fusion(f"{_ENCODER}.fpn_blocks.{{i}}", "encoder.down_fusions.{i}"),
        _fusion(f"{_ENCODER}.pan_blocks.{{i}}", "encoder.up_fusions.{i}"),
    )


def level_rows() -> tuple[Row, ...]:
    """The attention on the coarsest level, and what leads from level to level."""
    return joined(
        rt_detr.attention_rows(),
        feed_forward(f"{_ENCODER}.aifi.0.layers.{{i}}", "encoder.layers.{i}.feed_forward", _FIRST, _SECOND),
        convolution(f"{_ENCODER}.lateral_convs.{{i}}", "encoder.laterals.{i}"),
        convolution(f"{_ENCODER}.downsample_convs.{{i}}.conv1", "encoder.strides.{i}.0"),
        convolution(f"{_ENCODER}.downsample_convs.{{i}}.conv2", "encoder.strides.{i}.1"),
    )


def table(config: Any, metr: DetectorConfig) -> KeyTable:
    """D-FINE's; a METR with a deformable decoder has fewer of its parts."""
    theirs, ours = f"{_DECODER}.layers.{{i}}", "decoder.layers.{i}"
    heads, copies = distribution_rows(config.decoder_layers, metr.decoder.distribution.shared)
    return KeyTable(
        backbone=backbone_rows(config.backbone_config, TARGET.backbone),
        encoder=joined(encoder_rows(), rt_detr.sequence("model.decoder_input_proj.{i}", "encoder.outputs.{i}")),
        decoder=joined(
            rt_detr.self_attention_rows(),
            sampling_rows(),
            linear(theirs, ours, {"gateway.gate": "gate", "gateway.norm": "cross_norm"}),
            feed_forward(theirs, f"{ours}.feed_forward", _FIRST, _SECOND),
            rt_detr.position_rows(),
        ),
        heads=joined(
            rt_detr.proposal_rows(),
            heads,
            box_rows(config.lqe_layers),
        ),
        copies=copies,
    )


def sampling_rows() -> tuple[Row, ...]:
    """The attention to the memory, which samples it as it is."""
    names = {"sampling_offsets": "offsets", "attention_weights": "weights"}
    return linear(f"{_DECODER}.layers.{{i}}.encoder_attn", "decoder.layers.{i}.cross", names)


def box_rows(quality_layers: int) -> tuple[Row, ...]:
    """The box of the first layer, the shifts of its edges, and the quality that their distributions tell."""
    return joined(
        mlp(f"{_DECODER}.pre_bbox_head", "decoder.box.change", 3),
        mlp(f"{_DECODER}.lqe_layers.{{i}}.reg_conf", "decoder.quality.{i}.read", quality_layers),
        (Row(f"{_DECODER}.up", "decoder.shifts.reach"), Row(f"{_DECODER}.reg_scale", "decoder.shifts.flatness")),
    )


def differences(config: DetectorConfig) -> tuple[str, ...]:
    """What D-FINE computes otherwise."""
    said = [*rt_detr.queries_differ(config)]
    if config.decoder.kind != TARGET.decoder:
        said += [
            "attention to the memory has no values and outputs of its own, and a gate: these start afresh",
            "boxes after the first layer are distributions, whose heads start afresh",
        ]
    elif not config.decoder.gate:
        said.append("a gate weighs what a query was and what it sees: it starts afresh")
    said += [*rt_detr.decoder_differs(config), *rt_detr.positions_differ(config)]
    if config.encoder.fusion != "elan":
        said.append("its fusions are those of D-FINE; this METR's are those of RT-DETR, and start afresh")
    elif config.encoder.fusion_inputs != "cat":
        said.append(rt_detr.ADDED)
    if config.encoder.project_memory and config.encoder.width in (None, config.width):
        said.append("its memory is not projected once more after the encoder, as this METR's is")
    return tuple(said)


def adopt(config: Any, backbone: BackboneConfig, state: State) -> Adopted:
    """A METR with D-FINE's encoder and decoder.

    Raises:
        ModelError: an option is set for which METR has no counterpart.
    """
    need_last_layer(config)
    blocks = round(BLOCKS * config.depth_mult)
    fusions = {"fusion": "elan", "fusion_blocks": blocks}
    decoder = {"kind": TARGET.decoder, "distribution": distribution(config, state)}
    return rt_detr.adopted(config, backbone, state, fusions, decoder)


def distribution_rows(layers: int, shared: bool) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows of the heads for distributions, and of those that METR's one head is copied to."""
    theirs = f"{_DECODER}.bbox_embed"
    if not shared:
        return mlp(f"{theirs}.{{i}}", "decoder.distributions.{i}", 3), ()
    heads = [mlp(f"{theirs}.{layer}", "decoder.distributions", 3) for layer in range(layers)]
    return heads[0], joined(*heads[1:])


def need_last_layer(config: Any) -> None:
    """Stops where another layer than the last detects: those behind it are of another width, and for training only.

    Raises:
        ModelError: it is so.
    """
    last = config.eval_idx if config.eval_idx == config.decoder_layers - 1 else -1
    need_options(config, {"eval_idx": last})


def distribution(config: Any, state: State) -> dict[str, Any]:
    """How METR refines boxes as D-FINE does. What the weights say goes before the configuration, which may be older."""
    return {
        "bins": config.max_num_bins,
        "reach": abs(float(state[f"{_DECODER}.up"])),
        "flatness": abs(float(state[f"{_DECODER}.reg_scale"])),
        "quality_bins": config.top_prob_values,
        "quality_width": config.lqe_hidden_dim,
        "quality_layers": config.lqe_layers,
    }


TARGET = replace(
    rt_detr.TARGET,
    name="d_fine",
    title="D-FINE",
    decoder="distribution",
    similar_decoders=("deformable",),
    configure=configure,
    table=table,
    derive=rt_detr.queries_and_heads,
    differences=differences,
    adopt=adopt,
)
