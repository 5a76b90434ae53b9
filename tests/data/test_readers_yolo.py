"""YOLO: descriptions in their variants, text files, and everything that may be wrong in them."""

import logging
from pathlib import Path

import numpy as np
import pytest
from reader_trees import save_image, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.errors import DataError


def opened(root: Path) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root), root.parent / "cache")


def with_labels(
    tmp_path: Path, text: str | None, description: str = "names: [cat, dog]\nval: images/val\n"
) -> DatasetSource:
    """A dataset of one image of 40 x 30."""
    root = tmp_path / "data"
    save_image(root / "images" / "val" / "a.jpg")
    if text is not None:
        write_text(root / "labels" / "val" / "a.txt", text)
    write_text(root / "data.yaml", description)
    return opened(root)


def test_boxes_polygons_and_empty_lines(tmp_path: Path) -> None:
    source = with_labels(tmp_path, "0 0.5 0.5 0.5 0.2\n\n1.0 0.1 0.2 0.3 0.2 0.3 0.4\n 1 0.25 0.5 0.1 1 \n")
    record = source.split("val")[0]
    np.testing.assert_allclose(record.boxes, [[10, 12, 30, 18], [4, 6, 12, 12], [8, 0, 12, 30]], rtol=1e-5)
    assert record.labels.tolist() == [0, 1, 1]
    assert source.issue_counts == {}


def test_key_points_are_no_polygon(tmp_path: Path) -> None:
    source = with_labels(
        tmp_path, "0 0.5 0.5 0.5 0.2 0.9 0.9 0.8 0.8", "names: [cat]\nval: images/val\nkpt_shape: [2, 2]\n"
    )
    np.testing.assert_allclose(source.split("val")[0].boxes, [[10, 12, 30, 18]], rtol=1e-5)


@pytest.mark.parametrize("text", [None, "", "\n"])
def test_images_without_objects(tmp_path: Path, text: str | None) -> None:
    source = with_labels(tmp_path, text)
    assert len(source.split("val")[0].boxes) == 0
    assert source.issue_counts == {}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0 0.5 0.5 0.5", "unreadable label"),
        ("0 0.5 0.5 0.5 0.5 0.9", "unreadable label"),
        ("cat 0.5 0.5 0.5 0.5", "unreadable label"),
        ("2 0.5 0.5 0.5 0.5", "unknown category"),
        ("-1 0.5 0.5 0.5 0.5", "unknown category"),
        ("0.5 0.5 0.5 0.5 0.5", "unknown category"),
        ("0 0.5 0.5 0 0.5", "degenerate box"),
        ("0 0.5 0.5 nan 0.5", "unreadable box"),
        ("0 0.5 0.5 inf 0.5", "unreadable box"),
        ("0 1.5 0.5 0.5 0.5", "box outside"),
    ],
)
def test_wrong_lines_are_dropped_and_counted(tmp_path: Path, line: str, kind: str) -> None:
    source = with_labels(tmp_path, f"1 0.5 0.5 0.5 0.2\n{line}\n0 0.5 0.5 0.5 0.2")
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where == "labels/val/a.txt:2"
    assert source.split("val")[0].labels.tolist() == [1, 0]


def test_boxes_are_clipped(tmp_path: Path) -> None:
    source = with_labels(tmp_path, "0 0.0 0.5 0.5 0.2")
    np.testing.assert_allclose(source.split("val")[0].boxes, [[0, 12, 10, 18]], rtol=1e-5)
    assert source.issue_counts == {"box clipped": 1}


def test_unreadable_images_are_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "images" / "val"
    folder.mkdir(parents=True)
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").touch()
    source = with_labels(tmp_path, "0 0.5 0.5 0.5 0.2")
    assert source.issue_counts == {"unreadable image": 1}
    assert len(source.split("val")) == 1


