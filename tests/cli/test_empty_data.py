"""The verbs refuse a dataset without a box, or of which most were lost, unless they are told to go on."""

from pathlib import Path

import pytest
from PIL import Image

from tiny import CommandLine, TinyRun

TOLD = ("the train split of 'empty' is not used: no box in 4 images", "--allow-empty")


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A YOLO dataset whose text files are empty, but for that of the val split."""
    root = tmp_path / "empty"
    for split, count in {"train": 4, "val": 1}.items():
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (64, 64), (90, 40 * number, 0)).save(root / "images" / split / f"{number}.png")
            text = "0 0.5 0.5 0.4 0.4\n" if split == "val" else ""
            (root / "labels" / split / f"{number}.txt").write_text(text)
    (root / "data.yaml").write_text("names: [cat]\ntrain: images/train\nval: images/val\n")
    return root


def test_train_refuses_and_leaves_no_run(metr: CommandLine, tiny_run: TinyRun, empty: Path, tmp_path: Path) -> None:
    arguments = ["train", *tiny_run.data, empty, "-o", tmp_path / "run", "--config", tiny_run.recipe]
    for ended in (metr(*arguments), metr(*arguments, "--dry-run")):
        assert ended.code == 1
        assert all(part in ended.words for part in TOLD), ended.words
        assert "Done" not in ended.out
    assert not (tmp_path / "run" / "last").exists()


def test_train_goes_on_where_it_is_told_to_and_resumes_so(
    metr: CommandLine, tiny_run: TinyRun, empty: Path, tmp_path: Path
) -> None:
    arguments = ["train", tiny_run.data[0], empty, "-o", tmp_path / "run", "--config", tiny_run.recipe]
    ended = metr(*arguments, "--allow-empty")
    assert ended.code == 0, ended.err
    resumed = metr("train", "--resume", "-o", tmp_path / "run", "--steps", 4)
    assert resumed.code == 0, resumed.err


def test_finetune_refuses(metr: CommandLine, tiny_run: TinyRun, empty: Path, tmp_path: Path) -> None:
    arguments = ["--from", tiny_run.best, "-o", tmp_path / "run"]
    refused = metr("finetune", empty, *arguments)
    assert refused.code == 1
    assert all(part in refused.words for part in TOLD), refused.words
    rehearsed = metr("finetune", tiny_run.data[0], "--rehearse", empty, *arguments)
    assert rehearsed.code == 1
    assert TOLD[0] in rehearsed.words
    ended = metr("finetune", empty, *arguments, "--steps", 1, "--allow-empty")
    assert ended.code == 0, ended.err


def test_evaluate_refuses(metr: CommandLine, tiny_run: TinyRun, empty: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", tiny_run.best, empty, "-o", tmp_path / "out"]
    refused = metr(*arguments, "--split", "train")
    assert refused.code == 1
    assert TOLD[0] in refused.words
    assert metr(*arguments, "--split", "train", "--allow-empty").code == 0
    assert metr(*arguments).code == 0


def test_inspect_shows_it(metr: CommandLine, empty: Path) -> None:
    ended = metr("inspect", empty, "--set", "text.source=bundled:none")
    assert ended.code == 0
    assert "empty: 1 x split without a box" in ended.out
    assert "train: no box in 4 images" in ended.out
