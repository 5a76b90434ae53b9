"""Going on where training stopped: resumed equals uninterrupted, bit by bit; Ctrl-C keeps everything."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from metr.errors import CheckpointError
from metr.training.logger import read_metrics
from metr.training.parts import Evaluated
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts

TIMES = {"seconds", "images_per_second", "waiting_fraction", "memory_gib", "evaluation_seconds"}
SCHEDULE = {"evaluate_every": 3, "checkpoint_every": 0, "log_every": 2, "accumulation": 2}


def evaluate(network: nn.Module) -> Evaluated:
    """A metric of the weights, so that equal weights have equal metrics."""
    torch.rand(3)
    metric = float(sum(parameter.abs().sum().item() for parameter in network.parameters()))
    return Evaluated(metrics={"AP": metric}, calibration={"shark": (1.0, metric % 1)})


class StopsAt:
    """Sends a signal to this process while step `step` is made, as Ctrl-C would."""

    def __init__(self, trainer: Trainer, step: int, number: signal.Signals = signal.SIGINT) -> None:
        self.trainer, self.step, self.number = trainer, step, number
        trainer.plain_network.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, inputs: object) -> None:
        if self.trainer.counters.step + 1 == self.step and not self.trainer._stop_signals.requested:
            signal.raise_signal(self.number)


def run(
    folder: Path, name: str, *, steps: int = 5, resume: bool = False, stop: int | None = None, **loop: Any
) -> Trainer:
    trainer = Trainer(make_parts(folder), make_config(steps, loop=SCHEDULE | loop), folder / name, evaluate=evaluate)
    if stop is not None:
        StopsAt(trainer, stop)
    trainer.fit(resume=resume)
    return trainer


def everything(folder: Path) -> dict[str, Any]:
    """All that a run wrote, but for times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}:{key}": value for key, value in load_file(path).items()}
    del found["state/random.safetensors:python.words"]  # beartype, which runs in tests only, draws from them
    state = json.loads((folder / "state" / "state.json").read_text())
    found["state"] = without_times(state)
    found["metrics"] = [without_times(record) for record in read_metrics(folder)]
    return found


def without_times(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if key not in TIMES and key != "waiting"}
    return {key: without_times(value) if isinstance(value, dict) else value for key, value in kept.items()}


def assert_same(first: Path, second: Path) -> None:
    ours, theirs = everything(first), everything(second)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        same = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
        assert same, key


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps that nothing interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder, "whole")
    return folder / "whole"


@pytest.mark.trains
@pytest.mark.parametrize("stops", [[3], [1, 4]], ids=["before an evaluation", "between, twice"])
def test_resumed_equals_uninterrupted_bit_by_bit(tmp_path: Path, whole: Path, stops: list[int]) -> None:
    for stop in stops:
        trainer = run(tmp_path, "parts", resume=True, stop=stop)
        assert trainer.counters.step == stop
    run(tmp_path, "parts", resume=True)
    assert_same(whole, tmp_path / "parts")


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path, whole: Path) -> None:
    """What was logged after that checkpoint is forgotten and made again."""
    trainer = Trainer(make_parts(tmp_path), make_config(5, loop=SCHEDULE), tmp_path / "parts", evaluate=evaluate)

    def die(module: nn.Module, inputs: object) -> None:
        if trainer.counters.step == 4:
            raise MemoryError

    trainer.plain_network.register_forward_pre_hook(die)
    with pytest.raises(MemoryError):
        trainer.fit()
    state = json.loads((tmp_path / "parts" / "state" / "state.json").read_text())
    assert state["step"] == 3
    run(tmp_path, "parts", resume=True)
    assert_same(whole, tmp_path / "parts")


