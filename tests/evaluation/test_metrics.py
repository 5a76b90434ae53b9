import pytest
import torch
from played import annotations, detections, record

from metr.evaluation.results import (
    NO_DOMAIN,
    PresenceRecall,
    count_best_names,
    cross_dataset_confusion,
    presence_recall,
)

NAMES = ("RBC", "king", "bear", "eel", "cup")
BOX = (0.0, 0.0, 9.0, 9.0)


def test_equals_counting_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 5.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
    present = torch.tensor([[True, False, False, True], [False, False, False, True], [False, False, False, False]])
    # ranks of the present ones: 0 and 3; 2 (equal logits keep their order); none
    result = presence_recall(logits, present, (1, 2, 3, 4, 9))
    assert result.pairs == 3
    assert result.hits == {1: 1, 2: 1, 3: 2, 4: 3, 9: 3}
    assert result.shares == pytest.approx({1: 100 / 3, 2: 100 / 3, 3: 200 / 3, 4: 100, 9: 100})


def test_batches_add_up() -> None:
    logits, present = torch.randn(10, 30), torch.rand(10, 30) > 0.8
    parts = [presence_recall(logits[i : i + 3], present[i : i + 3]) for i in range(0, 10, 3)]
    assert sum(parts, PresenceRecall()) == presence_recall(logits, present)


def test_nothing_present_has_no_recall() -> None:
    result = presence_recall(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), (1,))
    assert result.shares == {1: None}


def test_what_was_not_shortlisted_is_kept_by_no_number() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0, -torch.inf]])
    result = presence_recall(logits, torch.tensor([[True, True, False, False]]), (1, 2, 3, 4))
    assert result.hits == {1: 0, 2: 1, 3: 1, 4: 1}
    assert result.pairs == 2


def test_as_many_detections_count_as_there_are_objects() -> None:
    held = annotations(
        "blood",
        ("RBC",),
        record(1, [(0, BOX), (0, BOX), (0, BOX)], crowds=[2]),
        record(2, []),
        record(3, [(0, BOX), (0, BOX)]),
        record(4, [(0, BOX)]),
    )
    found = {
        1: detections(NAMES, ("RBC", 0.3, BOX), ("king", 0.9, BOX), ("eel", 0.2, BOX)),
        2: detections(NAMES, ("bear", 0.9, BOX)),
        3: detections(NAMES, ("RBC", 0.9, BOX)),
    }
    assert count_best_names(held, found) == {"king": 1, "RBC": 2}


CATEGORIES = {"bccd": ("RBC",), "cards": ("king",), "wild": ("bear",), "sea": ("eel",), "coco": ("bear", "cup", "king")}
FIELDS = {"wild": "photographs", "sea": "photographs", "coco": "photographs"}


def test_names_of_another_domain_are_confused_and_shared_ones_are_not() -> None:
    named = {
        "bccd": {"RBC": 6, "king": 2},
        "wild": {"bear": 3, "eel": 1, "cup": 1, "RBC": 5},
        "cards": {"king": 4},
    }
    result = cross_dataset_confusion(named, CATEGORIES, FIELDS)
    assert result.domains == ("bccd", "photographs", "cards")
    # "king" names cards and photographs: half a count each in a blood smear, a whole one among the cards
    assert result.counts == ((6.0, 1.0, 1.0), (5.0, 5.0, 0.0), (0.0, 0.0, 4.0))
    assert result.shares == pytest.approx({"bccd": 25.0, "wild": 50.0, "cards": 0.0})


def test_without_groups_each_dataset_is_a_domain() -> None:
    result = cross_dataset_confusion({"wild": {"bear": 3, "eel": 1}}, CATEGORIES)
    assert result.shares == {"wild": 25.0}
    assert set(result.domains) == set(CATEGORIES)


def test_names_of_no_dataset_are_foreign_everywhere() -> None:
    result = cross_dataset_confusion({"bccd": {"RBC": 1, "unicorn": 1}}, CATEGORIES, FIELDS)
    assert result.domains[-1] == NO_DOMAIN
    assert result.counts[0][-1] == 1
    assert result.shares == {"bccd": 50.0}


def test_nothing_detected_has_no_share() -> None:
    result = cross_dataset_confusion({"bccd": {}}, CATEGORIES, FIELDS)
    assert result.shares == {"bccd": None}
