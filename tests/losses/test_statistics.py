from dataclasses import replace

import torch
from small_outputs import image_targets, random_output

from metr.boxes import cxcywh_to_xyxy, paired_iou
from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.losses.statistics import match_statistics


def test_counts_what_was_left_over_and_how_well_the_rest_fits() -> None:
    output = random_output([[0, 1], [1, 2]], [[0, 0, 1], [1]], vocabulary=4, layers=3)
    # First image: category 1 has one query for two objects, 3 is not kept. Second: 0 is not kept; one row of padding.
    targets = [image_targets([0, 1, 1, 3], 4), image_targets([2, 0, 0], 4)]
    matches = SetCriterion(CriterionConfig()).match(output, targets)
    found = match_statistics(output, targets, matches)
    assert (int(found.objects), int(found.without_slot), int(found.crowded_out)) == (7, 3, 1)
    last = matches.layer == 3
    ious = [
        paired_iou(cxcywh_to_xyxy(output.boxes[-1, b, q].detach()), cxcywh_to_xyxy(targets[b].boxes[m]))
        for b, q, m in zip(matches.image[last], matches.query[last], matches.target[last], strict=True)
    ]
    assert len(ious) == 3
    torch.testing.assert_close(found.iou, torch.stack(ious).mean())
    assert not found.iou.requires_grad


def test_the_fit_is_that_of_the_last_layer() -> None:
    output, targets = random_output([[0]], [[0, 0]], vocabulary=1), [image_targets([0], 1)]
    exact, far = targets[0].boxes[0], torch.tensor([0.95, 0.95, 0.01, 0.01])
    boxes = torch.stack([torch.stack([exact, far]), torch.stack([far, exact])]).unsqueeze(1)
    output = replace(output, logits=torch.zeros(2, 1, 2), boxes=boxes)
    found = match_statistics(output, targets, SetCriterion(CriterionConfig()).match(output, targets))
    torch.testing.assert_close(found.iou, torch.tensor(1.0))


def test_an_empty_batch_has_figures_too() -> None:
    output, targets = random_output([[0]], [[0]], vocabulary=1), [image_targets([], 1)]
    found = match_statistics(output, targets, SetCriterion(CriterionConfig()).match(output, targets))
    assert [int(figure) for figure in (found.objects, found.without_slot, found.crowded_out)] == [0, 0, 0]
    assert float(found.iou) == 0
