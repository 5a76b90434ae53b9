"""Which images a command names: folders, patterns, lists and addresses."""

import os
import shutil
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from metr.data.images import read_image
from metr.data.shards import stores
from metr.errors import ConfigError, DataError, StoreError
from metr.inference.image_paths import expanded_images, expanded_paths, listed_images, read_named_image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images in a folder and its subfolders, names with a blank and a percent sign, and a text."""
    folder = tmp_path / "my images"
    for number, name in enumerate(("a.png", "more/b 1.PNG", "more/deep/c%20d.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6, 3), number * 40, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_pattern_names_images_alone_and_each_once(images: Path) -> None:
    out = images / "more/deep"
    assert expanded_paths([f"{images}/*"], Path("out")) == [images / "a.png"]
    everything = expanded_paths([images, f"{images}/**/*", images / "a.png"], Path("out"))
    assert [path.name for path in everything] == ["a.png", "b 1.PNG", "c%20d.png"]
    assert [path.name for path in expanded_paths([f"{images}/**/*.[pP][nN][gG]"], out)] == ["a.png", "b 1.PNG"]
    with pytest.raises(DataError, match="no image fits this pattern"):
        expanded_paths([f"{images}/*.txt"], Path("out"))


def test_what_is_hidden_in_a_folder_is_passed_over(images: Path) -> None:
    for name in (".b.png", "._a.png", ".thumbnails/a.png", "more/.cache/deep/a.png", "__MACOSX/._a.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / "a.png", images / name)
    shown = ["a.png", "b 1.PNG", "c%20d.png"]
    assert [path.name for path in expanded_paths([images], Path("out"))] == shown
    assert [Path(address).name for address in expanded_images([f"file://{images}"], Path("out"))] == shown
    assert expanded_paths([images / ".thumbnails"], Path("out")) == [images / ".thumbnails/a.png"]
    assert expanded_images([f"file://{images}/.thumbnails"], Path("out")) == [f"file://{images}/.thumbnails/a.png"]
    assert expanded_paths([images / ".b.png"], Path("out")) == [images / ".b.png"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(images: Path) -> None:
    (images / "a.png").rename(images / "a[1].png")
    assert expanded_paths([images / "a[1].png"], Path("out")) == [images / "a[1].png"]


def test_addresses_are_looked_up_and_read_as_paths_are(images: Path) -> None:
    address = f"file://{images}"
    found = expanded_images([address, images / "a.png"], Path("out"))
    assert found[:-1] == [f"file://{images / name}" for name in ("a.png", "more/b 1.PNG", "more/deep/c%20d.png")]
    for named, path in zip(found, [*sorted(images.rglob("*.[pP]*")), images / "a.png"], strict=True):
        assert (read_named_image(named) == read_image(path)).all()
    assert expanded_images([found[0]], Path("out")) == [found[0]]
    (images / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="not an image"):
        read_named_image(f"{address}/broken.png")
    with pytest.raises(DataError, match=r"gone\.png"):
        read_named_image(f"{address}/gone.png")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("file:///nowhere/at/all", "no such image or folder"),
        ("nothing://bucket/a.png", "no such kind of store"),
    ],
)
def test_an_address_that_leads_nowhere_is_told(given: str, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        expanded_images([given], Path("out"))
    assert given in str(caught.value)


def test_a_store_that_does_not_answer_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is down would list millions of images as unreadable."""
    fsspec.filesystem("memory").pipe("/there/a.png", b"...")
    monkeypatch.setattr(stores, "PAUSES", ())

    def down(*_: object, **__: object) -> bytes:
        raise OSError("no route to host")

    monkeypatch.setattr(stores.filesystem("memory://there/a.png")[0], "cat_file", down)
    with pytest.raises(StoreError, match="no route to host"):
        read_named_image("memory://there/a.png")


def test_the_plain_engine_says_which_engine_reads_addresses() -> None:
    with pytest.raises(DataError, match="need --engine ray"):
        expanded_paths(["s3://bucket/a.png"], Path("out"))


def test_a_list_gives_each_path_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.png\r\n\nmore/b 1.PNG\ngone.png\na.png\ns3://bucket/e.png\n")
    assert listed_images(tmp_path / "list.txt") == ["a.png", "more/b 1.PNG", "gone.png", "s3://bucket/e.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes there alone")
def test_a_list_may_hold_names_that_are_not_utf_8(images: Path, tmp_path: Path) -> None:
    name = os.fsencode(images) + b"/caf\xe9.png"
    Path(os.fsdecode(name)).write_bytes((images / "a.png").read_bytes())
    (tmp_path / "list.txt").write_bytes(name + b"\n")
    (found,) = listed_images(tmp_path / "list.txt")
    assert os.fsencode(found) == name
    assert read_named_image(found).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read: No such file"),
        (b"\n \n", "names no image"),
        (b"gone/a.png\ngone/b.png\n", "none of the first 2 paths of this list exists, such as 'gone/a.png'"),
        (b"\x89PNG\0\0", "none of the first 1 paths"),
    ],
)
def test_a_list_of_nothing_is_refused(tmp_path: Path, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises((ConfigError, DataError), match=told) as caught:
        listed_images(tmp_path / "list.txt")
    assert "list.txt" in str(caught.value)
