import pytest
import torch
from small_outputs import image_targets, random_boxes

from metr.boxes import cxcywh_to_xyxy, paired_giou, paired_iou
from metr.losses.box import box_losses
from metr.losses.padded_targets import PaddedTargets, QueryPredictions


def test_compares_each_positive_with_its_object() -> None:
    targets = [image_targets([0, 0, 1], 2), image_targets([1], 2)]
    target = torch.tensor([[[2, -1, 0], [-1, -1, 0]], [[-1, 1, -1], [0, -1, -1]]])
    boxes = random_boxes(2, 2, 3)
    answers = QueryPredictions(
        logits=torch.zeros(2, 2, 3), boxes=boxes, category=torch.zeros(2, 3).long(), target=target
    )
    losses = box_losses(answers, PaddedTargets.of(targets))
    l1, giou = torch.zeros(2), torch.zeros(2)
    for r, b, q in (target >= 0).nonzero().tolist():
        wanted = targets[b].boxes[target[r, b, q]]
        l1[r] += (boxes[r, b, q] - wanted).abs().sum()
        giou[r] += 1 - paired_giou(cxcywh_to_xyxy(boxes[r, b, q]), cxcywh_to_xyxy(wanted))
        torch.testing.assert_close(
            losses.iou[r, b, q], paired_iou(cxcywh_to_xyxy(boxes[r, b, q]), cxcywh_to_xyxy(wanted))
        )
    torch.testing.assert_close(losses.l1, l1)
    torch.testing.assert_close(losses.giou, giou)


@pytest.mark.parametrize("anything", [float("nan"), float("inf"), 0.0, -1e30])
def test_boxes_without_an_object_may_be_anything_and_have_no_gradient(anything: float) -> None:
    boxes = random_boxes(1, 1, 3)
    boxes[0, 0, 1] = anything
    boxes.requires_grad_()
    target = torch.tensor([[[0, -1, -1]]])
    answers = QueryPredictions(
        logits=torch.zeros(1, 1, 3), boxes=boxes, category=torch.zeros(1, 3).long(), target=target
    )
    losses = box_losses(answers, PaddedTargets.of([image_targets([0], 1)]))
    (gradient,) = torch.autograd.grad((losses.l1 + losses.giou).sum(), boxes)
    assert gradient[0, 0, 1:].tolist() == [[0.0] * 4] * 2
    assert gradient[0, 0, 0].abs().sum() > 0
    assert losses.iou.isfinite().all()
    assert not losses.iou.requires_grad
