"""labelme: every shape, groups, flags, where images lie, and everything that may be wrong in a file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import save_image, write_json, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset

BOX = [[2, 3], [12, 23]]


def shape(
    label: object = "cat", points: object = BOX, kind: str | None = "rectangle", **rest: object
) -> dict[str, Any]:
    """A shape as labelme writes it."""
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **rest}


def content(*shapes: object, image: str | None = "a.jpg", **rest: object) -> dict[str, Any]:
    size = {"imageHeight": 30, "imageWidth": 40}
    return (
        {"version": "5.5.0", "flags": {}, "shapes": list(shapes), "imagePath": image, "imageData": None} | size | rest
    )


def opened(tmp_path: Path, value: object, image: str = "a.jpg") -> DatasetSource:
    """A dataset of one valid annotation file and one with the given content."""
    root = tmp_path / "data"
    for name in (image, "sound.jpg"):
        save_image(root / "val" / name)
    if isinstance(value, str):
        write_text(root / "val" / "a.json", value)
    else:
        write_json(root / "val" / "a.json", value)
    write_json(root / "val" / "sound.json", content(shape("dog"), image="sound.jpg"))
    return open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")


@pytest.mark.parametrize(
    ("points", "kind", "box"),
    [
        ([[12, 23], [2, 3]], "rectangle", [2, 3, 12, 23]),
        ([[2, 3], [12, 3], [12, 23], [2, 23]], "rectangle", [2, 3, 12, 23]),
        ([[2, 10], [7, 3], [12, 23]], "polygon", [2, 3, 12, 23]),
        ([[2, 10], [7, 3], [12, 23]], None, [2, 3, 12, 23]),
        ([[10, 12], [13, 16]], "circle", [5, 7, 15, 17]),
        ([[2.5, 3], [12, 23.5]], "mask", [2.5, 3, 12, 23.5]),
        ([[7, 3], [12, 13], [7, 23], [2, 13]], "rotation", [2, 3, 12, 23]),
    ],
)
def test_shapes_are_read_as_the_boxes_around_them(tmp_path: Path, points: object, kind: str, box: list[float]) -> None:
    source = opened(tmp_path, content(shape("cat", points, kind)))
    np.testing.assert_allclose(source.split("val")[0].boxes, [box])
    assert source.issue_counts == {}


@pytest.mark.parametrize("kind", ["line", "linestrip", "point", "points"])
def test_lines_and_points_are_no_objects(tmp_path: Path, kind: str) -> None:
    source = opened(tmp_path, content(shape(), shape("edge", BOX, kind)))
    assert source.issue_counts == {"unsupported shape": 1}
    assert source.issues[0].where == "val/a.json, shape 2"
    assert source.categories == ("cat", "dog")


def test_a_point_makes_its_category_unknown_whatever_the_order(tmp_path: Path) -> None:
    """The dog of the other image is read later, and only the edges are of no category."""
    source = opened(tmp_path, content(shape("dog", [[2, 3]], "point"), shape("edge", BOX, "line"), shape()))
    assert source.categories == ("cat", "dog")
    assert [record.annotated for record in source.split("val")] == [(0,), None]


def test_shapes_of_a_group_are_one_object(tmp_path: Path) -> None:
    """As in labelme's converters: the same label and the same group."""
    shapes = [
        shape("cat", [[2, 3], [6, 7]], group_id=1),
        shape("dog", [[20, 3], [26, 7]], group_id=1),
        shape("cat", [[10, 12], [14, 17]], group_id=1, flags={"difficult": True}),
        shape("cat", [[1, 1], [4, 4]], group_id=2),
        shape("cat", [[1, 1], [5, 5]]),
        shape("cat", [[1, 1], [5, 5]]),
    ]
    record = opened(tmp_path, content(*shapes)).split("val")[0]
    boxes = [[2, 3, 14, 17], [20, 3, 26, 7], [1, 1, 4, 4], [1, 1, 5, 5], [1, 1, 5, 5]]
    np.testing.assert_array_equal(record.boxes, boxes)
    assert record.ignore.tolist() == [True, False, False, False, False]


def test_difficult_objects_and_crowds_are_ignored(tmp_path: Path) -> None:
    flags = [{}, {"ignore": True}, {"crowd": True}, {"difficult": False}, {"occluded": True}, None]
    shapes = [*(shape(flags=flag) for flag in flags), shape(difficult=True), shape(difficult=False)]
    record = opened(tmp_path, content(*shapes)).split("val")[0]
    assert record.ignore.tolist() == [False, True, True, False, False, False, True, False]


