"""Folders that are replaced whole or not at all."""

import os
from pathlib import Path

import pytest

from metr.errors import CheckpointError
from metr.run_directory import RunDirectory, existing_folder, replaced_file, replaced_folder

MARKER = "state.json"


def fill(folder: Path, text: str) -> None:
    with replaced_folder(folder, MARKER) as fresh:
        (fresh / MARKER).write_text(text)
        (fresh / "data").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_new_takes_the_place_of_the_old(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    fill(folder, "first")
    (folder / "stale").touch()
    fill(folder, "second")
    assert (folder / "data").read_text() == "second"
    assert names(folder) == ["data", MARKER]
    assert names(folder.parent) == ["state"], "nothing is left beside it"


def test_a_failure_leaves_the_old_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    fill(folder, "first")
    with pytest.raises(ZeroDivisionError), replaced_folder(folder, MARKER) as fresh:
        (fresh / MARKER).write_text(str(1 / 0))
    assert (folder / "data").read_text() == "first"
    assert names(tmp_path) == ["state"]


def test_a_disk_that_refuses_is_one_message(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"cannot be written: .*No space"),
        replaced_folder(tmp_path / "a", MARKER),
    ):
        raise OSError(28, "No space left on device")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        fill(tmp_path / "file" / "state", "x")


def test_leftovers_of_a_crash_while_writing_do_not_matter(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    fill(folder, "first")
    (tmp_path / ".state.new").mkdir()
    (tmp_path / ".state.new" / "half").touch()
    assert existing_folder(folder) == folder
    fill(folder, "second")
    assert names(folder) == ["data", MARKER]
    assert names(tmp_path) == ["state"]


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    fill(folder, "first")
    folder.rename(tmp_path / ".state.previous")
    assert (existing_folder(folder) / "data").read_text() == "first"
    with pytest.raises(ZeroDivisionError), replaced_folder(folder, MARKER):
        raise ZeroDivisionError
    assert (folder / "data").read_text() == "first", "the old one is put back before a new one is tried"
    fill(folder, "second")
    assert names(tmp_path) == ["state"]


def test_a_run_that_was_killed_between_renames_is_settled(tmp_path: Path) -> None:
    """Also where nothing is saved any more, because the run was done: nothing stays beside its folders."""
    run = RunDirectory(tmp_path)
    for folder in (run.state, run.last, run.best):
        fill(folder, folder.name)
    run.state.rename(tmp_path / ".state.previous")
    for name in (".last.previous", ".last.new", ".best.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    run.settle()
    assert names(tmp_path) == ["best", "last", "state"]
    assert [(folder / "data").read_text() for folder in (run.state, run.last)] == ["state", "last"]


def half_a_file(path: Path, error: Exception) -> None:
    path.write_text("half")
    raise error


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("first", "second"):
        with replaced_file(path, flush=True) as fresh:
            assert fresh.suffix == ".yaml", "libraries go by it"
            fresh.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    for error, raised in ((ZeroDivisionError(), ZeroDivisionError), (OSError(28, "No space left"), CheckpointError)):
        with pytest.raises(raised), replaced_file(path) as fresh:
            half_a_file(fresh, error)
    assert path.read_text() == "second"
    assert names(tmp_path) == ["config.yaml"]


def test_other_peoples_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="not overwritten"):
        fill(tmp_path, "x")
    assert names(tmp_path) == ["thesis.tex"]
    empty = tmp_path / "empty"
    empty.mkdir()
    fill(empty, "x")
    assert names(empty) == ["data", MARKER]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_ordinary_permissions(tmp_path: Path, umask: int, mode: int) -> None:
    """Whatever a library gave them: safetensors' own writer lets the owner alone read a file."""
    before = os.umask(umask)
    try:
        with replaced_folder(tmp_path / "state", MARKER) as fresh:
            (fresh / MARKER).touch(mode=0o600)
            (fresh / "inner").mkdir()
            (fresh / "inner/data").touch(mode=0o600)
    finally:
        os.umask(before)
    assert names(tmp_path / "state") == ["inner", MARKER]
    for path in (tmp_path / "state" / MARKER, tmp_path / "state/inner/data"):
        assert path.stat().st_mode & 0o777 == mode
