"""The sequence of samples: its proportions, its epochs, repeats, and that it can be cut anywhere."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from metr.data.config import LoaderConfig
from metr.data.index import annotation_index as index_module
from metr.data.index.annotation_index import AnnotationIndex, LabelMap, write_index
from metr.data.records import ImageRecord, InMemoryAnnotations
from metr.data.sampling import BLOCK, Epochs, MixedSampler, SampleKey, mixture_weights, repeat_factors
from metr.errors import ConfigError, DataError

LENGTHS = {"cells": 205, "fish": 13, "cards": 1, "tables": 7}


def taken(sampler: MixedSampler, steps: int) -> list[SampleKey]:
    return [key for batch in islice(sampler, steps) for key in batch]


def sampler(mixture: str = "equal", **options: object) -> MixedSampler:
    return MixedSampler(LENGTHS, mixture_weights(LENGTHS, mixture), **{"batch_size": 4, "seed": 3} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("mixture", ["proportional", "sqrt", "equal"])
def test_datasets_are_sampled_in_proportion(mixture: str) -> None:
    samples = taken(sampler(mixture), 2500)
    counts = Counter(key.dataset for key in samples)
    for number, share in enumerate(mixture_weights(LENGTHS, mixture).values()):  # type: ignore[arg-type]
        sigma = (share * (1 - share) * len(samples)) ** 0.5
        assert abs(counts[number] - share * len(samples)) < 3 * sigma
    # A step mixes datasets.
    assert max(len({key.dataset for key in samples[i : i + 4]}) for i in range(0, 80, 4)) > 1


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    samples = taken(sampler(), 1500)
    for number, length in enumerate(LENGTHS.values()):
        indices = [key.index for key in samples if key.dataset == number]
        epochs = [indices[i : i + length] for i in range(0, len(indices) - length, length)]
        assert len(epochs) >= 2
        assert all(sorted(one) == list(range(length)) for one in epochs)
        if length > 5:
            assert epochs[0] != epochs[1]


def test_epochs_are_counted() -> None:
    one = sampler("sqrt")
    samples = taken(one, 2 * BLOCK // 4 + 11)
    counts = Counter(key.dataset for key in samples)
    state = one.samples_after(2 * BLOCK // 4 + 11)
    assert state == len(samples)
    expected = {name: counts[i] / length for i, (name, length) in enumerate(LENGTHS.items())}
    assert one.epochs(state) == expected
    assert one.epochs(0) == dict.fromkeys(LENGTHS, 0.0)


@pytest.mark.parametrize("cut", [0, 1, 7, BLOCK // 4 - 1, BLOCK // 4, BLOCK // 4 + 1])
def test_a_resumed_sequence_goes_on_as_if_never_cut(cut: int) -> None:
    whole = sampler(sizes=(192, 224, 256))
    rest = sampler(sizes=(192, 224, 256), start=whole.samples_after(cut))
    assert taken(whole, cut + 60)[4 * cut :] == taken(rest, 60)
    assert rest.samples_after(60) == whole.samples_after(cut + 60)


def test_samples_follow_from_the_seed() -> None:
    assert taken(sampler(), 20) == taken(sampler(), 20)
    assert [d.index for d in taken(sampler(), 20)] != [d.index for d in taken(sampler(seed=4), 20)]
    first, again, other = (taken(sampler(), 2)[i].generator().random() for i in (0, 0, 1))
    assert first == again != other


def test_processes_share_one_sequence() -> None:
    alone = taken(sampler(batch_size=12), 30)
    ranks = [taken(sampler(rank=rank, world=3), 30) for rank in range(3)]
    together = [key for step in range(30) for i in range(4) for rank in range(3) for key in [ranks[rank][step * 4 + i]]]
    assert together == alone
    assert sampler(rank=1, world=3).samples_after(30) == 360


def test_a_batch_has_one_size_the_same_in_every_process() -> None:
    sizes = (192, 224, 256)
    ranks = [list(islice(sampler(sizes=sizes, rank=rank, world=2), 60)) for rank in range(2)]
    for left, right in zip(*ranks, strict=True):
        assert len({key.size for key in left + right}) == 1
    assert {batch[0].size for batch in ranks[0]} == set(sizes)
    assert taken(sampler(), 1)[0].size is None


# images that come more often

REPEATS = {"cells": np.linspace(1, 3, 205), "fish": np.ones(13), "cards": np.array([2.5]), "tables": np.full(7, 1.5)}


def repeating(**options: object) -> MixedSampler:
    weights = mixture_weights(LENGTHS, "equal")
    return MixedSampler(REPEATS, weights, **{"batch_size": 4, "seed": 3} | options)  # type: ignore[arg-type]


def test_repeats_leave_the_datasets_of_samples_alone() -> None:
    samples, plain = taken(repeating(), 1500), taken(sampler(), 1500)
    assert [key.dataset for key in samples] == [key.dataset for key in plain]
    assert [key for key in samples if key.dataset == 1] == [key for key in plain if key.dataset == 1]
    assert repeating().lengths == LENGTHS
    counts = np.bincount([key.index for key in samples if key.dataset == 0], minlength=205)
    assert counts[150:].mean() > 1.5 * counts[:50].mean()


@pytest.mark.parametrize("cut", [0, 1, 7, BLOCK // 4 - 1, BLOCK // 4 + 1])
def test_repeats_resume_and_split_over_processes(cut: int) -> None:
    whole = taken(repeating(), cut + 60)
    assert taken(repeating(start=4 * cut), 60) == whole[4 * cut :]
    ranks = [taken(repeating(batch_size=2, rank=rank, world=2, start=4 * cut), 60) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1], key=lambda key: key.number) == whole[4 * cut :]


# weights of the datasets


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ("proportional", [1, 4, 16]),
        ("sqrt", [1, 2, 4]),
        ("equal", [1, 1, 1]),
        ({"b": 3.0, "a": 1.0, "c": 0.0}, [1, 3, 0]),
    ],
)
def test_mixture_weights(mixture: object, expected: list[float]) -> None:
    weights = mixture_weights({"a": 10, "b": 40, "c": 160}, mixture)  # type: ignore[arg-type]
    assert list(weights) == ["a", "b", "c"]
    np.testing.assert_allclose(list(weights.values()), np.array(expected) / sum(expected))


def test_mixtures_that_do_not_fit_say_so() -> None:
    with pytest.raises(ConfigError, match=r"'cels'(.|\n)*did you mean 'cells'"):
        mixture_weights(LENGTHS, {"cels": 1.0, "fish": 1.0})
    with pytest.raises(ConfigError, match="no weight for cards, tables"):
        mixture_weights(LENGTHS, {"cells": 1.0, "fish": 1.0})
    with pytest.raises(ConfigError, match="zero"):
        mixture_weights(LENGTHS, dict.fromkeys(LENGTHS, 0.0))
    for share in (float("inf"), 1e308):
        with pytest.raises(ConfigError, match="finite"):
            mixture_weights(LENGTHS, dict.fromkeys(LENGTHS, share))
    for share in (float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="mixture"):
            LoaderConfig.checked({"mixture": {"cells": share}})
    with pytest.raises(DataError, match="a, c: no images"):
        mixture_weights({"a": 0, "b": 4, "c": 0}, "sqrt")
    with pytest.raises(DataError, match="no dataset"):
        mixture_weights({}, "sqrt")


def test_a_mixture_of_a_configuration() -> None:
    assert LoaderConfig.checked({"mixture": {"a": 1}}).mixture == {"a": 1.0}
    with pytest.raises(ConfigError, match=r"mixture"):
        LoaderConfig.checked({"mixture": "hardnes"})


# repeat factors against the formula


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
