"""The sequence of draws: its proportions, its epochs, and that it can be cut anywhere."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from metr.data.mixture import mixture_weights
from metr.data.sample_keys import Draw
from metr.data.samplers import BLOCK, MixedSampler
from metr.errors import ConfigError

LENGTHS = {"cells": 205, "fish": 13, "cards": 1, "tables": 7}


def taken(sampler: MixedSampler, steps: int) -> list[Draw]:
    return [draw for batch in islice(sampler, steps) for draw in batch]


def sampler(mixture: str = "equal", **options: object) -> MixedSampler:
    return MixedSampler(LENGTHS, mixture_weights(LENGTHS, mixture), **{"batch_size": 4, "seed": 3} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("mixture", ["proportional", "sqrt", "equal"])
def test_datasets_are_drawn_in_proportion(mixture: str) -> None:
    draws = taken(sampler(mixture), 2500)
    counts = Counter(draw.dataset for draw in draws)
    for number, share in enumerate(mixture_weights(LENGTHS, mixture).values()):  # type: ignore[arg-type]
        sigma = (share * (1 - share) * len(draws)) ** 0.5
        assert abs(counts[number] - share * len(draws)) < 3 * sigma
    # A step mixes datasets.
    assert max(len({draw.dataset for draw in draws[i : i + 4]}) for i in range(0, 80, 4)) > 1


def test_every_pass_shows_every_image_once_in_another_order() -> None:
    draws = taken(sampler(), 1500)
    for number, length in enumerate(LENGTHS.values()):
        indices = [draw.index for draw in draws if draw.dataset == number]
        epochs = [indices[i : i + length] for i in range(0, len(indices) - length, length)]
        assert len(epochs) >= 2
        assert all(sorted(one) == list(range(length)) for one in epochs)
        if length > 5:
            assert epochs[0] != epochs[1]


def test_passes_are_counted() -> None:
    one = sampler("sqrt")
    draws = taken(one, 2 * BLOCK // 4 + 11)
    counts = Counter(draw.dataset for draw in draws)
    state = one.draws_after(2 * BLOCK // 4 + 11)
    assert state == len(draws)
    expected = {name: counts[i] / length for i, (name, length) in enumerate(LENGTHS.items())}
    assert one.epochs(state) == expected
    assert one.epochs(0) == dict.fromkeys(LENGTHS, 0.0)


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


# shares that change on the way

CHANGES = [(90, (0.0, 1.0, 0.0, 0.0)), (130, (0.5, 0.0, 0.5, 0.0)), (BLOCK + 40, (0.7, 0.1, 0.1, 0.1))]


def shares(values: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(LENGTHS, values, strict=True))


def changing(**options: object) -> MixedSampler:
    one = sampler("sqrt", **options)
    for at, values in CHANGES:
        one.change(at, shares(values))
    return one


def test_shares_change_at_their_draw_and_nothing_else_does() -> None:
    steady, other = taken(sampler("sqrt"), 1200), taken(changing(), 1200)
    assert other[:90] == steady[:90]
    assert {draw.dataset for draw in other[90:130]} == {1}
    assert {draw.dataset for draw in other[130 : BLOCK + 40]} == {0, 2}
    counts = np.bincount([draw.dataset for draw in other[130 : BLOCK + 40]])
    assert abs(counts[0] - counts[2]) < 3 * counts.sum() ** 0.5
    assert [draw.number for draw in other] == list(range(len(other)))
    # the images of a dataset go on in their order, however often it comes
    for dataset in range(4):
        left, right = ([draw.index for draw in draws if draw.dataset == dataset] for draws in (steady, other))
        assert all(one == two for one, two in zip(left, right, strict=False))
    one = changing()
    assert [one.shares(at) for at in (0, 89, 90, 129, 130, BLOCK + 40, 10**6)] == [
        mixture_weights(LENGTHS, "sqrt"),
        mixture_weights(LENGTHS, "sqrt"),
        *(shares(CHANGES[number][1]) for number in (0, 0, 1, 2, 2)),
    ]


@pytest.mark.parametrize("cut", [0, 22, 23, 32, 33, 500, BLOCK // 4 + 10])
def test_changes_may_be_announced_late_or_told_to_a_resumed_sampler(cut: int) -> None:
    """The same draws whether a change is known from the start, while drawing, or after a restart."""
    expected = taken(changing(), 1200)
    late, pending, draws = sampler("sqrt"), list(CHANGES), []
    for batch in islice(late, 1200):
        draws += batch
        while pending and pending[0][0] <= len(draws) + 40:
            late.change(pending[0][0], shares(pending.pop(0)[1]))
    assert draws == expected
    rest = changing(start=4 * cut)
    assert taken(rest, 1200 - cut) == expected[4 * cut :]
    counts = Counter(draw.dataset for draw in expected)
    seen = {name: counts[number] / length for number, (name, length) in enumerate(LENGTHS.items())}
    assert rest.epochs(4800) == late.epochs(4800) == seen
    assert rest.epochs(100) == changing().epochs(100), "looking back counts anew"


def test_processes_share_changing_draws_and_see_none_twice() -> None:
    alone = taken(changing(batch_size=12), 100)
    ranks = [taken(changing(rank=rank, world=3), 100) for rank in range(3)]
    numbers = [{draw.number for draw in rank} for rank in ranks]
    assert not numbers[0] & numbers[1] | numbers[0] & numbers[2] | numbers[1] & numbers[2]
    assert sorted((draw for rank in ranks for draw in rank), key=lambda draw: draw.number) == alone


def test_what_is_drawn_already_cannot_change() -> None:
    one = sampler()
    taken(one, 3)
    one.change(12, mixture_weights(LENGTHS, "sqrt"))
    with pytest.raises(
        ConfigError, match=r"change at draw 11, and draws up to 12 are settled(.|\n)*let more steps pass"
    ):
        one.change(11, mixture_weights(LENGTHS, "equal"))


# images that come more often

REPEATS = {"cells": np.linspace(1, 3, 205), "fish": np.ones(13), "cards": np.array([2.5]), "tables": np.full(7, 1.5)}


def repeating(**options: object) -> MixedSampler:
    weights = mixture_weights(LENGTHS, "equal")
    return MixedSampler(REPEATS, weights, **{"batch_size": 4, "seed": 3} | options)  # type: ignore[arg-type]


def test_repeats_leave_the_datasets_of_draws_alone() -> None:
    draws, plain = taken(repeating(), 1500), taken(sampler(), 1500)
    assert [draw.dataset for draw in draws] == [draw.dataset for draw in plain]
    assert [draw for draw in draws if draw.dataset == 1] == [draw for draw in plain if draw.dataset == 1]
    assert repeating().lengths == LENGTHS
    counts = np.bincount([draw.index for draw in draws if draw.dataset == 0], minlength=205)
    assert counts[150:].mean() > 1.5 * counts[:50].mean()


@pytest.mark.parametrize("cut", [0, 1, 7, BLOCK // 4 - 1, BLOCK // 4 + 1])
def test_repeats_resume_and_split_over_processes(cut: int) -> None:
    whole = taken(repeating(), cut + 60)
    assert taken(repeating(start=4 * cut), 60) == whole[4 * cut :]
    ranks = [taken(repeating(batch_size=2, rank=rank, world=2, start=4 * cut), 60) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1], key=lambda draw: draw.number) == whole[4 * cut :]
