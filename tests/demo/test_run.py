"""The demo from end to end, in miniature."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from metr.data.images import read_image
from metr.demo import run as demo
from metr.demo.run import run_demo
from metr.errors import DataError
from metr.training.signals import Stopped

from tiny import NAMES, TinyRun, as_overrides


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.slow
def test_the_demo_leaves_what_it_names_and_can_be_run_again(
    tiny_run: TinyRun, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "VAL", 2)
    monkeypatch.setattr(demo, "UNSEEN", 3)
    overrides = (*as_overrides(tiny_run), "train.loop.curves=true")
    for _ in range(2):
        result = run_demo(tmp_path / "demo", console, overrides, train_images=2)
    assert result is not None
    assert [one.name for one in result.report.datasets] == list(NAMES)
    assert all(one.own is not None and one.joint is not None for one in result.report.datasets)
    text = said(console)
    closing = text.rpartition("Everything is in ")[2].splitlines()
    assert closing[0] == str(tmp_path / "demo")
    named = [line.split()[0] for line in closing[1:] if line.startswith("  ")]
    assert named == [
        "detections.png",
        "datasets.png",
        "evaluation/evaluation.md",
        "evaluation/evaluation.png",
        "run/curves.png",
    ]
    for name in named:
        if name.endswith(".png"):
            assert min(read_image(tmp_path / "demo" / name).shape[:2]) > 100
        else:
            assert "| pond |" in (tmp_path / "demo" / name).read_text(encoding="utf-8")
    assert len(list((tmp_path / "demo/detections").glob("*.jpg"))) == 3


def test_an_interrupted_demo_judges_nothing(
    tiny_run: TinyRun, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Outcome:
        interrupted, signal = True, 15

    monkeypatch.setattr(demo, "VAL", 1)
    monkeypatch.setattr(demo, "train", lambda *_, **__: Outcome)
    monkeypatch.setattr(demo, "evaluate", pytest.fail)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        run_demo(tmp_path / "demo", console, as_overrides(tiny_run), train_images=2)
    assert "it begins anew" in said(console)


def test_other_files_are_left_alone(tmp_path: Path, console: Console) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(DataError, match="files that are not its own\n  try: another folder"):
        run_demo(tmp_path, console)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]
