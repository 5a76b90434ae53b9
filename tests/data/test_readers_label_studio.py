"""Label Studio: every region, several annotators, where images lie, and what nobody has looked at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import save_image, write_json

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset

WIDTH, HEIGHT = 40, 30
BOX = {"x": 5, "y": 10, "width": 25, "height": 50, "rotation": 0}  # [2, 3, 12, 18] in pixels


def region(value: object = BOX, label: object = "cat", kind: str = "rectanglelabels", **rest: Any) -> dict[str, Any]:
    named = {**value, kind: [label]} if isinstance(value, dict) else value
    sides = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    return {"id": "x", "type": kind, "value": named, "from_name": "label", "to_name": "image"} | sides | rest


def annotation(*result: object, **rest: object) -> dict[str, Any]:
    return {"id": 1, "completed_by": 1, "result": list(result), "was_cancelled": False, "ground_truth": False} | rest


def opened(tmp_path: Path, *annotations: object, address: str = "a.jpg", image: str = "a.jpg") -> DatasetSource:
    """A dataset of one task with these annotations, and one with a dog."""
    root = tmp_path / "data"
    for name in (image, "sound.jpg"):
        save_image(root / name, WIDTH, HEIGHT)
    tasks = [
        {"id": 1, "annotations": list(annotations), "predictions": [annotation(region())], "data": {"image": address}},
        {"id": 2, "annotations": [annotation(region(label="dog"))], "data": {"text": "hello", "image": "sound.jpg"}},
    ]
    write_json(root / "val.json", tasks)
    return open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")


def records(source: DatasetSource) -> dict[str, Any]:
    return {record.path.name: record for split in source.splits.values() for record in split}


def brush(rows: slice, columns: slice) -> dict[str, Any]:
    """A mask as Label Studio's brush stores it: an RGBA image, run by run, with counters of 3, 4, 8 and 16 bits."""
    mask = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    mask[rows, columns] = 255
    values = mask.ravel().tolist()
    bits = f"{len(values):032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}"
    place = 0
    while place < len(values):
        end = next((at for at in range(place, len(values)) if values[at] != values[place]), len(values))
        if end - place == 4 and place % 8 == 0:  # now and then value by value
            bits += f"0{0:02b}{3:03b}" + f"{values[place]:08b}" * 4
        else:
            bits += f"1{3:02b}{end - place - 1:016b}{values[place]:08b}"
        place = end
    bits += "0" * (-len(bits) % 8)
    return {"format": "rle", "rle": [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]}


@pytest.mark.parametrize(
    ("value", "kind", "box"),
    [
        (BOX, "rectanglelabels", [2, 3, 12, 18]),
        (BOX | {"rotation": 360}, "rectanglelabels", [2, 3, 12, 18]),
        # turned clockwise around its top left corner, in pixels
        ({"x": 50, "y": 10, "width": 25, "height": 10, "rotation": 90}, "rectanglelabels", [17, 3, 20, 13]),
        ({"points": [[5, 30], [20, 10], [30, 60]]}, "polygonlabels", [2, 3, 12, 18]),
        ({"x": 50, "y": 50, "radiusX": 25, "radiusY": 20, "rotation": 0}, "ellipselabels", [10, 9, 30, 21]),
        ({"x": 50, "y": 50, "radiusX": 25, "radiusY": 20, "rotation": 90}, "ellipselabels", [14, 5, 26, 25]),
        (brush(slice(3, 18), slice(2, 12)), "brushlabels", [2, 3, 12, 18]),
        (brush(slice(0, 1), slice(0, 1)), "brushlabels", [0, 0, 1, 1]),
    ],
)
def test_regions_are_read_as_the_boxes_around_them(tmp_path: Path, value: object, kind: str, box: list[float]) -> None:
    source = opened(tmp_path, annotation(region(value, kind=kind)))
    np.testing.assert_allclose(records(source)["a.jpg"].boxes, [box], atol=1e-4)
    assert source.issue_counts == {}


def test_a_label_beside_its_shape(tmp_path: Path) -> None:
    """The tags Rectangle and Labels write two items of one id; Choices write more."""
    shape = region() | {"id": "r", "type": "rectangle", "value": BOX}
    label = region() | {"id": "r", "type": "labels", "value": BOX | {"labels": ["cat"]}}
    answer = region() | {"id": "r", "type": "choices", "value": BOX | {"choices": ["blurred"]}}
    whole = {"id": "w", "type": "choices", "value": {"choices": ["day"]}, "from_name": "time", "to_name": "image"}
    source = opened(tmp_path, annotation(shape, label, answer, whole))
    assert source.issue_counts == {}
    np.testing.assert_allclose(records(source)["a.jpg"].boxes, [[2, 3, 12, 18]])


def test_a_region_with_two_labels_is_two_objects(tmp_path: Path) -> None:
    item = region()
    item["value"]["rectanglelabels"] = ["cat", "dog"]
    source = opened(tmp_path, annotation(item))
    assert records(source)["a.jpg"].labels.tolist() == [0, 1]


def test_regions_without_the_size_of_the_image(tmp_path: Path) -> None:
    bare: dict[str, Any] = {"original_width": None, "original_height": None}
    source = opened(tmp_path, annotation(region(**bare), region(BOX | {"rotation": 30}, **bare)))
    np.testing.assert_allclose(records(source)["a.jpg"].boxes, [[2, 3, 12, 18]])
    assert source.issue_counts == {"unreadable box": 1}  # nobody knows how wide a turned one is


