"""Several processes of `metr`, started for real by torchrun and by accelerate, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metr.checkpoint import find_checkpoint, load_checkpoint
from metr.cli.launch import _options_of_launch
from metr.evaluation.results import EvaluationConfig, as_dict
from metr.evaluation.runner import evaluate
from metr.model import METR
from metr.processes import in_main_process, process_count, process_index
from metr.training.comparison import COMPARED
from metr.training.logger import read_metrics

from tiny import TinyRun

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--nproc-per-node", "2"]
ACCELERATE = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2"]
SCRIPT = """
import os, signal, time
from metr.errors import MetrError
from metr.evaluation.coco import CocoScorer
from metr.evaluation.evaluator import Evaluator
from metr.processes import process_index
from metr.training.trainer import Trainer
made = Trainer.train_step
def train_step(self, batches):
    step, other = self.counters.step, self.accelerator.process_index == 1
    if step == 1 and other and "DIES" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 1 and other and "FAILS" in os.environ:
        raise MetrError("nothing here but trouble")
    return made(self, batches)
Trainer.train_step = train_step
answers = Evaluator._answers
def fail(self, *arguments):
    if process_index() == 1:
        raise MetrError("nothing here but trouble")
    return answers(self, *arguments)
def linger(self, detections):
    open("scoring", "w").close()
    time.sleep(120)
if "FAILS_EVALUATING" in os.environ:
    Evaluator._answers = fail
if "SLOW_METRICS" in os.environ:
    CocoScorer.score = linger
from metr.cli.main import run
run()
"""


def start(launcher: list[str], place: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Starts the launcher with a script that is the command `metr`."""
    script = place / "metr"
    script.write_text(SCRIPT, encoding="utf-8")
    own = {"HF_HUB_OFFLINE": "1", "METR_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [*launcher, str(script), *map(str, arguments)],
        env={**os.environ, **own},
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def training(run: TinyRun, *more: object) -> list[object]:
    """`metr train` of the small recipe on whatever device there is."""
    return ["train", *run.data, "-o", "run", "--config", run.recipe, "--set", "train.loop.device=auto", *more]


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """The exit code of a launcher, and what was said; nothing outlives it."""
    try:
        out, err = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


@pytest.mark.slow
def test_two_processes_train_one_network_and_speak_once(tmp_path: Path, tiny_run: TinyRun) -> None:
    code, out, err = ended(start(TORCHRUN, tmp_path, *training(tiny_run)))
    assert code == 0, err
    assert out.count("processes: 2") == 1
    assert out.count("Done: 3 steps") == 1
    said = [line for line in (out + err).splitlines() if len(line) > 20 and not set(line) <= {*"*-─━ "}]
    assert len(said) == len({*said}), "every line once"
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert [record["images"] for record in records] == [4, 8, 12], "steps of two processes with two images each"
    (judged,) = (record for record in read_metrics(tmp_path / "run") if record["kind"] == "evaluation")
    alone = evaluate(tmp_path / "run" / "last", tiny_run.data, device="cpu")
    assert judged["metrics"] == pytest.approx(alone.metrics(), abs=1e-6), "as one process evaluates"
    assert load_checkpoint(tmp_path / "run" / "last").detection.calibration == alone.calibration()


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path: Path, tiny_run: TinyRun) -> None:
    process = start(TORCHRUN, tmp_path, "evaluate", tiny_run.folder, *tiny_run.data, "-o", "e", "--device", "cpu")
    code, out, err = ended(process)
    assert code == 0, err
    alone = evaluate(tiny_run.folder, tiny_run.data, device="cpu")
    assert out.count("evaluation.json") == out.count("mean of 3") == 1, out
    assert err.count("images a second, 2 processes") == 1, err
    written = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    _check_same(written, json.loads(json.dumps(as_dict(alone))))


@pytest.mark.slow
def test_two_processes_compare_before_and_after_as_one(tmp_path: Path, tiny_run: TinyRun) -> None:
    settings = ["train.loop.curves=false", "loader.workers=0", "loader.batch_size=2", "train.loop.evaluate_every=1"]
    more = [word for value in settings for word in ("--set", value)]
    old = ["--rehearse", tiny_run.data[1], "--rehearse-evaluate", tiny_run.data[2]]
    arguments = ["finetune", tiny_run.data[0], "--from", tiny_run.folder, "-o", "run", "--steps", 2, *old, *more]
    code, out, err = ended(start(ACCELERATE, tmp_path, *arguments))
    assert code == 0, err
    assert out.count("AP before and after, 0 to 100") == out.count("Done: 2 steps") == 1, out
    told = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert [one["images"] for one in told["before"]["datasets"]] == [3, 3, 3]
    for when, source in (("before", tiny_run.folder), ("after", tmp_path / "run")):
        names = load_checkpoint(find_checkpoint(tmp_path / "run")).detection.names
        config = EvaluationConfig(modes=COMPARED, default_names=names)
        alone = as_dict(evaluate(source, tiny_run.data, device="cpu", config=config))
        by_name = {one["name"]: one for one in json.loads(json.dumps(alone))["datasets"]}
        for one in told[when]["datasets"]:
            _check_same({mode: one[mode] for mode in COMPARED}, {mode: by_name[one["name"]][mode] for mode in COMPARED})


@pytest.mark.slow
def test_an_error_of_one_process_in_an_evaluation_ends_all(tmp_path: Path, tiny_run: TinyRun) -> None:
    arguments = ["evaluate", tiny_run.folder, *tiny_run.data, "-o", "e", "--device", "cpu"]
    code, _, err = ended(start(TORCHRUN, tmp_path, *arguments, FAILS_EVALUATING="1"))
    assert code
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors[:1] == ["error: process 1: nothing here but trouble"], err
    assert len(errors) <= 2, err
    assert "gloo" not in err.lower()
    assert not (tmp_path / "e").exists()


