from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_outputs import image_targets, random_boxes

from metr.losses.classification import (
    asymmetric_loss,
    focal_cost,
    focal_loss,
    matchability_loss,
    presence_losses,
    query_losses,
    supervised,
    varifocal_loss,
)
from metr.losses.config import CriterionConfig
from metr.losses.predictions import QueryPredictions
from metr.structures import Targets

LOGITS = torch.tensor([-30.0, -2.0, 0.0, 1.5, 30.0])
QUALITY = torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0])
YES, NO = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)


def log_probability() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p, log p, log(1 - p) in double precision."""
    x = LOGITS.double()
    return x.sigmoid(), -(-x).exp().log1p(), -x.exp().log1p()


def test_focal_loss_and_cost_follow_the_formula() -> None:
    p, log_p, log_rest = log_probability()
    yes, no = -0.25 * (1 - p) ** 2 * log_p, -0.75 * p**2 * log_rest
    torch.testing.assert_close(focal_loss(LOGITS, YES, 0.25, 2.0).double(), yes, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(focal_loss(LOGITS, NO, 0.25, 2.0).double(), no, atol=1e-6, rtol=1e-5)
    middle = slice(1, 4)  # beyond, the cost's logarithms are cut
    torch.testing.assert_close(focal_cost(LOGITS, 0.25, 2.0).double()[middle], (yes - no)[middle], atol=1e-6, rtol=1e-5)
    assert focal_cost(LOGITS, 0.25, 2.0).isfinite().all()


def test_varifocal_loss_follows_the_formula() -> None:
    p, log_p, log_rest = log_probability()
    q = QUALITY.double()
    yes, no = -q * (q * log_p + (1 - q) * log_rest), -0.75 * p**2 * log_rest
    torch.testing.assert_close(varifocal_loss(LOGITS, QUALITY, YES, 0.75, 2.0).double(), yes, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(varifocal_loss(LOGITS, QUALITY, NO, 0.75, 2.0).double(), no, atol=1e-6, rtol=1e-5)


def test_matchability_loss_follows_the_formula() -> None:
    p, log_p, log_rest = log_probability()
    q = QUALITY.double() ** 1.5
    yes, no = -(q * log_p + (1 - q) * log_rest), -(p**1.5) * log_rest
    torch.testing.assert_close(matchability_loss(LOGITS, QUALITY, YES, 1.5).double(), yes, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(matchability_loss(LOGITS, QUALITY, NO, 1.5).double(), no, atol=1e-6, rtol=1e-5)


def test_quality_is_what_the_logit_is_drawn_to() -> None:
    for loss in (
        lambda x, q: varifocal_loss(x, q, torch.tensor([True]), 0.75, 2.0),
        lambda x, q: matchability_loss(x, q ** (1 / 1.5), torch.tensor([True]), 1.5),
    ):
        logit = torch.tensor([0.7]).logit().requires_grad_()
        loss(logit, torch.tensor([0.7])).sum().backward()
        assert logit.grad is not None
        assert logit.grad.abs().item() < 1e-6


@pytest.mark.parametrize("kind", ["varifocal", "matchability"])
def test_weights_carry_no_gradient(kind: str) -> None:
    logit = torch.tensor([0.4], requires_grad=True)
    no, gamma = torch.tensor([False]), 2.0
    loss = (
        varifocal_loss(logit, torch.ones(1), no, 1.0, gamma)
        if kind == "varifocal"
        else matchability_loss(logit, torch.ones(1), no, gamma)
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logit)
    torch.testing.assert_close(gradient, torch.tensor([0.4]).sigmoid() ** 3)


def test_golden_asymmetric_loss(shared: Path) -> None:
    golden = load_file(shared / "golden" / "official_forward.safetensors")
    targets = image_targets(golden["input/present_categories"].nonzero().flatten().tolist(), 12)
    loss = presence_losses(golden["output/cem_logits"][None], targets, CriterionConfig())
    torch.testing.assert_close(loss, golden["output/loss_asl"].reshape(1), atol=1e-5, rtol=1e-6)


def test_asymmetric_loss_is_cut_and_its_focus_carries_no_gradient() -> None:
    logits = torch.tensor([-40.0, 40.0, 0.3, 0.3], requires_grad=True)
    loss = asymmetric_loss(logits, torch.tensor([True, False, True, False]), 0.0, 2.0)
    p = torch.tensor(0.3).sigmoid()
    expected = torch.stack([-torch.tensor(1e-5).log(), -torch.tensor(1e-5).log(), -p.log(), -(p**2) * (1 - p).log()])
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.stack([p * 0, p * 0, p - 1, p**3]))


def test_presence_is_asked_of_annotated_categories_and_of_those_in_the_image() -> None:
    crowd = (0.5, 0.5, 1.0, 1.0)
    targets = Targets.stack(
        [
            image_targets([0], 5, annotated=[0, 1]),
            image_targets([3], 5, annotated=[1, 2], ignore=[(1, crowd)]),
        ]
    )
    logits = torch.randn(3, 2, 5)
    logits[:, 0, 2:] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    logits.requires_grad_()
    losses = presence_losses(logits, targets, CriterionConfig())
    expected = torch.zeros(3)
    for image, category, present in [(0, 0, True), (0, 1, False), (1, 2, False), (1, 3, True)]:
        p = logits[:, image, category].detach().sigmoid()
        expected += -p.log() if present else -(p**2) * (1 - p).log()
    torch.testing.assert_close(losses, expected / 2)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    asked = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
    assert torch.equal(gradient != 0, asked.expand(3, 2, 5))


def predictions_for(boxes: torch.Tensor, category: list[int], target: list[int]) -> QueryPredictions:
    """One layer, one image."""
    logits = torch.randn(1, 1, len(category))
    return QueryPredictions(
        logits=logits, boxes=boxes[None, None], category=torch.tensor([category]), target=torch.tensor([[target]])
    )


def test_no_is_known_only_of_annotated_categories() -> None:
    targets = image_targets([2], 4, annotated=[0, 1])
    predictions = predictions_for(random_boxes(5), [0, 1, 2, 2, -1], [-1, -1, -1, 0, -1])
    # Annotated, annotated, unannotated, an object of a category that is not annotated exhaustively, asked for nothing.
    assert supervised(predictions, targets, 0.5).flatten().tolist() == [True, True, False, True, False]


def test_boxes_inside_ignored_ones_of_their_category_are_not_mistakes() -> None:
    targets = Targets.stack([image_targets([0], 2, ignore=[(0, (0.5, 0.5, 0.4, 0.4))]), image_targets([], 2)])
    half_inside, less = [0.3, 0.5, 0.2, 0.2], [0.29, 0.5, 0.2, 0.2]
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], half_inside, less])
    predictions = QueryPredictions(
        logits=torch.zeros(3, 2, 5),
        boxes=boxes.expand(3, 2, 5, 4),
        category=torch.tensor([[0, 0, 1, 0, 0]]).expand(2, 5),
        target=torch.tensor([-1, 0, -1, -1, -1]).expand(3, 2, 5),
    )
    # Inside; inside but matched; inside, of another category; just half; less.
    expected = torch.tensor([[False, True, True, False, True], [True] * 5])
    assert torch.equal(supervised(predictions, targets, 0.5 - 1e-6), expected.expand(3, 2, 5))


@pytest.mark.parametrize("kind", ["focal", "quality", "matchability"])
def test_what_is_not_asked_may_be_infinite_and_has_no_gradient(kind: str) -> None:
    targets = image_targets([0], 2, annotated=[0])
    boxes = random_boxes(4)
    predictions = predictions_for(boxes, [0, 0, 1, -1], [0, -1, -1, -1])
    logits = torch.tensor([[[0.1, 0.2, float("inf"), float("nan")]]], requires_grad=True)
    predictions = QueryPredictions(
        logits=logits, boxes=predictions.boxes, category=predictions.category, target=predictions.target
    )
    loss = query_losses(predictions, torch.full((1, 1, 4), 0.6), targets, CriterionConfig(classification=kind))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert (gradient[..., :2] != 0).all()
    assert gradient[..., 2:].tolist() == [[[0.0, 0.0]]]
