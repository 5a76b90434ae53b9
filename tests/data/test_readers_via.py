"""VGG Image Annotator: every shape, which attribute names the category, and what may be wrong in a file."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import save_image, write_json, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset

RECT = {"name": "rect", "x": 2, "y": 3, "width": 10, "height": 20}
HEADER = "#filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes\n"


def region(shape: object = RECT, **attributes: object) -> dict[str, Any]:
    return {"shape_attributes": shape, "region_attributes": attributes}


def opened(tmp_path: Path, *regions: object, name: str = "a.jpg") -> DatasetSource:
    """A dataset of one image with these regions, and one with nothing."""
    root = tmp_path / "leaves"
    content = {
        f"{image}9": {"filename": image, "size": 9, "regions": found, "file_attributes": {}}
        for image, found in ((name, list(regions)), ("empty.jpg", []))
    }
    for image in ("a.jpg", "empty.jpg"):
        save_image(root / "val" / image)
    write_json(root / "val" / "via_region_data.json", content)
    return open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")


def quoted(value: object) -> str:
    """A CSV cell that holds JSON."""
    return '"' + json.dumps(value).replace('"', '""') + '"'


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        (RECT, [2, 3, 12, 23]),
        ({"name": "rect", "x": 2.5, "y": 3, "width": 9.5, "height": 20}, [2.5, 3, 12, 23]),
        ({"name": "polygon", "all_points_x": [2, 7, 12], "all_points_y": [10, 3, 23]}, [2, 3, 12, 23]),
        ({"name": "polyline", "all_points_x": [2, 7, 12], "all_points_y": [10, 3, 23]}, [2, 3, 12, 23]),
        ({"name": "circle", "cx": 10, "cy": 12, "r": 5}, [5, 7, 15, 17]),
        ({"name": "ellipse", "cx": 10, "cy": 12, "rx": 5, "ry": 7}, [5, 5, 15, 19]),
        ({"name": "ellipse", "cx": 15, "cy": 12, "rx": 5, "ry": 7, "theta": math.pi / 2}, [8, 7, 22, 17]),
    ],
)
def test_shapes_are_read_as_the_boxes_around_them(tmp_path: Path, shape: object, box: list[float]) -> None:
    source = opened(tmp_path, region(shape, label="cat"))
    np.testing.assert_allclose(source.split("val")[0].boxes, [box], atol=1e-5)
    assert source.issue_counts == {}
    assert len(source.split("val")[1].boxes) == 0


def test_regions_without_attributes_are_called_like_the_dataset(tmp_path: Path) -> None:
    source = opened(tmp_path, region(RECT), region(RECT))
    assert source.categories == ("made",)
    assert source.issue_counts == {"no categories": 1}


@pytest.mark.parametrize(
    ("attributes", "categories", "said"),
    [
        ([{"anything": "cat"}, {"anything": "dog"}], ("cat", "dog"), False),
        ([{"colour": "red", "Class": "cat"}, {"colour": "red", "Class": "dog"}], ("cat", "dog"), True),
        ([{"name": "Tom", "type": "cat"}, {"name": "Rex", "type": "dog"}], ("cat", "dog"), True),
        ([{"note": "", "size_of_it": "cat"}, {"note": "", "size_of_it": "dog"}], ("cat", "dog"), False),
        ([{"note": "left", "pet": "cat"}, {"pet": "dog"}], ("cat", "dog"), True),
        ([{"class_id": 1}, {"class_id": 2}], ("1", "2"), False),
        ([{"pet": {"cat": True, "dog": False}}, {"pet": {"dog": True}}], ("cat", "dog"), False),
    ],
)
def test_the_attribute_that_names_the_category(
    tmp_path: Path, attributes: list[dict[str, object]], categories: tuple[str, ...], said: bool
) -> None:
    source = opened(tmp_path, *(region(RECT, **values) for values in attributes))
    assert source.categories == categories
    assert source.issue_counts == ({"category attribute": 1} if said else {})
    assert len(source.split("val")[0].boxes) == 2


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (region(RECT, label=""), "unknown category"),
        (region(RECT), "unknown category"),
        (region(RECT, label={"cat": True, "dog": True}), "unknown category"),
        (region({"name": "rect", "x": 2, "y": 3}, label="cat"), "unreadable box"),
        (region({"name": "rect", "x": "x", "y": 3, "width": 2, "height": 3}, label="cat"), "unreadable box"),
        (region({"name": "polygon", "all_points_x": [2], "all_points_y": [3, 4]}, label="cat"), "unreadable box"),
        (region({"name": "star"}, label="cat"), "unreadable box"),
        (region({}, label="cat"), "unreadable box"),
        (region({"name": "rect", "x": 2, "y": 3, "width": 0, "height": 3}, label="cat"), "degenerate box"),
        (region({"name": "rect", "x": 90, "y": 3, "width": 5, "height": 3}, label="cat"), "box outside"),
        (region({"name": "point", "cx": 2, "cy": 3}, label="cat"), "unsupported shape"),
    ],
)
def test_wrong_regions_are_left_out_and_counted(tmp_path: Path, wrong: object, kind: str) -> None:
    source = opened(tmp_path, region(RECT, label="dog"), wrong, region(RECT, label="cat"))
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where == "val/via_region_data.json, a.jpg, region 2"
    assert len(source.split("val")[0].boxes) == 2


def test_a_point_makes_its_category_unknown_but_no_category_of_its_own(tmp_path: Path) -> None:
    point = {"name": "point", "cx": 2, "cy": 3}
    source = opened(tmp_path, region(point, label="cat"), region(point, label="tip"), region(RECT, label="dog"))
    assert source.categories == ("dog",)
    source = opened(tmp_path / "more", region(point, label="cat"), region(RECT, label="dog"), region(RECT, label="cat"))
    assert source.split("val")[0].annotated == (1,)
    assert source.split("val")[1].annotated is None


def test_images_that_are_missing_or_unreadable_are_no_negatives(tmp_path: Path) -> None:
    root = tmp_path / "data"
    save_image(root / "a.jpg")
    save_image(root / "unlisted.jpg")
    content = {
        "a.jpg9": {"filename": "a.jpg", "size": 9, "regions": [region(label="cat")]},
        "b.jpg9": {"filename": "b.jpg", "size": 9, "regions": [region(label="cat")]},
        "c.jpg9": {"filename": "c.jpg", "size": 9, "regions": 5},
        "again": {"filename": "a.jpg", "size": 9, "regions": []},
    }
    write_json(root / "via_train.json", content)
    source = open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")
    assert source.issue_counts == {"missing image": 1, "unreadable annotation": 1, "duplicate image": 1}
    assert [record.path.name for record in source.split("train")] == ["a.jpg"]


def test_csv_rows_that_cannot_be_read_leave_their_image_out(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in "abc":
        save_image(root / f"{name}.jpg")
    rows = [
        f"a.jpg,9,{quoted({})},1,0,{quoted(RECT)},{quoted({'label': 'cat'})}",
        f"b.jpg,9,{quoted({})},2,0,{quoted(RECT)},{quoted({'label': 'cat'})}",
        f"b.jpg,9,{quoted({})},2,1,broken,{quoted({'label': 'cat'})}",
        f"c.jpg,9,{quoted({})},0,0,{quoted({})},{quoted({})}",
    ]
    write_text(root / "train.csv", "\ufeff" + HEADER + "\n".join(rows) + "\n")
    source = open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")
    assert source.format == "via"
    assert source.issue_counts == {"unreadable annotation": 1}
    assert source.issues[0].where == "train.csv:4"
    found = {record.path.name: len(record.boxes) for split in ("train", "val") for record in source.split(split)}
    assert found == {"a.jpg": 1, "c.jpg": 0}


def test_json_is_read_where_a_folder_has_both(tmp_path: Path) -> None:
    opened(tmp_path, region(label="cat"))
    write_text(tmp_path / "leaves" / "val" / "via_export_csv.csv", HEADER)
    source = open_dataset(DatasetConfig(name="made", path=tmp_path / "leaves"), tmp_path / "other")
    assert source.issue_counts == {}
    assert len(source.split("val")) == 2