def test_names_twice_are_joined(tmp_path: Path) -> None:
    source = with_labels(tmp_path, "2 0.5 0.5 0.5 0.2", "names: [cat, dog, cat]\nval: images/val\n")
    assert source.categories == ("cat", "dog")
    assert source.split("val")[0].labels.tolist() == [0]
    assert source.issue_counts == {"duplicate category": 1}


def test_names_with_gaps(tmp_path: Path) -> None:
    source = with_labels(tmp_path, "7 0.5 0.5 0.5 0.2", "names: {7: dog, 3: 12}\nval: images/val\n")
    assert source.categories == ("12", "dog")
    assert source.split("val")[0].labels.tolist() == [1]


def test_a_missing_split_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        source = with_labels(tmp_path, None, "names: [cat]\nval: images/val\ntrain: images/elsewhere\ntest:\n")
    assert list(source.splits) == ["val"]
    assert "'images/elsewhere' is not in this folder" in caplog.text


def test_a_split_that_the_description_leaves_out_is_found(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "images" / "test" / "b.jpg")
    assert list(with_labels(tmp_path, None).splits) == ["val", "test"]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("names: [cat", "not readable as YAML"),
        ("names: cat\nval: images/val\n", "`names` is a str"),
        ("names: {cat: 0}\nval: images/val\n", "`names` is a dict"),
        ("names: []\nval: images/val\n", "no category"),
    ],
)
def test_fatal_descriptions(tmp_path: Path, description: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        with_labels(tmp_path, None, description)


def test_no_split_is_there(tmp_path: Path) -> None:
    path = write_text(tmp_path / "data" / "data.yaml", "names: [cat]\ntrain: nowhere\n")
    with pytest.raises(DataError, match="none of its splits") as caught:
        opened(tmp_path / "data")
    assert caught.value.where == path


def test_the_description_may_be_named(tmp_path: Path) -> None:
    with_labels(tmp_path, "0 0.5 0.5 0.5 0.2")
    assert len(opened(tmp_path / "data" / "data.yaml").split("val")) == 1


def test_lists_refuse_paths_that_lead_outside(tmp_path: Path) -> None:
    root = tmp_path / "data"
    save_image(tmp_path / "secret.jpg")
    inside = save_image(root / "images" / "a.jpg")
    lines = ["images/a.jpg", "../secret.jpg", "/etc/passwd.jpg", "images/missing.jpg", str(inside), "./images/a.jpg"]
    write_text(root / "val.txt", "\n".join(lines))
    write_text(root / "data.yaml", "names: [cat]\nval: val.txt\n")
    source = opened(root)
    assert source.issue_counts == {"path outside": 2, "missing image": 1}
    assert [record.path for record in source.split("val")] == [inside]


def test_splits_never_leave_the_folder(tmp_path: Path) -> None:
    save_image(tmp_path / "other" / "images" / "a.jpg")
    save_image(tmp_path / "data" / "images" / "b.jpg")
    write_text(tmp_path / "data" / "data.yaml", "path: ../other\nnames: [cat]\nval: ../other/images\n")
    assert [record.path.name for record in opened(tmp_path / "data").split("val")] == ["b.jpg"]


def test_classes_file_without_text_files_is_not_yolo(tmp_path: Path) -> None:
    save_image(tmp_path / "data" / "a.jpg")
    write_text(tmp_path / "data" / "classes.txt", "cat\ndog")
    with pytest.raises(DataError, match="no annotations of a known format"):
        opened(tmp_path / "data")
    write_text(tmp_path / "data" / "a.txt", "1 0.5 0.5 0.5 0.2")
    assert opened(tmp_path / "data").format == "yolo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train = train.txt\nnames = missing.names", "not in this folder"),
        ("train = x.txt\nnames = a.names", "none of its"),
    ],
)
def test_fatal_darknet_descriptions(tmp_path: Path, text: str, message: str) -> None:
    write_text(tmp_path / "data" / "obj.data", text)
    write_text(tmp_path / "data" / "a.names", "cat")
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "data")
