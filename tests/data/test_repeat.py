"""Repeat factors against the formula, and epochs that keep to them."""

from collections import Counter
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from metr.data.epochs import Epochs
from metr.data.index import annotation_index as index_module
from metr.data.index.annotation_index import AnnotationIndex, LabelMap, write_index
from metr.data.records import ImageRecord, InMemoryAnnotations
from metr.data.repeat import repeat_factors

NAMES = tuple("abcdefg")


def record(number: int, labels: list[int], ignored: list[int]) -> ImageRecord:
    count = len(labels) + len(ignored)
    boxes = np.tile(np.array([[1, 2, 10, 20]], dtype=np.float32), (count, 1))
    return ImageRecord(
        image_id=number,
        path=Path(f"/data/{number}.jpg"),
        width=64,
        height=48,
        boxes=boxes,
        labels=np.array([*labels, *ignored], dtype=np.int64),
        areas=np.full(count, 162, dtype=np.float32),
        ignore=np.array([False] * len(labels) + [True] * len(ignored), dtype=bool),
    )


def made_up(count: int = 200) -> tuple[ImageRecord, ...]:
    """Category k is in about one of 4^k images, often several times; the last one is ignored wherever it is."""
    rng = np.random.default_rng(5)
    records = []
    for number in range(count):
        labels = [k for k in range(6) for _ in range(int(rng.random() < 0.25**k) * int(rng.integers(1, 4)))]
        records.append(record(number, [] if number == 7 else labels, [6] if number % 50 == 0 else []))
    return tuple(records)


def by_hand(records: tuple[ImageRecord, ...], threshold: float) -> list[float]:
    sets = [set(one.labels[~one.ignore].tolist()) for one in records]
    share = {k: sum(k in each for each in sets) / len(records) for k in range(len(NAMES))}
    return [max([1.0, *(sqrt(threshold / share[k]) for k in each)]) for each in sets]


def in_memory(records: tuple[ImageRecord, ...]) -> InMemoryAnnotations:
    return InMemoryAnnotations(name="d", split="train", categories=NAMES, records=records)


@pytest.mark.parametrize("threshold", [0.02, 0.2, 1.0])
def test_factors_are_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float) -> None:
    records = made_up()
    expected = by_hand(records, threshold)
    assert max(expected) > 1.5
    assert min(expected) == 1
    np.testing.assert_allclose(repeat_factors(in_memory(records), threshold), expected)
    monkeypatch.setattr(index_module, "_PIECE", 37)
    write_index(tmp_path / "a.arrow", records, root=Path("/data"))
    opened = AnnotationIndex(tmp_path / "a.arrow", LabelMap.identity(NAMES))
    monkeypatch.setattr(AnnotationIndex, "__getitem__", lambda *_: pytest.fail("a record was made"))
    np.testing.assert_allclose(repeat_factors(opened, threshold), expected)


def test_joined_and_dropped_names_of_an_index(tmp_path: Path) -> None:
    """Labels 1 and 2 are one category, label 3 is none."""
    records = tuple(record(number, [number % 4], []) for number in range(16))
    write_index(tmp_path / "a.arrow", records, root=Path("/data"))
    labels = LabelMap(categories=("x", "y"), rows=np.array([0, 1, 1, -1]))
    found = repeat_factors(AnnotationIndex(tmp_path / "a.arrow", labels), 1.0)
    np.testing.assert_allclose(found, np.tile([2, sqrt(2), sqrt(2), 1], 4))


def test_nothing_to_repeat() -> None:
    assert repeat_factors(in_memory(()), 0.5).shape == (0,)
    empty = replace(in_memory((record(0, [], []),)), categories=())
    assert repeat_factors(empty, 0.5).tolist() == [1]
    assert repeat_factors(in_memory(made_up(20)), 0.0).tolist() == [1] * 20


def test_a_pass_shows_everything_and_the_rare_more_often() -> None:
    repeats = np.array([1.0, 1.25, 2.0, 3.5, 1.0, 1.75])
    epochs = Epochs(repeats, seed=4, key=2)
    ends = [0]
    counts: Counter[int] = Counter()
    for turn in range(400):
        size = 0
        order = []
        while epochs.seen(ends[-1] + size) < turn + 1:
            order.append(epochs.image(ends[-1] + size))
            size += 1
        ends.append(ends[-1] + size)
        shown = Counter(order)
        assert set(shown) == set(range(6))
        assert all(np.floor(repeats[i]) <= shown[i] <= np.ceil(repeats[i]) for i in range(6))
        counts += shown
    sigma = np.sqrt(0.25 / 400)
    assert np.abs(np.array([counts[i] for i in range(6)]) / 400 - repeats).max() < 4 * sigma
    assert counts[0] == 400
    assert epochs.seen(ends[3]) == 3
    assert len(set(np.diff(ends))) > 1, "epochs differ in length"


def test_any_place_can_be_asked_for_at_once() -> None:
    repeats = np.linspace(1, 2.6, 9)
    first = Epochs(repeats, seed=4, key=2)
    order = [first.image(number) for number in range(300)]
    assert [Epochs(repeats, seed=4, key=2).image(number) for number in (0, 17, 123, 299)] == [
        order[number] for number in (0, 17, 123, 299)
    ]
    assert [Epochs(repeats, seed=seed, key=key).image(5) for seed, key in ((4, 3), (5, 2))] != [order[5]] * 2
    assert (np.diff([first.seen(count) for count in range(300)]) > 0).all()


def test_without_repeats_a_pass_is_a_shuffle() -> None:
    plain, ones = Epochs(8, seed=1, key=0), Epochs(np.ones(8), seed=1, key=0)
    assert [plain.image(n) for n in range(50)] == [ones.image(n) for n in range(50)]
    assert sorted(plain.image(n) for n in range(8, 16)) == list(range(8))
    assert plain.seen(20) == ones.seen(20) == 2.5
