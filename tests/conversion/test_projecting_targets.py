"""LW-DETR and RF-DETR: the same pixels give the same features, memory, proposals, decoder layers and boxes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_cases import (
    NAMES,
    PROJECTING,
    SIDE,
    alike,
    normalised,
    random_images,
    save_folder,
    stir,
    stirred,
    texts,
)
from torch import Tensor
from transformers import AutoModelForObjectDetection

from metr.conversion.activation_statistics import after_norm
from metr.conversion.classifier import classifier, name_tokens
from metr.conversion.convert import giving_to_ours, giving_to_theirs
from metr.conversion.export import Transferred, build, transfer
from metr.conversion.import_ import adopt, read_published
from metr.conversion.targets import find_target
from metr.data.config import ResizeConfig
from metr.errors import ModelError
from metr.models.detector import Detector
from metr.models.heads import SimilarityHead
from metr.models.proposals import anchor_boxes
from metr.structures import Categories, Memory, Proposals, Queries

# what Group DETR has once a group
PLACES = ("enc_output", "enc_output_norm", "enc_out_class_embed", "enc_out_bbox_embed")


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


class Case:
    """A METR, what became of it, and what both make of the same images."""

    def __init__(self, name: str) -> None:
        self.target = find_target(name)
        self.network = stirred(alike(name))
        self.done: Transferred = transfer(self.target, self.network, NAMES, texts())
        # transformers' RF-DETR mixes up rows and columns where an image is not square
        self.images = random_images(width=SIDE if name == "rf_detr" else SIDE + 32)
        self.padding = torch.zeros(2, *self.images.shape[2:], dtype=torch.bool)
        self.padding[1, :, 48:] = True
        self.pixels, self.mask = normalised(self.network, self.images), (~self.padding).long()
        with torch.no_grad():
            self.theirs: Any = self.done.model(pixel_values=self.pixels, pixel_mask=self.mask)
            self.maps = self.network.backbone(self.images)
            self.memory: Memory = self.network.encoder(self.maps, self.padding)

    @property
    def model(self) -> Any:
        return self.done.model.model

    def their_memory(self) -> Tensor:
        found = self.model.backbone(self.pixels, self.mask)
        levels = [found[0]] if self.target.name == "rf_detr" else [level for level, _ in found]
        return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)


@pytest.fixture(scope="module", params=PROJECTING)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@torch.no_grad()
def test_backbone(case: Case) -> None:
    theirs = case.model.backbone.backbone(case.pixels).feature_maps
    assert len(case.maps) == len(theirs) == 3
    for ours, other in zip(case.maps, theirs, strict=True):
        assert float(ours.std()) > 1e-2
        close(ours, other)


@torch.no_grad()
def test_encoder(case: Case) -> None:
    theirs = case.their_memory()
    assert len(case.memory.level_shapes) == (3 if case.target.name == "lw_detr" else 1)
    assert float(case.memory.tokens.std()) > 1e-2
    close(case.memory.tokens, theirs)


@torch.no_grad()
def test_proposals(case: Case) -> None:
    head, network = case.network.proposals, case.network
    anchors, usable = anchor_boxes(case.memory)
    features = head.features(case.memory, usable)
    boxes = head.box(features, anchors)
    scores = head.scores(features, name_tokens(network, texts()).expand(2, -1, -1))
    best = scores.amax(-1).masked_fill(~usable, -torch.inf).topk(9, dim=1).indices
    close(boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4)), case.theirs.enc_outputs_coord_logits)
    close(scores.gather(1, best.unsqueeze(-1).expand(-1, -1, 3)), case.theirs.enc_outputs_class)


def decoded(network: Detector, memory: Memory, content: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised output of every layer, and its boxes."""
    zero = torch.zeros(content.shape[:2], dtype=torch.int64)
    queries = Queries(content=content, reference_boxes=boxes, slot=zero, group=zero, valid=zero == 0)
    found = network.decoder(queries, memory)
    return found.features, found.boxes


