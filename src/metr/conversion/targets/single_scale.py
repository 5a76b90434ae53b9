"""What the targets of one scale have in common: METR's `plain` family in the words of DETR and its successors."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metr.conversion.activation_statistics import after_norm, inside
from metr.conversion.classifier import Linear, classifier
from metr.conversion.table import Row, backbone_rows
from metr.conversion.targets.base import (
    ADOPTED_QUERIES,
    BuildSpec,
    Context,
    KeyTable,
    Target,
    attention,
    feed_forward,
    joined,
    linear,
)
from metr.layers.position_encoding import box_encoding
from metr.models.backbones.registered import EfficientNetLiteConfig
from metr.models.config import BackboneConfig, DetectorConfig, EncoderConfig
from metr.models.decoder import ConditionalDecoder

DECODER = ("model.decoder.layers.{i}", "decoder.layers.{i}")

ASK_FOR_ALL = "every query asks for every name; METR's each ask for one, and attend to those that ask for the same"
"""What distinguishes the queries of all these detectors from METR's."""

# the side of the boxes from which learnt queries start, as a share of the image
SIDE = 0.2
PLAIN_OPTIONS = {
    "encoder.temperature": 10_000,
    "encoder.position_scale": False,
    "encoder.activation": "relu",
    "decoder.temperature": 10_000,
    "decoder.activation": "relu",
}
"""What all of them but DAB-DETR have."""
BOX_MARGIN = 1e-5
"""The least distance from 0 and 1 of a coordinate from which their boxes start."""
# the steps of the most even sequence of points in a square: powers of the inverse of the plastic number (Roberts, 2018)
_STEPS = (0.7548776662466927, 0.5698402909980532)


def with_backbone(table: KeyTable, prefix: str = Target.backbone) -> Callable[[Any, DetectorConfig], KeyTable]:
    """The whole table of a configuration: beside the rows that are always the same those of its backbone."""
    return lambda config, _: replace(table, backbone=backbone_rows(config.backbone_config, prefix))


def common_options(spec: BuildSpec, width: str) -> dict[str, Any]:
    """What the configurations of these detectors share: METR's sizes. Dropout is off, as in METR.

    Args:
        spec: What the target is built for; a METR with another encoder says nothing of this one's sizes.
        width: What the configuration calls the width.
    """
    config = spec.config
    encoder = config.encoder if config.encoder.kind == "plain" else EncoderConfig(kind="plain")
    return {
        "backbone_config": _with_frozen_norms(spec.backbone),
        width: config.width,
        "encoder_layers": encoder.layers,
        "encoder_attention_heads": encoder.heads,
        "encoder_ffn_dim": encoder.feed_forward,
        "decoder_layers": config.decoder.layers,
        "decoder_attention_heads": config.decoder.heads,
        "decoder_ffn_dim": config.decoder.feed_forward,
        "num_queries": config.queries.number,
        "activation_function": "relu",
        "dropout": 0.0,
        **spec.labels,
    }


def _with_frozen_norms(backbone: Any) -> Any:
    """These detectors freeze the batch norms that they know, with an epsilon of their own; ours freeze themselves."""
    frozen = deepcopy(backbone)
    if isinstance(frozen, EfficientNetLiteConfig):
        frozen.freeze_batch_norm = True
    return frozen


def encoder_rows(out: str = "o_proj", first: str = "mlp.fc1", second: str = "mlp.fc2") -> tuple[Row, ...]:
    """The convolution between backbone and encoder, and the encoder; detectors name three of its layers differently."""
    theirs, ours = "model.encoder.layers.{i}", "encoder.layers.{i}"
    return joined(
        linear("model", "encoder", {"input_projection": "projection"}),
        attention(f"{theirs}.self_attn", f"{ours}.attention", out),
        linear(theirs, ours, {"self_attn_layer_norm": "norm"}),
        feed_forward(theirs, f"{ours}.feed_forward", first, second),
    )


def other_options(config: DetectorConfig, wanted: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences about options of a METR for which a detector has one value."""
    found = config.model_dump()
    parts = ((key, value, found[key.split(".")[0]][key.split(".")[1]]) for key, value in wanted.items())
    return tuple(f"it has {key} {value!r}; this METR has {own!r}" for key, value, own in parts if own != value)


def adopted_parts(config: Any, width: int) -> dict[str, Any]:
    """What the METRs of all these detectors share, part by part; further options of encoder and decoder may be added.

    Args:
        config: The detector's, which gives the sizes.
        width: d.
    """
    heads = config.decoder_attention_heads
    return {
        "width": width,
        "encoder": {
            "kind": "plain",
            "layers": config.encoder_layers,
            "heads": config.encoder_attention_heads,
            "feed_forward": config.encoder_ffn_dim,
        },
        "decoder": {
            "kind": "conditional",
            "layers": config.decoder_layers,
            "heads": heads,
            "feed_forward": config.decoder_ffn_dim,
            "box_margin": BOX_MARGIN,
        },
        "categories": {"heads": heads},
        "queries": ADOPTED_QUERIES | {"number": config.num_queries},
        "similarity": {"form": "classifier"},
    }


def adopted(config: Any, width: int, backbone: BackboneConfig, **parts: Mapping[str, Any]) -> DetectorConfig:
    """The METR around a detector's weights: `parts` go over what all have (`adopted_parts`)."""
    common = adopted_parts(config, width)
    values = common | {part: common.get(part, {}) | options for part, options in parts.items()}
    return DetectorConfig.model_validate(values | {"backbone": backbone})


def spread_boxes(number: int) -> Float[Tensor, "n 4"]:
    """Boxes of one size whose centres fill the image evenly, however many there are."""
    index = torch.arange(1, number + 1, dtype=torch.float64).unsqueeze(1)
    centres = (0.5 + index * torch.tensor(_STEPS, dtype=torch.float64)) % 1
    return torch.cat([centres, torch.full_like(centres, SIDE)], dim=1).float()


def conditional_decoder(context: Context) -> ConditionalDecoder:
    """METR's decoder, which is conditional where the families fit."""
    decoder = context.network.decoder
    assert isinstance(decoder, ConditionalDecoder)
    return decoder


def name_logits(context: Context) -> Linear:
    """One logit a name from the decoder's normalised output."""
    decoder = conditional_decoder(context)
    return classifier(decoder.similarity, context.tokens, after_norm(decoder.norm))


@torch.no_grad()
def query_positions(context: Context) -> Float[Tensor, "n d"]:
    """METR's embedding of boxes spread over the image, one for each of the target's learnt queries."""
    boxes = spread_boxes(context.config.num_queries)
    embedded: Tensor = conditional_decoder(context).position(box_encoding(boxes, context.network.config.width))
    return embedded


def position_keys(context: Context) -> tuple[str, ...]:
    """Our embedding of boxes."""
    return inside(context.network, "decoder.position")


def spread_logits(number: int) -> Float[Tensor, "n 4"]:
    """The spread boxes before the sigmoid."""
    return spread_boxes(number).clamp(0.01, 0.99).logit()
