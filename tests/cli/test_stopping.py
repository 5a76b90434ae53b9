"""SIGTERM, SIGHUP and Ctrl-C to the whole process group, as `timeout`, schedulers and terminals send them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metr.checkpoint import load_checkpoint
from metr.training.logger import read_metrics

from tiny import TinyRun, train_arguments

SCRIPT = [sys.executable, "-c", "from metr.cli.main import run; run()"]
WORKERS = ["--set", "loader.workers=2"]
SIGNALS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups"),
]


class Group:
    """`metr` in a process group of its own."""

    def __init__(self, place: Path, *arguments: object, code: str | None = None) -> None:
        own = {"HF_HUB_OFFLINE": "1", "METR_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = SCRIPT if code is None else [sys.executable, "-c", code]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            env={**os.environ, **own},
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until something holds, while the command runs."""
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def signal(self, number: signal.Signals, times: int = 1) -> tuple[int, str, str]:
        """Sends a signal to the group; the exit code, and what was said."""
        for _ in range(times):
            os.killpg(self.process.pid, number)
            time.sleep(0.02)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def members(self) -> list[int]:
        """The processes of the group that are alive, by /proc."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == self.process.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return found


@pytest.fixture
def groups() -> Iterator[Callable[..., Group]]:
    """Starts groups, and leaves none alive."""
    started: list[Group] = []

    def start(*arguments: object, **more: str) -> Group:
        started.append(Group(*arguments, **more))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for group in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.process.pid, signal.SIGKILL)
        group.process.communicate()


def finished(group: Group) -> str:
    out, err = group.process.communicate(timeout=120)
    assert group.process.returncode == 0, err
    return out


@pytest.mark.parametrize("number", SIGNALS)
def test_training_saves_and_resumes_to_the_same_result(
    tiny_run: TinyRun, tmp_path: Path, groups: Callable[..., Group], number: signal.Signals
) -> None:
    run = tmp_path / "my run"
    arguments = train_arguments(tiny_run, run, "--steps", 100_000, *WORKERS)
    group = groups(tmp_path, *arguments)
    group.wait_for(lambda: len(read_metrics(run)) >= 3)
    assert len(group.members()) >= 3, "the main process and two workers"
    # as `timeout` does: to the process and to its group
    os.kill(group.process.pid, number)
    code, out, err = group.signal(number)
    assert code == SIGNALS[number], err
    assert "Traceback" not in err
    assert "Error" not in err
    assert f"To go on:  metr train --resume -o '{run}'\n" in out
    (said,) = [line for line in err.splitlines() if "finishing this step, then saving" in line]
    assert said in (run / "log.txt").read_text(), "the pipe and the log have the same line"
    assert group.members() == []
    reached = json.loads((run / "state/state.json").read_text())["step"]
    assert 3 <= reached < 100_000

    finished(groups(tmp_path, "train", "--resume", "-o", run, "--steps", reached + 3))
    ours = load_checkpoint(run / "last")
    assert ours.training["step"] == reached + 3


@pytest.mark.trains
def test_stopped_by_a_scheduler_it_ends_as_if_nothing_had_happened(
    tiny_run: TinyRun, tmp_path: Path, groups: Callable[..., Group]
) -> None:
    """Every weight is the same, though the workers died and were started again."""
    arguments = ["--steps", 40, *WORKERS]
    finished(groups(tmp_path, *train_arguments(tiny_run, tmp_path / "whole", *arguments)))
    run = tmp_path / "run"
    group = groups(tmp_path, *train_arguments(tiny_run, run, *arguments))
    group.wait_for(lambda: len(read_metrics(run)) >= 2)
    code, _, err = group.signal(signal.SIGTERM)
    if code == 0:
        pytest.skip("it was done before the signal came")
    assert code == 143, err
    finished(groups(tmp_path, "train", "--resume", "-o", run))
    ours, theirs = (load_checkpoint(folder / "last").weights for folder in (tmp_path / "whole", run))
    assert all((value == theirs[key]).all() for key, value in ours.items())


def test_twice_within_a_second_is_once_and_later_it_is_at_once(
    tiny_run: TinyRun, tmp_path: Path, groups: Callable[..., Group]
) -> None:
    run = tmp_path / "run"
    group = groups(tmp_path, *train_arguments(tiny_run, run, "--steps", 100_000, *WORKERS))
    group.wait_for(lambda: len(read_metrics(run)) >= 1)
    code, out, err = group.signal(signal.SIGTERM, times=5)
    assert (code, "Traceback" in err) == (143, False), err
    assert "--resume" in out
    assert (run / "state/state.json").is_file()


SLOW_START = """
import sys, time
import {module} as module
def slowly(*_, **__):
    open("begun", "w").close()
    time.sleep(60)
