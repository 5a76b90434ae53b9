"""A detector that METR has become is taught METR's answers."""

import math
import re
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion_cases import alike, stir
from torch import Tensor

from metr.boxes import cxcywh_to_xyxy, pairwise_iou
from metr.conversion import distillation
from metr.conversion.distillation import lesson_loss
from metr.conversion.transfer import to_detector
from metr.conversion.transfer import transfer as transfer_folder
from metr.evaluation.runner import evaluate
from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.model import METR
from metr.models.detector import Detector
from metr.structures import Categories, DetectorOutput, Targets

from tiny import TinyRun, tiny_run

__all__ = ["tiny_run"]

NANO = Path(__file__).resolve().parents[2] / "checkpoints" / "metr-nano"
NAMES = ("fish", "frog")


def photos(number: int = 3) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (60, 60, 3), dtype=np.uint8) for _ in range(number)]


def answers(logits: Tensor, boxes: Tensor) -> DetectorOutput:
    """Of one layer, for two names of which each has the first or second half of the queries."""
    images, number = logits.shape[1:]
    categories = Categories(
        presence_logits=torch.zeros(1, images, 2),
        text=torch.zeros(2, 4),
        tokens=torch.zeros(images, 2, 4),
        ids=torch.arange(2).expand(images, 2),
        valid=torch.ones(images, 2, dtype=torch.bool),
        embeddings=torch.zeros(2, 4),
    )
    slot = torch.arange(2).repeat_interleave(number // 2).expand(images, number)
    valid = torch.ones(images, number, dtype=torch.bool)
    return DetectorOutput(logits=logits, boxes=boxes, slot=slot, valid=valid, categories=categories, proposals=None)


def objects(boxes: Tensor, labels: list[int]) -> Targets:
    every = torch.ones(1, 2, dtype=torch.bool)
    nothing, none = torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.long)
    return Targets(
        boxes=boxes.unsqueeze(0),
        labels=torch.tensor([labels], dtype=torch.long),
        ignore_boxes=nothing,
        ignore_labels=none,
        annotated=every,
        assumed_negative=~every,
    )


def giou(a: Tensor, b: Tensor) -> float:
    a, b = cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)
    hull = (torch.maximum(a, b)[2:] - torch.minimum(a, b)[:2]).prod()
    iou = pairwise_iou(a[None], b[None])[0, 0]
    union = ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) / (1 + iou)
    return float(iou - (hull - union) / hull)


def test_the_loss_is_that_of_a_loop() -> None:
    """Every query alone, and of all ways to match the best."""
    torch.manual_seed(0)
    logits, boxes = torch.randn(1, 1, 6), torch.rand(1, 1, 6, 4) * 0.4 + 0.2
    wanted, labels, scores = torch.rand(3, 4) * 0.4 + 0.2, [0, 0, 1], torch.tensor([[0.9, 0.3, 0.6]])
    criterion = SetCriterion(CriterionConfig())
    costs, weights = criterion.config.costs, criterion.config.weights
    alpha, gamma = criterion.config.focal_alpha, criterion.config.focal_gamma

    def cost(query: int, row: int) -> float:
        p, off = float(logits[0, 0, query].sigmoid()), boxes[0, 0, query] - wanted[row]
        yes, no = -alpha * (1 - p) ** gamma * math.log(p), -(1 - alpha) * p**gamma * math.log(1 - p)
        near = float(off.abs().sum()) * costs.l1 - giou(boxes[0, 0, query], wanted[row]) * costs.giou
        return costs.classification * (yes - no) + near

    best = min(permutations(range(3), 2), key=lambda some: cost(some[0], 0) + cost(some[1], 1))
    single = min(range(3, 6), key=lambda query: cost(query, 2))
    matched = {best[0]: 0, best[1]: 1, single: 2}
    expected = 0.0
    for query in range(6):
        p, score = float(logits[0, 0, query].sigmoid()), 0.0
        if query in matched:
            row = matched[query]
            score = float(scores[0, row])
            off = boxes[0, 0, query] - wanted[row]
            expected += score * weights.l1 * float(off.abs().sum())
            expected += score * weights.giou * (1 - giou(boxes[0, 0, query], wanted[row]))
        entropy = -score * math.log(p) - (1 - score) * math.log(1 - p)
        expected += weights.classification * (p - score) ** 2 * entropy
    found = lesson_loss(answers(logits, boxes), objects(wanted, labels), scores, criterion)
    assert float(found) == pytest.approx(expected / float(scores.sum()), rel=1e-4)


def test_images_in_which_nothing_is_found() -> None:
    logits = torch.randn(1, 1, 4, requires_grad=True)
    nothing = objects(torch.zeros(0, 4), [])
    found = lesson_loss(
        answers(logits, torch.rand(1, 1, 4, 4)), nothing, torch.zeros(1, 0), SetCriterion(CriterionConfig())
    )
    found.backward()
    assert logits.grad is not None
    assert (logits.grad > 0).all(), "all are taught to say no"


