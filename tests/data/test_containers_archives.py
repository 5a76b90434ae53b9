"""Archives: read as the folder that is in them, unpacked once, and never to a place outside of the cache."""

import io
import logging
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from reader_trees import hidden_beside, save_image, write_json, write_text

from metr.data.containers import archives, store
from metr.data.datasets_file import DatasetSource, open_dataset, parse_data_arguments
from metr.errors import DataError

KINDS = ("zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz")
Pack = Callable[[Path, Path], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unpacked"


def yolo(root: Path, box: str = "0 0.5 0.5 0.2 0.2") -> Path:
    save_image(root / "train" / "images" / "a.jpg")
    save_image(root / "val" / "images" / "b.jpg")
    write_text(root / "train" / "labels" / "a.txt", box)
    write_text(root / "val" / "labels" / "b.txt", "")
    write_text(root / "data.yaml", "names: [cell]\ntrain: train/images\nval: val/images\n")
    return root


def packed(folder: Path, target: Path, top: str = "") -> Path:
    """An archive of a folder, its files below `top`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in files:
                archive.write(path, top + path.relative_to(folder).as_posix())
    else:
        kind = {"tar": "w", "tgz": "w:gz", "gz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}[target.suffix[1:]]
        with tarfile.open(target, kind) as archive:
            for path in files:
                archive.add(path, top + path.relative_to(folder).as_posix())
    return target


def opened(path: Path) -> DatasetSource:
    (config,) = parse_data_arguments([str(path)])
    return open_dataset(config)


def copies(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/[!.]*/"))


def tar_of(path: Path, *members: tuple[str, bytes, str]) -> Path:
    """A tar of entries: name, kind, and contents or where a link leads."""
    with tarfile.open(path, "w") as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content.encode())
                archive.addfile(info, io.BytesIO(content.encode()))
            else:
                info.linkname = content
                archive.addfile(info)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", ["", "my data/", "a/b/"])
def test_an_archive_is_read_as_the_folder_in_it(
    tmp_path: Path, cache: Path, kind: str, top: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = packed(yolo(tmp_path / "plain"), tmp_path / "in" / f"cells.v2.{kind}", top)
    source = opened(path)
    assert (source.name, source.format, source.categories) == ("cells.v2", "yolo", ("cell",))
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 1, "val": 1}
    assert source.splits["train"][0].boxes.tolist() == [[16, 12, 24, 18]]
    assert source.splits["train"][0].path.read_bytes() == (tmp_path / "plain/train/images/a.jpg").read_bytes()
    told = [record.message for record in caplog.records if "unpacked once" in record.message]
    assert len(told) == 1
    assert str(copies(cache)[0]) in told[0]
    assert "kB" in told[0]
    before = copies(cache)[0].stat().st_ino
    opened(path)
    assert copies(cache)[0].stat().st_ino == before
    assert len([record for record in caplog.records if "unpacked once" in record.message]) == 1


@pytest.mark.parametrize("top", ["", "my data/"])
def test_what_macos_packs_beside_the_files_is_passed_over(tmp_path: Path, top: str) -> None:
    hidden_beside(yolo(tmp_path / "plain" / top))
    source = opened(packed(tmp_path / "plain", tmp_path / "cells.zip"))
    assert source.issues == ()
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 1, "val": 1}


@pytest.mark.parametrize("below", ["annotations", "train"])
def test_a_folder_of_a_layout_at_the_top_is_kept(tmp_path: Path, below: str) -> None:
    root = tmp_path / "plain" / below
    save_image(root / "a.jpg")
    voc = (
        "<annotation><filename>a.jpg</filename><size><width>40</width><height>30</height></size><object><name>x</name>"
    )
    voc += "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
    write_text(root / "a.xml", voc)
    save_image(root / "b.jpg")
    write_text(root / "b.xml", voc.replace("a.jpg", "b.jpg"))
    source = opened(packed(tmp_path / "plain", tmp_path / "x.zip", "export/"))
    assert source.root.name == "export"
    assert source.format == "voc"


def test_a_changed_archive_is_unpacked_anew_and_the_earlier_copy_removed(tmp_path: Path, cache: Path) -> None:
    path = packed(yolo(tmp_path / "plain"), tmp_path / "cells.zip")
    first = opened(path).root
    packed(yolo(tmp_path / "plain", "0 0.5 0.5 0.4 0.2"), path)
    os.utime(path, ns=(1, 1))
    source = opened(path)
    assert source.splits["train"][0].boxes.tolist() == [[12, 12, 28, 18]]
    assert copies(cache) == [source.root]
    assert not first.exists()


def test_a_copy_that_lost_files_is_unpacked_anew(tmp_path: Path) -> None:
    path = packed(yolo(tmp_path / "plain"), tmp_path / "cells.zip")
    image = opened(path).splits["train"][0].path
    image.unlink()
    assert opened(path).splits["train"][0].path.exists()


def test_a_killed_unpacking_is_not_taken_for_complete(tmp_path: Path, cache: Path) -> None:
    path = packed(yolo(tmp_path / "plain"), tmp_path / "cells.zip")
    killed = (
        "import os, sys\nfrom pathlib import Path\nfrom metr.data.containers import archives\nwrite = archives._write\n"
        "def dies(entry, *rest):\n    write(entry, *rest)\n    os._exit(9)\n"
        "archives._write = dies\narchives.archive_folders(Path(sys.argv[1]))\n"
    )
    result = subprocess.run([sys.executable, "-c", killed, str(path)], check=False, capture_output=True)
    assert result.returncode == 9, result.stderr
    (left,) = cache.glob("*/.building-*")
    assert any(left.rglob("*"))
    opened(path)
    assert not left.exists()
    # killed between the copy and the note of it
    (note,) = cache.glob("*/*.json")
    note.unlink()
    assert len(opened(path).splits) == 2
    assert len(copies(cache)) == 1


def test_a_read_only_folder_and_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = packed(yolo(tmp_path / "plain"), tmp_path / "read-only" / "cells.zip")
    path.parent.chmod(0o555)
    assert len(opened(path).splits) == 2
    path.parent.chmod(0o755)
    write_text(tmp_path / "file", "")
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "file"))
    folders = {opened(path).root for _ in range(2)}
    assert len(folders) == 1
    assert "for this run only" in caplog.text


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("../out.txt", tarfile.REGTYPE, "x")], r"'\.\./out\.txt', a path that leads out"),
        ([("a/../../out.txt", tarfile.REGTYPE, "x")], "a path that leads out"),
        ([("/out.txt", tarfile.REGTYPE, "x")], "a path that leads out"),
        ([("C:\\out.txt", tarfile.REGTYPE, "x")], "a path that leads out"),
        ([("a\\..\\..\\out.txt", tarfile.REGTYPE, "x")], "a path that leads out"),
        ([("link", tarfile.SYMTYPE, "/etc/passwd")], "a link that leads out"),
        ([("link", tarfile.SYMTYPE, "..\\..\\x")], "a link that leads out"),
        ([("link", tarfile.SYMTYPE, "../../..")], "a link that leads out"),
        ([("a/link", tarfile.LNKTYPE, "../out.txt")], "a link that leads out"),
        ([("a/b", tarfile.DIRTYPE, ""), ("d", tarfile.SYMTYPE, "a/b"), ("e", tarfile.SYMTYPE, "d/../../..")], "leads"),
        ([("pipe", tarfile.FIFOTYPE, "")], "a device or a pipe"),
        ([("null", tarfile.CHRTYPE, "")], "a device or a pipe"),
    ],
)
def test_what_leads_out_of_an_archive_is_refused(
    tmp_path: Path, cache: Path, members: Sequence[tuple[str, bytes, str]], said: str
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        opened(tar_of(tmp_path / "evil.tar", *members))
    assert caught.value.where == tmp_path / "evil.tar"
    assert not list(tmp_path.rglob("out.txt"))
    assert copies(cache) == []
    assert not list(cache.glob("*/.building*"))


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """A link to a folder comes first, then a file below its name: that is a file in a folder of its own."""
    (tmp_path / "outside").mkdir()
    members = [("in", tarfile.DIRTYPE, ""), ("x", tarfile.SYMTYPE, "in"), ("x/out.txt", tarfile.REGTYPE, "x")]
    path = tar_of(tmp_path / "a.tar", *members)
    top = archives.archive_folders(path)[-1]
    assert (top / "x" / "out.txt").read_text() == "x"
    assert not (top / "x").is_symlink()
    assert list((top / "in").iterdir()) == []


def test_links_within_an_archive_lead_where_they_did(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        ("images/train", tarfile.SYMTYPE, "../all"),
        ("twice.txt", tarfile.SYMTYPE, "again.txt"),
        ("again.txt", tarfile.SYMTYPE, "all/a.txt"),
        ("hard.txt", tarfile.LNKTYPE, "all/a.txt"),
        ("nothing.txt", tarfile.SYMTYPE, "nowhere.txt"),
        ("all/self", tarfile.SYMTYPE, "."),
        ("all/a.txt", tarfile.REGTYPE, "content"),
    ]
    top = archives.archive_folders(tar_of(tmp_path / "links.tar", *members))[-1]
    for name in ("images/train/a.txt", "twice.txt", "again.txt", "hard.txt"):
        assert (top / name).read_text() == "content", name
    assert not (top / "nothing.txt").exists()
    assert "links in it that lead to nothing: 1, the first is nothing.txt -> nowhere.txt" in caplog.text


def test_a_link_in_a_zip_file_stays_inside(tmp_path: Path) -> None:
    for target, fits in (("data.txt", True), ("/etc/passwd", False), ("../../x", False)):
        with zipfile.ZipFile(tmp_path / "links.zip", "w") as archive:
            archive.writestr("a/data.txt", "content")
            info = zipfile.ZipInfo("a/link.txt")
            info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
        if fits:
            assert (archives.archive_folders(tmp_path / "links.zip")[-1] / "a/link.txt").read_text() == "content"
        else:
            with pytest.raises(DataError, match="a link that leads out"):
                archives.archive_folders(tmp_path / "links.zip")


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_that_unfolds_to_too_much_is_refused(
    tmp_path: Path, cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_ALWAYS_ALLOWED", 1 << 16)
    monkeypatch.setattr(store, "_RATIO", 3)
    write_text(tmp_path / "plain" / "zeros.txt", "0" * (1 << 22))
    path = packed(tmp_path / "plain", tmp_path / f"bomb.{kind}")
    if kind == "tar":
        assert archives.archive_folders(path)
        return
    with pytest.raises(DataError, match="unfolds to more than"):
        opened(path)
    assert copies(cache) == []


def test_a_zip_file_that_lies_about_its_sizes_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "plain" / "zeros.txt", "0" * (1 << 20))
    path = packed(tmp_path / "plain", tmp_path / "lies.zip")
    data = path.read_bytes()
    path.write_bytes(data.replace((1 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(DataError, match="damaged or cut off"):
        archives.archive_folders(path)


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_FILES_ALWAYS_ALLOWED", 10)
    path = tar_of(tmp_path / "many.tar", *((f"{number}.txt", tarfile.REGTYPE, "") for number in range(20)))
    monkeypatch.setattr(store, "_BYTES_A_FILE", 1 << 20)
    with pytest.raises(DataError, match="more than 10 files"):
        archives.archive_folders(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_too_small(tmp_path: Path, cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(yolo(tmp_path / "plain"), tmp_path / f"cells.{kind}")
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: usage(10, 9, 1))
    with pytest.raises(DataError, match=r"(?s)unpacked it takes .* are free in .*METR_CACHE"):
        opened(path)
    assert not list(cache.glob("*/.building*"))


@pytest.mark.parametrize("name", ["cells.zip", "cells.tar.gz"])
def test_what_is_only_called_like_an_archive(tmp_path: Path, cache: Path, name: str) -> None:
    (tmp_path / name).write_text("<html>please log in</html>")
    with pytest.raises(DataError, match=r"called like an archive, but it is none.*\n  try: fetch it again"):
        opened(tmp_path / name)
    assert copies(cache) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_an_archive_that_is_cut_off(tmp_path: Path, cache: Path, kind: str, share: float) -> None:
    folder = yolo(tmp_path / "plain")
    for number in range(20):
        (folder / f"noise {number}.bin").write_bytes(os.urandom(20_000))
    path = packed(folder, tmp_path / f"cells.{kind}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match="damaged or cut off"):
        opened(path)
    assert copies(cache) == []


def test_a_broken_header_in_a_tar_file_is_not_its_end(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", *((f"{number}.txt", tarfile.REGTYPE, "x" * 600) for number in range(4)))
    data = bytearray(path.read_bytes())
    data[3 * 1536 : 3 * 1536 + 512] = b"\xff" * 512
    path.write_bytes(data)
    with pytest.raises(DataError, match="a broken header"):
        archives.archive_folders(path)


def test_a_damaged_byte_in_a_zip_file_is_found(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "content" * 100)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[200] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.txt cannot be read"):
        archives.archive_folders(tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("start", "said"),
    [(b"Rar!\x1a\x07\x01\0", "a RAR archive"), (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"), (b"PK\x03\x04", "damaged")],
)
def test_archives_of_other_kinds_are_named(tmp_path: Path, start: bytes, said: str) -> None:
    (tmp_path / "cells.rar").write_bytes(start + bytes(600))
    with pytest.raises(DataError, match=said):
        opened(tmp_path / "cells.rar")


def test_a_password_is_said(tmp_path: Path) -> None:
    path = packed(yolo(tmp_path / "plain"), tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(magic)
        while at >= 0:
            data[at + place] |= 1
            at = data.find(magic, at + 1)
    path.write_bytes(data)
    with pytest.raises(DataError, match="locked with a password"):
        opened(path)


def test_names_of_other_systems(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/снимок.txt", "1")
        archive.writestr("x\\windows.txt", "2")
        archive.writestr("__MACOSX/x/._a.txt", "3")
        archive.writestr("x/.DS_Store", "4")
    data = (tmp_path / "a.zip").read_bytes()
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # UTF-8, but nothing says so
        at = data.index(magic)
        data = data[: at + place] + b"\0\0" + data[at + place + 2 :]
    (tmp_path / "a.zip").write_bytes(data)
    top = archives.archive_folders(tmp_path / "a.zip")[-1]
    assert sorted(path.relative_to(top).as_posix() for path in top.rglob("*.*")) == ["x/windows.txt", "x/снимок.txt"]


def test_files_that_come_twice_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tar_of(tmp_path / "a.tar", ("a.txt", tarfile.REGTYPE, "1"), ("a.txt", tarfile.REGTYPE, "2"))
    assert (archives.archive_folders(path)[-1] / "a.txt").read_text() == "2"
    assert "files that come twice in it: 1, the first is a.txt" in caplog.text


def test_archives_in_a_folder_without_annotations_are_named(tmp_path: Path) -> None:
    packed(yolo(tmp_path / "plain"), tmp_path / "data" / "cells.zip")
    with pytest.raises(DataError, match=r"found 1 archives \(cells\.zip\): name one of them, or unpack them all"):
        opened(tmp_path / "data")


def test_an_archive_in_a_datasets_file(tmp_path: Path) -> None:
    packed(yolo(tmp_path / "plain"), tmp_path / "cells.tar.gz")
    write_text(tmp_path / "all.yaml", "datasets:\n- cells.tar.gz\n- {name: other, path: cells.tar.gz}\n")
    assert [open_dataset(config).name for config in parse_data_arguments([str(tmp_path / "all.yaml")])] == [
        "cells",
        "other",
    ]


def test_an_archive_without_a_dataset(tmp_path: Path) -> None:
    write_json(tmp_path / "plain" / "a.json", {})
    path = packed(tmp_path / "plain", tmp_path / "a.zip")
    with pytest.raises(DataError, match="no annotations of a known format") as caught:
        opened(path)
    assert caught.value.where == path
