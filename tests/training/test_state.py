"""Random numbers that are put back, and evaluations that stop improving."""

import json
import logging
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from metr.training.config import LoopConfig
from metr.training.parts import Evaluated, Outcome
from metr.training.state import Counters, random_state, restore_random_state, seed_everything, undisturbed_random_state
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts

CPU = torch.device("cpu")


def draw() -> list[float]:
    generator = np.random
    return [random.random(), random.gauss(0, 1), generator.normal(), torch.rand(()).item(), torch.randn(3).sum().item()]


def test_the_state_gives_the_same_numbers_again() -> None:
    seed_everything(3)
    draw()  # leaves half a pair of normal numbers behind in Python's and NumPy's generators
    state = {name: value.clone() for name, value in random_state(CPU).items()}
    first = [draw(), draw()]
    restore_random_state(state, CPU)
    assert [draw(), draw()] == first


def test_seeding_decides_everything() -> None:
    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(now != then for now, then in zip(draw(), first, strict=True))


def test_a_block_leaves_no_trace() -> None:
    seed_everything(1)
    expected = [draw(), draw()]
    seed_everything(1)
    first = draw()
    with undisturbed_random_state(CPU):
        draw()
    assert [first, draw()] == expected


def test_shapes_never_change() -> None:
    before = {name: value.shape for name, value in random_state(CPU).items()}
    draw()
    assert {name: value.shape for name, value in random_state(CPU).items()} == before


# early stop


@pytest.mark.parametrize(
    ("best", "best_step", "evaluated", "stalled"),
    [
        (None, 0, 90, False),
        (0.0, 10, 90, False),
        (5.0, 10, 30, False),
        (5.0, 10, 40, True),
        (5.0, 10, 45, True),
        (5.0, 40, 40, False),
    ],
)
def test_it_counts_evaluations_since_the_best(
    best: float | None, best_step: int, evaluated: int, stalled: bool
) -> None:
    counters = Counters(step=evaluated, evaluated_step=evaluated, best=best, best_step=90, rose_step=best_step)
    assert counters.has_stalled(LoopConfig(patience=3, evaluate_every=10)) == stalled
    assert not counters.has_stalled(LoopConfig(patience=0, evaluate_every=10))
    assert not counters.has_stalled(LoopConfig(patience=3, evaluate_every=0))


def test_of_equal_evaluations_the_newest_is_the_best() -> None:
    """And it is no progress: patience counts from the first of them."""
    counters = Counters()
    for step, value in ((10, 0.0), (20, 5.0), (30, 5.0), (40, 4.9)):
        counters.step = counters.evaluated_step = step
        counters.metrics = {"AP": value}
        if counters.is_best("AP"):
            counters.take_best("AP")
    assert (counters.best, counters.best_step, counters.rose_step) == (5.0, 30, 20)
    assert counters.has_stalled(LoopConfig(patience=2, evaluate_every=10))
    assert not counters.has_stalled(LoopConfig(patience=3, evaluate_every=10))


def test_counters_of_a_state_that_knows_no_equal_evaluations() -> None:
    values = asdict(Counters(step=9, best=5.0, best_step=4))
    del values["rose_step"]
    assert Counters.of(values, Path("state.json")).rose_step == 4


class Falling:
    """An evaluation that gets worse after its second time, by the step at which it is asked."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def __call__(self, network: nn.Module) -> Evaluated:
        step = self.trainer.counters.step if self.trainer else 0
        return Evaluated(metrics={"AP": 10.0 + min(step, 4) - step / 10})


def run_falling(folder: Path, *, steps: int = 20, resume: bool = False, patience: int = 2) -> Outcome:
    evaluate = Falling()
    loop = {"evaluate_every": 2, "patience": patience}
    evaluate.trainer = Trainer(make_parts(folder), make_config(steps, loop=loop), folder / "run", evaluate=evaluate)
    return evaluate.trainer.fit(resume=resume)


def test_it_stops_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        outcome = run_falling(tmp_path)
    assert (outcome.step, outcome.stalled, outcome.interrupted, outcome.best_step) == (8, True, False, 4)
    assert "stopped early after step 8 of 20: no better evaluation since step 4" in caplog.text
    assert json.loads((tmp_path / "run/state/state.json").read_text())["step"] == 8
    # resumed, it is done; with more patience it goes on
    again = run_falling(tmp_path, resume=True)
    assert (again.step, again.stalled, again.interrupted) == (8, True, False)
    longer = run_falling(tmp_path, resume=True, patience=0, steps=9)
    assert (longer.step, longer.stalled, longer.interrupted) == (9, False, False)


def test_the_last_step_is_no_early_stop(tmp_path: Path) -> None:
    outcome = run_falling(tmp_path, steps=8)
    assert (outcome.step, outcome.stalled, outcome.interrupted) == (8, False, False)
