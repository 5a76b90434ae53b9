"""Swapped corners: sorted and counted wherever files write corners; a negative width or height has no such reading."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from line_trees import LINE_LAYOUTS
from reader_trees import LAYOUTS, Truth, made_up, save_image, write_json, write_text
from tool_trees import TOOL_LAYOUTS, kitti_line

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset

ALL = LAYOUTS | LINE_LAYOUTS | TOOL_LAYOUTS
# formats that write corners, and those in which a rectangle is a list of points in any order
CORNERS = {"voc", "csv", "odvg", "cvat", "bdd100k"}
POINTS = {"labelme", "labelme_xml", "dota"}
SWAPS: dict[str, tuple[int, ...]] = {
    "both": (2, 3, 0, 1),
    "left and right": (2, 1, 0, 3),
    "top and bottom": (0, 3, 2, 1),
}


def opened(root: Path, **options: object) -> DatasetSource:
    return open_dataset(DatasetConfig.checked({"name": "swapped", "path": root, **options}), root.parent / "cache")


def boxes_of(source: DatasetSource) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Names and boxes of each image."""
    return {
        record.path.name: [
            (source.categories[label], tuple(box))
            for label, box in zip(record.labels.tolist(), record.boxes.round().astype(int).tolist(), strict=True)
        ]
        for split in source.splits.values()
        for record in split
    }


def swapped(truth: Truth, order: tuple[int, ...]) -> Truth:
    """The same with the corners of one box in another order: the first one of the train split."""
    first, *others = truth["train"]
    one, two, three, four = (first.boxes[0][place] for place in order)
    changed = replace(first, boxes=((one, two, three, four), *first.boxes[1:]))
    return {**truth, "train": [changed, *others]}


@pytest.mark.parametrize("layout", ALL)
def test_one_rule_for_all_formats(tmp_path: Path, layout: str) -> None:
    name, write = ALL[layout]
    write(tmp_path / "plain", made_up())
    plain = opened(tmp_path / "plain")
    for number, order in enumerate(SWAPS.values()):
        write(tmp_path / f"{number}", swapped(made_up(), order))
        source = opened(tmp_path / f"{number}")
        more = {kind: count - plain.issue_counts.get(kind, 0) for kind, count in source.issue_counts.items()}
        told = {kind: count for kind, count in more.items() if count}
        if name in CORNERS | POINTS:
            assert boxes_of(source) == boxes_of(plain)
            assert told == ({"swapped corners": 1} if name in CORNERS else {})
        else:
            assert "swapped corners" not in told
            lost = sum(map(len, boxes_of(plain).values())) - sum(map(len, boxes_of(source).values()))
            assert lost == sum(told.get(kind, 0) for kind in ("degenerate box", "box outside", "unreadable box"))


def kitti(root: Path, box: tuple[int, ...]) -> None:
    write_text(root / "training/label_2/000000.txt", kitti_line("Car", box))
    save_image(root / "training/image_2/000000.png")


def labelme_mask(root: Path, box: tuple[int, ...]) -> None:
    """LabelMe's XML writes corners only of masks."""
    sides = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    size = "<imagesize><nrows>30</nrows><ncols>40</ncols></imagesize>"
    item = f"<object><name>Car</name><deleted>0</deleted><segm><box>{sides}</box></segm></object>"
    write_text(root / "Annotations/a.xml", f"<annotation><filename>a.jpg</filename>{item}{size}</annotation>")
    save_image(root / "Images/a.jpg")


def open_images(root: Path, box: tuple[int, ...]) -> None:
    left, top, right, bottom = (value / side for value, side in zip(box, (40, 30, 40, 30), strict=True))
    header = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    row = f"a,xclick,/m/car,1,{left},{right},{top},{bottom},0,0,0,0,0"
    write_text(root / "annotations/train-annotations-bbox.csv", f"{header}\n{row}")
    write_text(root / "annotations/class-descriptions-boxable.csv", "/m/car,Car")
    save_image(root / "train/a.jpg")


def coco_of_corners(root: Path, box: tuple[int, ...]) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "Car"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": list(box)}],
    }
    write_json(root / "annotations.json", content)
    save_image(root / "a.jpg")


def lines_of_corners(root: Path, box: tuple[int, ...]) -> None:
    line = f'{{"file_name": "a.jpg", "objects": {{"bbox": [{list(box)}], "category": ["Car"]}}}}'
    write_text(root / "train/metadata.jsonl", line)
    save_image(root / "train/a.jpg")


@pytest.mark.parametrize("order", SWAPS.values(), ids=SWAPS)
@pytest.mark.parametrize(
    ("write", "options"),
    [
        (kitti, {}),
        (labelme_mask, {}),
        (open_images, {}),
        (coco_of_corners, {"boxes": "xyxy"}),
        (lines_of_corners, {"boxes": "xyxy"}),
    ],
    ids=["kitti", "labelme_xml", "open_images", "coco", "imagefolder"],
)
def test_boxes_that_are_corners_by_format_or_by_the_datasets_file(
    tmp_path: Path, write: Callable[[Path, tuple[int, ...]], None], options: dict[str, str], order: tuple[int, ...]
) -> None:
    box = (4, 6, 20, 17)
    write(tmp_path / "data", tuple(box[place] for place in order))
    source = opened(tmp_path / "data", **options)
    assert [found for found in boxes_of(source).values() if found] == [[("Car", box)]]
    assert source.issue_counts["swapped corners"] == 1
    issue = next(one for one in source.issues if one.kind == "swapped corners")
    assert "sorted" in issue.detail


def test_corners_that_may_be_widths_are_not_sorted(tmp_path: Path) -> None:
    """Columns called xmax and ymax that hold widths and heights: sorted, they would be boxes of something else."""
    rows = [(20, 15, 8, 6), (5, 4, 9, 7), (25, 20, 6, 5), (18, 12, 10, 8)]
    lines = [",".join(map(str, ("a.jpg", "cat", *row))) for row in rows]
    write_text(tmp_path / "data/train.csv", "filename,class,xmin,ymin,xmax,ymax\n" + "\n".join(lines))
    save_image(tmp_path / "data/a.jpg")
    counts = opened(tmp_path / "data").issue_counts
    assert counts["boxes are doubtful"] == 1
    assert counts["degenerate box"] == 3
    assert "swapped corners" not in counts
    # a person who knows that they are corners says so
    assert opened(tmp_path / "data", boxes="xyxy").issue_counts["swapped corners"] == 3
