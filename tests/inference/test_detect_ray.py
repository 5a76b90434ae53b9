"""Detection on Ray Data: the answers of the plain engine, whatever dies on the way; and nothing is left of ray."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ray_in_process import assert_as_plain, slow, written

from metr.errors import ConfigError, DataError, DependencyError
from metr.inference.detect_ray import RayConfig, _actors, detect_with_ray
from metr.inference.ray_session import RayResources

from ray_workers import NAMES, Loader
from tiny import CommandLine, TinyRun

SCRIPT = [sys.executable, "-c", "from metr.cli.main import run; run()"]


@slow
def test_sessions_in_the_same_process() -> None:
    """Ray may end the process that started it, in native code: then this test fails, and no others with it."""
    here = Path(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    ended = subprocess.run(
        [*command, str(here.with_name("ray_in_process.py"))],
        cwd=here.parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 passed" in ended.stdout


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


HOLDS_AND_STOPS = """
from metr.inference.ray_session import imported_ray, ray_session

ray = imported_ray()

class Held:
    def __del__(self):
        print("ended while ray was", "there" if ray.is_initialized() else "gone")

def work():
    held = Held()
    try:
        raise ValueError
    finally:
        raise KeyboardInterrupt

try:
    with ray_session(ray, 1):
        work()
except KeyboardInterrupt:
    print("stopped")
"""


@slow
def test_what_a_stopped_command_held_of_ray_ends_before_ray() -> None:
    """Ray's iterators ask ray when they end: where it is gone they start it again, or the process dies."""
    command = [sys.executable, "-c", HOLDS_AND_STOPS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    assert ended.stdout == "ended while ray was there\nstopped\n"


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
