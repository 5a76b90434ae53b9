import pytest
import torch

from metr.evaluation.metrics import PresenceRecall, presence_recall


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
