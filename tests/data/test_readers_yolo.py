"""YOLO: descriptions in their variants, text files, and everything that may be wrong in them."""

import logging
from pathlib import Path

import numpy as np
import pytest
from reader_trees import save_image, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset, parse_data_arguments
from metr.errors import DataError, MetrError


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


@pytest.mark.parametrize("text", ["", "\n"])
def test_images_without_objects(tmp_path: Path, text: str) -> None:
    source = with_labels(tmp_path, text)
    assert len(source.split("val")[0].boxes) == 0
    assert source.issue_counts == {}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0 0.5 0.5 0.5", "unreadable label"),
        ("0 0.5 0.5 0.5 0.5 1.9", "unreadable label"),
        ("0 0.5 0.5 0.5 0.5 -0.4", "unreadable label"),
        ("0 0.5 0.5 0.5 0.5 0.9 7", "unreadable label"),
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
    write_text(root / "labels" / "a.txt", "")
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


# what scalars of YAML look like


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[no, yes]", ("no", "yes")),
        ("\n  - off\n  - on", ("off", "on")),
        ("\n  0: 007\n  1: 12:30", ("007", "12:30")),
        ("[null, NA, ~]", ("null", "NA", "~")),
        ("[1e3, 0x10, 1_000, .5, 2024-01-31]", ("1e3", "0x10", "1_000", ".5", "2024-01-31")),
        ("['yes', \"007\"]", ("yes", "007")),
    ],
)
def test_names_are_the_words_as_they_are_written(tmp_path: Path, names: str, expected: tuple[str, ...]) -> None:
    assert with_labels(tmp_path, "", f"names: {names}\nval: images/val\n").categories == expected


# lines with more numbers than a box


def with_lines(tmp_path: Path, lines: list[str], more: str = "") -> DatasetSource:
    """A dataset with an image for each line."""
    root = tmp_path / "data"
    for number, line in enumerate(lines):
        save_image(root / "images" / "val" / f"{number}.jpg", 100, 100)
        write_text(root / "labels" / "val" / f"{number}.txt", line)
    write_text(root / "data.yaml", f"names: [cat]\nval: images/val\n{more}")
    return opened(root)


BOXES = [(0.3, 0.4, 0.2, 0.3), (0.7, 0.6, 0.3, 0.2), (0.5, 0.2, 0.1, 0.2), (0.2, 0.8, 0.2, 0.1)]


def posed(box: tuple[float, ...], points: int, visibility: object) -> str:
    """A line of a box and key points inside it."""
    x, y, width, height = box
    kept = []
    for number in range(points):
        kept += [x + width * (number / points - 0.4), y - height * 0.3]
        kept += [] if visibility is None else [visibility]
    return " ".join(map(str, (0, *box, *kept)))


