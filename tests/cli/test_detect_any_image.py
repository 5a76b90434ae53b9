"""`metr detect` on a folder of images of every kind: a clear line for each, and no traceback."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from odd_images import READABLE, UNREADABLE, write_all

from tiny import CommandLine, TinyRun, read_coco


def lines(out: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Name and the rest of each line about an image of the folder."""
    for line in out.splitlines():
        told = line.removeprefix("skipped ")
        if told.startswith(f"{folder}/"):
            name, _, rest = told.removeprefix(f"{folder}/").partition(": ")
            yield unicodedata.normalize("NFC", name), ("skipped " if told != line else "") + rest


def test_a_folder_of_everything(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "photos"
    some = {name: save for name, save in READABLE.items() if not name.startswith("turned") or name.endswith(".jpg")}
    assert len(some) > 16
    write_all(folder, some | UNREADABLE)
    write_all(folder / "deeper", {"inside.png": READABLE["opaque.png"]})
    write_all(tmp_path / "far", {"linked.png": READABLE["opaque.png"]})
    (folder / "link").symlink_to(tmp_path / "far")
    (folder / "deeper" / "up").symlink_to(folder)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")  # reading it would wait for ever
    (folder / "notes.txt").write_text("no image")
    ended = metr("detect", tiny_run.folder, folder, "-o", tmp_path / "out", "--threshold", 0)
    assert ended.code == 0, ended
    assert "Traceback" not in ended.out + ended.err
    found = list(lines(ended.out, folder))
    told = dict(found)
    assert len(found) == len(told), "one line each"
    skipped = {name: rest for name, rest in told.items() if rest.startswith("skipped ")}
    assert skipped.keys() == UNREADABLE.keys()
    assert "0 bytes" in skipped["empty.png"]
    assert "30000 x 30000" in skipped["bomb.jpg"]
    assert "no such image" in skipped["link to nothing.png"]
    images, _ = read_coco(tmp_path / "out")
    wanted = {unicodedata.normalize("NFC", name) for name in [*some, "deeper/inside.png", "link/linked.png"]}
    looked_at = [str(Path(one["file_name"]).relative_to(folder)) for one in images["images"]]
    assert len(looked_at) == len(wanted)
    assert {unicodedata.normalize("NFC", name) for name in looked_at} == wanted
    assert {(one["height"], one["width"]) for one in images["images"]} == {(40, 60)}
    # the first twenty have lines of their own, the rest is counted
    assert len(told) - len(skipped) == 20
    assert f"and {len(wanted) - 20} more" in ended.out


def test_only_what_cannot_be_read(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    write_all(tmp_path / "photos", UNREADABLE)
    ended = metr("detect", tiny_run.folder, tmp_path / "photos", "-o", tmp_path / "out")
    assert ended.code == 1
    assert ended.err.startswith("error: ")
    assert f"none of {len(UNREADABLE)} images could be read" in ended.err