@pytest.fixture
def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a network of random weights finds is enough to teach it."""
    monkeypatch.setattr(distillation, "_SURE", 0.0)
    monkeypatch.setattr(distillation, "_LEAST_SCORE", 0.0)


def by_name(target: str, tiny_run: TinyRun) -> METR:
    """A METR of random weights whose queries contain their place, their name and their rank."""
    config = alike(target)
    config = config.model_copy(update={"queries": config.queries.model_copy(update={"content": "place"})})
    made = METR.from_pretrained(tiny_run.folder, device="cpu")
    torch.manual_seed(0)
    network = stir(Detector(config, made.network.text_width)).eval()
    return METR(network, replace(made.checkpoint, model=config))


@pytest.mark.usefixtures("sure")
@pytest.mark.parametrize("target", ["rt_detr", "rt_detr_v2", "d_fine", "deimv2"])
def test_all_but_backbone_and_encoder_learns(target: str, tiny_run: TinyRun) -> None:
    model = by_name(target, tiny_run)
    own = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
    fitted = to_detector(model, target, NAMES, images=photos(), steps=0)
    taught = to_detector(model, target, NAMES, images=photos(), steps=8)
    again = to_detector(model, target, NAMES, images=photos(), steps=8)
    before, after = fitted.model.state_dict(), taught.model.state_dict()
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    learned = {key for key in changed if not torch.allclose(after[key], before[key], atol=1e-5)}
    assert any(key.startswith("model.decoder.layers.") for key in learned)
    assert not any(
        "backbone" in key or key.startswith(("model.encoder.", "model.encoder_input_proj")) for key in learned
    )
    assert all(torch.equal(tensor, after[key]) for key, tensor in again.model.state_dict().items())
    assert all(torch.equal(tensor, own[key]) for key, tensor in model.network.state_dict().items()), "METR stays"
    assert {parameter.requires_grad for parameter in model.network.parameters()} == {True}
    report = taught.report
    assert sum(report.counts[kind] for kind in ("copied", "reshaped", "afresh")) == sum(
        fitted.report.counts[kind] for kind in ("copied", "reshaped", "afresh")
    )
    said = {moved.key for moved in report.reshaped if moved.how == "taught on 3 images"}
    # a tensor under several names is one
    assert {after[key].data_ptr() for key in said} == {after[key].data_ptr() for key in learned}
    assert report.to_dict()["taught in steps"] == 8
    assert report.fitted_to == 3


def test_names_that_metr_does_not_see_are_not_unlearned(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of such a name the images would teach that it is nowhere: only what all names share of a class head moves."""
    model = METR.from_pretrained(tiny_run.folder, device="cpu")
    monkeypatch.setattr(distillation, "_LEAST_SCORE", 0.0)
    monkeypatch.setattr(distillation, "_seen", lambda *_: torch.tensor([True, False]))
    fitted = to_detector(model, "rt_detr", NAMES, images=photos(), steps=0).model.state_dict()
    done = to_detector(model, "rt_detr", NAMES, images=photos(), steps=8)
    assert 'METR is sure of no "frog"' in " ".join(done.report.notes)
    key = "model.decoder.class_embed.0.bias"
    seen, unseen = (done.model.state_dict()[key] - fitted[key]).abs().tolist()
    assert unseen == pytest.approx(seen / 2, rel=0.01), "the other half is the name's own"


def test_images_that_show_nothing_teach_nothing(tiny_run: TinyRun) -> None:
    model = by_name("rt_detr", tiny_run)
    done = to_detector(model, "rt_detr", NAMES, images=photos(), steps=8)
    assert done.report.start == "METR is sure of none of these names in the images, so they teach nothing"
    assert (done.report.taught, done.report.fitted_to) == (0, 0)


@pytest.mark.usefixtures("sure")
def test_answers_come_nearer(tiny_run: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    """The loss of a hundred steps, which is told twice."""
    with caplog.at_level("INFO", logger="metr.conversion.distillation"):
        to_detector(METR.from_pretrained(tiny_run.folder, device="cpu"), "rt_detr", NAMES, images=photos(), steps=100)
    told = re.findall(r"step (\d+)/100, loss ([0-9.]+), 0:00:\d\d left", caplog.text)
    assert [step for step, _ in told] == ["50", "100"]
    first, second = (float(loss) for _, loss in told)
    assert second < first


@pytest.mark.slow
def test_nine_tenths_of_what_the_shipped_metr_finds(shared: Path, tmp_path: Path) -> None:
    data = str(shared / "data" / "bccd")
    own = evaluate(METR.from_pretrained(NANO, device="cpu"), data, device="cpu").datasets[0].own.coco.ap
    transfer_folder(METR.from_pretrained(NANO, device="cpu"), "rt_detr", tmp_path / "taught", names=data)
    found = (
        evaluate(METR.from_pretrained(tmp_path / "taught", device="cpu"), data, device="cpu").datasets[0].own.coco.ap
    )
    assert found > 0.9 * own, (found, own)
