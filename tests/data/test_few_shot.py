"""Subsets by seed: what is in them, that they nest, and that training can use them."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from metr.data.index.annotation_index import AnnotationIndex, LabelMap, write_index
from metr.data.joint import Subset, SubsetConfig, shortage, subset_of
from metr.data.records import Annotations, ImageRecord, InMemoryAnnotations
from metr.data.sampling import repeat_factors
from metr.errors import ConfigError, DataError

NAMES = ("often", "seldom", "once", "never", "ignored")


def record(number: int, rng: np.random.Generator) -> ImageRecord:
    labels = [0] * int(rng.integers(0, 4)) + [1] * int(rng.random() < 0.2) + [2] * int(number == 17) + [4]
    count = len(labels)
    return ImageRecord(
        image_id=number,
        path=Path(f"/data/{number}.jpg"),
        width=64,
        height=48,
        boxes=np.tile(np.array([[1, 2, 10, 20]], dtype=np.float32), (count, 1)),
        labels=np.array(labels, dtype=np.int64),
        areas=np.full(count, 162, dtype=np.float32),
        ignore=np.array([label == 4 for label in labels], dtype=bool),
    )


@pytest.fixture(scope="module")
def split() -> InMemoryAnnotations:
    rng = np.random.default_rng(3)
    records = tuple(record(number, rng) for number in range(60))
    return InMemoryAnnotations(name="made", split="train", categories=NAMES, records=records)


def ids(annotations: Annotations) -> list[int | str]:
    return [annotations[index].image_id for index in range(len(annotations))]


def objects(annotations: Annotations) -> Counter[int]:
    return Counter(
        label
        for index in range(len(annotations))
        for label in annotations[index].labels[~annotations[index].ignore].tolist()
    )


def by_hand(split: InMemoryAnnotations, order: list[int | str], shots: int) -> set[int | str]:
    """One image after the other: it is taken if a category that it shows has too few so far."""
    have: Counter[int] = Counter()
    taken = set()
    for number in order:
        here = split[int(number)]
        labels = here.labels[~here.ignore].tolist()
        if any(have[label] < shots for label in labels):
            taken.add(number)
            have.update(labels)
    return taken


def test_a_fraction_is_a_fraction_and_nests(split: InMemoryAnnotations) -> None:
    chosen = {
        fraction: set(ids(subset_of(split, SubsetConfig(fraction=fraction)))) for fraction in (0.001, 0.1, 0.25, 0.5)
    }
    assert [len(one) for one in chosen.values()] == [1, 6, 15, 30]
    assert chosen[0.001] < chosen[0.1] < chosen[0.25] < chosen[0.5]
    assert subset_of(split, SubsetConfig(fraction=1.0)) is split
    assert subset_of(split, SubsetConfig()) is split


def test_shots_are_reached_and_nest(split: InMemoryAnnotations) -> None:
    order = [ids(subset_of(split, SubsetConfig(fraction=n / 60)))[:] for n in range(1, 61)]
    walk = [(set(later) - set(earlier)).pop() for earlier, later in zip([[], *order[:-1]], order, strict=True)]
    all_objects, before = objects(split), set()
    for shots in (1, 2, 5, 10, 100):
        part = subset_of(split, SubsetConfig(shots=shots))
        assert set(ids(part)) == by_hand(split, walk, shots)
        found = objects(part)
        for label in all_objects:
            assert found[label] >= min(shots, all_objects[label])
        assert before <= set(ids(part))
        before = set(ids(part))
    assert 17 in set(ids(subset_of(split, SubsetConfig(shots=1)))), "the only image of a category"
    assert not objects(split)[3]
    assert shortage(split, 2) == "once (1), never (0), ignored (0)"


def test_the_seed_decides_and_nothing_else(split: InMemoryAnnotations, tmp_path: Path) -> None:
    first = ids(subset_of(split, SubsetConfig(shots=2, seed=1)))
    assert first == ids(subset_of(split, SubsetConfig(shots=2, seed=1)))
    assert first != ids(subset_of(split, SubsetConfig(shots=2, seed=2)))
    assert first == sorted(first), "in the split's own order"
    # an index chooses by the paths of its images, wherever they lie
    fractions = []
    for home in ("here", "there"):
        moved = [ImageRecord(**{**vars(one), "path": tmp_path / home / one.path.name}) for one in split.records]
        write_index(tmp_path / f"{home}.arrow", moved, root=tmp_path / home)
        index = AnnotationIndex(tmp_path / f"{home}.arrow", LabelMap.identity(NAMES), name="made", split="train")
        fractions.append(ids(subset_of(index, SubsetConfig(fraction=0.2))))
        part = subset_of(index, SubsetConfig(shots=3))
        assert all(objects(part)[label] >= min(3, count) for label, count in objects(split).items())
    assert fractions[0] == fractions[1]


def test_a_subset_is_a_split(split: InMemoryAnnotations) -> None:
    part = subset_of(split, SubsetConfig(shots=2))
    assert isinstance(part, Subset)
    assert isinstance(part, Annotations)
    assert (part.name, part.split, part.categories, part.format) == ("made", "train", NAMES, "memory")
    assert len(part.issues) == 0
    assert ids(pickle.loads(pickle.dumps(part))) == ids(part)
    assert repeat_factors(part, 0.5).shape == (len(part),)
    with pytest.raises(IndexError):
        part[len(part)]


def test_choices_that_are_none(split: InMemoryAnnotations) -> None:
    empty = InMemoryAnnotations(name="bare", split="train", categories=NAMES, records=())
    with pytest.raises(DataError, match="no object in the training split"):
        subset_of(empty, SubsetConfig(shots=1))
    for values in ({"shots": 1, "fraction": 0.5}, {"shots": 0}, {"fraction": 0}, {"fraction": 1.5}):
        with pytest.raises(ConfigError, match=r"fraction|shots"):
            SubsetConfig.checked(values)
