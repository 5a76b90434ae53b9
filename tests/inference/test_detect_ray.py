"""Detection on Ray Data: the answers of the plain engine, whatever dies on the way; and nothing is left of ray."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from rich.console import Console

from metr.errors import ConfigError, DataError, DependencyError, MetrError
from metr.inference.detect_ray import RayConfig, _actors, detect_with_ray
from metr.inference.predictor import Predictor
from metr.inference.ray_session import RayResources

from ray_workers import NAMES, Loader
from tiny import CommandLine, TinyRun

SCRIPT = [sys.executable, "-c", "from metr.cli.main import run; run()"]

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


class Command:
    """`metr detect --engine ray` in a process group of its own."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [*SCRIPT, "detect", *map(str, arguments)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.family: list[tuple[psutil.Process, str]] = []

    def wait_for_parts(self, out: Path, number: int) -> None:
        """Waits until so many parts are complete, and remembers the processes."""
        deadline = time.monotonic() + 300
        while len(list(out.glob("detections-*"))) < number:
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                self.family.append((process, (process.cmdline() or [""])[0]))

    def end(self) -> tuple[int, str, str]:
        """The exit code, and what was said."""
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err


@pytest.fixture
def commands() -> Iterator[Callable[..., Command]]:
    """Starts commands, and leaves none alive."""
    started: list[Command] = []

    def start(*arguments: object) -> Command:
        started.append(Command(*arguments))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()
        for process, _ in one.family:
            with contextlib.suppress(psutil.Error):
                process.kill()


@slow
def test_a_killed_command_and_a_stopped_one_go_on(
    tiny_run: TinyRun, tmp_path: Path, commands: Callable[..., Command]
) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for number in range(120):
        os.link(tiny_run.unseen[number % 4], folder / f"{number:03}.jpg")
    arguments = [tiny_run.folder, folder, "-o", out, "--categories", ", ".join(NAMES)]
    arguments += ["--engine", "ray", "--actors", 1, "--part-size", 2, "--device", "cpu"]

    killed = commands(*arguments)
    killed.wait_for_parts(out, 3)
    killed.process.kill()
    killed.end()
    # ray's agents look for what is gone for a minute or so; the next command ends them
    workers = [process for process, name in killed.family if not name.endswith("Agent")]
    assert len(workers) > 4
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "ray's processes end with the command"
    assert list(Path("/tmp").glob(f"metr-ray-{killed.process.pid}-*")), "the session of a killed process is still there"

    reached = len(list(out.glob("detections-*")))
    stopped = commands(*arguments)
    stopped.wait_for_parts(out, reached + 2)
    os.killpg(stopped.process.pid, signal.SIGINT)  # as a terminal does
    code, said, err = stopped.end()
    assert code == 130, err
    assert "Traceback" not in err
    assert f"{reached} parts are complete already and skipped" in said
    assert "of 60 parts are complete; the same command goes on with the others" in said
    _, alive = psutil.wait_procs([process for process, _ in (*killed.family, *stopped.family)], timeout=15)
    assert not alive
    for one in (killed, stopped):
        assert not list(Path("/tmp").glob(f"metr-ray-{one.process.pid}-*"))

    code, said, err = commands(*arguments).end()
    assert code == 0, err
    # METR's own lines alone: a name that was not trained, and progress
    assert all(line.startswith("warning: ") or line.endswith(" left") for line in err.splitlines()), err
    assert "detections-*.parquet of all 120 images are in" in said
    assert_as_plain(written(out), Loader(tiny_run.folder)("cpu"), sorted(folder.iterdir()))


@pytest.fixture
def no_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray, of which nothing may be started."""
    monkeypatch.setitem(sys.modules, "ray", None)


def test_without_ray_the_way_to_it_is_told(
    tiny_run: TinyRun, metr: CommandLine, no_actors: None, tmp_path: Path
) -> None:
    with pytest.raises(DependencyError, match=r"pip install 'metr\[ray\]'"):
        detect_with_ray(Loader(tiny_run.folder), [tiny_run.unseen[0]], tmp_path / "out")
    ended = metr("detect", tiny_run.folder, tiny_run.unseen[0], "--engine", "ray", "-o", tmp_path / "out")
    assert ended.code == 1
    assert "pip install 'metr[ray]'" in ended.words
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--engine", "ray", "--labels", "none"], "--labels: ray draws nothing, so this option has no use"),
        (["--engine", "ray", "--device", "cuda:1"], "--device: expected auto, cpu, cuda with --engine ray"),
        (["--engine", "spark"], "no engine 'spark'"),
        (["--actors", "2"], "--actors: goes with --engine ray only"),
        (["--part-size", "2"], "--part-size: goes with --engine ray only"),
    ],
)
def test_options_without_a_use_are_refused(
    tiny_run: TinyRun, metr: CommandLine, no_actors: None, tmp_path: Path, arguments: list[str], told: str
) -> None:
    ended = metr("detect", tiny_run.folder, tiny_run.unseen[0], "-o", tmp_path / "out", *arguments)
    assert ended.code == 1
    assert told in ended.words
    assert not (tmp_path / "out").exists()


def test_a_list_of_images_serves_the_plain_engine_as_well(tiny_run: TinyRun, metr: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{tiny_run.unseen[1]}\n{tiny_run.unseen[0]}\n")
    out = tmp_path / "out"
    ended = metr("detect", tiny_run.folder, "--images-from", tmp_path / "list.txt", "-o", out)
    assert ended.code == 0, ended.err
    named = [one["file_name"] for one in json.loads((out / "images.json").read_text())["images"]]
    assert named == [str(tiny_run.unseen[1]), str(tiny_run.unseen[0])]
    ended = metr("detect", tiny_run.folder, "-o", out)
    assert ended.code == 1
    assert "expected images" in ended.words


def test_actors_are_one_a_gpu_or_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    gpus, cores = RayResources(cpus=16, gpus=4), RayResources(cpus=4, gpus=0)
    many = _actors(RayConfig(), gpus)
    assert (many.number, many.cpu, many.gpu, many.device, many.threads) == (4, 4.0, 1.0, "cuda", 4)
    two = _actors(RayConfig(actors=2), gpus)
    assert (two.number, two.cpu, two.gpu) == (2, 8.0, 1.0)
    assert _actors(RayConfig(device="cpu", actors=3), gpus).gpu == 0
    crowd = _actors(RayConfig(actors=8), cores)
    assert (crowd.number, crowd.cpu, crowd.threads, crowd.device) == (8, 0.5, 1, "cpu")
    assert 1 <= _actors(RayConfig(), cores).number <= 4
    for config, resources in ((RayConfig(actors=5), gpus), (RayConfig(device="cuda"), cores)):
        with pytest.raises(ConfigError, match="expected a GPU for each of"):
            _actors(config, resources)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert _actors(RayConfig(actors=1), cores).threads == 2


def test_a_place_without_images_is_an_error_before_ray_starts(tiny_run: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image in this folder"):
        detect_with_ray(Loader(tiny_run.folder), [tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
