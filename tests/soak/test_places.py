"""Folders that cannot be written, and no home: it works, or says why. Two runs in one folder; data that change."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from metr.training.logger import read_metrics

from tiny import CommandLine, TinyRun, train_arguments

pytestmark = pytest.mark.slow


def warned(caplog: pytest.LogCaptureFixture) -> str:
    """The warnings of METR in one line; on the screen they are wrapped, in the middle of a path too."""
    own = [one for one in caplog.records if one.name.startswith("metr") and one.levelname == "WARNING"]
    return " ".join(one.getMessage() for one in own)


def test_a_dataset_that_cannot_be_written_is_like_any_other(
    tiny_run: TinyRun,
    read_only: Callable[[Path], Path],
    metr: CommandLine,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = read_only(tiny_run.datasets[0].parent)
    data = [place / one.name for one in tiny_run.datasets]
    ended = metr("train", *data, "-o", tmp_path / "run", "--config", tiny_run.recipe)
    assert (ended.code, warned(caplog)) == (0, ""), ended.words


def test_a_cache_that_cannot_be_written_costs_a_warning(
    tiny_run: TinyRun,
    read_only: Callable[[Path], Path],
    metr: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "empty").mkdir()
    place = read_only(tmp_path / "empty")
    monkeypatch.setenv("METR_CACHE", str(place))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = metr(*train_arguments(tiny_run, tmp_path / "run"))
    assert ended.code == 0, ended.words
    assert f"{place / 'index'} cannot be written" in warned(caplog)
    assert "text embeddings are not kept on disk" in warned(caplog)
    assert "set METR_CACHE to a writable folder" in warned(caplog)


def test_a_cache_that_was_filled_before_need_not_be_writable(
    tiny_run: TinyRun,
    read_only: Callable[[Path], Path],
    metr: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = tmp_path / "filled"
    monkeypatch.setenv("METR_CACHE", str(cache))
    assert metr(*train_arguments(tiny_run, tmp_path / "first")).code == 0
    monkeypatch.setenv("METR_CACHE", str(read_only(cache)))
    ended = metr(*train_arguments(tiny_run, tmp_path / "second"))
    assert (ended.code, warned(caplog)) == (0, ""), ended.words


def test_a_run_folder_that_cannot_be_written_is_said(
    tiny_run: TinyRun, read_only: Callable[[Path], Path], metr: CommandLine, tmp_path: Path
) -> None:
    shutil.copytree(tiny_run.folder, tmp_path / "runs/old")
    place = read_only(tmp_path / "runs")
    commands = {
        place / "new": train_arguments(tiny_run, place / "new"),
        place / "old": ("train", "--resume", "-o", place / "old", "--steps", 9),
        place / "old/evaluation": ("evaluate", place / "old", *tiny_run.data),
        place / "found": ("detect", place / "old", *tiny_run.unseen, "-o", place / "found"),
    }
    for out, command in commands.items():
        ended = metr(*command)
        assert (ended.code, "cannot be written" in ended.words) == (1, True), ended.words
        assert str(out) in ended.words
        assert "folder may be written" in ended.words


@pytest.mark.parametrize("home", ["none", "read-only"])
def test_without_a_home(
    home: str,
    tiny_run: TinyRun,
    metr: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A user without a home has the cache in the temporary folder; where HOME cannot be written, a warning is shown."""
    monkeypatch.delenv("METR_CACHE")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    if home == "none":
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    else:
        (tmp_path / "home").mkdir()
        monkeypatch.setenv("HOME", str(request.getfixturevalue("read_only")(tmp_path / "home")))
    ended = metr(*train_arguments(tiny_run, tmp_path / "run"))
    assert ended.code == 0, ended.words
    assert ("METR_CACHE" in warned(caplog)) == (home == "read-only")
    assert (tmp_path / "tmp/metr/index").is_dir() == (home == "none")


def test_a_second_run_in_the_folder_is_refused_and_a_killed_one_frees_it(
    tiny_run: TinyRun, metr: CommandLine, tmp_path: Path
) -> None:
    """Its workers, which are copies of it, do not keep the folder for long."""
    run = tmp_path / "run"
    arguments = train_arguments(tiny_run, run, "--steps", 100_000, "--set", "loader.workers=2")
    script = [sys.executable, "-c", "from metr.cli.main import run; run()", *map(str, arguments)]
    first = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while len(read_metrics(run)) < 2:
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.1)
        ended = metr(*train_arguments(tiny_run, run))
        assert ended.code == 1
        assert "another process trains in this folder" in ended.words
        assert "Traceback" not in ended.words
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
    ended = metr(*train_arguments(tiny_run, run))
    assert ended.code == 0, ended.words


CHANGES = ("a box is moved", "an image is added", "an image is removed")


@pytest.mark.parametrize("change", CHANGES)
def test_data_that_changed_before_resuming_are_named_and_read_anew(
    change: str, tiny_run: TinyRun, metr: CommandLine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = [Path(shutil.copytree(one, tmp_path / one.name)) for one in tiny_run.datasets]
    run = tmp_path / "run"
    assert metr("train", *data, "-o", run, "--config", tiny_run.recipe).code == 0
    (folder,) = (one for one in data if list(one.rglob("*.json")))
    (file,) = (path for path in folder.rglob("*.json") if "train" in path.as_posix())
    status, text = file.stat(), file.read_text()
    tree = json.loads(text)
    if change == "a box is moved":  # same size, same time of change
        x = tree["annotations"][0]["bbox"][0]
        digit = next(letter for letter in str(x) if letter.isdigit())
        tree["annotations"][0]["bbox"][0] = type(x)(str(x).replace(digit, "1" if digit != "1" else "2", 1))
    elif change == "an image is added":
        first = tree["images"][0]
        image = next(folder.rglob(Path(first["file_name"]).name))
        shutil.copy(image, image.with_name("added.jpg"))
        name = str(Path(first["file_name"]).with_name("added.jpg"))
        tree["images"].append({**first, "id": 9999, "file_name": name})
        tree["annotations"].append({**tree["annotations"][0], "id": 9999, "image_id": 9999})
    else:
        gone = tree["images"].pop()
        tree["annotations"] = [one for one in tree["annotations"] if one["image_id"] != gone["id"]]
        next(folder.rglob(Path(gone["file_name"]).name)).unlink()
    separators = (",", ":") if '": ' not in text else None
    file.write_text(json.dumps(tree, separators=separators, indent=1 if "\n " in text else None))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    ended = metr("train", "--resume", "-o", run, "--steps", 4)
    assert ended.code == 0, ended.words
    assert f"{folder.name}: its files have changed since the run was here last" in warned(caplog)
    counts = {
        "a box is moved": "as many images as before",
        "an image is added": "now train 5",
        CHANGES[2]: "now train 3",
    }
    assert counts[change] in warned(caplog)
