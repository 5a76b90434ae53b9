"""Tracks: the same number for the same object, and no more memory for more frames."""

import numpy as np
import pytest
import torch

from metr.inference.tracking import Tracker
from metr.structures import Detections


def frame(boxes: list[tuple[float, float, float, float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(
        boxes=torch.tensor([list(box) for box in boxes]).reshape(-1, 4),
        scores=torch.tensor(scores),
        labels=torch.tensor(labels, dtype=torch.int64),
        names=("cell", "leaf"),
    )


def square(x: float, y: float, side: float = 20) -> tuple[float, float, float, float]:
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2


def numbers(tracker: Tracker, boxes: list, scores: list[float] | None = None, labels: list[int] | None = None) -> list:
    scores = [0.9] * len(boxes) if scores is None else scores
    found = frame(boxes, scores, labels or [0] * len(boxes))
    return tracker.update(found, found.scores.numpy() > 0.5)


def test_objects_that_move_and_cross_keep_their_numbers() -> None:
    tracker, chance, seen = Tracker(25.0), np.random.default_rng(0), []
    for step in range(60):
        noise = chance.normal(0, 0.5, 4)
        # two pass each other in opposite directions, 12 pixels apart; one stands still, one is of another name
        boxes = [
            square(10 + 3 * step + noise[0], 50),
            square(190 - 3 * step + noise[1], 62),
            square(100 + noise[2], 150),
            square(100 + noise[3], 150),
        ]
        order = chance.permutation(4).tolist()
        given = numbers(tracker, [boxes[row] for row in order], labels=[int(row == 3) for row in order])
        seen.append([given[order.index(row)] for row in range(4)])
    assert {*seen[0]} == {1, 2, 3, 4}
    assert all(one == seen[0] for one in seen)


def test_an_object_that_is_hidden_for_a_while_keeps_its_number() -> None:
    tracker = Tracker(25.0)
    for step in range(40):
        hidden = 15 <= step < 25
        given = numbers(tracker, [] if hidden else [square(10 + 4 * step, 50, 40)])
        assert given == ([] if hidden else [1])
    for _ in range(40):  # longer than a second
        assert numbers(tracker, []) == []
    assert numbers(tracker, [square(170, 50, 40)]) == [None]
    assert numbers(tracker, [square(170, 50, 40)]) == [2]


def test_weak_detections_continue_tracks_and_begin_none() -> None:
    tracker = Tracker(25.0)
    assert numbers(tracker, [square(50, 50)]) == [1]
    for _ in range(10):
        assert numbers(tracker, [square(50, 50), square(150, 50)], [0.2, 0.2]) == [1, None]
    assert numbers(tracker, [square(50, 50)], [0.05]) == [None]  # too weak


def test_what_is_seen_in_one_frame_alone_gets_no_number() -> None:
    tracker = Tracker(25.0)
    assert numbers(tracker, [square(50, 50)]) == [1]
    for step in range(20):
        assert numbers(tracker, [square(50, 50), square(100 + 200 * (step % 3), 150)]) == [1, None]
    assert numbers(tracker, [square(50, 50), square(900, 900)]) == [1, None]
    assert numbers(tracker, [square(50, 50), square(901, 900)]) == [1, 2]


@pytest.mark.parametrize("boxes", [[], [square(0, 0, 0)], [square(0, 0, 1e6)]])
def test_odd_boxes_are_no_error(boxes: list) -> None:
    tracker = Tracker(25.0)
    for _ in range(5):
        assert len(numbers(tracker, boxes)) == len(boxes)


def test_tracks_do_not_pile_up() -> None:
    tracker, chance = Tracker(10.0), np.random.default_rng(0)
    for _ in range(100):
        numbers(tracker, [square(*chance.uniform(0, 2000, 2)) for _ in range(10)])
    assert len(tracker._tracks) < 150
