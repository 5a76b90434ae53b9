"""Ray in the process of the tests themselves; `test_detect_ray.py` runs this file in a process of its own."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from rich.console import Console

from metr.errors import MetrError
from metr.inference.detect_ray import RayConfig, detect_with_ray
from metr.inference.predictor import Predictor

from ray_workers import Loader
from tiny import TinyRun

ray_runs = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes and sessions as Linux has them"),
    # ray's own: what it calls without arguments that will be needed one day, and files that it leaves to the collector
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore:.*subprocess .* is still running:ResourceWarning"),
]


def slow(test: Any) -> Any:
    for mark in ray_runs:
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def _found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's processes import modules of the tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*filter(None, sys.path)]))


@pytest.fixture
def images(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """Twenty images in a folder and its subfolder, two of which cannot be read."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number in range(18):
        shutil.copy(tiny_run.unseen[number % 4], folder / f"{'more/' if number % 3 else ''}{number:02}.jpg")
    (folder / "broken.png").touch()
    (folder / "more/cut.jpg").write_bytes(tiny_run.unseen[0].read_bytes()[:300])
    return folder


def written(out: Path) -> list[dict[str, Any]]:
    """All rows, part after part."""
    return [row for path in sorted(out.glob("detections-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def assert_as_plain(rows: list[dict[str, Any]], plain: Predictor, images: list[Path]) -> None:
    """Whether the rows are the images, each once and in order, with what the plain engine says of each."""
    assert [row["image"] for row in rows] == [str(path) for path in images]
    for row, one in zip(rows, plain.detect_many(images), strict=True):
        if one.detections is None:
            assert one.issue is not None
            assert row["error"] == one.issue.detail
            assert row["boxes"] is row["scores"] is row["categories"] is None
            continue
        found = one.detections
        assert row["error"] is None
        assert (row["height"], row["width"]) == one.size
        assert row["categories"] == [found.names[label] for label in found.labels.tolist()]
        torch.testing.assert_close(torch.tensor(row["scores"]), found.scores, rtol=0, atol=1e-5)
        boxes = torch.tensor(row["boxes"]).reshape(-1, 4)
        torch.testing.assert_close(boxes, found.boxes, rtol=1e-5, atol=1e-5)


def remains() -> tuple[set[Path], list[str]]:
    """Sessions of this process, and its processes that are ray's."""
    names = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    return set(Path("/tmp").glob(f"metr-ray-{os.getpid()}-*")), [name for name in names if "ray" in name]


@slow
def test_answers_are_those_of_the_plain_engine_and_nothing_is_left(
    tiny_run: TinyRun, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load, out = Loader(tiny_run.folder), tmp_path / "made/out"
    config = RayConfig(actors=2, part_size=6, cpus=2, device="cpu")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with (tmp_path / "said").open("w") as file:
        done = detect_with_ray(load, [images], out, config=config, console=Console(file=file, width=200))
    assert remains() == (set(), [])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert capfd.readouterr() == ("", "")
    assert (done.images, done.failed, done.parts, done.skipped) == (20, 2, 4, 0)
    assert_as_plain(written(out), load("cpu"), sorted(images.rglob("*.*g")))
    failed = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert [one["image"] for one in failed] == [str(images / "broken.png"), str(images / "more/cut.jpg")]
    assert failed[0]["error"] == "an empty file (0 bytes), not an image"
    said = (tmp_path / "said").read_text()
    assert "20 images in 4 parts of up to 6\nactors: 2 on CPUs, 1 thread each\n" in said
    assert "2 of 20 images could not be read, such as " in said

    # once more: everything is there, and ray is not even started
    before = {path: path.stat().st_mtime_ns for path in out.glob("detections-*")}
    again = detect_with_ray(load, [images], out, config=config)
    assert (again.skipped, again.failed, again.seconds) == (4, 2, 0)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("detections-*")}
    (images / "new.jpg").write_bytes((images / "00.jpg").read_bytes())
    with pytest.raises(MetrError, match="other images: 1 new"):
        detect_with_ray(load, [images], out, config=config)


@slow
def test_killed_workers_lose_and_double_nothing(
    tiny_run: TinyRun,
    images: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A worker is killed at an image once, and at another one whenever it is touched."""
    for width, name in ((77, "more/05.jpg"), (78, "more/13.jpg")):
        with Image.open(tiny_run.unseen[0]) as image:
            image.resize((width, 60)).save(images / name)
    marks, out = tmp_path / "marks", tmp_path / "out"
    marks.mkdir()
    config = RayConfig(actors=2, part_size=6, cpus=2, device="cpu")
    done = detect_with_ray(Loader(tiny_run.folder, marks), [images], out, config=config)
    assert remains() == (set(), [])
    assert capfd.readouterr() == ("", "")
    told = sorted(message for message in caplog.messages if "died" in message)
    assert told == [
        "part 1: the process that detects died once; it was done again",
        "part 2: the process that detects died 3 times; it was done again",
    ]
    assert len(list(marks.glob("77-*"))) == 1
    assert len(list(marks.glob("78-*"))) == 3  # in the fast attempt, and in two that name it
    assert (done.images, done.failed) == (20, 3)
    rows = written(out)
    fatal = str(images / "more/13.jpg")
    (lost,) = [row for row in rows if row["image"] == fatal]
    assert lost["error"] == "the process that detects died at this image, twice"
    every = sorted(images.rglob("*.*g"))
    assert sorted(row["image"] for row in rows) == sorted(map(str, every))
    others = [row for row in rows if row is not lost]
    assert_as_plain(others, Loader(tiny_run.folder)("cpu"), [path for path in every if str(path) != fatal])
    assert not list(out.glob(".part-*"))
    assert not list(out.glob(".*.new.*"))
