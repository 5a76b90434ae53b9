"""metrics.jsonl: written, read back, rewound, damaged; curves and TensorBoard from it."""

import json
import logging
import sys
from pathlib import Path

import cv2
import pytest

from metr.errors import CheckpointError, DependencyError, MetrError
from metr.training.curves import plot_curves
from metr.training.metrics import MetricsWriter, grouped_terms, read_metrics


def test_round_trip(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run" / "metrics.jsonl")
    writer.write("train", 10, {"total": 1.5, "losses": {"presence/0": 0.1}})
    writer.write("evaluation", 10, {"metrics": {"AP": 12.5}})
    writer.close()
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert read_metrics(tmp_path / "run") == [
        {"kind": "train", "step": 10, "total": 1.5, "losses": {"presence/0": 0.1}},
        {"kind": "evaluation", "step": 10, "metrics": {"AP": 12.5}},
    ]


def test_rewinding_forgets_later_lines_and_a_torn_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
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
    MetricsWriter(path).write("train", 1, {"total": float("nan"), "losses": {"a": float("inf"), "b": 1.0}})
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
    writer = MetricsWriter(folder / "metrics.jsonl")
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
    MetricsWriter(tmp_path / "metrics.jsonl").write("train", 1, {"total": None, "losses": {}})
    assert plot_curves(tmp_path).is_file()


def test_no_curves_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(MetrError, match="nothing to plot"):
        plot_curves(tmp_path)


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "board")
    writer.write("train", 3, {"total": 2.0, "losses": {"presence/0": 0.5}, "memory_gib": None})
    writer.close()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/total", "train/losses/presence/0"]
    assert [(event.step, event.value) for event in events.Scalars("train/losses/presence/0")] == [(3, 0.5)]


def test_missing_tensorboard_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(DependencyError, match=r"pip install 'metr\[tensorboard\]'"):
        MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "board")


def test_a_disk_that_refuses_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        MetricsWriter(tmp_path / "file" / "metrics.jsonl")
    writer = MetricsWriter(tmp_path / "run" / "metrics.jsonl")
    writer.path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        writer.write("train", 1, {})
