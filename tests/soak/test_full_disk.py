"""A disk that is full: one clear message, an exit code, nothing lost; after space is freed it goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from metr.checkpoint import load_checkpoint
from metr.training.logger import read_metrics
from metr.training.train import train
from small_disk import SmallDisk

from tiny import CommandLine, TinyRun, read_coco, train_arguments

pytestmark = pytest.mark.slow
MORE = ("--set", "train.loop.images=true", "--set", "train.loop.curves=true", "--set", "train.loop.evaluate_every=2")
ROOM = (0, 4 << 10, 12 << 10, 40 << 10, 160 << 10, 500 << 10, 1 << 20)


@pytest.mark.parametrize("room", ROOM)
def test_training_ends_in_a_message_keeps_its_checkpoint_and_goes_on(
    room: int, tiny_run: TinyRun, small_disk: SmallDisk, metr: CommandLine
) -> None:
    """However much room is left: for the log alone, for an image, for the weights but not for the optimizer."""
    run = small_disk.path / "run"
    shutil.copytree(tiny_run.folder, run)
    begun = json.loads((run / "state/state.json").read_text())["step"]
    small_disk.leave(room)
    ended = metr("train", "--resume", "-o", run, "--steps", begun + 3, *MORE)
    if ended.code:
        assert ended.code == 1
        assert "cannot be written" in ended.words
        assert str(run) in ended.words
        assert "check that the disk has room" in ended.words
    assert load_checkpoint(run).weights
    assert load_checkpoint(run / "last").weights
    assert json.loads((run / "state/state.json").read_text())["step"] >= begun
    small_disk.free()
    if ended.code:
        assert metr("train", "--resume", "-o", run, "--steps", begun + 3, *MORE).code == 0
    assert [record["step"] for record in read_metrics(run) if record["kind"] == "train"] == list(range(1, begun + 4))
    assert not [path.name for path in run.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_it_ends_as_on_a_large_disk(
    tiny_run: TinyRun, small_disk: SmallDisk, metr: CommandLine, tmp_path: Path
) -> None:
    for run in (tmp_path / "whole", small_disk.path / "run"):
        shutil.copytree(tiny_run.folder, run)
    train(None, tmp_path / "whole", resume=True, overrides=["train.loop.steps=6"])
    small_disk.leave(100 << 10)
    assert metr("train", "--resume", "-o", small_disk.path / "run", "--steps", 6).code == 1
    small_disk.free()
    assert metr("train", "--resume", "-o", small_disk.path / "run", "--steps", 6).code == 0
    ours, theirs = (load_checkpoint(run / "last").weights for run in (tmp_path / "whole", small_disk.path / "run"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize("room", [0, 8 << 10])
def test_a_new_run_leaves_nothing_that_looks_like_a_run(
    room: int, tiny_run: TinyRun, small_disk: SmallDisk, metr: CommandLine
) -> None:
    run = small_disk.path / "run"
    small_disk.leave(room)
    ended = metr(*train_arguments(tiny_run, run))
    assert (ended.code, "cannot be written" in ended.words, str(run) in ended.words) == (1, True, True), ended.words
    small_disk.free()
    assert metr(*train_arguments(tiny_run, run)).code == 0


@pytest.mark.parametrize("room", ROOM[:4])
def test_a_full_cache_costs_time_alone(
    room: int,
    tiny_run: TinyRun,
    small_disk: SmallDisk,
    metr: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("METR_CACHE", str(small_disk.path / "cache"))
    small_disk.leave(room)
    ended = metr("evaluate", tiny_run.folder, *tiny_run.data, "-o", small_disk.path.parent / "out")
    assert ended.code == 0, ended.words
    assert "cannot be written" in caplog.text or "METR_CACHE" in caplog.text or room >= 40 << 10
    left = [path for path in small_disk.path.rglob("*") if path.name.startswith(".building") or path.suffix == ".part"]
    assert left == []


def test_a_full_cache_and_a_full_temporary_folder_are_said(
    tiny_run: TinyRun, small_disk: SmallDisk, metr: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METR_CACHE", str(small_disk.path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(small_disk.path))
    small_disk.leave(8 << 10)
    ended = metr("inspect", tiny_run.data[0])
    assert ended.code == 1
    assert "cannot be written" in ended.words
    assert "free some disk space, or name another folder in METR_CACHE" in ended.words


@pytest.mark.parametrize("room", ROOM[:5])
def test_detection_says_what_it_cannot_write(
    room: int, tiny_run: TinyRun, small_disk: SmallDisk, metr: CommandLine
) -> None:
    small_disk.leave(room)
    out = small_disk.path / "out"
    arguments = ("detect", tiny_run.folder, *tiny_run.unseen, "-o", out, "--threshold", 0)
    ended = metr(*arguments)
    if ended.code:
        assert ended.code == 1
        assert "check that the disk has room" in ended.words
        assert str(out) in ended.words
    else:
        assert room >= 160 << 10
    small_disk.free()
    assert metr(*arguments).code == 0
    images, _ = read_coco(out)
    assert len(images["images"]) == len(tiny_run.unseen)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


WRITERS = {
    "evaluate": lambda run, out: ("evaluate", run.folder, *run.data, "-o", out),
    "inspect --write": lambda run, out: ("inspect", *run.data, "--write", out / "data.yaml"),
    "inspect --draw": lambda run, out: ("inspect", *run.data, "--draw", out / "sheets"),
    "inspect --export": lambda run, out: ("inspect", run.data[0], "--export", "coco", out / "export"),
    "transfer": lambda run, out: ("transfer", run.folder, "--to", "deformable_detr", "-o", out / "other"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_writes_says_where_there_is_no_room(
    writer: str, tiny_run: TinyRun, small_disk: SmallDisk, metr: CommandLine
) -> None:
    for room in (0, 8 << 10):
        out = small_disk.path / f"out{room}"
        small_disk.leave(room + (4 << 10))
        out.mkdir()
        ended = metr(*WRITERS[writer](tiny_run, out))
        if room or ended.code:
            assert ended.code in {0, 1}
        if ended.code:
            assert str(small_disk.path) in ended.words
            assert "room" in ended.words or "space" in ended.words
