"""Output that nobody reads any more, as after `| head`: training goes on, other verbs end in silence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metr.training.logger import read_metrics

from tiny import TinyRun, train_arguments

SCRIPT = [sys.executable, "-c", "from metr.cli.main import run; run()"]
UNREAD = 141

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs pipes as POSIX has them")]


class Unread:
    """`metr` whose standard output is a pipe without a reader: from the start, or after so many lines.

    With `both`, its standard error is the same pipe.
    """

    def __init__(self, place: Path, arguments: list[object], *, lines: int = 0, both: bool = False) -> None:
        own = {"HF_HUB_OFFLINE": "1", "METR_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
        reading, writing = os.pipe()
        if not lines:
            os.close(reading)
        self.errors = place / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*SCRIPT, *map(str, arguments)],
                env={**os.environ, **own},
                cwd=place,
                stdout=writing,
                stderr=writing if both else errors,
            )
        os.close(writing)
        if lines:
            with os.fdopen(reading) as read:
                self.read = [read.readline() for _ in range(lines)]

    def end(self) -> tuple[int, str]:
        """The exit code, and what it said on the standard error."""
        return self.process.wait(timeout=120), self.errors.read_text()


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("lines", [0, 1])
def test_training_goes_on(tiny_run: TinyRun, tmp_path: Path, lines: int, both: bool) -> None:
    run = tmp_path / "run"
    code, err = Unread(tmp_path, [*train_arguments(tiny_run, run)], lines=lines, both=both).end()
    log = (run / "log.txt").read_text()
    assert code == 0, (err, log)
    assert "Traceback" not in err + log
    assert "Exception ignored" not in err
    assert "nobody reads the output of this call any more" in log
    assert "Done: 3 steps" in log
    assert [one["step"] for one in read_metrics(run) if one["kind"] == "evaluation"] == [3]


def test_finetuning_goes_on_to_its_comparison(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["finetune", tiny_run.data[0], "--from", tiny_run.folder, "-o", run, "--steps", 2]
    more = ["--set", "loader.workers=0", "--set", "train.loop.device=cpu", "--set", "train.loop.images=false"]
    code, err = Unread(tmp_path, [*arguments, *more], lines=1).end()
    assert code == 0, err
    assert "Traceback" not in err + (run / "log.txt").read_text()
    assert (run / "comparison.json").is_file()


@pytest.mark.parametrize("both", [False, True])
def test_training_is_stopped_as_ever(tiny_run: TinyRun, tmp_path: Path, both: bool) -> None:
    run = tmp_path / "run"
    group = Unread(tmp_path, [*train_arguments(tiny_run, run, "--steps", 100_000)], both=both)
    deadline = time.monotonic() + 120
    while len(read_metrics(run)) < 3:
        assert time.monotonic() < deadline
        assert group.process.poll() is None, group.end()
        time.sleep(0.05)
    group.process.send_signal(signal.SIGINT)
    code, err = group.end()
    assert code == 130, err
    log = (run / "log.txt").read_text()
    assert "Traceback" not in err + log
    assert "To go on:  metr train --resume" in log


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("verb", ["detect", "evaluate", "inspect", "version"])
def test_other_verbs_end_in_silence(tiny_run: TinyRun, tmp_path: Path, verb: str, both: bool) -> None:
    arguments: list[object] = {
        "detect": ["detect", tiny_run.folder, tiny_run.unseen[0], "-o", tmp_path / "out"],
        "evaluate": ["evaluate", tiny_run.folder, tiny_run.data[0], "-o", tmp_path / "out"],
        "inspect": ["inspect", *tiny_run.data],
        "version": ["--version"],
    }[verb]
    code, err = Unread(tmp_path, arguments, both=both).end()
    assert code == UNREAD, err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    if verb in {"detect", "evaluate"}:  # what was found is kept all the same
        kept = {"detect": "detections.json", "evaluate": "evaluation.png"}[verb]
        assert (tmp_path / "out" / kept).is_file()


def test_a_mistake_keeps_its_exit_code(tmp_path: Path) -> None:
    assert Unread(tmp_path, ["inspect", "nowhere"], both=True).end()[0] == 1
    assert Unread(tmp_path, ["inspect", "--nothing"], both=True).end()[0] == 2
