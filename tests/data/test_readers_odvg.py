"""ODVG: label maps, grounded phrases and what is known of them, and everything that may be wrong in a line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from line_trees import write_lines
from reader_trees import save_image, write_json, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.errors import DataError


def instance(label: object = 0, bbox: object = (2, 3, 12, 23), **rest: object) -> dict[str, Any]:
    return {"bbox": list(bbox) if isinstance(bbox, tuple) else bbox, "label": label, **rest}


def detections(name: str, *instances: object) -> dict[str, Any]:
    return {"filename": name, "height": 30, "width": 40, "detection": {"instances": list(instances)}}


def grounding(name: str, *regions: tuple[object, object]) -> dict[str, Any]:
    found = [{"bbox": box, "phrase": phrase, "tokens_positive": [[0, 3]]} for box, phrase in regions]
    return {"filename": name, "height": 30, "width": 40, "grounding": {"caption": "a man on a horse", "regions": found}}


def opened(tmp_path: Path, labels: object = None, **files: list[Any]) -> DatasetSource:
    """A dataset with the images a.jpg to d.jpg of 40 x 30."""
    root = tmp_path / "data"
    for name in "abcd":
        save_image(root / "images" / f"{name}.jpg")
    for name, rows in files.items():
        write_lines(root / f"{name}.jsonl", rows)
    if labels is not None:
        write_json(root / "label_map.json", labels)
    return open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")


def test_names_of_the_label_map_are_annotated_though_unseen(tmp_path: Path) -> None:
    labels = {"0": "cat", "1": "dog", "2": "unicorn"}
    source = opened(tmp_path, labels, val=[detections("a.jpg", instance(1)), detections("b.jpg")])
    assert source.categories == ("cat", "dog", "unicorn")
    assert [record.annotated for record in source.split("val")] == [None, None]
    assert source.split("val")[0].labels.tolist() == [1]
    assert source.split("val").counts().empty == 1


def test_labels_may_be_text_and_the_map_a_list(tmp_path: Path) -> None:
    source = opened(tmp_path, ["cat", "dog"], val=[detections("a.jpg", instance("1"), instance(0))])
    assert [source.categories[label] for label in source.split("val")[0].labels] == ["dog", "cat"]


def test_the_name_in_a_line_is_believed(tmp_path: Path) -> None:
    rows = [detections("a.jpg", instance(0, category="cat"), instance(1, category="horse"), instance(1))]
    source = opened(tmp_path, {"0": "cat", "1": "dog"}, val=rows)
    assert [source.categories[label] for label in source.split("val")[0].labels] == ["cat", "horse", "dog"]
    assert source.issue_counts == {"conflicting name": 1}


def test_phrases_are_categories_of_which_nothing_is_known_to_be_absent(tmp_path: Path) -> None:
    several = [[1, 2, 3, 4], [5, 6, 9, 9]]
    rows = [grounding("a.jpg", ([2, 3, 12, 23], "a  man"), (several, "a horse")), grounding("b.jpg")]
    source = opened(tmp_path, val=rows)
    assert source.categories == ("a horse", "a man")
    record, empty = source.split("val")
    np.testing.assert_array_equal(record.boxes, [[2, 3, 12, 23], [1, 2, 3, 4], [5, 6, 9, 9]])
    assert record.labels.tolist() == [1, 0, 0]
    assert record.annotated == ()
    assert (len(empty.boxes), empty.annotated) == (0, ())


def test_an_image_comes_with_each_of_its_captions(tmp_path: Path) -> None:
    rows = [grounding("a.jpg", ([1, 2, 3, 4], "man")), grounding("a.jpg", ([5, 6, 8, 9], "hat"))]
    first, second = opened(tmp_path, val=rows).split("val")
    assert first.path == second.path
    assert first.image_id != second.image_id


def test_detections_beside_phrases_know_nothing_of_the_phrases(tmp_path: Path) -> None:
    """Else every phrase would count as absent wherever the detector's names are annotated."""
    pairs = {"train": [grounding("a.jpg", ([1, 2, 9, 9], "a man"))], "val": [detections("b.jpg", instance(1))]}
    source = opened(tmp_path, {"0": "cat", "1": "dog"}, **pairs)
    assert source.categories == ("a man", "cat", "dog")
    assert source.split("train")[0].annotated == ()
    assert source.split("val")[0].annotated == (1, 2)


def test_detections_beside_phrases_without_a_label_map_know_what_they_name(tmp_path: Path) -> None:
    rows = [detections("b.jpg", instance(1, category="dog")), detections("c.jpg", instance(0, category="cat"))]
    source = opened(tmp_path, train=[grounding("a.jpg", ([1, 2, 9, 9], "a man"))], val=rows)
    assert [record.annotated for record in source.split("val")] == [(2,), (1,)]


