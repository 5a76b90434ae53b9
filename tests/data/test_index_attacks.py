"""What damaged or hostile files do to the index: it is built again, and never tells boxes that are not there."""

import json
import os
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from reader_trees import coco_plain, made_up, yolo_plain
from test_index import builds, opened

from metr.data.formats.base import LONGEST_NAME, Names, plain_name
from metr.data.images import probe_size
from metr.data.index.manifest import packed_name, unpacked_name
from metr.data.regular_files import open_regular
from metr.errors import DataError

__all__ = ["builds"]


def content(tmp_path: Path) -> list[tuple[str, list, list]]:
    source = opened(tmp_path)
    return [
        (record.path.name, record.boxes.tolist(), [source.categories[label] for label in record.labels])
        for split in source.splits.values()
        for record in split
    ]


def test_a_flipped_bit_anywhere_has_it_built_again(tmp_path: Path, builds: list[Path]) -> None:
    coco_plain(tmp_path / "data", made_up())
    before, chance = content(tmp_path), random.Random(0)
    folder = opened(tmp_path).split("train").path.parent
    for round_, name in enumerate(["train.arrow", "manifest.json"] * 25, start=2):
        file = folder / name
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        assert content(tmp_path) == before
        assert len(builds) == round_


@pytest.mark.parametrize("name", ["\0", "\0zz", "a\0b/c.jpg", "\0 00.jpg", "x" * 5000, "../../x\0"])
def test_a_file_name_that_no_file_has(name: str, tmp_path: Path, builds: list[Path]) -> None:
    coco_plain(tmp_path / "data", made_up())
    file = tmp_path / "data" / "annotations" / "instances_val2017.json"
    tree = json.loads(file.read_text())
    tree["images"].append({"id": 999, "file_name": name, "width": 8, "height": 8})
    file.write_text(json.dumps(tree))
    before = content(tmp_path)
    assert sum(opened(tmp_path).issue_counts.values()) == 1
    assert content(tmp_path) == before
    assert len(builds) == 1
    assert unpacked_name(packed_name(name)) == name


def test_a_file_edited_in_place_with_its_times_kept(tmp_path: Path, builds: list[Path]) -> None:
    coco_plain(tmp_path / "data", made_up())
    file = tmp_path / "data" / "annotations" / "instances_val2017.json"
    before, status = content(tmp_path), file.stat()
    text = file.read_text()
    file.write_text(text.replace("cat", "cow"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after = content(tmp_path)
    assert (after != before) == ("cat" in text)
    assert len(builds) == 2


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    coco_plain(tmp_path / "data", made_up())
    place = opened(tmp_path).split("train").path.parents[1]
    (place / ".building-0123").mkdir()
    (place / ".building-0123" / "train.arrow").write_bytes(b"half")
    file = tmp_path / "data" / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text() + " ")
    opened(tmp_path)
    assert not list(place.glob(".building-*"))


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    held = socket.socket(socket.AF_UNIX)
    try:
        held.bind(str(path))
    except OSError:  # a socket's path is short
        pytest.skip("the folder's path is too long for a socket")
    finally:
        held.close()


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_pipe, _socket, _device])
@pytest.mark.parametrize("kind", ["image", "annotation", "list"])
def test_pipes_sockets_and_devices_are_not_opened(
    make: Callable[[Path], None], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    (yolo_plain if kind == "list" else coco_plain)(root, made_up())
    if kind == "image":
        file = next(path for path in root.rglob("*") if path.suffix in {".jpg", ".png"})
    elif kind == "annotation":
        file = root / "annotations" / "instances_val2017.json"
    else:
        file = next(root.glob("labels/*/*.txt"))
    file.unlink()
    monkeypatch.chdir(file.parent)
    make(Path(file.name))

    said: list[str] = []

    def read() -> None:
        try:
            content(tmp_path)
            if kind == "image":
                probe_size(file)
        except DataError as error:
            said.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert not said or any(words in said[0] for words in ("not a file", "no image", "not recognised"))


def test_a_sparse_file_of_gigabytes_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coco_plain(tmp_path / "data", made_up())
    file = tmp_path / "data" / "annotations" / "instances_val2017.json"
    with file.open("r+b") as opened_file:
        opened_file.truncate(40 << 30)
    opened(tmp_path)
    assert "instances_val2017.json is left out: 42,949,672,960 bytes of which nearly none" in caplog.text
    with pytest.raises(OSError, match="nearly none are on the disk"):
        open_regular(file)


def test_names_are_of_bounded_length(tmp_path: Path) -> None:
    long = ["a" * 1_000_000 + end for end in "xy"]
    names = Names()
    assert [names.number(name) for name in (*long, *long)] == [0, 1, 0, 1]
    assert {len(name) for name in names} == {LONGEST_NAME}
    assert all(plain_name(name) == name for name in names)
    coco_plain(tmp_path / "data", made_up())
    file = tmp_path / "data" / "annotations" / "instances_val2017.json"
    tree = json.loads(file.read_text())
    tree["categories"][0]["name"] = long[0]
    file.write_text(json.dumps(tree))
    source = opened(tmp_path)
    assert max(map(len, source.categories)) == LONGEST_NAME
    assert source.issue_counts["long name"] == 1
