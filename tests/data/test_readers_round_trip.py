"""Every format and layout gives back what was written; the real datasets give their known counts."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from line_trees import LINE_LAYOUTS
from reader_trees import LAYOUTS, NAMES, ExpectedImage, Truth, hidden_beside, made_up
from tool_trees import TOOL_LAYOUTS

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset

ALL = LAYOUTS | LINE_LAYOUTS | TOOL_LAYOUTS


def opened(root: Path, tmp_path: Path, **options: object) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root, **options), tmp_path / "cache")


def as_truth(source: DatasetSource) -> dict[str, dict[str, ExpectedImage]]:
    """What was read, in the form of the truth; boxes in whole pixels, in a fixed order."""
    result: dict[str, dict[str, ExpectedImage]] = {}
    for split, annotations in source.splits.items():
        result[split] = {}
        for record in annotations:
            assert record.path.is_file()
            np.testing.assert_allclose(record.boxes, record.boxes.round(), atol=1e-3)
            labels = [source.categories[label] for label in record.labels]
            boxes = [tuple(int(value) for value in box.round()) for box in record.boxes]
            ordered = sorted(zip(boxes, labels, strict=True))
            name = record.path.name
            result[split][name] = ExpectedImage(
                name,
                record.width,
                record.height,
                tuple(box for box, _ in ordered),
                tuple(label for _, label in ordered),
            )
            sides = record.boxes[:, 2:] - record.boxes[:, :2]
            np.testing.assert_allclose(record.areas, sides[:, 0] * sides[:, 1], rtol=1e-4)
            assert not record.ignore.any()
            assert record.annotated is None
    return result


def in_order(truth: Truth) -> dict[str, dict[str, ExpectedImage]]:
    result: dict[str, dict[str, ExpectedImage]] = {}
    for split, images in truth.items():
        result[split] = {}
        for item in images:
            ordered = sorted(zip(item.boxes, item.labels, strict=True))
            boxes, labels = tuple(box for box, _ in ordered), tuple(label for _, label in ordered)
            result[split][item.name] = ExpectedImage(item.name, item.width, item.height, boxes, labels)
    return result


@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("seed", [0, 1])
def test_round_trip(tmp_path: Path, layout: str, seed: int) -> None:
    expected_format, write = ALL[layout]
    truth = made_up(seed)
    root = tmp_path / "data set"
    write(root, truth)
    source = opened(root, tmp_path)
    assert source.format == expected_format
    assert source.issues == ()
    assert source.issue_counts == {}
    assert as_truth(source) == in_order(truth)
    declared = expected_format in {"coco", "yolo", "cvat", "datumaro"}
    assert source.categories == (NAMES if declared else tuple(sorted(NAMES)))


@pytest.mark.parametrize("layout", ALL)
def test_what_macos_leaves_beside_files_is_passed_over(tmp_path: Path, layout: str) -> None:
    """A file of attributes with the name and suffix of each file, one of settings a folder, and copies of them."""
    expected_format, write = ALL[layout]
    truth, root = made_up(), tmp_path / "data set"
    write(root, truth)
    hidden_beside(root)
    source = opened(root, tmp_path)
    assert source.format == expected_format
    assert source.issues == ()
    assert as_truth(source) == in_order(truth)


@pytest.mark.parametrize("layout", ALL)
def test_files_of_text_may_be_utf_16(tmp_path: Path, layout: str) -> None:
    """Windows PowerShell writes what a program prints in UTF-16."""
    expected_format, write = ALL[layout]
    truth = made_up()
    write(tmp_path / "data", truth)
    texts = {".json", ".jsonl", ".odgt", ".txt", ".csv", ".yaml", ".xml", ".names", ".data", ".md"}
    for file in (tmp_path / "data").rglob("*"):
        if file.suffix.lower() in texts:
            text = file.read_text(encoding="utf-8").replace('encoding="utf-8"', 'encoding="utf-16"')
            file.write_text(text, encoding="utf-16")
    source = opened(tmp_path / "data", tmp_path)
    assert (source.format, source.issue_counts) == (expected_format, {})
    assert as_truth(source) == in_order(truth)


@pytest.mark.parametrize(
    "layout", ["coco plain", "voc beside", "yolo plain", "csv plain", "odvg plain", "labelme apart"]
)
def test_order_is_the_same_every_time(tmp_path: Path, layout: str) -> None:
    ALL[layout][1](tmp_path / "data", made_up())
    orders = [
        [record.image_id for record in opened(tmp_path / "data", tmp_path / str(run)).split("train")]
        for run in range(2)
    ]
    assert orders[0] == orders[1]
    assert len(set(orders[0])) == len(orders[0])


REAL = {
    # name: format, images by split, categories, boxes, ignored, images without objects, issues
    "bccd": ("voc", {"train": 205, "val": 87, "test": 72}, 3, 4886, 0, 0, {"degenerate box": 2}),
    "aquarium": ("yolo", {"train": 135, "val": 41, "test": 23}, 7, 1441, 0, 1, {"degenerate box": 2}),
    "coco_mini": ("coco", {"train": 195, "val": 120}, 80, 2943, 35, 4, {}),
    "playing_cards": ("voc", {"train": 170, "val": 42, "test": 47}, 6, 473, 0, 0, {}),
    "doc_tables": ("csv", {"train": 197, "val": 28}, 1, 277, 0, 0, {}),
    "endangered_animals": ("coco", {"train": 153, "val": 45, "test": 15}, 7, 327, 0, 0, {}),
    "chess_pieces": ("coco", {"train": 190, "val": 53, "test": 28}, 13, 2594, 0, 1, {"unused parent category": 1}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_datasets(shared: Path, tmp_path: Path, name: str) -> None:
    expected_format, images, categories, boxes, ignored, empty, issues = REAL[name]
    source = opened(shared / "data" / name, tmp_path)
    counts = [annotations.counts() for annotations in source.splits.values()]
    assert source.format == expected_format
    assert {split: len(annotations) for split, annotations in source.splits.items()} == images
    assert len(source.categories) == categories
    assert sum(count.boxes.sum() for count in counts) == boxes
    assert sum(count.ignored.sum() for count in counts) == ignored
    assert sum(count.empty for count in counts) == empty
    assert source.issue_counts == issues
    assert Counter(issue.kind for issue in source.issues) == issues
    for annotations in source.splits.values():
        for record in annotations:
            assert (record.boxes >= 0).all()
            assert (record.boxes <= [record.width, record.height] * 2).all()


@pytest.mark.parametrize("name", ["bccd", "aquarium", "chess_pieces", "playing_cards"])
def test_real_categories(shared: Path, tmp_path: Path, name: str) -> None:
    """Boxes of each name as the datasets' notes count them."""
    known = {
        "bccd": {"RBC": 4153, "WBC": 372, "Platelets": 361},
        "aquarium": {"fish": 896, "jellyfish": 179, "shark": 119, "penguin": 96, "puffin": 67, "stingray": 56}
        | {"starfish": 28},
        "chess_pieces": {"black-pawn": 595, "white-pawn": 576, "black-rook": 184, "black-knight": 174}
        | {"white-knight": 166, "white-rook": 161, "white-bishop": 156, "white-king": 138, "black-king": 137}
        | {"black-bishop": 130, "white-queen": 99, "black-queen": 77, "bishop": 1},
        "playing_cards": {"king": 92, "jack": 86, "nine": 84, "ace": 72, "ten": 70, "queen": 69},
    }[name]
    source = opened(shared / "data" / name, tmp_path)
    total = sum(annotations.counts().boxes for annotations in source.splits.values())
    found = {category: int(count) for category, count in zip(source.categories, total, strict=True)}
    assert found == known


def test_two_truths_of_the_playing_cards_agree(shared: Path, tmp_path: Path) -> None:
    root = shared / "data" / "playing_cards"
    assert as_truth(opened(root, tmp_path)) == as_truth(opened(root, tmp_path, format="csv"))
