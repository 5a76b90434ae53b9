"""CreateML and Datumaro: their keys, and what may be wrong in a file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import save_image, write_json, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.formats.registry import recognise
from metr.errors import DataError

CENTRE = {"x": 7, "y": 13, "width": 10, "height": 20}  # [2, 3, 12, 23]


def opened(tmp_path: Path, content: object, file: str) -> DatasetSource:
    root = tmp_path / "data"
    for name in "abc":
        save_image(root / "val" / f"{name}.jpg")
    write_json(root / file, content)
    return open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")


def records(source: DatasetSource) -> dict[str, Any]:
    return {record.path.name: record for split in source.splits.values() for record in split}


def createml(tmp_path: Path, *entries: object) -> DatasetSource:
    sound = {"image": "a.jpg", "annotations": [{"label": "cat", "coordinates": CENTRE}]}
    return opened(tmp_path, [sound, *entries], "val/_annotations.createml.json")


def test_createml_of_old_versions(tmp_path: Path) -> None:
    entry = {"imagefilename": "b.jpg", "annotation": [{"label": "dog", "coordinates": CENTRE}]}
    source = createml(tmp_path, entry, {"image": "c.jpg", "annotations": []})
    assert source.issue_counts == {}
    np.testing.assert_array_equal(records(source)["b.jpg"].boxes, [[2, 3, 12, 23]])
    assert len(records(source)["c.jpg"].boxes) == 0


@pytest.mark.parametrize(
    ("entry", "issues", "boxes"),
    [
        ({"image": "b.jpg"}, {"unannotated image": 1}, None),
        ({"image": "b.jpg", "annotations": 5}, {"unreadable annotation": 1}, None),
        ({"image": "gone.jpg", "annotations": []}, {"missing image": 1}, None),
        ({"image": "a.jpg", "annotations": []}, {"duplicate image": 1}, None),
        ({"image": "b.jpg", "annotations": [{"label": "", "coordinates": CENTRE}]}, {"unknown category": 1}, 0),
        ({"image": "b.jpg", "annotations": [{"label": "cat"}]}, {"unreadable box": 1}, 0),
        ({"image": "b.jpg", "annotations": [{"label": "cat", "coordinates": {"x": 1}}]}, {"unreadable box": 1}, 0),
        ({"image": "b.jpg", "annotations": [{"label": 7, "coordinates": CENTRE}]}, {}, 1),
    ],
)
def test_createml_entries(tmp_path: Path, entry: object, issues: dict[str, int], boxes: int | None) -> None:
    source = createml(tmp_path, entry)
    assert source.issue_counts == issues
    found = records(source).get("b.jpg")
    assert (None if found is None else len(found.boxes)) == boxes
    assert len(records(source)["a.jpg"].boxes) == 1


def test_createml_with_numbers_that_only_python_writes(tmp_path: Path) -> None:
    source = createml(tmp_path)
    entry = '{"image": "%s.jpg", "annotations": [%s]}'
    item = '{"label": "cat", "coordinates": {"x": %s, "y": 9, "width": 2, "height": 3}}'
    sound, wrong = entry % ("a", item % "7"), entry % ("b", item % "NaN")
    write_text(tmp_path / "data" / "val" / "_annotations.createml.json", f"\ufeff[{sound}, {wrong}]")
    source = open_dataset(DatasetConfig(name="made", path=tmp_path / "data"), tmp_path / "cache")
    assert source.issue_counts == {"unreadable box": 1}


def test_createml_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "data" / "val" / "_annotations.createml.json"
    createml(tmp_path)
    file.write_text(file.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    with pytest.raises(DataError, match="not readable as a JSON list"):
        open_dataset(DatasetConfig(name="made", path=tmp_path / "data"), tmp_path / "cache")


def datumaro(tmp_path: Path, *annotations: object) -> DatasetSource:
    labels: list[dict[str, Any]] = [{"name": name, "parent": "", "attributes": []} for name in ("dog", "cat")]
    items = [
        {"id": "a", "annotations": list(annotations), "image": {"path": "a.jpg", "size": [30, 40]}},
        {"id": "b", "annotations": []},
    ]
    categories = {"label": {"labels": labels, "attributes": []}, "mask": {"colormap": []}}
    return opened(tmp_path, {"info": {}, "categories": categories, "items": items}, "annotations/val.json")


def annotation(kind: str = "bbox", label: object = 1, **rest: object) -> dict[str, Any]:
    return {"id": 0, "type": kind, "attributes": {}, "group": 0, "label_id": label} | rest


def test_datumaro_shapes_and_crowds(tmp_path: Path) -> None:
    source = datumaro(
        tmp_path,
        annotation(bbox=[2, 3, 10, 20]),
        annotation("polygon", 0, points=[2, 10, 7, 3, 12, 23]),
        annotation(bbox=[2, 3, 10, 20], attributes={"is_crowd": True}),
        annotation("label"),
        annotation("caption", None, caption="a cat"),
    )
    assert source.categories == ("dog", "cat")
    assert source.issue_counts == {}
    record = records(source)["a.jpg"]
    np.testing.assert_array_equal(record.boxes, [[2, 3, 12, 23]] * 3)
    assert record.labels.tolist() == [1, 0, 1]
    assert record.ignore.tolist() == [False, False, True]
    assert len(records(source)["b.jpg"].boxes) == 0


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (annotation(bbox=[2, 3, 10]), "unreadable box"),
        (annotation("polygon", points=[2, 3, 10]), "unreadable box"),
        (annotation(label=7, bbox=[2, 3, 10, 20]), "unknown category"),
        (annotation(label=None, bbox=[2, 3, 10, 20]), "unknown category"),
        (annotation("mask", rle={"counts": "abc", "size": [30, 40]}), "unsupported shape"),
    ],
)
def test_wrong_datumaro_annotations_are_left_out_and_counted(tmp_path: Path, wrong: object, kind: str) -> None:
    source = datumaro(tmp_path, annotation(label=0, bbox=[2, 3, 10, 20]), wrong)
    assert source.issue_counts == {kind: 1}
    record = records(source)["a.jpg"]
    assert len(record.boxes) == 1
    if kind != "unknown category":
        assert record.annotated == (0,)  # whether there is a cat is unknown


def test_one_file_can_be_named(tmp_path: Path) -> None:
    datumaro(tmp_path, annotation(bbox=[2, 3, 10, 20]))
    assert recognise(tmp_path / "data" / "annotations" / "val.json").format == "datumaro"
