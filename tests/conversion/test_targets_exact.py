"""For each multi-scale target: the same pixels give the same features, memory, proposals and decoder layers."""

from typing import Any

import pytest
import torch
from conversion_cases import NAMES, SIDE, alike, maps_of, normalised, random_images, stir, stirred, texts
from torch import Tensor

from metr.conversion.classifier import name_tokens
from metr.conversion.convert import giving_to_ours, giving_to_theirs
from metr.conversion.export import Transferred, build, transfer
from metr.conversion.targets import find_target
from metr.models.config import DetectorConfig
from metr.models.detector import Detector
from metr.models.proposals import anchor_logits
from metr.structures import Memory

TARGETS = ("deformable_detr", "rt_detr", "rt_detr_v2", "d_fine", "deimv2")


class Case:
    """A METR, what became of it, and what both make of the same images."""

    def __init__(self, name: str) -> None:
        self.target = find_target(name)
        self.network = stirred(alike(name))
        self.done: Transferred = transfer(self.target, self.network, NAMES, texts())
        self.images = random_images()
        self.padding = torch.zeros(2, SIDE, SIDE + 32, dtype=torch.bool)
        if name == "deformable_detr":  # the others look at no mask
            self.padding[1, :, 48:] = True
        mask = (~self.padding).long()
        with torch.no_grad():
            pixels = normalised(self.network, self.images)
            self.theirs: Any = self.done.model(pixel_values=pixels, pixel_mask=mask)
            self.their_maps = maps_of(self.done.model, pixels, mask)
            self.maps = self.network.backbone(self.images)
            self.memory: Memory = self.network.encoder(self.maps, self.padding)

    @property
    def model(self) -> Any:
        return self.done.model.model

    @property
    def their_memory(self) -> Tensor:
        """Their encoder's output, as one row of tokens behind the projection that precedes their decoder."""
        found = self.theirs.encoder_last_hidden_state
        if isinstance(found, Tensor):
            return found
        levels = [project(level) for project, level in zip(self.model.decoder_input_proj, found, strict=True)]
        return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)

    def decode(self, layer: int, content: Tensor, position: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """What both make of queries in one layer."""
        allowed = torch.ones(2, content.shape[1], content.shape[1], dtype=torch.bool)
        reference = boxes.unsqueeze(2).expand(-1, -1, len(self.memory.level_shapes), -1)
        shapes = list(self.memory.level_shapes)
        ours = self.network.decoder.layers[layer](content, position, reference, allowed, self.memory)
        placed = (
            "position_embeddings" if self.target.name in ("d_fine", "deimv2") else "object_queries_position_embeddings"
        )
        theirs = self.model.decoder.layers[layer](
            content,
            **{placed: position},
            reference_points=reference if self.target.name == "deformable_detr" else reference[:, :, :1],
            spatial_shapes=torch.tensor(shapes),
            spatial_shapes_list=shapes,
            level_start_index=None,
            encoder_hidden_states=self.memory.tokens,
            encoder_attention_mask=~self.memory.padding_mask if self.target.name == "deformable_detr" else None,
        )
        return ours, theirs


@pytest.fixture(scope="module", params=TARGETS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_backbone(case: Case) -> None:
    assert len(case.maps) == len(case.their_maps) == 3
    for ours, theirs in zip(case.maps, case.their_maps, strict=True):
        assert float(ours.std()) > 1e-2
        close(ours, theirs)


def test_encoder(case: Case) -> None:
    # their norms scale padded cells by what they find there; nothing reads them
    seen = ~case.memory.padding_mask
    assert float(case.memory.tokens.std()) > 1e-2
    close(case.memory.tokens[seen], case.their_memory[seen])


def test_proposals(case: Case) -> None:
    head = case.network.proposals
    with torch.no_grad():
        anchors, usable = anchor_logits(case.memory)
        features = head.features(case.memory, usable)
        boxes = head.box.change(features) + anchors
        scores = head.scores(features, name_tokens(case.network, texts()).expand(2, -1, -1))
    theirs = (
        case.theirs
        if case.target.name != "deformable_detr"
        else case.model(normalised(case.network, case.images), (~case.padding).long())
    )
    assert usable.any()
    close(boxes[usable], theirs.enc_outputs_coord_logits[usable])
    if case.target.name == "deformable_detr":
        # the first label's score chooses places whatever they hold
        close(scores[..., 1:][usable], theirs.enc_outputs_class[..., 1:][usable])
        close(scores.mean(-1)[usable], theirs.enc_outputs_class[..., 0][usable])
    else:
        close(scores[usable], theirs.enc_outputs_class[usable])


@pytest.mark.parametrize("name", TARGETS[1:])
@torch.no_grad()
def test_a_metr_that_queries_places_goes_out_whole(name: str) -> None:
    """Its own training, not an adoption, gave it weights: all its answers are the target's, and nothing is left out."""
    values = alike(name).model_dump()
    values["queries"] |= {"layout": "places", "content": "place_only"}
    values["similarity"] |= {"form": "classifier"}
    values["decoder"] |= {"predictors": "layer", "box_margin": 1e-5}
    network, images = stirred(DetectorConfig.model_validate(values)), random_images()
    done = transfer(find_target(name), network, NAMES, texts())
    assert done.report.notes == ()
    assert done.same_answers
    assert all(key.startswith(("category_extraction.", "denoising.")) for key in done.report.left_over)
    output = network(images, torch.zeros(2, SIDE, SIDE + 32, dtype=torch.bool), texts())
    theirs = done.model(pixel_values=normalised(network, images))
    logits = output.logits[-1].unflatten(1, (len(NAMES), -1)).transpose(1, 2)
    boxes = output.boxes[-1].unflatten(1, (len(NAMES), -1))[:, 0]
    assert float(logits.std()) > 1e-2
    assert float(boxes.std()) > 1e-2
    torch.testing.assert_close(logits, theirs.logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(boxes, theirs.pred_boxes, atol=1e-4, rtol=0)


def test_what_answers_only_nearly_the_same_does_not_claim_more() -> None:
    """Queries by name; and Deformable DETR of two stages, whose places go by one score, even of queries by place."""
    for name in TARGETS:
        assert not transfer(find_target(name), stirred(alike(name)), NAMES, texts()).same_answers
    values = alike("deformable_detr").model_dump()
    values["queries"] |= {"layout": "places", "content": "box_only"}
    values["similarity"] |= {"form": "classifier"}
    values["decoder"] |= {"positions": "first", "predictors": "layer", "box_margin": 1e-5}
    network = stirred(DetectorConfig.model_validate(values))
    done = transfer(find_target("deformable_detr"), network, NAMES, texts())
    assert not done.same_answers
    assert done.report.notes == (
        "places are chosen by one score, the mean of the labels'; METR's by that of the best name",
    )


@torch.no_grad()
def test_decoder_layers(case: Case) -> None:
    width = case.network.config.width
    content, position = torch.randn(2, 2, 7, width)
    boxes = torch.rand(2, 7, 4) * 0.6 + 0.2
    for layer in range(2):
        ours, theirs = case.decode(layer, content, position, boxes)
        close(ours, theirs)


@pytest.mark.parametrize("name", ["rt_detr", "rt_detr_v2"])
def test_the_whole_decoder(name: str) -> None:
    """From the same queries, every layer's output and refined boxes agree: positions follow the boxes in both."""
    case = Case(name)
    seen: list[Tensor] = []
    for layer in case.network.decoder.layers:
        layer.register_forward_hook(lambda *call: seen.append(call[2]))
    content, boxes = torch.randn(2, 7, case.network.config.width), torch.rand(2, 7, 4) * 0.4 + 0.3
    _run_decoder(case.network, case.memory, content, boxes)
    shapes = list(case.memory.level_shapes)
    with torch.no_grad():
        theirs = case.model.decoder(
            inputs_embeds=content,
            encoder_hidden_states=case.memory.tokens,
            reference_points=boxes.logit(),
            spatial_shapes=torch.tensor(shapes),
            spatial_shapes_list=shapes,
            level_start_index=None,
        )
    close(torch.stack(seen, dim=1), theirs.intermediate_hidden_states)


@torch.no_grad()
def _run_decoder(network: Detector, memory: Memory, content: Tensor, boxes: Tensor) -> None:
    from metr.structures import Queries

    zero = torch.zeros(2, content.shape[1], dtype=torch.int64)
    queries = Queries(content=content, reference_boxes=boxes, slot=zero, group=zero, valid=zero == 0)
    network.decoder(queries, memory)


def test_there_and_back(case: Case) -> None:
    """What the table moved comes back bit by bit."""
    table = case.target.table(case.done.model.config, case.network.config)
    back = giving_to_ours(case.done.model.state_dict(), table.rows(), {})
    ours = case.network.state_dict()
    report = case.done.report
    whole = [*report.copied, *(moved for moved in report.reshaped if moved.how == "stacked")]
    copied = {source for moved in whole for source in moved.source}
    assert set(back.state) == copied
    for key, tensor in back.state.items():
        assert torch.equal(tensor, ours[key]), key


def test_back_and_there(case: Case) -> None:
    """The same from their side: a detector of transformers through METR's names."""
    model = stir(build(case.target, case.network, NAMES, seed=5))
    state, table = model.state_dict(), case.target.table(case.done.model.config, case.network.config)
    ours = giving_to_ours(state, table.rows(), {})
    theirs = giving_to_theirs(ours.state, table.rows(), {})
    assert not theirs.left_over
    assert set(theirs.state) == set(state) - set(ours.left_over)
    for key, tensor in theirs.state.items():
        assert torch.equal(tensor, state[key]), key


def test_what_starts_afresh_has_no_counterpart(case: Case) -> None:
    known = {
        "deformable_detr": (),
        "rt_detr": (),
        "rt_detr_v2": ("encoder_attn.n_points_scale",),
        "d_fine": ("encoder_attn.num_points_scale",),
        "deimv2": ("encoder_attn.num_points_scale",),
    }
    report = case.done.report
    assert [key for key in report.afresh if not any(part in key for part in known[case.target.name])] == []
    parts = ("class_queries.", "denoising.", "category_extraction.", "decoder.norm.", "decoder.similarity.")
    for key in report.left_over:
        assert key.startswith(parts), key


def test_it_trains(case: Case) -> None:
    """Their own loss reaches what moved."""
    pixels = normalised(case.network, case.images)
    labels = [{"class_labels": torch.tensor([0, 2]), "boxes": torch.rand(2, 4) * 0.4 + 0.3} for _ in range(2)]
    model = case.done.model.train()
    try:
        loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
    finally:
        model.eval()
    assert bool(loss.isfinite())
    for part in ("encoder", "decoder"):
        gradients = [one.grad for one in getattr(case.model, part).parameters() if one.grad is not None]
        assert any(float(gradient.abs().max()) > 0 for gradient in gradients)
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
