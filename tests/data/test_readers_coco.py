"""COCO JSON: crowds, categories, ids, and everything that may be wrong in a file."""

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import save_image, write_json, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.formats import coco
from metr.errors import DataError

IMAGE = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}
CAT = {"id": 7, "name": "cat"}


def box(**values: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": 1, "category_id": 7, "bbox": [2, 3, 10, 20]} | values


def opened(tmp_path: Path, content: Any, split: str = "val") -> DatasetSource:
    """A dataset of one split with the images a.jpg and b.jpg."""
    root = tmp_path / "data"
    for name in ("a.jpg", "b.jpg"):
        save_image(root / split / name)
    file = root / "annotations" / f"instances_{split}.json"
    if isinstance(content, str):
        write_text(file, content)
    else:
        write_json(file, content)
    return open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")


def with_boxes(*boxes: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    return {"images": [IMAGE], "annotations": list(boxes), "categories": [CAT]} | rest


def test_crowds_are_ignored_and_areas_kept(tmp_path: Path) -> None:
    source = opened(
        tmp_path,
        with_boxes(
            box(area=55.5), box(iscrowd=1), box(area=None, iscrowd=0), box(area=0), box(area=1e6), box(iscrowd=None)
        ),
    )
    record = source.split("val")[0]
    assert record.ignore.tolist() == [False, True, False, False, False, False]
    assert record.areas.tolist() == [55.5, 200, 200, 200, 200, 200]
    assert source.issue_counts == {}


def test_ids_with_gaps_and_as_words(tmp_path: Path) -> None:
    images = [IMAGE | {"id": 999}, IMAGE | {"id": "x-1", "file_name": "b.jpg"}]
    annotations = [box(image_id="x-1", category_id="d"), box(image_id=999)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": "d", "name": "dog"}, CAT]}
    source = opened(tmp_path, content)
    records = list(source.split("val"))
    assert [record.image_id for record in records] == [999, "x-1"]
    assert [[source.categories[label] for label in record.labels] for record in records] == [["cat"], ["dog"]]


def test_categories_without_boxes_are_kept(tmp_path: Path) -> None:
    categories = [{"id": 9, "name": "dog", "supercategory": "animal"}, CAT | {"supercategory": "animal"}]
    assert opened(tmp_path, with_boxes(box(), categories=categories)).categories == ("dog", "cat")


def test_an_empty_parent_category_is_dropped(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": "pets", "supercategory": "none"}, CAT | {"supercategory": "pets"}]
    source = opened(tmp_path, with_boxes(box(), categories=categories))
    assert source.categories == ("cat",)
    assert source.split("val")[0].labels.tolist() == [0]
    assert source.issue_counts == {"unused parent category": 1}


def test_a_parent_category_with_a_box_is_kept(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": "pets", "supercategory": "none"}, CAT | {"supercategory": "pets"}]
    source = opened(tmp_path, with_boxes(box(), box(category_id=0), categories=categories))
    assert source.categories == ("pets", "cat")
    assert source.issue_counts == {}


def test_a_category_that_is_its_own_parent_is_kept(tmp_path: Path) -> None:
    """As Roboflow exports of a single class have it."""
    source = opened(tmp_path, with_boxes(categories=[CAT | {"supercategory": "cat"}]))
    assert source.categories == ("cat",)


def test_equal_names_are_joined(tmp_path: Path) -> None:
    categories = [CAT, {"id": 8, "name": "dog"}, {"id": 9, "name": " cat "}, {"id": 10, "name": ""}]
    source = opened(tmp_path, with_boxes(box(), box(category_id=9), box(category_id=8), categories=categories))
    assert source.categories == ("cat", "dog", "category 10")
    assert source.split("val")[0].labels.tolist() == [0, 0, 1]
    assert source.issue_counts == {"duplicate category": 1, "unnamed category": 1}


def test_ids_may_differ_between_splits(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split, first in (("train", 1), ("valid", 5)):
        save_image(root / split / "a.jpg")
        categories = [{"id": first, "name": "cat"}, {"id": first + 1, "name": f"dog {split}"}]
        annotations = [box(category_id=first), box(category_id=first + 1)]
        write_json(root / split / "_annotations.coco.json", with_boxes(*annotations, categories=categories))
    source = open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")
    assert source.categories == ("cat", "dog train", "dog valid")
    assert [source.split(split)[0].labels.tolist() for split in ("train", "val")] == [[0, 1], [0, 2]]


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (box(bbox=[2, 3, 0, 20]), "degenerate box"),
        (box(bbox=[2, 3, 0.5, 20]), "degenerate box"),
        (box(bbox=[2, 3, -5, 20]), "degenerate box"),
        (box(bbox=[50, 3, 10, 20]), "box outside"),
        (box(bbox=[39.5, 3, 10, 20]), "box outside"),
        (box(bbox=[1, 2, 3]), "unreadable box"),
        (box(bbox=[]), "unreadable box"),
        (box(bbox=None), "unreadable box"),
        ({"id": 1, "image_id": 1, "category_id": 7}, "unreadable box"),
        (box(bbox=[None, 1, 2, 3]), "unreadable box"),
        (box(bbox="what"), "unreadable box"),
        (box(bbox="what", category_id=[]), "unreadable annotation"),
        ({"id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]}, "unreadable annotation"),
        (box(category_id=8), "unknown category"),
        (box(image_id=2), "unknown image"),
    ],
)
def test_wrong_annotations_are_dropped_and_counted(tmp_path: Path, wrong: dict[str, Any], kind: str) -> None:
    source = opened(tmp_path, with_boxes(box(), wrong, box(bbox=[1, 1, 2, 2])))
    assert source.issue_counts == {kind: 1}
    (issue,) = source.issues
    assert issue.kind == kind
    assert "instances_val.json" in issue.where
    assert "nan" not in issue.detail
    assert source.split("val").issues == (issue,)
    np.testing.assert_allclose(source.split("val")[0].boxes, [[2, 3, 12, 23], [1, 1, 3, 3]])


def test_boxes_are_clipped(tmp_path: Path) -> None:
    source = opened(tmp_path, with_boxes(box(bbox=[-5, 20, 20, 20], area=400), box(bbox=[0, 0, 40.3, 30.2])))
    np.testing.assert_allclose(source.split("val")[0].boxes, [[0, 20, 15, 30], [0, 0, 40, 30]])
    assert source.split("val")[0].areas.tolist() == [150, 1200]
    assert source.issue_counts == {"box clipped": 1}  # a fraction of a pixel is rounding, not an issue


def test_numbers_written_as_words(tmp_path: Path) -> None:
    source = opened(tmp_path, with_boxes(box(bbox=["2", "3", "10", "20.0"]), images=[IMAGE | {"width": "40"}]))
    np.testing.assert_allclose(source.split("val")[0].boxes, [[2, 3, 12, 23]])
    assert source.issue_counts == {}


def test_nan_is_an_issue_of_its_box_alone(tmp_path: Path) -> None:
    content = json.dumps(with_boxes(box(bbox=[float("nan"), 1, 2, 3]), box()))
    source = opened(tmp_path, content)
    assert source.issue_counts == {"unreadable box": 1}
    assert len(source.split("val")[0].boxes) == 1


def test_images(tmp_path: Path) -> None:
    images = [
        IMAGE,
        IMAGE | {"id": 2, "file_name": "missing.jpg"},
        IMAGE | {"id": 1},
        IMAGE | {"id": 3, "file_name": "../../secret.jpg"},
        IMAGE | {"id": 4, "file_name": "/etc/secret.jpg"},
        IMAGE | {"id": 5, "file_name": "C:\\secret.jpg"},
        IMAGE | {"id": 6, "file_name": "B.JPG"},
    ]
    save_image(tmp_path / "secret.jpg")
    source = opened(tmp_path, with_boxes(box(), images=images))
    assert source.issue_counts == {"missing image": 1, "duplicate image": 1, "path outside": 3}
    assert [record.path.name for record in source.split("val")] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "size", [{"width": 0, "height": 0}, {"width": None, "height": None}, {}, {"width": 1e300, "height": 1}]
)
def test_sizes_that_say_nothing_are_probed(tmp_path: Path, size: dict[str, Any]) -> None:
    image = {"id": 1, "file_name": "a.jpg"} | size
    record = opened(tmp_path, with_boxes(box(), images=[image])).split("val")[0]
    assert (record.width, record.height) == (40, 30)


def test_unreadable_images_without_a_size_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "data" / "val").mkdir(parents=True)
    (tmp_path / "data" / "val" / "empty.jpg").touch()
    images = [IMAGE, {"id": 2, "file_name": "empty.jpg"}]
    source = opened(tmp_path, with_boxes(box(), images=images))
    assert source.issue_counts == {"unreadable image": 1}
    assert len(source.split("val")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [], "annotations": [', "not readable as COCO JSON"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1}]}', "not readable as COCO JSON"),
        ('{"images": [], "annotations": [], "categories": []}', "no image is left"),
        ('{"images": null, "annotations": [], "categories": null}', "no image is left"),
        ('{"images": [], "categories": []}', "`annotations` is missing, expected a list"),
        (with_boxes() | {"annotations": None}, "`annotations` is null, expected a list"),
        (with_boxes() | {"annotations": {"1": box()}}, "`annotations` is an object, expected a list"),
        (with_boxes() | {"annotations": "x"}, "`annotations` is a string, expected a list"),
        (with_boxes(categories=[CAT, {"id": 7, "name": "dog"}]), "category id 7 is 'cat' and 'dog'"),
        (with_boxes(images=[IMAGE | {"file_name": "c.jpg"}]), "1 issues, the first: missing image"),
        (with_boxes(categories=[]), "no category"),
    ],
)
def test_fatal(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path, content)
    assert caught.value.where is not None


def test_a_category_that_is_declared_twice_alike(tmp_path: Path) -> None:
    source = opened(tmp_path, with_boxes(box(), categories=[CAT, CAT]))
    assert source.categories == ("cat",)
    assert source.issue_counts == {"duplicate category": 1}


def test_a_test_split_without_annotations_is_left_out(tmp_path: Path) -> None:
    root = tmp_path / "data"
    save_image(root / "test" / "c.jpg")
    content = {"images": [IMAGE | {"file_name": "c.jpg"}], "categories": [CAT]}
    write_json(root / "annotations" / "instances_test.json", content)
    source = opened(tmp_path, with_boxes(box()))
    assert list(source.splits) == ["val"]
    assert source.issue_counts == {"unannotated image": 1, "empty split": 1}
    assert "`annotations` is missing" in source.issues[0].detail + source.issues[1].detail


def test_other_tasks_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / "data"
    save_image(root / "val" / "a.jpg")
    write_json(root / "annotations" / "image_info_test.json", with_boxes())
    write_json(root / "annotations" / "captions_val.json", with_boxes())
    write_json(root / "annotations" / "val.json", with_boxes(box()))
    assert list(open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache").splits) == ["val"]


def test_one_file_is_a_dataset(tmp_path: Path) -> None:
    opened(tmp_path, with_boxes(box()))
    path = tmp_path / "data" / "annotations" / "instances_val.json"
    source = open_dataset(DatasetConfig(name="one", path=path), tmp_path / "cache")
    assert {split: len(annotations) for split, annotations in source.splits.items()} == {"val": 1}


def test_pieces_give_what_the_whole_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts inside of objects and strings are tried and rejected."""
    rng = np.random.default_rng(0)
    nasty = [{"note": "}, {"}, {"parts": [{"a": 1}, {"b": [{}, {}]}]}, {"text": '"}\\", {"'}, {}]
    images = [IMAGE | {"id": number, "file_name": f"{number}.jpg"} | nasty[number % 4] for number in range(50)]
    annotations = [
        box(image_id=int(rng.integers(50)), bbox=[int(value) for value in rng.integers(1, 9, 4)])
        | nasty[int(rng.integers(4))]
        for _ in range(300)
    ]
    content = with_boxes(*annotations, images=images)
    sizes = (1, 100, 700)
    for folder, number in product(("whole", *map(str, sizes)), range(50)):
        save_image(tmp_path / folder / "data" / "val" / f"{number}.jpg")
    whole = list(opened(tmp_path / "whole", content).split("val"))
    for size in sizes:
        monkeypatch.setattr(coco, "_PIECE_BYTES", size)
        pieces = list(opened(tmp_path / str(size), content).split("val"))
        assert [record.image_id for record in pieces] == [record.image_id for record in whole]
        for one, other in zip(pieces, whole, strict=True):
            np.testing.assert_array_equal(one.boxes, other.boxes)
    expected = [[item["bbox"] for item in annotations if item["image_id"] == number] for number in range(50)]
    for record, boxes in zip(whole, expected, strict=True):
        corners = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes]).reshape(-1, 4)
        np.testing.assert_allclose(record.boxes, corners)
