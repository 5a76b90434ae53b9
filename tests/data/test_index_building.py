"""Building an index: by one process at a time, of files with any name, and again when a measured image changes."""

import errno
import json
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from reader_trees import coco_content, coco_plain, made_up, save_image, write_json, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.formats import base
from metr.data.index import cache as index_cache
from metr.data.index import manifest as manifest_module
from metr.data.index.annotation_index import LabelMap
from metr.data.records import SplitPlan


def opened(root: Path, **options: object) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root, **options), root.parent / "cache")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that indices were written to, each slowly."""
    found: list[Path] = []
    write = index_cache.build_index

    def counted(reader: object, plan: object, folder: Path) -> object:
        found.append(folder)
        time.sleep(0.2)
        return write(reader, plan, folder)

    monkeypatch.setattr(index_cache, "build_index", counted)
    return found


# One at a time --------------------------------------------------------------------------------------------------------


def test_one_builds_and_the_others_wait(tmp_path: Path, builds: list[Path]) -> None:
    coco_plain(tmp_path / "data", made_up())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: opened(tmp_path / "data").split("train"), range(4)))
    assert len(builds) == 1
    assert len({annotations.path for annotations in found}) == 1
    assert {path.name for path in (tmp_path / "cache").rglob(".*")} == {".lock"}


def test_who_dies_while_building_holds_nobody_up(tmp_path: Path, builds: list[Path]) -> None:
    coco_plain(tmp_path / "data", made_up())
    place = opened(tmp_path / "data").split("train").path.parents[1]
    script = "import os, sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): os._exit(0)"
    subprocess.run([sys.executable, "-c", script, str(place / ".lock")], check=True)
    assert (place / ".lock").exists()
    write_text(
        next((tmp_path / "data" / "annotations").glob("instances_train*")),
        json.dumps(coco_content(made_up()["train"])) + " ",
    )
    opened(tmp_path / "data")
    assert len(builds) == 2


@pytest.mark.filterwarnings("ignore:flock not supported")  # older versions of filelock do not say so
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    coco_plain(tmp_path / "data", made_up())
    monkeypatch.setattr(fcntl, "flock", refused)
    with caplog.at_level(logging.WARNING):
        assert len(opened(tmp_path / "data").split("train")) == 5
    assert caplog.text == ""


# Names of files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def latin(tmp_path: Path) -> bytes:
    """A folder's name that is not UTF-8."""
    name = bytes(tmp_path) + b"/caf\xe9"
    try:
        Path(os.fsdecode(name)).mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    return name


def yolo(root: Path) -> None:
    for name in "ab":
        save_image(root / "images" / "train" / f"{name}.jpg")
        write_text(root / "labels" / "train" / f"{name}.txt", "0 .5 .5 .2 .2\n")
    save_image(root / "images" / "val" / "v.jpg")
    write_text(root / "labels" / "val" / "v.txt", "")
    write_text(root / "data.yaml", "train: images/train\nval: images/val\nnames: [cat]\n")


def test_a_image_whose_name_is_not_utf8_is_counted(tmp_path: Path, latin: bytes) -> None:
    root = tmp_path / "data"
    yolo(root)
    for kind, suffix in (("images", b"jpg"), ("labels", b"txt")):
        place = bytes(root / kind / "train")
        (root / kind / "train" / f"b.{suffix.decode()}").rename(os.fsdecode(place + b"/b\xe9." + suffix))
    source = opened(root)
    assert [record.path.name for record in source.split("train")] == ["a.jpg"]
    assert source.issue_counts == {"unreadable file name": 1}
    assert [issue.where.encode() for issue in source.issues] == [rb"images/train/b\xe9.jpg"]
    assert opened(root).split("train").path == source.split("train").path


def test_stray_files_whose_names_are_not_utf8(tmp_path: Path, latin: bytes) -> None:
    root = tmp_path / "data"
    coco_plain(root, made_up())
    save_image(root / "val2017" / os.fsdecode(b"stray\xe9.jpg"))
    save_image(root / os.fsdecode(b"caf\xe9") / "a.jpg")
    source = opened(root)
    assert len(source.split("val")) == 3
    assert opened(root).split("val").path == source.split("val").path


def test_a_dataset_in_a_folder_whose_name_is_not_utf8(tmp_path: Path, latin: bytes) -> None:
    root = Path(os.fsdecode(latin)) / "data"
    yolo(root)
    (record, _) = open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache").split("train")
    assert record.path == root / "images" / "train" / "a.jpg"
    assert record.path.exists()


# Measured images ----------------------------------------------------------------------------------------------------


