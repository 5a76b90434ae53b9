"""The examples of the Python API do what they say. (That of fine-tuning has its test beside the conversion's.)"""

import runpy
from pathlib import Path

import pytest

from tiny import TinyRun, as_overrides, tiny_run

__all__ = ["tiny_run"]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, example: str, *words: object) -> None:
    monkeypatch.setattr("sys.argv", [example, *map(str, words)])
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")


def test_detecting_prints_what_it_finds(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "detect.py", tiny_run.folder, tiny_run.unseen[0], "zebra", "leaf")
    assert capsys.readouterr().out.splitlines()[-1].endswith("objects, looked for: zebra, leaf")


def test_detecting_ends_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"error: .*nowhere: no such checkpoint"):
        run(monkeypatch, "detect.py", tmp_path / "nowhere", "a.jpg")


def test_training_on_several_datasets(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for setting in as_overrides(tiny_run) for word in ("--set", setting)]
    places = ["--out", tmp_path / "run", "--image", tiny_run.unseen[0]]
    run(monkeypatch, "train.py", *tiny_run.data[:2], *places, *settings, "--set", "train.loop.steps=1")
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.endswith("objects, looked for: fish, frog, leaf, turtle, book, cup, scissors")
    assert (tmp_path / "run/best/model.safetensors").is_file()


def test_training_ends_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"error: .*nowhere: .*no such"):
        run(monkeypatch, "train.py", tmp_path / "nowhere", "--out", tmp_path / "run", "--image", "a.jpg")


def test_beginning_with_a_detector(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.loop.steps=1", "train.loop.device=cpu", "loader.workers=0", "train.loop.curves=false"]
    given = [word for setting in settings for word in ("--set", setting)]
    run(monkeypatch, "adopt_and_train.py", tiny_run.folder, tiny_run.data[0], "--out", tmp_path / "run", *given)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("it finds fish, frog, leaf")
    assert told[-1] == told[0].replace("it finds", "now it finds")
    with pytest.raises(SystemExit, match=r"error: nowhere: no such checkpoint, folder or file here"):
        run(monkeypatch, "adopt_and_train.py", "nowhere", tiny_run.data[0], "--out", tmp_path / "other")
