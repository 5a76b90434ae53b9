"""Warm-up and fall of the learning rate."""

import math
from itertools import pairwise

import pytest

from metr.training.config import ScheduleConfig
from metr.training.schedule import learning_rate_factor


def factors(steps: int, **values: object) -> list[float]:
    config = ScheduleConfig.checked(values)
    return [learning_rate_factor(step, steps, config) for step in range(steps)]


def test_warms_up_linearly_and_ends_at_the_floor() -> None:
    rates = factors(100, kind="cosine", warmup_steps=10, floor=0.1)
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[54] == pytest.approx(0.55), "half way down after half of the 90 steps"
    assert rates[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(rates[9:]))


def test_cosine_is_the_closed_form() -> None:
    rates = factors(50, kind="cosine", warmup_steps=0, floor=0.0)
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * (step + 1) / 50)) for step in range(50)])


def test_flat_cosine_stays_up_until_its_share() -> None:
    rates = factors(100, kind="flat_cosine", warmup_steps=5, flat_fraction=0.6, floor=0.0)
    assert rates[5:60] == [1.0] * 55
    assert rates[60] < 1
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_constant_never_falls() -> None:
    assert factors(20, kind="constant", warmup_steps=2) == [0.5] + [1.0] * 19


@pytest.mark.parametrize("kind", ["cosine", "flat_cosine", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 3, 10])
@pytest.mark.parametrize("steps", [1, 3])
def test_short_runs_stay_in_range(kind: str, warmup_steps: int, steps: int) -> None:
    rates = factors(steps, kind=kind, warmup_steps=warmup_steps, flat_fraction=1.0, floor=0.05)
    assert all(0 < rate <= 1 for rate in rates)
    assert warmup_steps < steps or rates[-1] == 1, "a warm-up longer than the run ends with it"


def test_a_step_past_the_end_stays_at_the_floor() -> None:
    config = ScheduleConfig(warmup_steps=0, floor=0.2)
    assert learning_rate_factor(99, 10, config) == pytest.approx(0.2)
