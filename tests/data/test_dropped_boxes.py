"""A box that cannot be used says that something is there: its category is unknown in that image, never absent."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reader_trees import save_image, write_json, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.formats.base import RawImage, Reader, Reading
from metr.data.formats.checks import records
from metr.data.formats.files import Files
from metr.data.index.annotation_index import AnnotationIndex, LabelMap, write_index
from metr.data.records import UNNAMED, ImageRecord

CATS = ["images/a.jpg,1,2,20,20,cat", "images/b.jpg,3,3,9,9,cat"]
USELESS = {"degenerate box": "30,2,30,10", "box outside": "60,2,90,10"}


def opened(root: Path, **options: object) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root, **options), root.parent / "cache")


def annotated(source: DatasetSource, split: str = "train") -> dict[str, set[str] | None]:
    """The names that each image annotates; None for all."""
    return {
        record.path.name: None if record.annotated is None else {source.categories[row] for row in record.annotated}
        for record in source.split(split)
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images, and a category that comes up in the last split only."""
    for name in "abv":
        save_image(tmp_path / "data" / "images" / f"{name}.jpg")
    write_text(tmp_path / "data" / "val.csv", "images/v.jpg,1,1,9,9,bird\n")
    return tmp_path / "data"


@pytest.mark.parametrize("kind", USELESS)
def test_all_but_the_category_of_a_dropped_box(root: Path, kind: str) -> None:
    write_text(root / "train.csv", "\n".join([*CATS, f"images/a.jpg,{USELESS[kind]},dog", ""]))
    source = opened(root)
    assert source.issue_counts == {kind: 1}
    assert annotated(source) == {"a.jpg": {"bird", "cat"}, "b.jpg": None}
    assert annotated(source, "val") == {"v.jpg": None}


@pytest.mark.parametrize("kind", USELESS)
def test_an_image_whose_boxes_were_all_dropped_is_no_negative(root: Path, kind: str) -> None:
    write_text(root / "train.csv", "\n".join([CATS[1], f"images/a.jpg,{USELESS[kind]},dog", ""]))
    source = opened(root)
    assert annotated(source) == {"a.jpg": set(), "b.jpg": None}
    assert source.split("train").counts().empty == 1


def test_categories_that_a_reader_does_not_know_and_boxes_without_numbers(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "a.jpg")

    class Made(Reader):
        format, looks_like = "made", "nothing"
        recognise = None  # type: ignore[assignment]

        def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
            labels = np.array([reading.names.number(name) for name in ("cat", "dog", "cup")])
            boxes = np.array([[1, 1, 9, 9], [np.nan, 1, 9, 9], [2, 2, 8, 8]])
            shared = {"where": "x", "path": "a.jpg", "size": (30, 40), "boxes": boxes, "labels": labels}
            yield RawImage(image_id=1, unknown=labels[2:].tolist(), **shared)
            yield RawImage(image_id=2, annotated=labels[:2].tolist(), **shared)

    found = list(records(Made(tmp_path / "data", {}), "train", Reading(files=Files(tmp_path / "data"))))
    assert [record.unknown for record in found] == [(1, 2), (1,)]
    write_index(tmp_path / "a.arrow", found, root=tmp_path / "data")
    index = AnnotationIndex(tmp_path / "a.arrow", LabelMap.identity(("cat", "dog", "cup", "bird")))
    assert [record.annotated for record in index] == [(0, 3), (0,)]
    assert [record.unknown for record in index] == [(), ()]


def test_a_clipped_box_is_a_box(root: Path) -> None:
    write_text(root / "train.csv", "\n".join([*CATS, "images/a.jpg,30,2,60,10,dog", ""]))
    assert annotated(opened(root)) == {"a.jpg": None, "b.jpg": None}


def test_neither_renames_nor_a_list_of_exhaustive_names_bring_it_back(root: Path) -> None:
    write_text(root / "train.csv", "\n".join([*CATS, f"images/a.jpg,{USELESS['degenerate box']},dog", ""]))
    joined = opened(root, renames={"dog": "animal", "cat": "animal"})
    assert annotated(joined) == {"a.jpg": {"bird"}, "b.jpg": None}
    listed = opened(root, exhaustive=["cat", "dog"])
    assert annotated(listed) == {"a.jpg": {"cat"}, "b.jpg": {"cat", "dog"}}