def test_images_that_cannot_be_read_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A resumed run remembers those that it has met, and does not log them again."""
    Trainer(make_parts(tmp_path), make_config(1), tmp_path / "none")
    (tmp_path / "cells" / "1.png").write_bytes(b"no image")

    def damaged_run(name: str, stop: int | None, resume: bool = False) -> None:
        parts = make_parts(tmp_path)
        (tmp_path / "cells" / "1.png").write_bytes(b"no image")
        trainer = Trainer(parts, make_config(12, loop=SCHEDULE), tmp_path / name, evaluate=evaluate)
        if stop is not None:
            StopsAt(trainer, stop)
        trainer.fit(resume=resume)

    damaged_run("whole", None)
    counts = [record["unreadable"] for record in read_metrics(tmp_path / "whole") if record["kind"] == "train"]
    assert counts[-1] == 1
    caplog.clear()
    damaged_run("parts", 9)
    damaged_run("parts", None, resume=True)
    assert caplog.text.count("1.png") == 1
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_what_is_left_beside_the_folders_of_a_finished_run_goes(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    (tmp_path / "run/state").rename(tmp_path / "run/.state.previous")
    for name in (".last.previous", ".best.new"):
        (tmp_path / "run" / name).mkdir()
    run(tmp_path, "run", resume=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert_same(whole, tmp_path / "run")


def test_a_kill_while_the_configuration_is_written_loses_nothing(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    text, write = config.read_text(), Path.write_text

    def killed(path: Path, data: str, **more: Any) -> int:
        write(path, data[:20], **more)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(MemoryError):
            run(tmp_path, "run", resume=True)
    assert config.read_text() == text


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path, whole: Path) -> None:
    for resume, stop in ((False, 2), (True, None)):
        config = make_config(5, loop=SCHEDULE)
        trainer = Trainer(make_parts(tmp_path, workers=1), config, tmp_path / "parts", evaluate=evaluate)
        if stop:
            StopsAt(trainer, stop)
        trainer.fit(resume=resume)
    assert_same(whole, tmp_path / "parts")


def test_going_on_for_longer(tmp_path: Path) -> None:
    assert run(tmp_path, "run", steps=3).counters.step == 3
    trainer = run(tmp_path, "run", steps=5, resume=True)
    assert trainer.counters.step == 5
    assert [r["step"] for r in read_metrics(tmp_path / "run") if r["kind"] == "evaluation"] == [3, 5]
    assert run(tmp_path, "run", steps=5, resume=True).counters.step == 5, "and nothing is left to do"


def test_resuming_nothing_starts_afresh(tmp_path: Path) -> None:
    assert run(tmp_path, "run", steps=1, resume=True).counters.step == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_finishes_the_step_saves_and_says_where(
    tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(number)
    trainer = Trainer(make_parts(tmp_path), make_config(50), tmp_path / "run")
    StopsAt(trainer, 2, number)
    outcome = trainer.fit()
    assert (outcome.step, outcome.interrupted, outcome.signal) == (2, True, number)
    assert json.loads((tmp_path / "run" / "last" / "config.json").read_text())["training"]["step"] == 2
    assert "stopped after step 2 of 50" in caplog.text
    assert caplog.text.count(str(tmp_path / "run")) == 1, "the verb says how to go on"
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metr.training.signals.REPEATED", 0.0)
    trainer, before = Trainer(make_parts(tmp_path), make_config(50), tmp_path / "run"), signal.getsignal(signal.SIGINT)
    StopsAt(trainer, 2)
    trainer.plain_network.register_forward_hook(
        lambda *_: signal.raise_signal(signal.SIGINT) if trainer._stop_signals.requested else None
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert not (tmp_path / "run" / "state").exists()
    # whatever it was: where tests run in the background, Ctrl-C is ignored
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_breaks_an_evaluation_off_and_resuming_makes_up_for_it(
    tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:

    def long(network: nn.Module) -> Evaluated:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(20)
        pytest.fail("the evaluation went on")

    config = make_config(5, loop=SCHEDULE)
    outcome = Trainer(make_parts(tmp_path), config, tmp_path / "parts", evaluate=long).fit()
    assert (outcome.step, outcome.interrupted, outcome.metrics) == (3, True, {})
    assert "the evaluation is broken off" in caplog.text
    run(tmp_path, "parts", resume=True)
    assert_same(whole, tmp_path / "parts")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "message"),
    [("optimizer", "not readable as safetensors"), ("network", "not readable"), ("state.json", "not readable as JSON")],
)
def test_a_damaged_state_is_one_clear_message(tmp_path: Path, name: str, message: str) -> None:
    run(tmp_path, "run", steps=1)
    truncate(tmp_path / "run" / "state" / (name if "." in name else f"{name}.safetensors"))
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, "run", steps=2, resume=True)


def test_the_state_of_another_version_or_configuration(tmp_path: Path) -> None:
    run(tmp_path, "run", steps=1)
    frozen = make_config(2, optimizer={"backbone_multiplier": 0})
    with pytest.raises(CheckpointError, match="belongs to no trainable parameter"):
        Trainer(make_parts(tmp_path), frozen, tmp_path / "run").fit(resume=True)
    path = tmp_path / "run" / "state" / "state.json"
    path.write_text(json.dumps({"step": 1}))
    with pytest.raises(CheckpointError, match=r"state.json: expected the keys .*found \['step'\]"):
        run(tmp_path, "run", steps=2, resume=True)


def test_an_average_cannot_begin_in_the_middle(tmp_path: Path) -> None:
    Trainer(make_parts(tmp_path), make_config(1, ema={"enabled": False}), tmp_path / "run").fit()
    with pytest.raises(
        CheckpointError, match=r"begun without an average of its weights.*\n  try: train\.ema\.enabled=f"
    ):
        Trainer(make_parts(tmp_path), make_config(2), tmp_path / "run").fit(resume=True)


def test_logging_goes_on_after_resuming(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, "run", steps=2)
    with caplog.at_level(logging.INFO):
        run(tmp_path, "run", steps=3, resume=True)
    assert "going on after step 2" in caplog.text


@pytest.mark.trains
def test_names_are_sampled_as_if_nothing_had_happened(tmp_path: Path) -> None:
    few = {"steps": 4, "vocabulary_sample": 2, "evaluate_every": 0}
    run(tmp_path, "whole", **few)
    run(tmp_path, "parts", **few, stop=2)
    run(tmp_path, "parts", **few, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")
