"""D-FINE in its published sizes becomes METR, and METR becomes D-FINE: the same features, boxes and qualities."""

from typing import Any, NamedTuple

import pytest
import torch
from conversion_cases import NAMES, alike, normalised, stirred, texts
from d_fine_sizes import SIZES, config_of
from torch import Tensor

from metr.conversion.convert import TransferReport, giving_to_ours, receive
from metr.conversion.export import transfer
from metr.conversion.table import adopted_backbone
from metr.conversion.targets import find_target
from metr.errors import ModelError
from metr.models.config import DecoderConfig
from metr.models.detector import Detector
from metr.models.proposals import anchor_logits
from metr.structures import Decoded, Memory, Queries

from small import TEXT_WIDTH

TARGET = find_target("d_fine")
# the larger ones take seconds to build
PUBLISHED = [size if size == "n" else pytest.param(size, marks=pytest.mark.slow) for size in SIZES]


@torch.no_grad()
def enlivened(model: Any) -> Any:
    """The model with random weights that keep the scale of what passes through them, however wide it is."""
    torch.manual_seed(4)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1.1 * parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "bias")):
            buffer.add_(torch.randn_like(buffer) * 0.1)
        elif key.endswith(("running_var", "weight")):
            buffer.mul_(0.5 + torch.rand_like(buffer))
    return model.eval()


def published(size: str, **changes: object) -> Any:
    """A D-FINE of a published size with random weights."""
    from transformers import DFineForObjectDetection

    config = config_of(size, NAMES, **changes)
    torch.manual_seed(3)
    return enlivened(DFineForObjectDetection(config))


def adopted(model: Any) -> tuple[Detector, TransferReport]:
    """METR with its weights."""
    # a tensor that is kept under several names stays one
    state = {key: tensor.requires_grad_(False) for key, tensor in model.state_dict(keep_vars=True).items()}
    config = model.config
    backbone = adopted_backbone(config.backbone_config, tuple(config.feat_strides), config.freeze_backbone_batch_norms)
    made = TARGET.adopt(config, backbone, state)
    network = Detector(made.config, TEXT_WIDTH).eval()
    giving = giving_to_ours(state, TARGET.table(config, made.config).rows(), made.derived)
    return network, receive(network, giving, source="D-FINE", name="METR")


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
    maps = tuple(found for found, _ in model.model.backbone(pixels, mask))
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


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_there_and_back(size: str) -> None:
    model = published(size)
    network, report = adopted(model)
    agree(network, model)
    for key in report.left_over:
        assert "class_embed" in key or "enc_score_head" in key or key.endswith(("tracked", "points_scale")), key
    again = transfer(TARGET, network, NAMES, texts()).model
    agree(network, again)


SMALL: dict[str, Any] = {
    "backbone_config": {
        "model_type": "hgnet_v2",
        "hidden_sizes": [8, 16, 24, 32],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8, 16, 24],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [8, 16, 24, 32],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
        "use_learnable_affine_block": True,
        "out_indices": [3, 4],
    },
    "encoder_in_channels": [24, 32],
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32],
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_n_points": [2, 4], "decoder_offset_scale": 0.25},
        {"encoder_hidden_dim": 48, "decoder_in_channels": [48, 48]},
        {"max_num_bins": 16, "up": 0.25, "reg_scale": 8.0, "top_prob_values": 3, "lqe_hidden_dim": 24, "lqe_layers": 3},
        {"eval_idx": 1},
    ],
    ids=["points", "encoder's width", "distributions", "last layer by its number"],
)
def test_options_that_published_sizes_may_set(changes: dict[str, Any]) -> None:
    model = published("n", **SMALL | changes)
    network, _ = adopted(model)
    agree(network, model)
    agree(network, transfer(TARGET, network, NAMES, texts()).model)


def test_weights_go_before_an_older_configuration() -> None:
    model = published("n", **SMALL, reg_scale=8.0)
    model.config.reg_scale = 4.0
    network, _ = adopted(model)
    assert network.config.decoder.distribution.flatness == float(model.model.decoder.reg_scale)
    agree(network, model)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"eval_idx": 0}, "eval_idx"), ({"eval_size": 640}, "eval_size"), ({"layer_norm_eps": 1e-6}, "layer_norm_eps")],
)
def test_options_without_a_counterpart_are_refused(changes: dict[str, Any], named: str) -> None:
    model = published("n", **SMALL)
    for option, value in changes.items():
        setattr(model.config, option, value)
    with pytest.raises(ModelError, match=f"needs {named} = "):
        adopted(model)


def test_a_metr_that_refines_boxes_otherwise_gives_what_fits() -> None:
    config = alike("d_fine")
    plain = DecoderConfig.model_validate(config.decoder.model_dump() | {"kind": "deformable"})
    report = transfer(TARGET, stirred(config.model_copy(update={"decoder": plain})), NAMES, texts()).report
    moved = {moved.key for moved in report.copied}
    assert {"model.decoder.layers.1.gateway.norm.weight", "model.decoder.pre_bbox_head.layers.2.weight"} <= moved
    assert "model.decoder.layers.1.gateway.gate.weight" in report.afresh
    assert any("distributions" in note for note in report.notes)
    whole = transfer(TARGET, stirred(config), NAMES, texts()).report
    assert not any("distributions" in note for note in whole.notes)