def test_built_again_when_a_measured_image_changes_in_place(tmp_path: Path, builds: list[Path]) -> None:
    """No folder's time of change tells it."""
    root = tmp_path / "data"
    yolo(root)
    opened(root)
    assert opened(root).split("train")[0].width == 40
    save_image(root / "images" / "train" / "a.jpg", 80, 60)
    record = opened(root).split("train")[0]
    assert (record.width, record.height) == (80, 60)
    assert len(builds) == 2


def test_built_again_when_a_broken_image_is_mended_in_place(tmp_path: Path) -> None:
    root = tmp_path / "data"
    yolo(root)
    (root / "images" / "train" / "b.jpg").write_bytes(b"no image")
    assert opened(root).issue_counts == {"unreadable image": 1}
    save_image(root / "images" / "train" / "b.jpg")
    assert opened(root).issue_counts == {}


def test_of_many_measured_images_some_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced ones, so a change of all is noticed; and the manifest stays small."""
    monkeypatch.setattr(manifest_module, "FINGERPRINTS", 8)
    fingerprints = manifest_module.Fingerprints()
    paths = [save_image(tmp_path / f"{number:02}.jpg") for number in range(33)]
    for path in paths:
        fingerprints.add(path.name, tmp_path)
    assert list(fingerprints.signatures) == ["00.jpg", "08.jpg", "16.jpg", "24.jpg", "32.jpg"]
    assert fingerprints.signatures["08.jpg"] == index_cache.signature(paths[8])


# Images in two parts ------------------------------------------------------------------------------------------------


def parts(root: Path, *, width: int = 40) -> None:
    """One image in two annotation files, of cats and of dogs, with one box in both; another in the first alone."""
    save_image(root / "images" / "a.jpg")
    save_image(root / "images" / "b.jpg")
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    boxes = {"cats": [(1, [1, 1, 9, 9]), (1, [20, 1, 9, 9])], "dogs": [(2, [5, 5, 10, 10]), (1, [1, 1, 9, 9])]}
    for part, mine in boxes.items():
        images = [{"id": 1, "file_name": "a.jpg", "width": width if part == "dogs" else 40, "height": 30}]
        if part == "cats":
            images.append({"id": 2, "file_name": "b.jpg", "width": 40, "height": 30})
        annotations = [
            {"id": place, "image_id": 1, "category_id": category, "bbox": box}
            for place, (category, box) in enumerate(mine)
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_json(root / "annotations" / f"train_{part}.json", content)


def test_the_boxes_of_a_image_in_two_parts_are_joined(tmp_path: Path) -> None:
    parts(tmp_path / "data")
    source = opened(tmp_path / "data", splits={"train": ["train_cats", "train_dogs"]})
    first, second = source.split("train")
    assert (first.path.name, second.path.name) == ("a.jpg", "b.jpg")
    assert first.labels.tolist() == [0, 0, 1]
    assert first.boxes.tolist() == [[1, 1, 10, 10], [20, 1, 29, 10], [5, 5, 15, 15]]
    assert first.annotated is second.annotated is None
    assert source.issue_counts == {}


def test_boxes_that_cannot_be_joined_are_counted_and_their_categories_unknown(tmp_path: Path) -> None:
    parts(tmp_path / "data", width=80)
    source = opened(tmp_path / "data", splits={"train": ["train_cats", "train_dogs"]})
    first, _ = source.split("train")
    assert first.labels.tolist() == [0, 0]
    assert first.annotated == ()
    assert source.issue_counts == {"duplicate image": 1}
    (issue,) = source.issues
    assert issue.where == "images/a.jpg"
    assert "2 boxes" in issue.detail
    assert "train_dogs" in issue.detail


def test_ids_are_unique_within_a_part(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("a", "b", "c"):
        save_image(root / "train" / name / "same.jpg")
        write_text(root / "train" / name / "same.txt", "0 .5 .5 .2 .2\n")
    raws = [
        base.RawImage(
            where="x",
            image_id=7,
            path=f"train/{name}/same.jpg",
            size=(30, 40),
            boxes=base.np.zeros((0, 4)),
            labels=base.np.zeros(0, dtype=base.np.int64),
        )
        for name in ("a", "b", "c")
    ]

    class Made(base.Reader):
        format = "made"
        looks_like = "nothing"
        recognise = None  # type: ignore[assignment]

        def read(self, split: str, reading: base.Reading) -> object:
            reading.names.number("cat")
            yield from raws

    plan = SplitPlan(parts={"train": ("own",)})
    stored = index_cache.stored(Made(root, {"own": ()}), plan, tmp_path / "cache")
    labels = LabelMap.identity(("cat",))
    ids = [record.image_id for record in stored.open("train", name="m", format_name="made", labels=labels)]
    assert ids == [7, "own/7", "own/7-2"]