@pytest.mark.parametrize(
    ("annotations", "boxes", "issues"),
    [
        ([annotation()], 0, {}),
        ([annotation(region(), was_cancelled=True)], None, {"unannotated image": 1}),
        ([], None, {"unannotated image": 1}),
        ([annotation(region(), was_cancelled=True), annotation(region(), region())], 2, {}),
        ([annotation(region()), annotation(region(), region())], 1, {"several annotators": 1}),
        ([annotation(region()), annotation(region(), region(), ground_truth=True)], 2, {"several annotators": 1}),
        ([annotation() | {"result": 5}], None, {"unreadable annotation": 1, "unannotated image": 1}),
    ],
)
def test_which_annotation_is_read(
    tmp_path: Path, annotations: Sequence[object], boxes: int | None, issues: dict[str, int]
) -> None:
    source = opened(tmp_path, *annotations)
    assert source.issue_counts == issues
    found = records(source)
    assert "a.jpg" not in found if boxes is None else len(found["a.jpg"].boxes) == boxes


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (region({"x": 5, "y": 10, "width": None, "height": 5}), "unreadable box"),
        (region({"x": "?", "y": 10, "width": 5, "height": 5}), "unreadable box"),
        (region({"points": [[1, 2]]}, kind="polygonlabels"), "unreadable box"),
        (region({"points": 5}, kind="polygonlabels"), "unreadable box"),
        (region({"rle": [1, 2, 3], "format": "rle"}, kind="brushlabels"), "unreadable box"),
        (region({"rle": [0, 0, 18, 192] * 2, "format": "rle"}, kind="brushlabels"), "unreadable box"),
        (region({"rle": "abc", "format": "rle"}, kind="brushlabels"), "unreadable box"),
        (region(brush(slice(0, 0), slice(0, 0)), kind="brushlabels"), "unreadable box"),
        (region(label=" "), "unknown category"),
        (region() | {"type": "rectangle", "value": BOX}, "unknown category"),
        (region({"x": 5, "y": 10, "width": 0.5}, kind="keypointlabels"), "unsupported shape"),
        (region(BOX | {"width": 0}), "degenerate box"),
    ],
)
def test_wrong_regions_are_left_out_and_counted(tmp_path: Path, wrong: object, kind: str) -> None:
    source = opened(tmp_path, annotation(region(label="dog", id="y"), wrong))
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where == "val.json, entry 1, region 2"
    assert len(records(source)["a.jpg"].boxes) == 1


@pytest.mark.parametrize(
    ("address", "image"),
    [
        ("/data/upload/1/8a7f3c2d-a.jpg", "images/a.jpg"),
        ("/data/upload/1/8a7f3c2d-a.jpg", "images/8a7f3c2d-a.jpg"),
        ("/data/local-files/?d=photos/one%20more/a.jpg", "photos/one more/a.jpg"),
        ("/data/local-files/?d=photos%5Ca.jpg", "photos/a.jpg"),
        ("images/a.jpg", "images/a.jpg"),
        ("/data/local-files/?d=else/where/a.jpg", "images/a.jpg"),
        ("s3://bucket/photos/a.jpg", "images/a.jpg"),
        ("https://example.org/photos/a.jpg?size=2", "images/a.jpg"),
        ("https://example.org/8a7f3c2d-a.jpg", "images/a.jpg"),
    ],
)
def test_where_images_lie(tmp_path: Path, address: str, image: str) -> None:
    source = opened(tmp_path, annotation(region()), address=address, image=image)
    assert source.issue_counts.keys() <= {"image found by its name"}
    assert (tmp_path / "data" / image) in {record.path for record in records(source).values()}


def test_images_that_are_not_there_are_counted(tmp_path: Path) -> None:
    source = opened(tmp_path, annotation(region()), address="images/gone.jpg")
    assert source.issue_counts == {"missing image": 1}
    assert set(records(source)) == {"sound.jpg"}


def test_completions_of_old_versions(tmp_path: Path) -> None:
    for name in "ab":
        save_image(tmp_path / "data" / f"{name}.jpg", WIDTH, HEIGHT)
    tasks = [
        {"id": number, "completions": [{"id": 1, "result": [region()]}], "data": {"image": f"{name}.jpg"}}
        for number, name in enumerate("ab")
    ]
    write_json(tmp_path / "data" / "result.json", tasks)
    source = open_dataset(DatasetConfig(name="made", path=tmp_path / "data"), tmp_path / "cache")
    assert source.format == "label_studio"
    assert source.issue_counts == {}
    assert all(len(record.boxes) == 1 for record in records(source).values())


def test_rows_of_json_min_that_nobody_has_submitted(tmp_path: Path) -> None:
    for name in "abc":
        save_image(tmp_path / "data" / f"{name}.jpg", WIDTH, HEIGHT)
    rows = [
        {
            "image": "a.jpg",
            "id": 1,
            "annotation_id": 1,
            "box": [{**BOX, "rectanglelabels": ["cat"]}],
            "quality": "good",
        },
        {"image": "b.jpg", "id": 2, "annotation_id": 2},
        {"image": "c.jpg", "id": 3},
    ]
    write_json(tmp_path / "data" / "val.json", rows)
    source = open_dataset(DatasetConfig(name="made", path=tmp_path / "data"), tmp_path / "cache")
    assert source.issue_counts == {"unannotated image": 1}
    assert {name: len(record.boxes) for name, record in records(source).items()} == {"a.jpg": 1, "b.jpg": 0}
