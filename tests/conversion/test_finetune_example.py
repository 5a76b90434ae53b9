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


@pytest.mark.parametrize("kept", ["out", "out-training", "out-trained"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_nothing_of_an_earlier_run_is_overwritten(
    kept: str, slash: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / kept).mkdir()
    (tmp_path / kept / "letter.txt").write_text("dear reader", encoding="utf-8")
    with pytest.raises(SystemExit, match=rf"error: {tmp_path / kept}: .*not overwritten"):
        run(monkeypatch, tmp_path / "run", tmp_path / "nowhere", f"{tmp_path / 'out'}{slash}")
    assert [folder.name for folder in tmp_path.iterdir()] == [kept]


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_no_request_for_whole_epochs(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path / "run", tmp_path / "data", tmp_path / "out", "--steps", steps)
    assert ended.value.code == 2
    assert f"--steps: expected at least 1, found {steps}" in capsys.readouterr().err


def test_help_says_which_folders_are_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--help")
    said = capsys.readouterr().out
    assert all(word in said for word in ("METR_RUN", "DATA", "OUT-training", "OUT-trained", "steps of 8 images"))
