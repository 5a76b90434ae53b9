"""D-FINE (Peng et al., 2024): RT-DETR with other fusions, a gate, and boxes refined as distributions."""

from dataclasses import replace
from typing import Any

import torch

from metr.conversion.table import Row, State, backbone_rows
from metr.conversion.targets import rt_detr
from metr.conversion.targets.base import (
    Adopted,
    BuildSpec,
    Derived,
    KeyTable,
    even_sampling,
    feed_forward,
    joined,
    linear,
    mlp,
)
from metr.conversion.targets.rt_detr import convolution, two_branches
from metr.errors import ModelError
from metr.models.config import BackboneConfig, DetectorConfig

# transformers ties its heads from the second layer on
_LEAST_LAYERS = 2
_FIRST, _SECOND = "mlp.layers.0", "mlp.layers.1"
_ENCODER, _DECODER = "model.encoder", "model.decoder"


def configure(spec: BuildSpec) -> Any:
    """A DFineConfig; the depth of its fusions is METR's where METR's are of its kind.

    Raises:
        ModelError: METR's decoder has one layer only, or its strides are not those of one step each.
    """
    from transformers import DFineConfig

    if spec.config.decoder.layers < _LEAST_LAYERS:
        what = f"needs {_LEAST_LAYERS} decoder layers, found {spec.config.decoder.layers}"
        raise ModelError(what, where="model.decoder.layers", hint="train a METR with more")
    values = rt_detr.arguments(spec)
    encoder = spec.config.encoder
    if spec.fits and encoder.fusion == "elan":
        values["depth_mult"] = encoder.fusion_blocks / rt_detr.BLOCKS
    return DFineConfig(**values)


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
        rt_detr.attention_rows(),
        feed_forward(f"{_ENCODER}.aifi.0.layers.{{i}}", "encoder.layers.{i}.feed_forward", _FIRST, _SECOND),
        convolution(f"{_ENCODER}.lateral_convs.{{i}}", "encoder.laterals.{i}"),
        _fusion(f"{_ENCODER}.fpn_blocks.{{i}}", "encoder.down_fusions.{i}"),
        convolution(f"{_ENCODER}.downsample_convs.{{i}}.conv1", "encoder.strides.{i}.0"),
        convolution(f"{_ENCODER}.downsample_convs.{{i}}.conv2", "encoder.strides.{i}.1"),
        _fusion(f"{_ENCODER}.pan_blocks.{{i}}", "encoder.up_fusions.{i}"),
    )


def table(config: Any, _: DetectorConfig) -> KeyTable:
    """D-FINE's. Its attention to the memory has no values and outputs of its own; its later boxes are distributions."""
    theirs, ours = f"{_DECODER}.layers.{{i}}", "decoder.layers.{i}"
    return KeyTable(
        backbone=backbone_rows(config.backbone_config, TARGET.backbone),
        encoder=encoder_rows(),
        decoder=joined(
            rt_detr.self_attention_rows(),
            linear(
                f"{theirs}.encoder_attn",
                f"{ours}.cross",
                {"sampling_offsets": "offsets", "attention_weights": "weights"},
            ),
            linear(theirs, ours, {"gateway.norm": "cross_norm"}),
            feed_forward(theirs, f"{ours}.feed_forward", _FIRST, _SECOND),
            rt_detr.position_rows(),
        ),
        heads=joined(rt_detr.proposal_rows(), mlp(f"{_DECODER}.pre_bbox_head", "decoder.box.change", 3)),
    )


def differences(config: DetectorConfig) -> tuple[str, ...]:
    """What D-FINE computes otherwise."""
    said = [
        rt_detr.PLACES,
        "attention to the memory has no values and outputs of its own, and a gate: these start afresh",
        "boxes after the first layer are distributions, whose heads start afresh",
        *rt_detr.positions_differ(config),
    ]
    if config.encoder.fusion != "elan":
        said.append("its fusions are those of D-FINE; this METR's are those of RT-DETR, and start afresh")
    return tuple(said)


def adopt(config: Any, backbone: BackboneConfig, state: State) -> Adopted:
    """A METR with D-FINE's encoder; the values and outputs that its decoder lacks change nothing.

    Raises:
        ModelError: an option is set for which METR has no counterpart.
    """
    blocks = round(rt_detr.BLOCKS * config.depth_mult)
    fusions = {"fusion": "elan", "fusion_blocks": blocks}
    adopted = rt_detr.adopted_config(config, backbone, fusions, {"positions": "plain"}, {"content": "place"})
    identity = dict[str, Derived]()
    for layer in range(config.decoder_layers):
        for part in ("value", "out"):
            key, width = f"decoder.layers.{layer}.cross.{part}", config.d_model
            identity[f"{key}.weight"] = Derived(tensor=torch.eye(width), how="identity")
            identity[f"{key}.bias"] = Derived(tensor=torch.zeros(width), how="identity")
    return Adopted(config=adopted, derived=identity | even_sampling(config, state))


TARGET = replace(
    rt_detr.TARGET,
    name="d_fine",
    title="D-FINE",
    configure=configure,
    table=table,
    derive=rt_detr.queries_and_heads,
    differences=differences,
    adopt=adopt,
)
