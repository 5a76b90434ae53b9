import torch
from small_outputs import denoising_plan, random_denoising, random_output

from metr.losses.predictions import denoising_predictions, query_categories, query_predictions
from metr.structures import NO_OBJECT, Matches


def test_a_query_without_category_is_asked_nothing() -> None:
    # The second image has an empty slot, whose id is 0, and a query that claims to look for it.
    output = random_output([[1, 3], [2]], [[0, 1, 1], [0, 1, -1]], vocabulary=4)
    found = query_categories(output.slot, output.valid, output.categories)
    assert found.tolist() == [[1, 3, 3], [2, NO_OBJECT, NO_OBJECT]]


def test_denoising_queries_are_asked_what_the_plan_says() -> None:
    output = random_output([[1, 3], [2]], [[0], [0]], vocabulary=4)
    plan = denoising_plan([[(0, 2, True), (1, 2, False)], [(1, 0, True)]])
    predictions = denoising_predictions(random_denoising(plan, layers=3), output.categories)
    assert predictions.category.tolist() == [[1, 3], [NO_OBJECT, NO_OBJECT]]
    assert predictions.target.tolist() == [[[2, NO_OBJECT], [NO_OBJECT, NO_OBJECT]]] * 3


def test_matched_queries_get_their_objects_and_no_others() -> None:
    output = random_output([[1, 3], [2]], [[0, 1, 1], [0, 0, 0]], vocabulary=4, layers=1)
    predictions = query_predictions(output)
    assert not predictions.positive.any()
    layer, image, query, target = torch.tensor([[0, 0, 1, 2], [1, 1, 0, 0]]).T
    matches = Matches(layer=layer, image=image, query=query, target=target)
    found = predictions.matched(matches)
    assert found.target.tolist() == [[[-1, 2, -1], [-1, -1, -1]], [[-1, -1, -1], [0, -1, -1]]]
    assert torch.equal(found.logits, predictions.logits)
    assert torch.equal(found.logits[0], output.proposals.logits)
