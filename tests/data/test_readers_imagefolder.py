"""Hugging Face imagefolder: names of numbers, extra columns, and everything that may be wrong in a row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line_trees import write_lines
from reader_trees import save_image, write_json, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.errors import DataError


def row(name: str = "a.jpg", boxes: object = ((2, 3, 10, 20),), categories: object = (0,), **rest: object) -> Any:
    objects = {"bbox": boxes, "categories": categories, **rest}
    return {"file_name": name, "objects": {key: value for key, value in objects.items() if value is not None}}


def opened(tmp_path: Path, *rows: object, folder: str = "val", **files: str) -> DatasetSource:
    """A dataset with the images a.jpg and b.jpg of 40 x 30; `files` are written to its folder."""
    root = tmp_path / "data"
    for name in ("a.jpg", "b.jpg"):
        save_image(root / folder / name)
    if rows:
        write_lines(root / folder / "metadata.jsonl", rows)
    for name, text in files.items():
        write_text(root / name.replace("_", "."), text)
    return open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")


def test_numbers_without_names_are_named_and_noted_once(tmp_path: Path) -> None:
    boxes = [[1, 1, 5, 5]] * 3
    source = opened(tmp_path, row(boxes=boxes, categories=[3, 3, 11]), row("b.jpg", boxes, [3, 11, 3]))
    assert source.categories == ("category 11", "category 3")
    assert source.issue_counts == {"unnamed category": 2}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "cat\ndog\n"),
        ("labels.txt", "cat\ndog\n"),
        ("id2label.json", '{"0": "cat", "1": "dog"}'),
        ("label_map.json", '["cat", "dog"]'),
        (
            "README.md",
            "---\ndataset_info:\n- features:\n  - name: objects\n    list:\n    - name: label\n"
            "      dtype: {class_label: {names: [cat, dog]}}\n---\n",
        ),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_names_of_numbers(tmp_path: Path, name: str, text: str, beside: bool) -> None:
    root = tmp_path / "data"
    write_text((root / "val" if beside else root) / name, text)
    source = opened(tmp_path, row(categories=[1]), row("b.jpg", [], []))
    assert source.categories == ("cat", "dog")
    assert source.split("val")[0].labels.tolist() == [1]
    assert source.issue_counts == {}


@pytest.mark.parametrize(
    "card",
    ["---\na: [\n---\n", "---\na: &a [*a]\n---\n", "no header", "---\n---\n", "---\ndataset_info: 5\n---\n"],
)
def test_cards_that_name_nothing(tmp_path: Path, card: str) -> None:
    source = opened(tmp_path, row(), README_md=card)
    assert source.categories == ("category 0",)
    assert source.issue_counts["unnamed category"] == 1


def test_crowds_are_ignored_and_areas_kept(tmp_path: Path) -> None:
    boxes, columns = [[1, 1, 10, 10]] * 3, {"iscrowd": [0, 1, True], "area": [50, None, 1e9], "id": [1, 2, 3]}
    record = opened(tmp_path, row(boxes=boxes, categories=["cat"] * 3, **columns)).split("val")[0]
    assert record.ignore.tolist() == [False, True, True]
    np.testing.assert_allclose(record.areas, [50, 100, 100])


def test_a_row_tells_the_size(tmp_path: Path) -> None:
    source = opened(tmp_path, {**row(), "width": 400, "height": 300}, {**row("b.jpg"), "width": None, "height": "x"})
    assert [(record.width, record.height) for record in source.split("val")] == [(400, 300), (40, 30)]


def test_an_image_without_objects_and_one_without_annotations(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "val" / "c.jpg")
    save_image(tmp_path / "data" / "val" / "d.jpg")
    rows = [row(), row("b.jpg", [], []), {"file_name": "c.jpg", "objects": None}]
    source = opened(tmp_path, *rows)
    assert [record.path.name for record in source.split("val")] == ["a.jpg", "b.jpg"]
    assert source.issue_counts["unannotated image"] == 2  # c.jpg as a row, d.jpg as a file without one


def test_an_empty_list_of_objects_is_an_image_without_objects(tmp_path: Path) -> None:
    source = opened(tmp_path, row(), {"file_name": "b.jpg", "objects": []})
    assert source.split("val").counts().empty == 1


@pytest.mark.parametrize(
    ("box", "category", "kind"),
    [
        ([1, 2, 3], "cat", "unreadable box"),
        (None, "cat", "unreadable box"),
        ("x", "cat", "unreadable box"),
        ([1, 2, float("nan"), 4], "cat", "unreadable box"),
        ([1, 2, 0, 4], "cat", "degenerate box"),
        ([50, 2, 4, 4], "cat", "box outside"),
        ([1, 2, 3, 4], None, "unknown category"),
        ([1, 2, 3, 4], " ", "unknown category"),
        ([1, 2, 3, 4], True, "unknown category"),
        ([1, 2, 3, 4], [1], "unknown category"),
    ],
)
def test_wrong_objects_are_dropped_and_counted(tmp_path: Path, box: object, category: object, kind: str) -> None:
    boxes, categories = [[2, 3, 10, 20], box, [1, 1, 5, 5]], ["cat", category, "dog"]
    source = opened(tmp_path, row(boxes=boxes, categories=categories), row("b.jpg"))
    assert {**source.issue_counts, "unnamed category": 1} == {kind: 1, "unnamed category": 1}
    assert next(issue for issue in source.issues if issue.kind == kind).where == "val/metadata.jsonl:1, box 2"
    assert len(source.split("val")[0].boxes) == 2


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"file_name": "b.jpg", "objects": 5}, "unreadable annotation"),
        ({"file_name": "b.jpg", "objects": {"bbox": [[1, 2, 3, 4]]}}, "unreadable annotation"),
        (row("b.jpg", [[1, 2, 3, 4]], []), "unreadable annotation"),
        (row("b.jpg", [[1, 2, 3, 4]], ["cat"], iscrowd=[0, 1]), "unreadable annotation"),
        ({"objects": {"bbox": [], "categories": []}}, "unreadable annotation"),
        ([1], "unreadable annotation"),
        (row("z.jpg"), "missing image"),
        (row("../../x.jpg"), "path outside"),
        (row("a.jpg"), "duplicate image"),
    ],
)
def test_wrong_rows_are_skipped_and_counted(tmp_path: Path, wrong: object, kind: str) -> None:
    save_image(tmp_path / "x.jpg")
    source = opened(tmp_path, row(categories=["cat"]), wrong, classes_txt="cat")
    told = isinstance(wrong, dict) and wrong.get("file_name") == "b.jpg"
    assert source.issue_counts == {kind: 1} | ({} if told else {"unannotated image": 1})
    assert len(source.split("val")) == 1


def test_a_file_without_any_sound_row_is_an_empty_split(tmp_path: Path) -> None:
    write_text(tmp_path / "data" / "train" / "metadata.jsonl", "{\n")
    source = opened(tmp_path, row(categories=["cat"]), row("b.jpg", [], []))
    assert list(source.splits) == ["val"]
    assert source.issue_counts == {"unreadable annotation": 1, "empty split": 1}


def test_a_damaged_table_is_an_error(tmp_path: Path) -> None:
    write_text(tmp_path / "data" / "train" / "metadata.parquet", "PAR1 and no more")
    with pytest.raises(DataError, match="cannot be read"):
        opened(tmp_path, row())


def test_one_file_is_a_dataset(tmp_path: Path) -> None:
    opened(tmp_path, row())
    spec = DatasetConfig(name="one", path=tmp_path / "data" / "val" / "metadata.jsonl")
    assert list(open_dataset(spec, tmp_path / "cache").splits) == ["val"]


def test_a_folder_without_splits_is_split(tmp_path: Path) -> None:
    source = opened(tmp_path, row(), row("b.jpg"), folder="images")
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 1, "val": 1}


def test_rows_may_name_their_splits(tmp_path: Path) -> None:
    rows = [row() | {"split": "train"}, row("b.jpg", [[1, 1, 9, 9], [2, 2, 9, 9]], [0, 0]) | {"split": "validation"}]
    source = opened(tmp_path, *rows, folder="images")
    assert {split: [record.path.name for record in found] for split, found in source.splits.items()} == {
        "train": ["a.jpg"],
        "val": ["b.jpg"],
    }
    assert source.issue_counts == {"unnamed category": 1}


def test_a_new_list_of_names_is_read(tmp_path: Path) -> None:
    assert opened(tmp_path, row()).categories == ("category 0",)
    write_json(tmp_path / "data" / "id2label.json", {"0": "cat"})
    assert opened(tmp_path).categories == ("cat",)


CORNERS = [[50, 40, 90, 70], [10, 5, 60, 50], [60, 10, 99, 20], [5, 50, 40, 79], [30, 30, 80, 60], [20, 2, 45, 75]]


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(
    ("kind", "notes"),
    [
        ("xywh", set()),
        ("xyxy", {"boxes are not xywh"}),
        ("xywhn", {"boxes are fractions"}),
        ("xyxyn", {"boxes are fractions", "boxes are not xywh"}),
    ],
)
def test_boxes_of_another_kind(tmp_path: Path, kind: str, notes: set[str], sized: bool) -> None:
    boxes = np.array(CORNERS, dtype=np.float64)
    if kind.startswith("xywh"):
        boxes[:, 2:] -= boxes[:, :2]
    if kind.endswith("n"):
        boxes /= [100, 80, 100, 80]
    save_image(tmp_path / "data" / "train" / "a.jpg", 100, 80)
    objects = {"bbox": boxes.tolist(), "categories": ["cat"] * 6, "area": [1e-9] * 6 if kind.endswith("n") else [5] * 6}
    size = {"width": 100, "height": 80} if sized else {}
    write_text(
        tmp_path / "data" / "train" / "metadata.jsonl", json.dumps({"file_name": "a.jpg", "objects": objects} | size)
    )
    source = open_dataset(DatasetConfig(name="made", path=tmp_path / "data"), tmp_path / "cache")
    np.testing.assert_allclose(source.split("train")[0].boxes, CORNERS, rtol=1e-5)
    assert set(source.issue_counts) == notes
    assert source.split("train")[0].areas.min() >= 5
    said = open_dataset(DatasetConfig(name="made", path=tmp_path / "data", boxes=kind), tmp_path / "cache")
    np.testing.assert_allclose(said.split("train")[0].boxes, CORNERS, rtol=1e-5)
    assert said.issue_counts == {}


@pytest.mark.parametrize(
    "image", [{"image": "a.jpg"}, {"image": {"path": "a.jpg", "bytes": None}}, {"filename": "a.jpg"}]
)
def test_the_image_under_another_key(tmp_path: Path, image: dict[str, Any]) -> None:
    save_image(tmp_path / "data" / "train" / "a.jpg")
    row = image | {"objects": {"bbox": [[1, 2, 3, 4]], "categories": ["cat"]}}
    write_text(tmp_path / "data" / "train" / "metadata.jsonl", json.dumps(row))
    source = open_dataset(DatasetConfig(name="made", path=tmp_path / "data"), tmp_path / "cache")
    assert source.split("train")[0].boxes.tolist() == [[1, 2, 4, 6]]


def test_the_boxes_of_all_files_are_of_one_kind(tmp_path: Path) -> None:
    """Those of the small file fit as what the format says, too, and would alone be read so."""
    root = tmp_path / "data"
    corners = [[20, 15, 38, 28], [22, 3, 39, 20], [30, 10, 36, 29]]
    for folder, boxes in (("train", corners), ("val", [[2, 3, 10, 20]])):
        save_image(root / folder / "a.jpg")
        write_lines(root / folder / "metadata.jsonl", [row(boxes=boxes, categories=["x"] * len(boxes))])
    source = open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")
    assert source.split("train")[0].boxes.tolist() == corners
    assert source.split("val")[0].boxes.tolist() == [[2, 3, 10, 20]]
    assert source.issue_counts == {"boxes are not xywh": 1}
