from dataclasses import replace

import torch
from small_outputs import denoising_plan, image_targets, random_denoising, random_output

from metr.losses.padded_targets import NO_OBJECT, PaddedTargets, denoising_predictions, query_categories


def test_padding_keeps_every_object_in_its_place() -> None:
    crowd = (0.5, 0.5, 0.2, 0.2)
    targets = [image_targets([2, 0, 2], 4, annotated=[0]), image_targets([], 4, ignore=[(3, crowd)])]
    truth = PaddedTargets.of(targets)
    assert truth.labels.tolist() == [[2, 0, 2], [NO_OBJECT] * 3]
    assert torch.equal(truth.boxes[0], targets[0].boxes)
    assert truth.ignore_labels.tolist() == [[NO_OBJECT], [3]]
    assert truth.ignore_boxes[1].tolist() == torch.tensor([crowd]).tolist()
    assert truth.annotated.tolist() == [[True, False, False, False], [True] * 4]
    assert truth.present.tolist() == [[True, False, True, False], [False] * 4]
    assert truth.absent.tolist() == [[False] * 4, [True, True, True, False]]
    assert int(truth.objects) == 3


def test_what_is_presumed_absent_is_absent_unless_something_of_it_is_there() -> None:
    crowd = (0.5, 0.5, 0.2, 0.2)
    target = image_targets([2], 5, annotated=[0], ignore=[(3, crowd)])
    truth = PaddedTargets.of([replace(target, assumed_negative=torch.tensor([False, True, True, True, False]))])
    assert truth.absent.tolist() == [[True, True, False, False, False]]
    assert truth.annotated.tolist() == [[True, False, False, False, False]]


def test_a_query_without_category_is_asked_nothing() -> None:
    # The second image has an empty slot, whose id is 0, and a query that image_conflicts to look for it.
    output = random_output([[1, 3], [2]], [[0, 1, 1], [0, 1, -1]], vocabulary=4)
    found = query_categories(output.slot, output.valid, output.categories)
    assert found.tolist() == [[1, 3, 3], [2, NO_OBJECT, NO_OBJECT]]


def test_denoising_queries_are_asked_what_the_plan_says() -> None:
    output = random_output([[1, 3], [2]], [[0], [0]], vocabulary=4)
    plan = denoising_plan([[(0, 2, True), (1, 2, False)], [(1, 0, True)]])
    answers = denoising_predictions(random_denoising(plan, layers=3), output.categories)
    assert answers.category.tolist() == [[1, 3], [NO_OBJECT, NO_OBJECT]]
    assert answers.target.tolist() == [[[2, NO_OBJECT], [NO_OBJECT, NO_OBJECT]]] * 3
