"""Whether a place can be written is known before anything is written there."""

from pathlib import Path

import pytest

from metr.errors import CheckpointError
from metr.run_directory import explained_disk_errors, replaced_file
from metr.writable import check_file_to_write, check_folder_to_write


def test_a_place_that_can_be_written_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "new", tmp_path / "new/newer", Path(), Path("new")):
        check_folder_to_write(folder, ("table.json",))
        check_file_to_write(folder / "table.json")
    check_file_to_write(Path("table.json"))
    assert not list(tmp_path.iterdir())


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    inside = r"cannot be written: .*file is a file, and no folder\n  try: "
    for folder, told in (
        (tmp_path / "file", r"file: expected a folder, found a file of that name\n  try: "),
        (tmp_path / "file/a", f"file/a: {inside}"),
        (tmp_path / "file/a/b", f"file/a/b: {inside}"),
    ):
        with pytest.raises(CheckpointError, match=told):
            check_folder_to_write(folder)
        with pytest.raises(CheckpointError, match=told), explained_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    with pytest.raises(CheckpointError, match="link: expected a folder, found a link that leads nowhere"):
        check_folder_to_write(tmp_path / "link")
    with pytest.raises(CheckpointError, match=r"link/inside: cannot be written: .*link is a link that leads nowhere"):
        check_folder_to_write(tmp_path / "link/inside")
    with pytest.raises(CheckpointError, match="folder: expected a file, found a folder of that name"):
        check_file_to_write(tmp_path / "folder")
    with (
        pytest.raises(CheckpointError, match="folder: expected a file, found a folder of that name"),
        replaced_file(tmp_path / "folder") as fresh,
    ):
        fresh.touch()
    with pytest.raises(CheckpointError, match=r"a{300}: cannot be written: .*too long"):
        check_folder_to_write(tmp_path / ("a" * 300))


def test_other_processes_write_nothing_and_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("metr.writable.in_main_process", lambda: False)
    check_folder_to_write(tmp_path / "file")
