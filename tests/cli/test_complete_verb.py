"""Mistakes of `metr complete` end in one message."""

from pathlib import Path

import pytest

from tiny import CommandLine, TinyRun

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints" / "metr-nano"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "DATA: expected datasets"),
        (["data", "--names", "cup"], "--names: expected NAME=SCORE, found 'cup'"),
        (["data", "--format", "voc"], "--format: goes with --for-new only"),
        ([".", "--for-new", ".", "--format", "vok"], "--format: no format 'vok' to write"),
        ([".", "--splits", "trian"], "splits"),
        (["no such folder"], "no such dataset"),
        (["--for-new", "no such folder", "--names", "cup=0.5"], "no such image or folder"),
        (["--for-new", ".", "--names", "cup=5"], "expected a score of 0.05 to 1 for 'cup', found 5"),
    ],
)
def test_mistakes(
    metr: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = metr("complete", *arguments, "--model", SHIPPED, "-o", tmp_path / "out")
    assert (ended.code, ended.err.count("error: ")) == (1, 1), ended
    assert told in ended.err
    assert not (tmp_path / "out").exists()


def test_one_dataset_alone_has_nothing_to_get(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    ended = metr("complete", tiny_run.datasets[0], "--model", tiny_run.folder, "-o", tmp_path / "out")
    assert ended.code == 1
    assert "one dataset has no names of others to add" in ended.err
