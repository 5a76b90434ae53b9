"""Categories that say "do not care": their boxes are regions where nothing is known, in every format."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import save_image, write_json, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.index.annotation_index import AnnotationIndex
from metr.errors import DataError

SPELLINGS = ["DontCare", "ignore", "ignored regions", "Ignored_Region", "don't care", "DONT-CARE", "do not care"]


def opened(root: Path, **options: Any) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root, **options), root.parent / "cache")


def csv(root: Path, *lines: str) -> Path:
    save_image(root / "a.jpg")
    write_text(root / "val.csv", "\n".join(["filename,class,x1,y1,x2,y2", *lines]))
    return root


@pytest.mark.parametrize("name", SPELLINGS)
def test_such_boxes_are_ignored_for_every_category(tmp_path: Path, name: str) -> None:
    root = csv(tmp_path / "data", "a.jpg,cat,1,2,9,9", f"a.jpg,{name},20,2,30,9", "a.jpg,dog,1,12,9,19")
    source = opened(root)
    assert source.categories == ("cat", "dog")
    record = source.split("val")[0]
    assert record.labels.tolist() == [0, 1, 0, 1]
    assert record.ignore.tolist() == [False, False, True, True]
    np.testing.assert_array_equal(record.boxes[2:], [[20, 2, 30, 9]] * 2)
    assert source.issue_counts == {"do-not-care regions": 1}
    assert repr(name) in source.issues[0].detail
    annotations = source.split("val")
    assert isinstance(annotations, AnnotationIndex)
    counts = annotations.counts()
    assert (counts.boxes.tolist(), counts.ignored.tolist(), counts.empty) == ([1, 1], [1, 1], 0)
    assert [part.tolist() for part in next(iter(annotations.objects()))] == [[0, 0], [0, 1]]


def test_an_image_with_such_a_box_alone_has_no_object(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "b.jpg")
    source = opened(csv(tmp_path / "data", "a.jpg,cat,1,2,9,9", "b.jpg,ignore,1,2,9,9"))
    annotations = source.split("val")
    assert isinstance(annotations, AnnotationIndex)
    assert annotations.counts().empty == 1
    assert annotations[1].ignore.tolist() == [True]


def test_names_that_only_begin_so_are_categories(tmp_path: Path) -> None:
    root = csv(tmp_path / "data", "a.jpg,ignored sign,1,2,9,9", "a.jpg,ignorer,1,2,9,9")
    assert opened(root).categories == ("ignored sign", "ignorer")


def test_a_user_may_rename_it_to_a_category(tmp_path: Path) -> None:
    root = csv(tmp_path / "data", "a.jpg,cat,1,2,9,9", "a.jpg,ignore,1,2,9,9")
    source = opened(root, renames={"ignore": "no entry sign"})
    assert source.categories == ("cat", "no entry sign")
    assert source.issue_counts == {}


def test_coco_and_yolo(tmp_path: Path) -> None:
    save_image(tmp_path / "coco" / "val" / "a.jpg")
    categories = [{"id": 0, "name": "ignored regions"}, {"id": 1, "name": "cat"}]
    boxes = [{"id": number, "image_id": 1, "category_id": number, "bbox": [1, 2, 9, 9]} for number in range(2)]
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": boxes, "categories": categories}
    write_json(tmp_path / "coco" / "annotations" / "instances_val.json", content)
    save_image(tmp_path / "yolo" / "images" / "val" / "a.jpg")
    write_text(tmp_path / "yolo" / "labels" / "val" / "a.txt", "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5")
    write_text(tmp_path / "yolo" / "data.yaml", "names: [DontCare, cat]\nval: images/val\n")
    for name in ("coco", "yolo"):
        source = opened(tmp_path / name)
        assert source.categories == ("cat",)
        assert source.split("val")[0].ignore.tolist() == [False, True]
        assert source.split("val")[0].labels.tolist() == [0, 0]


def test_where_nothing_else_is_annotated_there_is_no_category(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no category"):
        opened(csv(tmp_path / "data", "a.jpg,DontCare,1,2,9,9"))
