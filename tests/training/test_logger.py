"""metrics.jsonl: written, read back, rewound, damaged; curves from it; trackers beside it."""

import json
import logging
from pathlib import Path

import cv2
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metr.checkpoint import load_checkpoint
from metr.errors import CheckpointError, ConfigError, MetrError
from metr.training import logger
from metr.training.curves import plot_curves
from metr.training.logger import MetricsFile, check_trackers, read_metrics
from metr.training.parts import Evaluated
from metr.training.progress import grouped_terms
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts


def test_round_trip(tmp_path: Path) -> None:
    writer = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    writer.write("train", 10, {"total": 1.5, "losses": {"presence/0": 0.1}})
    writer.write("evaluation", 10, {"metrics": {"AP": 12.5}})
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert read_metrics(tmp_path / "run") == [
        {"kind": "train", "step": 10, "total": 1.5, "losses": {"presence/0": 0.1}},
        {"kind": "evaluation", "step": 10, "metrics": {"AP": 12.5}},
    ]


def test_rewinding_forgets_later_lines_and_a_torn_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsFile(path)
    for step in (10, 20, 30):
        writer.write("train", step, {"total": float(step)})
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    with caplog.at_level(logging.WARNING):
        writer.rewind(20, 20)
    assert "cut short" in caplog.text
    writer.write("train", 25, {"total": 0.0})
    assert [record["step"] for record in read_metrics(path)] == [10, 20, 25]
    writer.write("evaluation", 25, {})
    writer.rewind(25, 0)
    assert [(record["kind"], record["step"]) for record in read_metrics(path)] == [
        ("train", 10), ("train", 20), ("train", 25),
    ]  # fmt: skip
    writer.rewind(0, 0)
    assert path.read_text() == ""


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write("train", 1, {"total": float("nan"), "losses": {"a": float("inf"), "b": 1.0}})
    strict = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert strict["total"] is None
    assert strict["losses"] == {"a": None, "b": 1.0}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnonsense\n{"kind": "train", "step": 2}\n')
    with pytest.raises(MetrError, match="line 2 is no record"):
        read_metrics(path)


def test_terms_are_grouped_over_layers_and_blocks() -> None:
    terms = {"presence/0": 1.0, "presence/1": 2.0, "decoder.0/l1": 3.0, "decoder.11/l1": 4.0, "proposals/giou": 5.0}
    assert grouped_terms(terms) == {"presence": 3.0, "decoder/l1": 7.0, "proposals/giou": 5.0}


def write_run(folder: Path, steps: int = 40) -> None:
    writer = MetricsFile(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        terms = {"presence/0": 1 / step, "decoder.0/l1": 3 / step, "decoder.1/l1": 2 / step, "decoder.0/giou": 1.0}
        rates = {"backbone": 1e-5 * step, "rest": 1e-4 * step}
        writer.write("train", step, {"total": sum(terms.values()), "losses": terms, "learning_rate": rates})
        if step % 10 == 0:
            writer.write("evaluation", step, {"metrics": {"AP": step / 2, "cells/AP": step / 3}})


def test_curves_are_drawn(tmp_path: Path) -> None:
    write_run(tmp_path)
    image = cv2.imread(str(plot_curves(tmp_path)))
    assert image.shape == (800, 1500, 3)
    assert (image != 255).any(axis=2).mean() > 0.01


def test_curves_of_a_run_without_evaluation_or_losses(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "metrics.jsonl").write("train", 1, {"total": None, "losses": {}})
    assert plot_curves(tmp_path).is_file()


def test_no_curves_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(MetrError, match="nothing to plot"):
        plot_curves(tmp_path)


# trackers


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard finds in a run folder, but for the configuration, which has a folder of its own."""
    found = EventAccumulator(str(folder / "trackers" / "metr"))
    found.Reload()
    return found


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    config = make_config(4, loop={"trackers": ["tensorboard"], "log_every": 2, "evaluate_every": 4})
    run = tmp_path / "run"
    Trainer(make_parts(tmp_path), config, run, evaluate=lambda network: Evaluated(metrics={"AP": 12.5})).fit()
    first, second, evaluation = read_metrics(run)
    found = events(run)
    tags = set(found.Tags()["scalars"])
    assert tags >= {"train/total", "train/images_per_second", "train/learning_rate/rest", "evaluation/metrics/AP"}
    assert {f"train/losses/{name}" for name in first["losses"]} <= tags
    totals = [(event.step, event.value) for event in found.Scalars("train/total")]
    assert totals == [(2, pytest.approx(first["total"])), (4, pytest.approx(second["total"]))]
    assert [event.value for event in found.Scalars("evaluation/metrics/AP")] == [evaluation["metrics"]["AP"]]
    (settings,) = (run / "trackers" / "metr").rglob("hparams.yml")
    assert yaml.safe_load(settings.read_text())["optimizer.learning_rate"] == 1e-3


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path: Path) -> None:
    for steps in (2, 3):
        config = make_config(steps, loop={"trackers": ["tensorboard"], "log_every": 1})
        Trainer(make_parts(tmp_path), config, tmp_path / "run").fit(resume=True)
    assert [event.step for event in events(tmp_path / "run").Scalars("train/total")] == [1, 2, 3]


def test_without_trackers_there_is_no_folder_of_theirs(tmp_path: Path) -> None:
    Trainer(make_parts(tmp_path), make_config(1), tmp_path / "run").fit()
    assert not (tmp_path / "run" / "trackers").exists()


def test_a_tracker_that_is_not_there_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match=r"train.loop.trackers: unknown tracker 'tensorbord'\n  try: did you mean"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr(logger, "get_available_trackers", list)
    config = make_config(2, loop={"trackers": ["wandb"]})
    with pytest.raises(ConfigError, match=r"the tracker 'wandb' is not installed\n  try: pip install wandb, or leave"):
        Trainer(make_parts(tmp_path), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_refuses_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")
    writer = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    writer.path.mkdir()
    with pytest.raises(CheckpointError, match="expected a file, found a folder"):
        writer.write("train", 1, {})


def test_how_often_each_dataset_was_seen_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    schedule = {"log_every": 2, "evaluate_every": 4, "checkpoint_every": 0}
    trainer = Trainer(
        make_parts(tmp_path),
        make_config(3, loop=schedule),
        tmp_path / "run",
        evaluate=lambda network: Evaluated(metrics={"AP": 1.0}),
    )
    with caplog.at_level(logging.INFO):
        trainer.fit()
    (evaluation,) = (one for one in read_metrics(tmp_path / "run") if one["kind"] == "evaluation")
    epochs = evaluation["epochs"]
    assert sum(epochs.values()) * 5 == pytest.approx(6), "five images in each dataset"
    told = f"seen: cells {epochs['cells']:.1f} times, fish {epochs['fish']:.1f} times"
    assert caplog.messages.count(told) == 1
    assert load_checkpoint(tmp_path / "run").training["epochs"] == pytest.approx(epochs, abs=1e-3)
    config = make_config(5, loop=schedule | {"evaluate_every": 0})
    with caplog.at_level(logging.INFO):
        Trainer(make_parts(tmp_path), config, tmp_path / "run").fit(resume=True)
    assert caplog.messages[-1].startswith("seen: cells "), "at the end, where nothing is evaluated"