@pytest.mark.parametrize("points", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("visibility", [0, 1, 2, "2.000000", 0.83, None])
def test_key_points_are_told_from_polygons(tmp_path: Path, points: int, visibility: object) -> None:
    source = with_lines(tmp_path, [posed(box, points, visibility) for box in BOXES])
    found = np.concatenate([record.boxes for record in source.split("val")])
    expected = [[100 * (x - w / 2), 100 * (y - h / 2), 100 * (x + w / 2), 100 * (y + h / 2)] for x, y, w, h in BOXES]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert source.issue_counts == {"numbers left out": 1}
    assert "key points" in source.issues[0].detail


@pytest.mark.parametrize("corners", [3, 4, 5, 8, 20])
def test_polygons_and_rotated_boxes_are_no_key_points(tmp_path: Path, corners: int) -> None:
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + 0.3
    shapes = []
    for x, y, width, height in BOXES:
        shapes.append(np.stack([x + width / 2 * np.cos(angles), y + height / 2 * np.sin(angles)], axis=1))
    lines = [" ".join(["0", *map(str, shape.reshape(-1).tolist())]) for shape in shapes]
    source = with_lines(tmp_path, lines)
    found = np.concatenate([record.boxes for record in source.split("val")])
    np.testing.assert_allclose(found, [[*(100 * s).min(0), *(100 * s).max(0)] for s in shapes], rtol=1e-4)
    assert source.issue_counts == {}


@pytest.mark.parametrize(
    "polygon", ["0 0 1 0 1 1 0 1 0 0", "1 0 1 1 0 1 0 0 1 0", "0 0 0 1 1 1 1 0 0 0", "0 0 1 0 1 1 0 1"]
)
def test_a_polygon_around_the_whole_image(tmp_path: Path, polygon: str) -> None:
    source = with_lines(tmp_path, [f"0 {polygon}"])
    np.testing.assert_allclose(source.split("val")[0].boxes, [[0, 0, 100, 100]])


@pytest.mark.parametrize(
    ("numbers", "box"),
    [("0.5 0.5 0.2 0.4", [40, 30, 60, 70]), ("0.1 0.1 0.3 0.1 0.3 0.4", [10, 10, 30, 40])],
)
def test_a_confidence_is_left_out_and_said(tmp_path: Path, numbers: str, box: list[int]) -> None:
    source = with_lines(tmp_path, [f"0 {numbers} 0.87", f"0 {numbers} 1"])
    np.testing.assert_allclose(source.split("val")[1].boxes, [box], rtol=1e-5)
    assert source.issue_counts == {"numbers left out": 1}
    assert "confidence" in source.issues[0].detail


def test_one_number_that_is_no_confidence_puts_all_in_doubt(tmp_path: Path) -> None:
    """Angles of rotated boxes, or the numbers of tracks: the box around a rotated one would be wrong."""
    source = with_lines(tmp_path, ["0 0.5 0.5 0.2 0.4 0.7", "0 0.5 0.5 0.2 0.4 -1.2", "0 0.5 0.5 0.2 0.4"])
    assert source.issue_counts == {"unreadable label": 2}
    assert [len(record.boxes) for record in source.split("val")] == [0, 0, 1]


def test_polygons_in_pixels_are_not_cut_to_the_image(tmp_path: Path) -> None:
    source = with_lines(tmp_path, ["0 10 10 30 10 30 40 10 40", "0 0.5 0.5 0.2 0.2"])
    assert source.issue_counts == {"unreadable label": 1}


@pytest.mark.parametrize("line", ["0,0.5,0.5,0.2,0.4", "0, 0.5, 0.5, 0.2, 0.4", "0 0,5 0,5 0,2 0,4"])
def test_commas(tmp_path: Path, line: str) -> None:
    np.testing.assert_allclose(with_lines(tmp_path, [line]).split("val")[0].boxes, [[40, 30, 60, 70]], rtol=1e-5)


# where text files lie


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("image/train", "labels/train"),
        ("images/train", "annotations/train"),
        ("Images/train", "Labels/train"),
        ("JPEGImages/train", "labels/train"),
        ("images/train", "label/train"),
        ("images/train", "txt/train"),
        ("images/train/a/b", "labels/train/a/b"),
        ("train/images", "train/labels"),
        ("train/imgs", "train/annotation"),
        ("train", "labels/train"),
        ("train", "train/labels"),
        ("train", "train"),
        ("train_images", "train_labels"),
        ("data/train/images", "data/train/labels"),
        ("images/train", "images/train/labels"),
    ],
)
def test_text_files_are_found(tmp_path: Path, images: str, labels: str) -> None:
    root = tmp_path / "data"
    for number in range(3):
        save_image(root / images / f"{number}.jpg")
        write_text(root / labels / f"{number}.txt", "0 0.5 0.5 0.5 0.2")
    write_text(root / "data.yaml", f"names: [cat]\ntrain: {images}\n")
    source = opened(root)
    assert [len(record.boxes) for split in source.splits.values() for record in split] == [1, 1, 1]
    assert source.issue_counts == {}


def test_text_files_of_other_splits_are_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "val"):
        save_image(root / f"{split}_images" / "0.jpg")
    write_text(root / "val_labels" / "0.txt", "0 0.5 0.5 0.5 0.2")
    write_text(root / "data.yaml", "names: [cat]\ntrain: train_images\nval: val_images\n")
    source = opened(root)
    assert [len(source.split(split)[0].boxes) for split in ("train", "val")] == [0, 1]
    assert source.issue_counts == {"no label files": 1}


