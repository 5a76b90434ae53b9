"""Folders that are replaced whole or not at all."""

import os
from pathlib import Path

import pytest

from metr.errors import CheckpointError
from metr.run_directory import existing_folder, replaced_folder

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
