"""`metr finetune` through the console script."""

import json
import os
import signal
from pathlib import Path

import pytest

from metr.training.trainer import Trainer

from tiny import CommandLine, TinyRun

SHORT = ["--set", "train.loop.device=cpu", "--set", "train.loop.curves=false", "--set", "loader.workers=0"]
SHORT += ["--set", "loader.batch_size=2", "--set", "train.loop.evaluate_every=0", "--steps", 2]


def arguments(run: TinyRun, out: Path, *more: object) -> list[object]:
    return ["finetune", f"lake={run.datasets[0]}", "--from", run.folder, "-o", out, *SHORT, *more]


def test_it_says_what_it_does_and_what_came_of_it(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    old = ["--rehearse", tiny_run.data[1], "--rehearse-fraction", 0.5, "--rehearse-evaluate", tiny_run.data[2]]
    ended = metr(*arguments(tiny_run, out, "--shots", 1, "--seed", 2, "--freeze", "backbone", *old))
    assert ended.code == 0, ended
    for part in ("2 steps of 2 at ", "backbone frozen", "--rehearse mixes old datasets in", "AP before and after"):
        assert part in ended.words
    for part in ("lake", "new", "desk", "rehearsed", "meadow", "evaluated", "Done: 2 steps, best AP", "of step 2."):
        assert part in ended.words
    assert ended.out.rstrip().endswith("--categories all: all 10 names that it knows"), (
        "what it looks for, and the rest"
    )
    assert "it looks for: " in ended.words
    request = json.loads((out / "finetuning.json").read_text())
    assert (request["shots"], request["seed"], request["rehearse_fraction"]) == (1, 2, 0.5)
    again = metr(*arguments(tiny_run, out))
    assert again.code == 1
    assert "a run is in this folder already" in again.err
    assert "lake" in metr("evaluate", out, f"lake={tiny_run.datasets[0]}", "-o", tmp_path / "judged").out


def test_ctrl_c_and_resume(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def interrupted(self: Trainer, *given: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        ended = metr(*arguments(tiny_run, tmp_path / "mine"))
    assert ended.code == 130
    assert f"To go on:  metr finetune --resume -o {tmp_path / 'mine'}\n" in ended.out
    assert ended.words.count("To go on") == ended.words.count("--resume") == 1, "advice is given once"
    assert not (tmp_path / "mine/comparison.json").exists()
    ended = metr("finetune", "--resume", "-o", tmp_path / "mine")
    assert ended.code == 0, ended
    assert "Done: 2 steps" in ended.out
    assert (tmp_path / "mine/comparison.json").is_file()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--shots", 1, "--fraction", 0.5], ["finetune: shots and fraction exclude each other"]),
        (["--fraction", 2], ["'fraction'", "found 2"]),
        (["--rehearse-fraction", 1, "--rehearse", "."], ["'rehearse_fraction'", "found 1"]),
        (["--rehearse-fraction", 0.3], ["--rehearse-fraction: ", "nothing is rehearsed", "--rehearse DATA"]),
        (["--freeze", "bakbone"], ["'train.freeze'", "found 'bakbone'"]),
        (["--set", "model.decoder.layers=2"], ["model: fine-tuning keeps", "model.decoder.layers=2", "metr train"]),
        (["--rehearse", "nowhere"], ["nowhere", "no such"]),
        (["--config", "no.yaml"], ["no.yaml: no such configuration file"]),
        (["--same-names", "perhaps"], ["'same_names'", "found 'perhaps'"]),
        (["--prompts", "mine"], ["'prompts'", "found 'mine'"]),
    ],
)
def test_mistakes(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, more: list[object], told: list[str]) -> None:
    ended = metr(*arguments(tiny_run, tmp_path / "mine", *more))
    assert ended.code == 1, ended
    assert ended.err.startswith("error: ")
    assert "Traceback" not in ended.err
    for part in told:
        assert part in ended.err


def test_from_is_needed(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    ended = metr("finetune", tiny_run.data[0], "-o", tmp_path / "mine")
    assert ended.code == 2
    assert "--from" in ended.err


def test_a_dry_run_shows_the_plan_and_writes_nothing(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    ended = metr(*arguments(tiny_run, out, "--shots", 1, "--rehearse", tiny_run.data[1], "--dry-run"))
    assert ended.code == 0, ended
    assert "configuration: the defaults, but for" in ended.words
    for part in ("lake", "desk", "steps: 2 of 2 images", "train.loop.steps: 300 -> 2"):
        assert part in ended.words, part
    assert "--rehearse mixes old datasets in" in ended.words
    assert "evaluating" not in ended.words
    assert not out.exists()
    resumed = metr("finetune", "--resume", "-o", out, "--dry-run")
    assert resumed.code == 1
    assert "nothing to resume" in resumed.err


def test_a_plan_refuses_what_the_run_would_refuse(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        ended = metr(*arguments(tiny_run, tmp_path / "out", "--set", "model.encoder.heads=8", *more))
        assert ended.code == 1, ended.words
        assert "fine-tuning keeps the checkpoint's network, which model.encoder.heads=8" in ended.words