@pytest.mark.slow
def test_sigterm_while_one_process_computes_metrics_and_the_other_waits(tmp_path: Path, tiny_run: TinyRun) -> None:
    process = start(TORCHRUN, tmp_path, *training(tiny_run), SLOW_METRICS="1")
    while not (tmp_path / "scoring").is_file() and process.poll() is None:
        time.sleep(0.1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, out, err = ended(process)
    assert code
    assert time.monotonic() - began < 25, "torchrun gives 30 seconds"
    assert (out + err).count("the evaluation is broken off") == 1, err
    assert (out + err).count("everything is saved") == out.count("To go on:") == 1
    assert "error: " not in err
    state = json.loads((tmp_path / "run" / "state" / "state.json").read_text())
    assert (state["step"], state["evaluated_step"]) == (3, 0)


def _check_same(ours: object, theirs: object) -> None:
    """The same tree, with the same numbers."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            _check_same(value, theirs[key])
    elif isinstance(ours, list) and isinstance(theirs, list):
        for one, other in zip(ours, theirs, strict=True):
            _check_same(one, other)
    else:
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.slow
def test_sharded_processes_train_tune_and_leave_an_ordinary_checkpoint(tmp_path: Path, tiny_run: TinyRun) -> None:
    """Its detections are those of any other checkpoint; a run on one process goes on from it."""
    sharded = ["--set", "train.parallel=fsdp"]
    code, out, err = ended(start(TORCHRUN, tmp_path, *training(tiny_run, *sharded)))
    assert code == 0, err
    assert out.count("processes: 2 (fsdp)") == 1
    assert "Done: 3 steps" in out
    detector = METR.from_pretrained(tmp_path / "run")
    assert len(detector.detect(tiny_run.unseen[0])) >= 0
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in {".pt", ".bin", ".distcp", ".pkl"}]

    alone = [sys.executable]
    code, out, err = ended(start(alone, tmp_path, "train", "--resume", "-o", "run", "--steps", 4))
    assert code == 0, err
    assert "processes: 1 (fsdp: nothing to shard)" in out
    assert "there is nothing to shard" in out + err

    tuning = ["finetune", tiny_run.datasets[0], "--from", "run", "-o", "tuned", "--steps", 2, *sharded]
    code, out, err = ended(start(TORCHRUN, tmp_path, *tuning, "--set", "loader.workers=0"))
    assert code == 0, err
    assert out.count("processes: 2 (fsdp)") == 1
    assert METR.from_pretrained(tmp_path / "tuned").names


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(tmp_path: Path, tiny_run: TinyRun) -> None:
    code, out, err = ended(start(ACCELERATE, tmp_path, "train", "nowhere", "-o", "run", "--config", tiny_run.recipe))
    assert code
    assert (out + err).count("error: ") == 1, err
    assert "nowhere" in err


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_and_is_said_first(tmp_path: Path, tiny_run: TinyRun) -> None:
    code, _, err = ended(start(ACCELERATE, tmp_path, *training(tiny_run), FAILS="1"))
    assert code
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors[:1] == ["error: process 1: nothing here but trouble"], err
    assert len(errors) <= 2, err
    assert "warning: " not in err
    assert err.count("nothing here but trouble") == 1
    assert "gloo" not in err.lower()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all(tmp_path: Path, tiny_run: TinyRun) -> None:
    process = start(TORCHRUN, tmp_path, *training(tiny_run, "--set", "train.parallel=fsdp"), DIES="1")
    while not (tmp_path / "run" / "metrics.jsonl").is_file() and process.poll() is None:
        time.sleep(0.1)
    began = time.monotonic()
    code, _, err = ended(process)
    assert code
    assert time.monotonic() - began < 120, "a minute, on a machine that has nothing else to do"
    assert "SIGKILL" in err
    assert "gloo" not in err.lower()
    assert err.count("another process of this run has ended") <= 1


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_ends(tmp_path: Path, tiny_run: TinyRun) -> None:
    process = start(TORCHRUN, tmp_path, *training(tiny_run, "--steps", "10000"))
    while not read_metrics(tmp_path / "run") and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, out, err = ended(process)
    assert code
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file(), err
    assert (out + err).count("everything is saved") == 1
    assert out.count("To go on:") == 1


@pytest.mark.parametrize(
    ("line", "options"),
    [
        (["python", "/bin/accelerate", "launch", "--cpu", "metr"], ["--cpu", "metr"]),
        (["python", "-m", "accelerate.commands.launch", "--cpu"], ["--cpu"]),
        (["/bin/accelerate-launch", "--cpu"], ["--cpu"]),
        (["python", "site-packages/accelerate/commands/launch.py", "--cpu"], ["--cpu"]),
    ],
)
def test_options_of_accelerate(line: list[str], options: list[str]) -> None:
    assert _options_of_launch(line) == options


def test_what_is_no_command_of_accelerate() -> None:
    with pytest.raises(ValueError, match="bash"):
        _options_of_launch(["bash", "-c", "metr"])


def test_launchers_say_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in (("WORLD_SIZE", "RANK"), ("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")):
        with monkeypatch.context() as patch:
            assert (process_count(), process_index()) == (1, 0)
            for name, value in zip(names, ("4", "3"), strict=True):
                patch.setenv(name, value)
            assert (process_count(), process_index()) == (4, 3)
            assert not in_main_process()
