"""The example that fine-tunes a detector of transformers: mistakes end in a line."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/finetune_detector.py"


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *map(str, words)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_a_missing_argument_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "runs/joint", "--steps", 3)
    assert ended.value.code == 2
    assert "required: DATA, OUT" in capsys.readouterr().err


def test_a_mistake_ends_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"no such"):
        run(monkeypatch, tmp_path / "run", tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