def test_the_label_map_of_the_most_similar_name_is_taken(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name, labels in (("cells", ["cat"]), ("v3det", ["dog"]), ("a", ["cow"])):
        write_json(root / f"{name}_label_map.json", labels)
    assert opened(tmp_path, v3det_2023_val_od=[detections("a.jpg", instance(0))]).categories == ("dog",)


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (instance(bbox=[1, 2, 3]), "unreadable box"),
        (instance(bbox=None), "unreadable box"),
        (instance(bbox=[[1, 2, 3, 4]]), "unreadable box"),
        (instance(bbox=[1, 2, float("inf"), 4]), "unreadable box"),
        (instance(bbox=[5, 5, 5, 9]), "degenerate box"),
        (instance(bbox=[9, 9, 3, 3]), "swapped corners"),
        (instance(bbox=[50, 5, 60, 9]), "box outside"),
        (instance(bbox=[-5, 5, 6, 9]), "box clipped"),
        (instance(label=9), "unknown category"),
        (instance(label=None), "unknown category"),
        (instance(label=9, category=" "), "unknown category"),
    ],
)
def test_wrong_instances_are_dropped_and_counted(tmp_path: Path, wrong: object, kind: str) -> None:
    source = opened(tmp_path, ["cat"], val=[detections("a.jpg", instance(), wrong, instance(bbox=(1, 1, 5, 5)))])
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where == "val.jsonl:1, instance 2"
    assert len(source.split("val")[0].boxes) == (3 if kind in {"box clipped", "swapped corners"} else 2)


@pytest.mark.parametrize(
    ("region", "kind"),
    [
        (([1, 2, 3], "man"), "unreadable box"),
        (([[1, 2, 9, 9], [1, 2]], "man"), "unreadable box"),
        ((None, "man"), "unreadable box"),
        (([], "man"), "unreadable box"),
        (([1, 2, 9, 9], ""), "unknown category"),
        (([1, 2, 9, 9], None), "unknown category"),
    ],
)
def test_wrong_regions_are_dropped_and_counted(tmp_path: Path, region: tuple[object, object], kind: str) -> None:
    source = opened(tmp_path, val=[grounding("a.jpg", ([1, 2, 3, 4], "hat"), region)])
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where == "val.jsonl:1, region 2"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"filename": "b.jpg"}, "unreadable annotation"),
        ({"filename": "b.jpg", "detection": {}}, "unreadable annotation"),
        ({"filename": "b.jpg", "detection": {"instances": [1]}}, "unreadable annotation"),
        ({"detection": {"instances": []}}, "unreadable annotation"),
        (grounding("b.jpg", ([1, 2, 9, 9], "man")), "unreadable annotation"),
        (detections("z.jpg"), "missing image"),
        (detections("../../x.jpg"), "path outside"),
        (detections("a.jpg"), "duplicate image"),
    ],
)
def test_wrong_lines_are_skipped_and_counted(tmp_path: Path, row: object, kind: str) -> None:
    save_image(tmp_path / "x.jpg")
    source = opened(tmp_path, ["cat"], val=[detections("a.jpg", instance()), row])
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where == "val.jsonl:2"
    assert len(source.split("val")) == 1


@pytest.mark.parametrize("labels", ["cat", {"0": 1}, [["cat"]], 5])
def test_a_label_map_that_is_none_is_an_error(tmp_path: Path, labels: object) -> None:
    with pytest.raises(DataError, match="not readable as a label map"):
        opened(tmp_path, labels, val=[detections("a.jpg", instance(0))])


def test_a_file_without_any_sound_line_is_an_empty_split(tmp_path: Path) -> None:
    write_text(tmp_path / "data" / "train.jsonl", "{\n")
    source = opened(tmp_path, ["cat"], val=[detections("a.jpg", instance(0))])
    assert list(source.splits) == ["val"]
    assert source.issue_counts == {"unreadable annotation": 1, "empty split": 1}


def test_a_changed_label_map_is_read_again(tmp_path: Path) -> None:
    rows = [detections("a.jpg", instance(0))]
    assert opened(tmp_path, ["cat"], val=rows).categories == ("cat",)
    assert opened(tmp_path, ["a dog"], val=rows).categories == ("a dog",)


def test_pieces_of_a_large_set_are_one_dataset(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for number, name in enumerate("abcd"):
        write_lines(root / "annotations" / f"{number:05d}.json", [grounding(f"{name}.jpg", ([1, 2, 9, 9], name))])
    source = opened(tmp_path)
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 3, "val": 1}


def test_one_file_is_a_dataset(tmp_path: Path) -> None:
    opened(tmp_path, ["cat"], val=[detections("a.jpg", instance())], train=[detections("b.jpg")])
    spec = DatasetConfig(name="one", path=tmp_path / "data" / "val.jsonl")
    assert list(open_dataset(spec, tmp_path / "cache").splits) == ["val"]


def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    opened(tmp_path, ["cat"], val=[detections("a.jpg", instance())])
    path = tmp_path / "data" / "val.jsonl"
    write_text(path, "\ufeff" + path.read_text(encoding="utf-8"))
    assert opened(tmp_path).issue_counts == {}