@torch.no_grad()
def test_the_whole_decoder(case: Case) -> None:
    """From the queries that they start with, on padded images too."""
    model, number = case.done.model, 9
    content = case.model.query_feat.weight[:number].expand(2, -1, -1)
    features, boxes = decoded(case.network, case.memory, content, case.theirs.init_reference_points)
    close(features, case.theirs.intermediate_hidden_states)
    close(boxes[-1], case.theirs.pred_boxes)
    # their heads of earlier layers are the last one's
    shift = model.bbox_embed(case.theirs.intermediate_hidden_states[0])
    start = case.theirs.init_reference_points
    close(boxes[0, ..., :2], shift[..., :2] * start[..., 2:] + start[..., :2])


@torch.no_grad()
def test_queries_start_where_theirs_do(case: Case) -> None:
    """METR's class queries, given their proposals: the boxes are moved by the shift of the rank."""
    network = case.network
    rank = torch.arange(9).expand(2, -1)
    assert network.class_queries.shift is not None
    assert float(network.class_queries.shift.weight.abs().max()) > 0.05
    proposals = case.theirs.enc_outputs_coord_logits
    found = Proposals(
        logits=torch.zeros(2, 9), boxes=proposals, place=rank, slot=rank * 0, rank=rank, valid=torch.ones(2, 9).bool()
    )
    tokens = torch.zeros(2, 1, network.config.width)
    ids = torch.zeros(2, 1, dtype=torch.int64)
    categories = Categories(
        presence_logits=torch.zeros(1, 2, 1), text=tokens[0], tokens=tokens, ids=ids, valid=ids == 0
    )
    queries = network.class_queries(found, tokens.expand(-1, 9, -1), categories)
    close(queries.reference_boxes, case.theirs.init_reference_points)


@torch.no_grad()
def test_the_classification_head(case: Case) -> None:
    network = case.network
    head = network.decoder.similarity
    assert isinstance(head, SimilarityHead)
    wanted = classifier(head, name_tokens(network, texts()), after_norm(network.decoder.norm))
    assert torch.equal(case.done.model.class_embed.weight, wanted.weight)


def test_there_and_back(case: Case) -> None:
    """What the table moved comes back bit by bit."""
    table = case.target.table(case.done.model.config, case.network.config)
    back = giving_to_ours(case.done.model.state_dict(), table.rows(), {})
    ours = case.network.state_dict()
    copied = {source for moved in case.done.report.copied for source in moved.source}
    assert set(back.state) == {key for key in copied if not key.startswith("class_queries.")}
    for key, tensor in back.state.items():
        assert torch.equal(tensor, ours[key]), key


def test_back_and_there(case: Case) -> None:
    model = stir(build(case.target, case.network, NAMES, seed=5))
    state, table = model.state_dict(), case.target.table(case.done.model.config, case.network.config)
    ours = giving_to_ours(state, table.rows(), {})
    theirs = giving_to_theirs(ours.state, table.rows(), {})
    assert set(theirs.state) == set(state) - set(ours.left_over)
    for key, tensor in theirs.state.items():
        assert torch.equal(tensor, state[key]), key


def test_nothing_of_theirs_starts_afresh(case: Case) -> None:
    report = case.done.report
    assert report.afresh == ()
    parts = ("denoising.", "category_extraction.")
    assert [key for key in report.left_over if not key.startswith(parts)] == []


