"""The example of the Python API does what it says."""

import runpy
from pathlib import Path

import pytest

from tiny import TinyRun, tiny_run

__all__ = ["tiny_run"]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/detect.py"


def test_the_example_prints_what_it_finds(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), str(tiny_run.folder), str(tiny_run.unseen[0]), "zebra", "leaf"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].endswith("objects, looked for: zebra, leaf")


def test_the_example_ends_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), str(tmp_path / "nowhere"), "a.jpg"])
    with pytest.raises(SystemExit, match=r"error: .*nowhere: no such checkpoint"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