def test_numbers_are_names_and_regions_of_nothing_are_left_out(tmp_path: Path) -> None:
    source = opened(tmp_path, content(shape(7), shape("__ignore__"), shape("_background_")))
    assert source.categories == ("7", "dog")
    assert source.issue_counts == {"unknown category": 2}


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (shape(points=[[2, 3]]), "unreadable box"),
        (shape(points=None), "unreadable box"),
        (shape(points=[2, 3, 12, 23]), "unreadable box"),
        (shape(points=[[2, 3], [12, "x"]]), "unreadable box"),
        (shape(points=[[2, 3], [12]]), "unreadable box"),
        (shape(points=[[1, 1], [9, 9]], kind="polygon"), "unreadable box"),
        (shape(points=[[2, 3], [2, 23]]), "degenerate box"),
        (shape(points=[[50, 3], [60, 23]]), "box outside"),
        (shape(label=""), "unknown category"),
        (shape(label=None), "unknown category"),
    ],
)
def test_wrong_shapes_are_dropped_and_counted(tmp_path: Path, wrong: object, kind: str) -> None:
    source = opened(tmp_path, content(shape(), wrong, shape(points=[[1, 1], [3, 3]])))
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where == "val/a.json, shape 2"
    np.testing.assert_array_equal(source.split("val")[0].boxes, [[2, 3, 12, 23], [1, 1, 3, 3]])


@pytest.mark.parametrize("size", [(None, None), (0, 0), ("x", 40), (-30, 40), (30, None)])
def test_sizes_that_say_nothing_are_probed(tmp_path: Path, size: tuple[object, object]) -> None:
    height, width = size
    source = opened(tmp_path, content(shape(), imageHeight=height, imageWidth=width))
    if "x" in size:  # no number: nothing in the file can be trusted
        assert source.issue_counts == {"unreadable annotation": 1, "unannotated image": 1}
    else:
        record = source.split("val")[0]
        assert (record.width, record.height) == (40, 30)


@pytest.mark.parametrize(
    ("value", "image", "issues"),
    [
        ("{", "a.jpg", {"unreadable annotation": 1, "unannotated image": 1}),
        ("", "a.jpg", {"unreadable annotation": 1, "unannotated image": 1}),
        ('{"shapes": ' + "[" * 100_000, "a.jpg", {"unreadable annotation": 1, "unannotated image": 1}),
        ('{"imagePath": "a.jpg"}', "a.jpg", {"unreadable annotation": 1, "unannotated image": 1}),
        (content(5), "a.jpg", {"unreadable annotation": 1, "unannotated image": 1}),
        (content(shape(), image="c.jpg"), "b.jpg", {"missing image": 1, "unannotated image": 1}),
        (content(shape(), image=None), "b.jpg", {"missing image": 1, "unannotated image": 1}),
        (content(shape(), image="../../x.jpg"), "b.jpg", {"path outside": 1, "unannotated image": 1}),
        (content(shape(), image="/etc/x.jpg"), "b.jpg", {"path outside": 1, "unannotated image": 1}),
        (content(shape(), image="sound.jpg"), "b.jpg", {"missing image": 1, "unannotated image": 1}),
    ],
)
def test_wrong_files_are_skipped_and_counted(tmp_path: Path, value: object, image: str, issues: dict[str, int]) -> None:
    save_image(tmp_path / "x.jpg")
    source = opened(tmp_path, value, image)
    assert source.issue_counts == issues
    assert [record.path.name for record in source.split("val")] == ["sound.jpg"]


@pytest.mark.parametrize("named", ["b.jpg", "C:\\images\\b.jpg", "../old/b.jpg", "/home/x/b.jpg", None])
def test_the_image_of_the_same_name_comes_first(tmp_path: Path, named: str | None) -> None:
    """Paths grow stale; b.jpg is there, but the file is called like a.jpg."""
    save_image(tmp_path / "data" / "val" / "b.jpg")
    source = opened(tmp_path, content(shape(), image=named))
    assert source.split("val")[0].path.name == "a.jpg"
    assert source.issue_counts == {"unannotated image": 1}


def test_an_image_without_objects(tmp_path: Path) -> None:
    assert opened(tmp_path, content()).split("val").counts().empty == 1


def test_a_folder_without_splits_is_split(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in "abcde":
        save_image(root / f"{name}.jpg")
        write_json(root / f"{name}.json", content(shape(), image=f"{name}.jpg"))
    source = open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 4, "val": 1}