module.{name} = slowly
from metr.cli.main import run
run()
"""
BEFORE_THE_FIRST_STEP = {
    "reading the data": ("metr.training.train_request", "open_joint", "train"),
    "embedding the names": ("metr.training.train", "training_parts", "train"),
    "the evaluation before": ("metr.training.finetune", "_evaluated", "finetune"),
    "evaluating": ("metr.evaluation.runner", "evaluate_in_detail", "evaluate"),
    "detecting": ("metr.inference.detect_files", "detect_files", "detect"),
    "drawing": ("metr.demo.run", "run_demo", "demo"),
}


@pytest.mark.parametrize(
    ("where", "number"),
    [*((where, signal.SIGTERM) for where in BEFORE_THE_FIRST_STEP), ("detecting", signal.SIGINT)],
)
def test_where_nothing_is_to_be_saved_it_ends_in_one_line(
    tiny_run: TinyRun, tmp_path: Path, groups: Callable[..., Group], where: str, number: signal.Signals
) -> None:
    module, name, verb = BEFORE_THE_FIRST_STEP[where]
    run = tmp_path / "run"
    arguments = {
        "train": train_arguments(tiny_run, run),
        "finetune": ["finetune", tiny_run.data[0], "--from", tiny_run.folder, "-o", run, "--steps", 1],
        "evaluate": ["evaluate", tiny_run.folder, tiny_run.data[0], "-o", run],
        "detect": ["detect", tiny_run.folder, tiny_run.unseen[0], "-o", run],
        "demo": ["demo", "-o", run],
    }[verb]
    group = groups(tmp_path, *arguments, code=SLOW_START.format(module=module, name=name))
    group.wait_for((tmp_path / "begun").is_file)
    code, _, err = group.signal(number)
    assert code == SIGNALS[number], err
    assert "Traceback" not in err
    (line,) = (line for line in err.splitlines() if "stopped by" in line)
    assert f"stopped by {number.name}" in line
    if verb in {"train", "finetune"}:
        assert line.endswith("Nothing is saved yet: give the same command again.")


def test_fine_tuning_saves_and_resumes_without_data(
    tiny_run: TinyRun, tmp_path: Path, groups: Callable[..., Group]
) -> None:
    run = tmp_path / "mine"
    arguments = ["finetune", tiny_run.data[0], "--from", tiny_run.folder, "-o", run, "--steps", 100_000, *WORKERS]
    more = ["train.loop.log_every=1", "loader.batch_size=2", "train.loop.evaluate_every=0"]
    arguments += [word for value in more for word in ("--set", value)]
    group = groups(tmp_path, *arguments, "--rehearse", tiny_run.data[1], "--rehearse-fraction", 0.5)
    group.wait_for(lambda: len(read_metrics(run)) >= 2)
    code, out, err = group.signal(signal.SIGHUP)
    assert code == 129, err
    assert f"To go on:  metr finetune --resume -o {run}\n" in out
    reached = json.loads((run / "state/state.json").read_text())["step"]
    out = finished(groups(tmp_path, "finetune", "--resume", "-o", run, "--steps", reached + 2))
    assert f"Done: {reached + 2} steps" in out
    assert "AP before and after" in out
    assert "rehearsed" in out


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc")
def test_workers_do_not_outlive_a_killed_main_process(
    tiny_run: TinyRun, tmp_path: Path, groups: Callable[..., Group]
) -> None:
    run = tmp_path / "run"
    group = groups(tmp_path, *train_arguments(tiny_run, run, "--steps", 100_000, *WORKERS))
    group.wait_for(lambda: len(read_metrics(run)) >= 1)
    os.kill(group.process.pid, signal.SIGKILL)
    group.process.wait(timeout=10)
    deadline = time.monotonic() + 30
    while group.members() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert group.members() == []


def test_an_error_while_workers_run_ends_the_command(
    tiny_run: TinyRun, tmp_path: Path, groups: Callable[..., Group]
) -> None:
    """Workers that ignore signals would otherwise be waited for for ever."""
    more = ["--set", "train.optimizer.learning_rate=1e9", "--set", "train.loop.max_skipped=1", "--steps", 1000]
    group = groups(tmp_path, *train_arguments(tiny_run, tmp_path / "run", *WORKERS, *more))
    _, err = group.process.communicate(timeout=90)
    assert group.process.returncode == 1
    assert "not finite" in err
    assert "Traceback" not in err
    assert group.members() == []
