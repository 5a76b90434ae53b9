"""Training ends when the best evaluation is too old, and a resumed run decides as an uninterrupted one."""

import json
import logging
from pathlib import Path

import pytest
from torch import nn

from metr.training.config import LoopConfig
from metr.training.early_stop import has_stalled
from metr.training.state import Counters
from metr.training.trainer import Outcome, Trainer
from small_runs import make_config, make_parts


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
    counters = Counters(step=evaluated, evaluated_step=evaluated, best=best, best_step=best_step)
    assert has_stalled(counters, LoopConfig(patience=3, evaluate_every=10)) == stalled
    assert not has_stalled(counters, LoopConfig(patience=0, evaluate_every=10))
    assert not has_stalled(counters, LoopConfig(patience=3, evaluate_every=0))


class Falling:
    """An evaluation that gets worse after its second time, by the step at which it is asked."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def __call__(self, network: nn.Module) -> dict[str, float]:
        step = self.trainer.counters.step if self.trainer else 0
        return {"AP": 10.0 + min(step, 4) - step / 10}


def run(folder: Path, *, steps: int = 20, resume: bool = False, patience: int = 2) -> Outcome:
    judge = Falling()
    loop = {"evaluate_every": 2, "patience": patience}
    judge.trainer = Trainer(make_parts(folder), make_config(steps, loop=loop), folder / "run", evaluate=judge)
    return judge.trainer.fit(resume=resume)


def test_it_stops_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        outcome = run(tmp_path)
    assert (outcome.step, outcome.stalled, outcome.interrupted, outcome.best_step) == (8, True, False, 4)
    assert "stopped early after step 8 of 20: no better evaluation since step 4" in caplog.text
    assert json.loads((tmp_path / "run/state/state.json").read_text())["step"] == 8
    # resumed, it is done; with more patience it goes on
    again = run(tmp_path, resume=True)
    assert (again.step, again.stalled, again.interrupted) == (8, True, False)
    longer = run(tmp_path, resume=True, patience=0, steps=9)
    assert (longer.step, longer.stalled, longer.interrupted) == (9, False, False)


def test_the_last_step_is_no_early_stop(tmp_path: Path) -> None:
    outcome = run(tmp_path, steps=8)
    assert (outcome.step, outcome.stalled, outcome.interrupted) == (8, False, False)
