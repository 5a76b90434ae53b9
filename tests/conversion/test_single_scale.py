"""DAB-DETR, Conditional DETR and DETR with METR's weights: what they compute alike, on the same pixels."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metr.conversion.classifier import name_tokens
from metr.conversion.convert import TransferReport, giving_to_ours, giving_to_theirs
from metr.conversion.export import build, transfer
from metr.conversion.targets import find_target
from metr.conversion.targets.base import KeyTable, Target
from metr.conversion.targets.single_scale import spread_boxes
from metr.models.backbones.base import BackboneConfig
from metr.models.detector import Detector
from metr.models.encoders.pyramid import token_places
from metr.structures import Memory, Queries

from small import TEXT_WIDTH, small_config

NAMES = ("fish", "frog", "leaf")
SINGLE = ("dab_detr", "conditional_detr", "detr")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A METR of random weights and the detector that got them, with what both see: two images, one padded."""

    target: Target
    ours: Detector
    theirs: Any
    table: KeyTable
    report: TransferReport
    tokens: Tensor
    images: Tensor
    mask: Tensor

    @property
    def memory(self) -> Memory:
        return self.ours.encoder(self.ours.backbone(self.images), self.mask)

    @property
    def pixels(self) -> dict[str, Tensor]:
        normalised = (self.images - self.ours.backbone.mean) / self.ours.backbone.std
        return {"pixel_values": normalised, "pixel_mask": (~self.mask).long()}


def stir(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("backbone."):
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand_like(buffer))


def pair_of(name: str, encoder: str = "plain", backbone: BackboneConfig | None = None) -> Pair:
    torch.manual_seed(0)
    config = small_config(encoder=encoder)
    if backbone is not None:
        config = config.model_copy(update={"backbone": backbone})
    ours = Detector(config, TEXT_WIDTH).eval()
    stir(ours)
    target = find_target(name)
    text = torch.nn.functional.normalize(torch.randn(len(NAMES), TEXT_WIDTH), dim=-1)
    moved = transfer(target, ours, NAMES, text)
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 64:], mask[1, :, 96:] = True, True
    images = torch.rand(2, 3, 96, 128).masked_fill(mask.unsqueeze(1), 0)
    return Pair(
        target=target,
        ours=ours,
        theirs=moved.model,
        table=target.table(moved.model.config, config),
        report=moved.report,
        tokens=name_tokens(ours, text),
        images=images,
        mask=mask,
    )


@pytest.fixture(scope="module", params=SINGLE)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Every target in turn."""
    return pair_of(request.param)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def features_of(pair: Pair) -> list[Tensor]:
    answer = pair.theirs.model.backbone(**pair.pixels)
    maps = answer[0] if pair.target.name == "dab_detr" else answer
    return [level for level, _ in maps]


@torch.no_grad()
def test_backbones_agree(pair: Pair) -> None:
    close(pair.ours.backbone(pair.images)[-1], features_of(pair)[-1])


@torch.no_grad()
def test_memories_agree(pair: Pair) -> None:
    answer = pair.theirs.model(**pair.pixels, output_hidden_states=True)
    memory = pair.memory
    image = ~memory.padding_mask
    close(memory.tokens[image], answer.encoder_last_hidden_state[image])


def test_the_table_gives_back_what_it_took(pair: Pair) -> None:
    there = giving_to_theirs(pair.ours.state_dict(), pair.table.rows(), {})
    back = giving_to_ours(there.state, pair.table.rows(), {})
    assert not back.left_over
    own = pair.ours.state_dict()
    parts = {"backbone", "encoder", "decoder"}
    assert {key.split(".")[0] for key in back.state} == parts
    for key, tensor in back.state.items():
        assert torch.equal(tensor, own[key]), key
    assert not [key for key in own if key.startswith("encoder.") and key not in back.state]


def test_back_and_there(pair: Pair) -> None:
    """The same from their side: a detector of transformers through METR's names."""
    model: Any = build(pair.target, pair.ours, NAMES, seed=5)
    stir(model)
    state = model.state_dict()
    ours = giving_to_ours(state, pair.table.rows(), {})
    theirs = giving_to_theirs(ours.state, pair.table.rows(), {})
    assert set(ours.state) <= set(pair.ours.state_dict())
    assert not theirs.left_over
    assert set(theirs.state) == set(state) - set(ours.left_over)
    # what is left over of theirs is derived on the way to them, a copy, or what METR has not
    made = {moved.key for moved in (*pair.report.reshaped, *pair.report.copied)} | set(pair.report.afresh)
    assert set(ours.left_over) <= made
    assert not [key for key in ours.left_over if key.startswith(("model.encoder.layers.", pair.target.backbone))]
    for key, tensor in theirs.state.items():
        assert torch.equal(tensor, state[key]), key


