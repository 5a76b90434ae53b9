"""The sequence of draws: its proportions, its passes, and that it can be cut anywhere."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from metr.data.samplers import BLOCK, Draw, MixedSampler, mixture_weights
from metr.errors import ConfigError, DataError

LENGTHS = {"cells": 205, "fish": 13, "cards": 1, "tables": 7}


def taken(sampler: MixedSampler, steps: int) -> list[Draw]:
    return [draw for batch in islice(sampler, steps) for draw in batch]


def sampler(mixture: str = "equal", **options: object) -> MixedSampler:
    return MixedSampler(LENGTHS, mixture_weights(LENGTHS, mixture), **{"batch_size": 4, "seed": 3} | options)  # type: ignore[arg-type]


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
    with pytest.raises(ConfigError, match="no share for cards, tables"):
        mixture_weights(LENGTHS, {"cells": 1.0, "fish": 1.0})
    with pytest.raises(ConfigError, match="zero"):
        mixture_weights(LENGTHS, dict.fromkeys(LENGTHS, 0.0))
    with pytest.raises(DataError, match="a, c: no pictures"):
        mixture_weights({"a": 0, "b": 4, "c": 0}, "sqrt")
    with pytest.raises(DataError, match="no dataset"):
        mixture_weights({}, "sqrt")


@pytest.mark.parametrize("mixture", ["proportional", "sqrt", "equal"])
def test_datasets_are_drawn_in_proportion(mixture: str) -> None:
    draws = taken(sampler(mixture), 2500)
    counts = Counter(draw.dataset for draw in draws)
    for number, share in enumerate(mixture_weights(LENGTHS, mixture).values()):  # type: ignore[arg-type]
        sigma = (share * (1 - share) * len(draws)) ** 0.5
        assert abs(counts[number] - share * len(draws)) < 3 * sigma
    # A step mixes datasets.
    assert max(len({draw.dataset for draw in draws[i : i + 4]}) for i in range(0, 80, 4)) > 1


def test_every_pass_shows_every_picture_once_in_another_order() -> None:
    draws = taken(sampler(), 1500)
    for number, length in enumerate(LENGTHS.values()):
        indices = [draw.index for draw in draws if draw.dataset == number]
        passes = [indices[i : i + length] for i in range(0, len(indices) - length, length)]
        assert len(passes) >= 2
        assert all(sorted(one) == list(range(length)) for one in passes)
        if length > 5:
            assert passes[0] != passes[1]


def test_passes_are_counted() -> None:
    one = sampler("sqrt")
    draws = taken(one, 2 * BLOCK // 4 + 11)
    counts = Counter(draw.dataset for draw in draws)
    state = one.draws_after(2 * BLOCK // 4 + 11)
    assert state == len(draws)
    expected = {name: counts[i] / length for i, (name, length) in enumerate(LENGTHS.items())}
    assert one.passes(state) == expected
    assert one.passes(0) == dict.fromkeys(LENGTHS, 0.0)


@pytest.mark.parametrize("cut", [0, 1, 7, BLOCK // 4 - 1, BLOCK // 4, BLOCK // 4 + 1])
def test_a_resumed_sequence_goes_on_as_if_never_cut(cut: int) -> None:
    whole = sampler(sizes=(192, 224, 256))
    rest = sampler(sizes=(192, 224, 256), start=whole.draws_after(cut))
    assert taken(whole, cut + 60)[4 * cut :] == taken(rest, 60)
    assert rest.draws_after(60) == whole.draws_after(cut + 60)


def test_draws_follow_from_the_seed() -> None:
    assert taken(sampler(), 20) == taken(sampler(), 20)
    assert [d.index for d in taken(sampler(), 20)] != [d.index for d in taken(sampler(seed=4), 20)]
    first, again, other = (taken(sampler(), 2)[i].generator().random() for i in (0, 0, 1))
    assert first == again != other


def test_processes_share_one_sequence() -> None:
    alone = taken(sampler(batch_size=12), 30)
    ranks = [taken(sampler(rank=rank, world=3), 30) for rank in range(3)]
    together = [
        draw for step in range(30) for i in range(4) for rank in range(3) for draw in [ranks[rank][step * 4 + i]]
    ]
    assert together == alone
    assert sampler(rank=1, world=3).draws_after(30) == 360


def test_a_batch_has_one_size_the_same_in_every_process() -> None:
    sizes = (192, 224, 256)
    ranks = [list(islice(sampler(sizes=sizes, rank=rank, world=2), 60)) for rank in range(2)]
    for left, right in zip(*ranks, strict=True):
        assert len({draw.size for draw in left + right}) == 1
    assert {batch[0].size for batch in ranks[0]} == set(sizes)
    assert taken(sampler(), 1)[0].size is None