def test_a_list_in_the_files_is_shortened(tmp_path: Path) -> None:
    for name in "ab":
        save_image(tmp_path / "data" / "train" / f"{name}.jpg")
    federation = {"neg_category_ids": [2, 3], "not_exhaustive_category_ids": []}
    images = [
        {"id": place, "file_name": f"{name}.jpg", "width": 40, "height": 30, **federation}
        for place, name in enumerate("ab")
    ]
    boxes = [(0, 1, [1, 2, 9, 9]), (0, 2, [5, 5, 0, 9]), (1, 1, [1, 2, 9, 9])]
    content = {
        "images": images,
        "annotations": [
            {"id": place, "image_id": image, "category_id": category, "bbox": box}
            for place, (image, category, box) in enumerate(boxes)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(["cat", "dog", "cup"], start=1)],
    }
    write_json(tmp_path / "data" / "lvis_v1_train.json", content)
    source = opened(tmp_path / "data")
    found = {
        record.path.name: {source.categories[row] for row in record.annotated or ()}
        for split in source.splits.values()
        for record in split
    }
    assert found == {"a.jpg": {"cat", "cup"}, "b.jpg": {"cat", "dog", "cup"}}


@pytest.mark.parametrize("line", ["3 0.5 0.5 0.2 0.2", "x 0.5 0.5 0.2 0.2", "0 0.5 0.5", "cat"])
def test_after_an_object_of_an_unknown_category_nothing_is_absent(tmp_path: Path, line: str) -> None:
    """Whether the image is empty but for it or not, and whatever a datasets file says."""
    for name, text in {"a": line, "b": f"0 0.5 0.5 0.2 0.2\n{line}", "c": "0 0.5 0.5 0.2 0.2", "d": ""}.items():
        save_image(tmp_path / "data" / "images" / "train" / f"{name}.jpg")
        write_text(tmp_path / "data" / "labels" / "train" / f"{name}.txt", text)
    write_text(tmp_path / "data" / "data.yaml", "names: [cat, dog]\ntrain: images/train\n")
    source = opened(tmp_path / "data", splits={"train": "train"})
    assert annotated(source) == {"a.jpg": set(), "b.jpg": set(), "c.jpg": None, "d.jpg": None}
    assert source.split("train").counts().boxes.tolist() == [2, 0]
    listed = opened(tmp_path / "data", splits={"train": "train"}, exhaustive=["cat"])
    assert annotated(listed) == {"a.jpg": set(), "b.jpg": set(), "c.jpg": {"cat"}, "d.jpg": {"cat"}}


def test_an_unnamed_object_of_one_of_several_files_leaves_nothing_absent(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "a.jpg")
    shared = {"image_id": 1, "path": tmp_path / "data" / "a.jpg", "width": 40, "height": 30}
    columns = {"labels": np.zeros(1, dtype=np.int64), "areas": np.ones(1), "ignore": np.zeros(1, dtype=bool)}
    record = ImageRecord(boxes=np.array([[1.0, 1, 9, 9]]), unknown=(UNNAMED, 0), **shared, **columns)
    write_index(tmp_path / "a.arrow", [record], root=tmp_path / "data")
    index = AnnotationIndex(tmp_path / "a.arrow", LabelMap.identity(("cat", "dog")))
    assert index[0].annotated == ()
    assert index.stored(0).unknown == (UNNAMED, 0)


def test_csv_lines_without_a_category(root: Path) -> None:
    write_text(root / "train.csv", "\n".join([*CATS, "images/a.jpg,2,2,9,9,", "images/v.jpg,2,2,9,9, ", ""]))
    source = opened(root)
    assert source.issue_counts == {"unknown category": 2}
    assert annotated(source) == {"a.jpg": set(), "b.jpg": None, "v.jpg": set()}
    assert source.split("train").counts().boxes.tolist() == [0, 2]


def test_coco_boxes_whose_category_is_not_declared(tmp_path: Path) -> None:
    for name in "abc":
        save_image(tmp_path / "data" / "train" / f"{name}.jpg")
    images = [
        {"id": number, "file_name": f"{name}.jpg", "width": 40, "height": 30} for number, name in enumerate("abc")
    ]
    pairs = [(0, 1), (0, 7), (1, 7), (2, 1)]
    boxes = [
        {"id": number, "image_id": image, "category_id": category, "bbox": [1, 2, 9, 9]}
        for number, (image, category) in enumerate(pairs)
    ]
    content = {
        "images": images,
        "annotations": boxes,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    write_json(tmp_path / "data" / "train" / "_annotations.coco.json", content)
    source = opened(tmp_path / "data", splits={"train": "train"})
    assert source.issue_counts == {"unknown category": 2}
    assert annotated(source) == {"a.jpg": set(), "b.jpg": set(), "c.jpg": None}
    assert source.split("train").counts().boxes.tolist() == [2, 0]
