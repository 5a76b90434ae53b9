"""CrowdHuman: whose boxes are read, what is ignored, and everything that may be wrong in a line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import save_image, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.errors import DataError

ID = "273271,1a0d6000b9e1f5b7"


def person(fbox: object = (2, 3, 10, 20), tag: str = "person", **extra: object) -> dict[str, Any]:
    """A box as CrowdHuman writes it."""
    others = {"vbox": [0, 0, 4, 4], "hbox": [1, 1, 2, 2], "head_attr": {"ignore": 0, "occ": 0, "unsure": 0}}
    return {"tag": tag, "fbox": list(fbox) if isinstance(fbox, tuple) else fbox, "extra": extra, **others}


def opened(tmp_path: Path, *boxes: object, more: str = "") -> DatasetSource:
    """A dataset of one image of 40 x 30 with these boxes; `more` are other lines."""
    root = tmp_path / "data"
    save_image(root / "Images" / f"{ID}.jpg")
    write_text(root / "annotation_val.odgt", json.dumps({"ID": ID, "gtboxes": boxes}) + "\n" + more)
    return open_dataset(DatasetConfig(name="crowd", path=root), tmp_path / "cache")


def test_full_boxes_are_read_and_nothing_else(tmp_path: Path) -> None:
    source = opened(tmp_path, person((2, 3, 10, 20)))
    record = source.split("val")[0]
    assert source.categories == ("person",)
    assert (record.image_id, record.width, record.height) == (ID, 40, 30)
    np.testing.assert_array_equal(record.boxes, [[2, 3, 12, 23]])
    assert record.annotated is None


def test_masks_and_ignored_persons_are_ignored_not_negative(tmp_path: Path) -> None:
    boxes = [person(), person(tag="mask", ignore=1), person(tag="mask"), person(ignore=1), person(ignore=0, occ=1)]
    del boxes[4]["head_attr"]
    source = opened(tmp_path, *boxes, {"tag": "person", "fbox": [1, 1, 5, 5]})
    assert source.categories == ("person",)
    assert source.split("val")[0].ignore.tolist() == [False, True, True, True, False, False]


def test_full_boxes_leave_the_image_without_an_issue(tmp_path: Path) -> None:
    source = opened(tmp_path, person((-30, -5, 50, 60)), person((35, 20, 10, 100)), person((41, 3, 5, 5)))
    np.testing.assert_array_equal(source.split("val")[0].boxes, [[0, 0, 20, 30], [35, 20, 40, 30]])
    assert source.issue_counts == {"box outside": 1}
    assert source.issues[0].where == "annotation_val.odgt:1, box 3"


def test_other_tags_are_categories(tmp_path: Path) -> None:
    assert opened(tmp_path, person(tag="rider"), person()).categories == ("person", "rider")


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        (person([1, 2, 3]), "unreadable box"),
        (person(None), "unreadable box"),
        (person("box"), "unreadable box"),
        (person([1, 2, 3, None]), "unreadable box"),
        (person([1, 2, float("nan"), 4]), "unreadable box"),
        (person([1, 2, 10**400, 4]), "unreadable box"),
        (person((1, 2, 0, 4)), "degenerate box"),
        (person((1, 2, -5, 4)), "degenerate box"),
        (person(tag=" "), "unknown category"),
    ],
)
def test_wrong_boxes_are_dropped_and_counted(tmp_path: Path, box: object, kind: str) -> None:
    source = opened(tmp_path, person(), box, person((1, 1, 5, 5)))
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where == "annotation_val.odgt:1, box 2"
    np.testing.assert_array_equal(source.split("val")[0].boxes, [[2, 3, 12, 23], [1, 1, 6, 6]])


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("{", "unreadable annotation"),
        ("[" * 100_000, "unreadable annotation"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "unreadable annotation"),
        ('{"ID": "b"}', "unreadable annotation"),
        ('{"gtboxes": []}', "unreadable annotation"),
        ('{"ID": "b", "gtboxes": [5]}', "unreadable annotation"),
        ('{"ID": "b", "gtboxes": null}', "unreadable annotation"),
        ('{"ID": "b", "gtboxes": []}', "missing image"),
        ('{"ID": "../../x", "gtboxes": []}', "path outside"),
        (f'{{"ID": "{ID}", "gtboxes": []}}', "duplicate image"),
    ],
)
def test_wrong_lines_are_skipped_and_counted(tmp_path: Path, line: str, kind: str) -> None:
    save_image(tmp_path / "x.jpg")
    source = opened(tmp_path, person(), more=f"\n  \n{line}\n")
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where == "annotation_val.odgt:4"
    assert len(source.split("val")) == 1


def test_one_file_is_a_dataset(tmp_path: Path) -> None:
    opened(tmp_path, person())
    spec = DatasetConfig(name="one", path=tmp_path / "data" / "annotation_val.odgt")
    assert len(open_dataset(spec, tmp_path / "cache").split("val")) == 1


def test_a_file_without_any_sound_line_is_an_empty_split(tmp_path: Path) -> None:
    write_text(tmp_path / "data" / "annotation_train.odgt", "{\n")
    source = opened(tmp_path, person())
    assert list(source.splits) == ["val"]
    assert source.issue_counts == {"unreadable annotation": 1, "empty split": 1}


def test_no_line_at_all(tmp_path: Path) -> None:
    opened(tmp_path, person())
    write_text(tmp_path / "data" / "annotation_val.odgt", "not JSON\n")
    with pytest.raises(DataError, match="no annotations of a known format"):
        open_dataset(DatasetConfig(name="crowd", path=tmp_path / "data"), tmp_path / "cache")
