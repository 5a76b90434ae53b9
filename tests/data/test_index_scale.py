"""Datasets of millions of images: little is held while one is read, and little is asked for when it is opened."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import LAYOUTS, coco_plain, made_up, save_image, write_json

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.formats import checks as base
from metr.data.formats import coco
from metr.data.index import annotation_index as index
from metr.data.index import cache as index_cache
from metr.data.records import ImageRecord


def opened(root: Path, cache: Path) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root), cache)


def many(root: Path, images: int = 300, boxes: int = 3000) -> dict[str, Any]:
    """One split in patch folders, its annotations in no order."""
    rng = np.random.default_rng(0)
    first = save_image(root / "val" / "patch0" / "0.jpg")
    for number in range(1, images):
        path = root / "val" / f"patch{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        os.link(first, path)
    content = {
        "images": [
            {"id": 7 * number, "file_name": f"patch{number % 3}/{number}.jpg", "width": 40, "height": 30}
            for number in range(images)
        ],
        "annotations": [
            {"image_id": 7 * int(owner), "category_id": 1, "bbox": [1, 2, number % 30 + 1, 5]}
            for number, owner in enumerate(rng.integers(images, size=boxes))
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }
    write_json(root / "annotations" / "instances_val.json", content)
    return content


def test_few_objects_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations become columns piece by piece; the columns hold all of them, each with its image."""
    content = many(tmp_path / "data")
    counts: list[int] = []
    columns = coco._columns

    def counted(annotations: Sequence[Any], *rest: Any) -> object:
        counts.append(len(annotations))
        return columns(annotations, *rest)

    monkeypatch.setattr(coco, "_columns", counted)
    monkeypatch.setattr(coco, "_PIECE_BYTES", 5000)
    monkeypatch.setattr(base, "_GROUP", 20)
    found = opened(tmp_path / "data", tmp_path / "cache").split("val")
    assert sum(counts) == 3000
    assert max(counts) < 150
    for image, record in zip(content["images"], found, strict=True):
        mine = [box["bbox"] for box in content["annotations"] if box["image_id"] == image["id"]]
        np.testing.assert_array_equal(record.boxes.tolist(), [[1, 2, 1 + width, 7] for _, _, width, _ in mine])


def test_opening_asks_for_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the images nor the folders full of them: directories are asked for their time of change."""
    many(tmp_path / "data")
    opened(tmp_path / "data", tmp_path / "cache")
    asked, listed = [], []
    scandir, signature = os.scandir, index_cache.signature

    def counted_signature(path: Path) -> tuple[int, int]:
        asked.append(path)
        return signature(path)

    def counted_scandir(path: Any = ".") -> Any:
        listed.append(Path(path))
        return scandir(path)

    monkeypatch.setattr(index_cache, "signature", counted_signature)
    monkeypatch.setattr(os, "scandir", counted_scandir)
    source = opened(tmp_path / "data", tmp_path / "cache")
    assert len(source.split("val")) == 300
    assert len(asked) < 50
    assert not [path for path in listed if path.name.startswith("patch")]


def test_a_seeded_split_keeps_every_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = many(tmp_path / "data")
    (tmp_path / "data" / "annotations" / "instances_val.json").rename(tmp_path / "data" / "annotations" / "all.json")
    (tmp_path / "data" / "val").rename(tmp_path / "data" / "images")
    monkeypatch.setattr(index, "_PIECE", 32)
    source = opened(tmp_path / "data", tmp_path / "cache")
    ids = {split: [record.image_id for record in annotations] for split, annotations in source.splits.items()}
    assert len(ids["val"]) == 60
    assert sorted(ids["train"] + ids["val"]) == [image["id"] for image in content["images"]]
    assert sum(len(record.boxes) for split in source.splits.values() for record in split) == 3000


# Images are checked many at a time ----------------------------------------------------------------------------------


def one_at_a_time(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> DatasetSource:
    monkeypatch.setattr(base, "_GROUP", group)
    return opened(root, cache)


def assert_same(one: ImageRecord, other: ImageRecord) -> None:
    facts = ("image_id", "path", "width", "height", "annotated")
    assert [getattr(one, name) for name in facts] == [getattr(other, name) for name in facts]
    for name in ("boxes", "labels", "areas", "ignore"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "coco" in layout or "yolo" in layout])
def test_groups_change_nothing(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    LAYOUTS[layout][1](tmp_path / "data", made_up(seed=1))
    one, other = (
        one_at_a_time(tmp_path / "data", tmp_path / f"cache {group}", monkeypatch, group) for group in (1, 512)
    )
    for split, annotations in one.splits.items():
        for record, again in zip(annotations, other.split(split), strict=True):
            assert_same(record, again)


def test_issues_are_those_of_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds, order, places and words are what they are when images are checked one at a time."""
    coco_plain(tmp_path / "data", made_up())
    boxes = [[2, 3, 0, 20], [1, 1, 2, 2], [50, 60, 9, 9], [-5, 3, 20, 9], [1, 1, 1e300, 1e300], [0, 0, 1000, 5]]
    for number in range(4):
        save_image(tmp_path / "data" / "val2017" / f"{number}.jpg")
    (tmp_path / "data" / "val2017" / "2.jpg").write_bytes(b"no image")
    sizes: list[dict[str, int]] = [{"width": 40, "height": 30}, {}, {}, {"width": 20, "height": 70}]
    content = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} | size for number, size in enumerate(sizes)],
        "annotations": [
            {"image_id": number % 4, "category_id": 1, "bbox": box, "area": 3 if number % 3 else None}
            for number, box in enumerate(boxes * 3)
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }
    write_json(tmp_path / "data" / "annotations" / "instances_val2017.json", content)
    one, other = (
        one_at_a_time(tmp_path / "data", tmp_path / f"cache {group}", monkeypatch, group) for group in (1, 512)
    )
    assert sum(one.issue_counts.values()) > 9
    assert one.issue_counts == other.issue_counts
    for kind in one.issue_counts:
        assert [issue for issue in one.issues if issue.kind == kind] == [
            issue for issue in other.issues if issue.kind == kind
        ]
    for record, again in zip(one.split("val"), other.split("val"), strict=True):
        assert_same(record, again)
    assert [record.image_id for record in one.split("val")] == [0, 1, 3]