def test_it_trains(case: Case) -> None:
    """Their own loss reaches what moved."""
    labels = [{"class_labels": torch.tensor([0, 2]), "boxes": torch.rand(2, 4) * 0.4 + 0.3} for _ in range(2)]
    model = case.done.model.train()
    try:
        model.zero_grad()
        loss = model(pixel_values=case.pixels, labels=labels).loss
        loss.backward()
    finally:
        model.eval()
    assert bool(loss.isfinite())
    gradients = [one.grad for one in case.model.backbone.parameters() if one.grad is not None]
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", PROJECTING)
@torch.no_grad()
def test_folders_of_transformers(name: str, groups: int, tmp_path: Path) -> None:
    """Of several groups the first is taken, and the others are left over."""
    target, network = find_target(name), stirred(alike(name))
    config = build(target, network, NAMES).config
    config.group_detr = groups
    torch.manual_seed(3)
    model: Any = stir(AutoModelForObjectDetection.from_config(config)).eval()
    save_folder(model, name, network, tmp_path)
    published = read_published(tmp_path)
    ours, report = adopt(published, texts(), texts())
    assert published.names == NAMES
    assert published.resize == ResizeConfig(size=SIDE, filter="bilinear")
    presence = {"nothing: presence was never taught"}
    cut = {"cut: the first of 3 groups"} if groups > 1 else set()
    assert {moved.how for moved in report.reshaped if "class head" not in moved.how} == cut | presence
    others = tuple(f"model.{part}.{group}" for part in PLACES for group in (1, 2))
    assert [key for key in report.left_over if not key.startswith(others)] == []
    images = random_images(width=SIDE)
    padding = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    theirs = model(normalised(ours, images))
    memory = ours.encode(images, padding)
    assert ours.class_queries.learned is not None
    content = ours.class_queries.learned.weight.expand(2, -1, -1)
    features, boxes = decoded(ours, memory, content, theirs.init_reference_points)
    close(features, theirs.intermediate_hidden_states)
    close(boxes[-1], theirs.pred_boxes)


def test_a_processor_that_needs_torchvision(tmp_path: Path) -> None:
    """RF-DETR's own, as it is published: its file says size and colours."""
    network = stirred(alike("rf_detr"))
    save_folder(build(find_target("rf_detr"), network, NAMES), "rf_detr", network, tmp_path)
    own = {
        "image_processor_type": "RfDetrImageProcessor",
        "size": {"height": 96, "width": 96},
        "image_mean": [0.1, 0.2, 0.3],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    published = read_published(tmp_path)
    assert published.resize == ResizeConfig(size=96, filter="bilinear")
    assert published.config.backbone.pixel_mean == (0.1, 0.2, 0.3)
    assert published.config.backbone.pixel_std == (0.229, 0.224, 0.225)


def test_another_backbone_is_refused() -> None:
    network = stirred(alike("rt_detr"))
    for name in PROJECTING:
        with pytest.raises(ModelError, match=r"has a .* backbone and no other, this METR has a resnet"):
            transfer(find_target(name), network, NAMES, texts())


def test_rf_detr_has_one_level() -> None:
    with pytest.raises(ModelError, match=r"one level of scale 1"):
        transfer(find_target("rf_detr"), stirred(alike("rf_detr", scales=(2.0, 0.5))), NAMES, texts())


@pytest.mark.parametrize("name", PROJECTING)
def test_images_are_multiples_of_windows(name: str) -> None:
    network, target = stirred(alike(name)), find_target(name)
    pad_to = network.backbone.pad_to
    assert pad_to == 16
    size = target.image_processor(ResizeConfig(size=50), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), pad_to).size
    assert (size.height, size.width) == (64, 64)
    (told,) = target.resizes_otherwise(ResizeConfig(size=50), pad_to)
    assert "images have 64 pixels, a multiple of 16; this METR's have 50" in told


def test_other_forms_of_boxes_are_told_of() -> None:
    config = alike("lw_detr", norm="layer")
    decoder = config.decoder.model_copy(update={"boxes": "logit", "refine": "each", "padded_positions": False})
    report = transfer(
        find_target("lw_detr"), stirred(config.model_copy(update={"decoder": decoder})), NAMES, texts()
    ).report
    for what in ("as logits", "the box of the layer before", "count padding", "layer norms"):
        assert any(what in note for note in report.notes), what
