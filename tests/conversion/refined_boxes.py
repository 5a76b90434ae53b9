"""Detectors that refine distributions of edges: with weights, as METR, and what both make of the same images."""

from typing import Any, NamedTuple

import torch
from conversion_cases import maps_of, normalised
from torch import Tensor

from metr.conversion.convert import TransferReport, giving_to_ours, receive
from metr.conversion.table import adopted_backbone
from metr.conversion.targets.base import Target
from metr.models.detector import Detector
from metr.models.proposals import anchor_logits
from metr.structures import Decoded, Memory, Queries

from small import TEXT_WIDTH


@torch.no_grad()
def enlivened(model: Any) -> Any:
    """The model with random weights that keep the scale of what passes through them, however wide it is."""
    torch.manual_seed(4)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.numel():
            parameter.normal_(std=1.1 * parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "bias")):
            buffer.add_(torch.randn_like(buffer) * 0.1)
        elif key.endswith(("running_var", "weight")):
            buffer.mul_(0.5 + torch.rand_like(buffer))
    return model.eval()


def adopted(target: Target, model: Any) -> tuple[Detector, TransferReport]:
    """METR with its weights."""
    # a tensor that is kept under several names stays one
    state = {key: tensor.requires_grad_(False) for key, tensor in model.state_dict(keep_vars=True).items()}
    config = model.config
    backbone = adopted_backbone(config.backbone_config, tuple(config.feat_strides), config.freeze_backbone_batch_norms)
    assert target.adopt is not None
    made = target.adopt(config, backbone, state)
    network = Detector(made.config, TEXT_WIDTH).eval()
    giving = giving_to_ours(state, target.table(config, made.config).rows(), made.derived)
    return network, receive(network, giving, source=target.title, name="METR")


class Answers(NamedTuple):
    """What both make of the same images and queries."""

    maps: tuple[Tensor, ...]
    tokens: Tensor
    place_boxes: Tensor
    decoded: Decoded


def queries_of(width: int, number: int = 7) -> Queries:
    torch.manual_seed(6)
    zero = torch.zeros(2, number, dtype=torch.int64)
    return Queries(
        content=torch.randn(2, number, width),
        reference_boxes=torch.rand(2, number, 4) * 0.4 + 0.3,
        slot=zero,
        group=zero,
        valid=zero == 0,
    )


@torch.no_grad()
def ours(network: Detector, images: Tensor) -> tuple[Answers, Memory]:
    maps = network.backbone(images)
    memory = network.encoder(maps, torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool))
    anchors, usable = anchor_logits(memory)
    boxes = network.proposals.box.change(network.proposals.features(memory, usable)) + anchors
    decoded = network.decoder(queries_of(network.config.width), memory)
    return Answers(maps, memory.tokens, boxes[usable], decoded), memory


@torch.no_grad()
def theirs(model: Any, pixels: Tensor, memory: Memory) -> Answers:
    mask = torch.ones(pixels.shape[0], *pixels.shape[2:], dtype=torch.int64)
    maps = tuple(maps_of(model, pixels, mask))
    whole = model.model(pixels)
    found = whole.encoder_last_hidden_state
    levels = [project(level) for project, level in zip(model.model.decoder_input_proj, found, strict=True)]
    _, usable = anchor_logits(memory)
    queries, shapes = queries_of(model.config.d_model), list(memory.level_shapes)
    decoder = model.model.decoder
    decoder.train()  # only then every layer answers; there is no dropout
    answer = decoder(
        inputs_embeds=queries.content,
        encoder_hidden_states=memory.tokens,
        reference_points=queries.reference_boxes.logit(),
        spatial_shapes=torch.tensor(shapes),
        spatial_shapes_list=shapes,
    )
    decoder.eval()
    features = answer.intermediate_hidden_states
    features = torch.cat([features[:1], features])
    heads = [decoder.class_embed[0], *decoder.class_embed]
    logits = torch.stack([head(feature) for head, feature in zip(heads, features, strict=True)])
    quality = answer.intermediate_logits.transpose(0, 1) - logits
    boxes = answer.intermediate_reference_points.transpose(0, 1)
    return Answers(
        maps,
        torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1),
        whole.enc_outputs_coord_logits[usable],
        Decoded(features=features, boxes=boxes, quality=quality.mean(-1)),
    )


def close(found: Tensor, wanted: Tensor) -> None:
    assert float(wanted.std()) > 1e-2
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def agree(network: Detector, model: Any) -> None:
    """Backbone, encoder, places and every output of the decoder are the same."""
    torch.manual_seed(5)
    images = torch.rand(2, 3, 64, 96)
    found, memory = ours(network, images)
    wanted = theirs(model, normalised(network, images), memory)
    for own, other in zip(found.maps, wanted.maps, strict=True):
        close(own, other)
    close(found.tokens, wanted.tokens)
    close(found.place_boxes, wanted.place_boxes)
    close(found.decoded.features, wanted.decoded.features)
    close(found.decoded.boxes, wanted.decoded.boxes)
    assert found.decoded.quality is not None
    assert wanted.decoded.quality is not None
    close(found.decoded.quality, wanted.decoded.quality)