def test_a_split_without_text_files_is_a_fault_and_has_no_negatives(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "val"):
        save_image(root / "images" / split / "a.jpg")
    write_text(root / "labels" / "val" / "a.txt", "0 0.5 0.5 0.5 0.2")
    write_text(root / "data.yaml", "names: [cat]\ntrain: images/train\nval: images/val\n")
    source = opened(root)
    (issue,) = source.issues
    assert (issue.kind, issue.where) == ("no label files", "train")
    assert "none of 1 image, such as images/train/a.jpg, has a text file" in issue.detail
    assert "text files lie in labels/val" in issue.detail
    assert source.split("train")[0].annotated == ()
    assert source.split("val")[0].annotated is None


def test_text_files_without_an_image_and_images_without_a_text_file_are_told(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in "abc":
        save_image(root / "images" / "val" / f"{name}.jpg")
    for name in ("a", "d", "e_1"):
        write_text(root / "labels" / "val" / f"{name}.txt", "0 0.5 0.5 0.5 0.2")
    for name in ("classes", "README"):
        write_text(root / "labels" / "val" / f"{name}.txt", "cat")
    write_text(root / "data.yaml", "names: [cat]\nval: images/val\n")
    source = opened(root)
    assert source.issue_counts == {"few label files": 1, "missing image": 2}
    assert [issue.where for issue in source.issues if issue.kind == "missing image"] == [
        "labels/val/d.txt",
        "labels/val/e_1.txt",
    ]


# where the description lies


def a_dataset(root: Path) -> None:
    for split in ("train", "valid"):
        save_image(root / split / "images" / "a.jpg")
        write_text(root / split / "labels" / "a.txt", "0 0.5 0.5 0.5 0.2")


def lengths(source: DatasetSource) -> dict[str, int]:
    return {split: len(found) for split, found in source.splits.items()}


@pytest.mark.parametrize("named", ["", "data/data.yaml"])
def test_a_description_in_a_folder_of_its_own(tmp_path: Path, named: str) -> None:
    root = tmp_path / "sets"
    a_dataset(root)
    write_text(root / "data" / "data.yaml", "names: [cat]\ntrain: ../train/images\nval: ../valid/images\n")
    source = opened(root / named)
    assert lengths(source) == {"train": 1, "val": 1}
    assert source.issue_counts == {}


def test_two_datasets_below_a_folder_are_no_dataset(tmp_path: Path) -> None:
    for name in "ab":
        a_dataset(tmp_path / "sets" / name)
        write_text(tmp_path / "sets" / name / "data.yaml", "names: [cat]\ntrain: train/images\n")
    with pytest.raises(DataError, match="no annotations of a known format"):
        opened(tmp_path / "sets")


@pytest.mark.parametrize("path", ["{root}", "../sets", "{root}/"])
def test_a_description_away_from_its_data(tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture) -> None:
    a_dataset(tmp_path / "sets")
    text = f"path: {path.format(root=tmp_path / 'sets')}\nnames: [cat]\ntrain: train/images\nval: valid/images\n"
    description = write_text(tmp_path / "code" / "data.yaml", text)
    with caplog.at_level(logging.WARNING):
        for place in (description, description.parent):
            source = opened(place)
            assert lengths(source) == {"train": 1, "val": 1}
            assert source.root == tmp_path / "sets"
    assert f"its images lie elsewhere, and are read in {tmp_path / 'sets'}" in caplog.text
    write_text(description, text.replace("cat", "dog"))
    assert opened(description).categories == ("dog",)


def test_a_folder_called_otherwise_than_the_description_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a_dataset(tmp_path / "data")
    (tmp_path / "data" / "valid").rename(tmp_path / "data" / "validate")
    write_text(tmp_path / "data" / "data.yaml", "names: [cat]\ntrain: ../train/images\nval: ../valid/images\n")
    with caplog.at_level(logging.WARNING):
        source = opened(tmp_path / "data")
    assert lengths(source) == {"train": 1, "val": 1}
    assert "validate/images is read in its place" in caplog.text


def test_faults_of_yaml_name_the_file_and_the_line(tmp_path: Path) -> None:
    for name in ("data.yaml", "other.yaml"):
        path = write_text(tmp_path / "data" / name, "names: [cat]\npath: @HERE@\n")
        with pytest.raises(MetrError, match="line 2, column 7: ") as caught:
            open_dataset(*parse_data_arguments([str(path)]), tmp_path / "cache")
        assert "unicode string" not in str(caught.value)
        assert str(path) in str(caught.value)