@torch.no_grad()
def test_every_tensor_arrives_where_the_table_says(pair: Pair) -> None:
    state = pair.theirs.state_dict()
    for moved in pair.report.copied:
        assert len(moved.source) == 1
        assert torch.equal(state[moved.key], pair.ours.state_dict()[moved.source[0]]), moved.key
    assert pair.report.notes == pair.target.differences(pair.ours.config)


def test_little_starts_afresh(pair: Pair) -> None:
    """What the target has and METR has not: named, so that nothing is forgotten by mistake."""
    expected = {
        # METR's encoder does not scale its positions: what would is set to change nothing by its last layer
        "dab_detr": {f"model.encoder.query_scale.layers.0.{part}" for part in ("weight", "bias")},
        "conditional_detr": set(),
        # boxes are not moved but made
        "detr": {f"bbox_predictor.layers.2.{part}" for part in ("weight", "bias")},
    }
    fresh = {key for key in pair.report.afresh if not key.endswith("num_batches_tracked")}
    assert fresh == expected[pair.target.name]


def test_what_stays_behind_is_what_the_target_lacks(pair: Pair) -> None:
    left = {key for key in pair.report.left_over if key.startswith("decoder.") and "similarity" not in key}
    kinds = {part for key in left for part in ("extent", "position", "place", "scale", "box") if part in key}
    lacking = {
        "dab_detr": set(),
        "conditional_detr": {"extent"},
        "detr": {"extent", "position", "place", "scale", "box"},
    }
    assert kinds == lacking[pair.target.name]


@torch.no_grad()
def test_dab_detr_gives_the_boxes_that_metr_gives() -> None:
    """The whole decoder, from the same learnt boxes and content."""
    pair = pair_of("dab_detr")
    answer = pair.theirs(**pair.pixels)
    anchors = pair.theirs.model.query_refpoint_embeddings.weight.sigmoid().expand(2, -1, -1)
    content = pair.theirs.model.patterns.weight.expand(2, anchors.shape[1], -1)
    slot = torch.zeros(anchors.shape[:2], dtype=torch.int64)
    there = torch.ones_like(slot, dtype=torch.bool)
    queries = Queries(content=content, reference_boxes=anchors, slot=slot, group=slot, valid=there)
    boxes = pair.ours.decoder(queries, pair.memory).boxes[-1]
    close(boxes, answer.pred_boxes)
    assert answer.logits.shape[-1] == len(NAMES)


@torch.no_grad()
def test_conditional_detr_has_metrs_layers() -> None:
    """Each layer of the decoder, from the same content, positions and places."""
    pair = pair_of("conditional_detr")
    memory, places = pair.memory, token_places(pair.memory, 32)
    content, position, place = (torch.randn(2, 7, 32) for _ in range(3))
    everyone = torch.ones(2, 7, 7, dtype=torch.bool)
    seen = torch.zeros(2, 1, 7, memory.tokens.shape[1])
    seen = seen.masked_fill(memory.padding_mask[:, None, None], torch.finfo(seen.dtype).min)
    for index, (own, other) in enumerate(zip(pair.ours.decoder.layers, pair.theirs.model.decoder.layers, strict=True)):
        expected = other(
            content,
            spatial_position_embeddings=places,
            query_position_embeddings=position,
            query_sine_embed=place,
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=seen,
            is_first=index == 0,
        )
        close(own(content, position, place, everyone, memory, places), expected)


@torch.no_grad()
def test_conditional_detr_starts_from_points_spread_over_the_image() -> None:
    """And a small step of an optimiser moves them a little."""
    model = pair_of("conditional_detr").theirs.model
    queries = model.query_position_embeddings.weight
    points = model.decoder.ref_point_head(queries).sigmoid()
    torch.testing.assert_close(points, spread_boxes(len(points))[:, :2].clamp(0.01, 0.99), atol=1e-2, rtol=0)
    moved = model.decoder.ref_point_head(queries + 1e-3 * torch.randn_like(queries)).sigmoid()
    torch.testing.assert_close(moved, points, atol=0.02, rtol=0)


