"""Which categories get slots, against the same written as a sort."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metr.models.category_selection import select_categories
from metr.models.config import CategoryConfig, DetectorConfig
from metr.structures import Categories, NameLimits, Targets

from small import targets_of


def categories_of(logits: Tensor) -> Categories:
    """Categories whose last presence logits [b v] are these; the block before says the opposite."""
    batch, words = logits.shape
    return Categories(
        presence_logits=torch.stack([-logits, logits]),
        text=torch.randn(words, 4),
        tokens=torch.randn(batch, words, 4),
        ids=torch.arange(words).expand(batch, -1),
        valid=torch.ones(batch, words, dtype=torch.bool),
    )


def target(labels: Sequence[int], words: int, annotated: Sequence[int] | None = None) -> Targets:
    return targets_of([[0.5, 0.5, 0.1, 0.1]] * len(labels), labels, words=words, annotated=annotated)


def selected(
    categories: Categories, kept: int, images: Sequence[Targets] | None = None, **changes: float
) -> Categories:
    targets = None if images is None else Targets.stack(images)
    return select_categories(categories, _keeping(kept=kept, **changes), targets)


def _keeping(**options: Any) -> DetectorConfig:
    return DetectorConfig(categories=CategoryConfig(**options))


def kept_ids(categories: Categories) -> list[list[int]]:
    """The ids in valid slots; empty slots come last and hold 0."""
    rows = []
    for ids, valid in zip(categories.ids, categories.valid, strict=True):
        count = int(valid.sum())
        assert valid[:count].all()
        assert not ids[count:].any()
        rows.append(ids[:count].tolist())
    return rows


def brute_force(logits: Tensor, kept: int, image: Targets | None) -> list[int]:
    """Sorted by "is present", then by logit, only what is annotated or present; then in ascending order."""
    words = range(len(logits))
    present = set() if image is None else set(image.labels[0].tolist())
    allowed = [v for v in words if image is None or image.annotated[0, v] or v in present]
    return sorted(sorted(allowed, key=lambda v: (v not in present, -logits[v].item()))[:kept])


@pytest.mark.parametrize("words", [1, 3, 8, 30])
@pytest.mark.parametrize("kept", [1, 4, 8])
def test_equals_brute_force(words: int, kept: int) -> None:
    for _ in range(10):
        logits = 4 * torch.randn(5, words)
        images = []
        for _ in range(5):
            labels = torch.randint(words, (int(torch.randint(0, 6, ())),)).tolist()
            annotated = (torch.rand(words) > 0.4).nonzero().flatten().tolist()
            images.append(target(labels, words, annotated))
        trained = selected(categories_of(logits), kept, images)
        assert trained.ids.shape == (5, min(kept, words))
        assert kept_ids(trained) == [brute_force(row, kept, image) for row, image in zip(logits, images, strict=True)]
        free = selected(categories_of(logits), kept)
        assert kept_ids(free) == [brute_force(row, kept, None) for row in logits]


def test_present_categories_come_first_however_unlikely() -> None:
    logits = torch.tensor([[9.0, 8.0, -1000.0, 7.0, -50.0]])
    assert kept_ids(selected(categories_of(logits), 3, [target([2, 4], 5)])) == [[0, 2, 4]]


def test_more_present_than_slots_keeps_the_likeliest_of_them() -> None:
    logits = torch.tensor([[9.0, 1.0, 3.0, 2.0, 8.0]])
    assert kept_ids(selected(categories_of(logits), 2, [target([1, 2, 3], 5)])) == [[2, 3]]


def test_unannotated_categories_never_take_a_slot_in_training() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 6.0]])
    assert kept_ids(selected(categories_of(logits), 3, [target([], 4, annotated=[3])])) == [[3]]
    assert kept_ids(selected(categories_of(logits), 3, [target([], 4, annotated=[])])) == [[]]
    # an object is present even where its category is not annotated everywhere
    assert kept_ids(selected(categories_of(logits), 3, [target([2], 4, annotated=[3])])) == [[2, 3]]


def test_at_most_so_many_assumed_negatives_take_a_slot() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0]])
    image = replace(
        target([2], 5, annotated=[2, 4]), assumed_negative=torch.tensor([[True, True, False, False, False]])
    )
    for slots, expected in ((0, [2, 4]), (1, [0, 2, 4]), (2, [0, 1, 2, 4]), (9, [0, 1, 2, 4])):
        assert kept_ids(selected(categories_of(logits), 5, [image], negative_slots=slots)) == [expected]
    # what nothing is assumed of stays out
    assert kept_ids(selected(categories_of(logits), 5, [target([2], 5, annotated=[4])], negative_slots=5)) == [[2, 4]]


def test_categories_below_the_threshold_take_no_slot_when_detecting() -> None:
    logits = torch.tensor([[0.3, -0.2, 0.1, -5.0], [-4.0, -3.0, -2.0, -1.0]])
    assert kept_ids(selected(categories_of(logits), 3, threshold=0.5)) == [[0, 2], []]
    images = [target([3], 4), target([], 4)]
    assert kept_ids(selected(categories_of(logits), 2, images, threshold=0.5)) == [[0, 3], [2, 3]]


def test_equal_logits_give_the_same_categories_alone_and_in_a_batch() -> None:
    logits = torch.zeros(3, 50)
    logits[1] = torch.randint(0, 2, (50,)).float()
    together = selected(categories_of(logits), 7)
    for image in range(3):
        alone = selected(categories_of(logits[image : image + 1]), 7)
        assert torch.equal(alone.ids[0], together.ids[image])
        assert len(set(together.ids[image].tolist())) == 7
    assert logits[1, together.ids[1]].all()


def test_what_was_extracted_stays_as_it_is() -> None:
    before = categories_of(torch.randn(2, 6))
    after = selected(before, 3)
    assert after.presence_logits is before.presence_logits
    assert after.tokens is before.tokens
    assert after.text is before.text


def test_logits_that_are_not_numbers_keep_nothing_and_break_nothing() -> None:
    logits = torch.full((1, 5), torch.nan)
    assert kept_ids(selected(categories_of(logits), 3, [target([2], 5)])) == [[]]


def test_each_name_has_a_least_presence_of_its_own() -> None:
    logits = torch.tensor([[0.0, 2.0, -3.0, -3.0]])
    limits = NameLimits(presence=torch.tensor([0.6, 0.6, 0.0, 0.1]), queries=torch.tensor([9, 9, 9, 9]))
    chosen = select_categories(categories_of(logits), _keeping(kept=4, threshold=0.9), None, limits)
    assert kept_ids(chosen) == [[1, 2]]