@torch.no_grad()
def test_detr_has_metrs_layers_where_no_place_is_known() -> None:
    pair = pair_of("detr")
    for layer in pair.ours.decoder.layers:
        # what is said of places is then nothing, and adds nothing
        for part in (layer.among.query_position, layer.among.key_position, layer.cross.query_place):
            part.bias.zero_()
        layer.cross.key_place.bias.zero_()
    if pair.ours.decoder.layers[0].cross.query_position is not None:
        pair.ours.decoder.layers[0].cross.query_position.bias.zero_()
    memory, content = pair.memory, torch.randn(2, 7, 32)
    nowhere, everyone = torch.zeros_like(content), torch.ones(2, 7, 7, dtype=torch.bool)
    seen = torch.zeros(2, 1, 7, memory.tokens.shape[1])
    seen = seen.masked_fill(memory.padding_mask[:, None, None], torch.finfo(seen.dtype).min)
    for own, other in zip(pair.ours.decoder.layers, pair.theirs.model.decoder.layers, strict=True):
        expected = other(content, encoder_hidden_states=memory.tokens, encoder_attention_mask=seen)
        close(own(content, nowhere, nowhere, everyone, memory, torch.zeros_like(memory.tokens)), expected)


@pytest.mark.parametrize("name", SINGLE)
@torch.no_grad()
def test_another_family_gives_its_backbone(name: str) -> None:
    pair = pair_of(name, encoder="deformable")
    close(pair.ours.backbone(pair.images)[-1], features_of(pair)[-1])
    assert all(moved.key.startswith(pair.target.backbone) for moved in pair.report.copied)
    assert any(key.startswith("model.encoder.") for key in pair.report.afresh)


@pytest.mark.parametrize("frozen", [True, False])
@torch.no_grad()
def test_efficientnet_is_carried_as_it_is(frozen: bool) -> None:
    """From a map of stride 16, and with the epsilon of its batch norms, which DAB-DETR would replace."""
    options = {"width": 0.25, "depth": 0.34}
    values = {"name": "efficientnet_lite0", "pretrained": False, "freeze_stages": 0, "strides": (16,)}
    pair = pair_of("dab_detr", backbone=BackboneConfig(**values, freeze_batch_norm=frozen, options=options))
    answer = pair.theirs.model(**pair.pixels, output_hidden_states=True)
    image = ~pair.memory.padding_mask
    assert pair.memory.level_shapes == ((6, 8),)
    close(pair.memory.tokens[image], answer.encoder_last_hidden_state[image])


@pytest.mark.trains
@torch.no_grad()
def test_the_classifier_comes_near_the_similarity_head(pair: Pair) -> None:
    """As near as least squares on features that are as the norm before declares them; "no object" of DETR is zero."""
    decoder = pair.ours.decoder
    features = decoder.norm.bias + decoder.norm.weight * torch.randn(65_536, 32)
    head = pair.theirs.class_embed if pair.target.name == "dab_detr" else pair.theirs.class_labels_classifier
    found = head(features)
    if pair.target.name == "detr":
        assert (found[:, -1] == 0).all()
    wanted = torch.stack([decoder.similarity(features, token.expand_as(features)) for token in pair.tokens], dim=1)
    error = (found[:, : len(NAMES)] - wanted).square().mean(0)
    with_one = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    least = (with_one @ torch.linalg.lstsq(with_one, wanted).solution - wanted).square().mean(0)
    assert (error < 1.05 * least).all(), error / least
    assert (error < 0.3 * wanted.var(0)).all(), error / wanted.var(0)


@pytest.mark.parametrize("number", [16, 100, 300])
def test_spread_boxes_are_even(number: int) -> None:
    """Each quarter of the image has its share, and no two centres are near each other."""
    centres = spread_boxes(number)[:, :2]
    quarter = (centres > 0.5).long() @ torch.tensor([1, 2])
    assert (quarter.bincount(minlength=4) - number / 4).abs().max() <= 2
    assert torch.cdist(centres, centres).fill_diagonal_(1).min() > 0.5 / number**0.5
