"""CSV: headers and their absence, fractions and pixels, and everything that may be wrong in a line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import save_image, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.errors import DataError

HEADER = "filename,width,height,class,xmin,ymin,xmax,ymax"


def opened(tmp_path: Path, *lines: str, name: str = "val.csv") -> DatasetSource:
    """A dataset with the images a.jpg and b.jpg of 40 x 30."""
    root = tmp_path / "data"
    for image in ("a.jpg", "b.jpg"):
        save_image(root / image)
    write_text(root / name, "\n".join(lines))
    return open_dataset(DatasetConfig(name="made", path=root), tmp_path / "cache")


def test_pixels_below_one_are_not_fractions(tmp_path: Path) -> None:
    """A file of boxes of one pixel at the corner is in pixels: no coordinate is a fraction."""
    source = opened(tmp_path, HEADER, "a.jpg,40,30,cat,0,0,1,1")
    np.testing.assert_array_equal(source.split("val")[0].boxes, [[0, 0, 1, 1]])


def test_fractions_are_scaled(tmp_path: Path) -> None:
    source = opened(tmp_path, "a.jpg,0.1,0,1,0.5,cat", "b.jpg,0,0,1,1,dog")
    boxes = [record.boxes.tolist() for record in source.split("val")]
    np.testing.assert_allclose(boxes, [[[4, 0, 40, 15]], [[0, 0, 40, 30]]])


def large(tmp_path: Path, numbers: Sequence[Sequence[float]], header: str, **options: Any) -> DatasetSource:
    """A dataset with one box in each image of 400 x 300."""
    root, lines = tmp_path / "data", [header]
    for number, box in enumerate(numbers):
        save_image(root / f"{number}.jpg", 400, 300)
        lines.append(f"{number}.jpg,cat,{','.join(map(str, box))}")
    write_text(root / "val.csv", "\n".join(lines))
    return open_dataset(DatasetConfig(name="made", path=root, **options), tmp_path / "cache")


SPREAD = [[5, 10, 30, 42], [60.5, 52, 95, 90], [0, 0, 100, 100], [33, 20, 36, 25], [40, 62, 98, 99], [1, 2, 4, 3]]
FILE_OF_CORNERS, FILE_OF_SIZES = "filename,class,xmin,ymin,xmax,ymax", "filename,class,x,y,width,height"


@pytest.mark.parametrize("header", [FILE_OF_CORNERS, FILE_OF_SIZES])
def test_per_cent_of_the_image(tmp_path: Path, header: str) -> None:
    """As annotation tools in browsers write them. What is assumed is said, with the way back."""
    boxes = [[a, b, c - a, d - b] if header is FILE_OF_SIZES else [a, b, c, d] for a, b, c, d in SPREAD]
    source = large(tmp_path, boxes, header)
    found = [record.boxes[0].tolist() for record in source.split("val")]
    np.testing.assert_allclose(found, np.array(SPREAD) * [4, 3, 4, 3], rtol=1e-5)
    assert set(source.issue_counts) == {"boxes are per cent"}
    kind = "xywh" if header is FILE_OF_SIZES else "xyxy"
    assert f"if they are pixels, `boxes: {kind}` in a datasets file says so" in source.issues[0].detail


def test_pixels_in_the_first_hundred_stay_pixels(tmp_path: Path) -> None:
    """A sign in the same corner of every image: likely in pixels. There is a doubt, and it is said."""
    boxes = [[10 + number, 12, 50 + number, 40] for number in range(6)]
    source = large(tmp_path, boxes, FILE_OF_CORNERS)
    assert [record.boxes[0].tolist() for record in source.split("val")] == boxes
    assert set(source.issue_counts) == {"boxes may be per cent"}
    assert "`boxes: xyxy%` in a datasets file" in source.issues[0].detail


@pytest.mark.parametrize("boxes", [SPREAD[:2], [*SPREAD, [10, 20, 101, 50]]])
def test_few_small_boxes_are_pixels_without_a_word(tmp_path: Path, boxes: list[list[float]]) -> None:
    """Two images with objects near the corner are nothing special, and one number above 100 makes all pixels."""
    source = large(tmp_path, boxes, FILE_OF_CORNERS)
    assert [record.boxes[0].tolist() for record in source.split("val")] == boxes
    assert source.issue_counts == {}


@pytest.mark.parametrize(("kind", "factors"), [("xyxy", [1, 1, 1, 1]), ("xyxy%", [4, 3, 4, 3])])
def test_per_cent_or_not_is_the_users_to_say(tmp_path: Path, kind: str, factors: list[int]) -> None:
    source = large(tmp_path, SPREAD, FILE_OF_CORNERS, boxes=kind)
    found = [record.boxes[0].tolist() for record in source.split("val")]
    np.testing.assert_allclose(found, np.array(SPREAD) * factors, rtol=1e-5)
    assert source.issue_counts == {}


def test_group_boxes_are_ignored(tmp_path: Path) -> None:
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsGroupOf"
    source = opened(tmp_path, header, "a,x,cat,1,0.1,0.5,0.2,0.6,0,1", "a,x,cat,1,0.1,0.5,0.2,0.6,0,0")
    record = source.split("val")[0]
    assert record.ignore.tolist() == [True, False]
    np.testing.assert_allclose(record.boxes[0], [4, 6, 20, 18], rtol=1e-5)


@pytest.mark.parametrize("column", ["iscrowd", "IsGroupOf"])
def test_lines_without_the_last_column(tmp_path: Path, column: str) -> None:
    lines = ("a.jpg,cat,1,2,3,4", "a.jpg,cat,1,2,3,4,1", "b.jpg,,,,,")
    source = opened(tmp_path, f"filename,class,xmin,ymin,xmax,ymax,{column}", *lines)
    assert source.issue_counts == {"unreadable annotation": 1}
    assert source.issues[0].where == "val.csv:2"
    assert [record.ignore.tolist() for record in source.split("val")] == [[True], []]


def test_quotes_spaces_tabs(tmp_path: Path) -> None:
    source = opened(tmp_path, HEADER.replace(",", "\t"), 'a.jpg\t40\t30\t"red, cell"\t 1 \t2\t3\t4', "", "\t\t")
    assert source.categories == ("red, cell",)
    assert source.issue_counts == {}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("a.jpg,40,30,cat,5,5,5,9", "degenerate box"),
        ("a.jpg,40,30,cat,50,5,60,9", "box outside"),
        ("a.jpg,40,30,cat,5,5,x,9", "unreadable box"),
        ("a.jpg,40,30,cat,5,5,,9", "unreadable box"),
        ("a.jpg,40,30,cat,5,5,nan,9", "unreadable box"),
        ("a.jpg,40,30,,5,5,10,9", "unknown category"),
        ("a.jpg,40,30,cat,5", "unreadable annotation"),
        (",40,30,cat,5,5,10,9", "unreadable annotation"),
        ("c.jpg,40,30,cat,5,5,10,9", "missing image"),
        ("../x.jpg,40,30,cat,5,5,10,9", "path outside"),
        ("/etc/x.jpg,40,30,cat,5,5,10,9", "path outside"),
    ],
)
def test_wrong_lines_are_dropped_and_counted(tmp_path: Path, line: str, kind: str) -> None:
    save_image(tmp_path / "x.jpg")
    source = opened(tmp_path, HEADER, "a.jpg,40,30,cat,1,2,3,4", line, "b.jpg,40,30,dog,1,2,3,4")
    assert source.issue_counts == {kind: 1}
    assert source.issues[0].where.startswith("val.csv")
    if "image" not in kind and "path" not in kind:
        assert source.issues[0].where == "val.csv:3"
    assert [record.boxes.tolist() for record in source.split("val")] == [[[1, 2, 3, 4]]] * 2


def test_boxes_are_clipped(tmp_path: Path) -> None:
    source = opened(tmp_path, HEADER, "a.jpg,40,30,cat,-5,2,3,4")
    np.testing.assert_array_equal(source.split("val")[0].boxes, [[0, 2, 3, 4]])
    assert source.issue_counts == {"box clipped": 1}


def test_a_quote_that_never_ends(tmp_path: Path) -> None:
    endless = '"' + "x," * 100_000
    source = opened(tmp_path, HEADER, "a.jpg,40,30,cat,1,2,3,4", f"b.jpg,40,30,{endless}")
    assert source.issue_counts == {"unreadable annotation": 1}
    assert len(source.split("val")) == 1


@pytest.mark.parametrize("size", ["0,0", ",", "x,y", "nan,30"])
def test_sizes_that_say_nothing_are_probed(tmp_path: Path, size: str) -> None:
    record = opened(tmp_path, HEADER, f"a.jpg,{size},cat,1,2,3,4").split("val")[0]
    assert (record.width, record.height) == (40, 30)


def test_files_with_all_boxes_beside_those_of_splits_are_left_out(tmp_path: Path) -> None:
    write_text(tmp_path / "data" / "train.csv", "a.jpg,1,2,3,4,cat")
    write_text(tmp_path / "data" / "all.csv", "a.jpg,1,2,3,4,cat\nb.jpg,1,2,3,4,cat")
    assert list(opened(tmp_path, "b.jpg,1,2,3,4,cat").splits) == ["train", "val"]


@pytest.mark.parametrize(
    "lines",
    [
        ("epoch,loss,a,b,c,d", "1,0.5,0.4,0.3,0.2,0.1"),
        ("1,0.5,0.4,0.3,0.2,0.1",),
        ("cat,0", "dog,1"),
        ("",),
    ],
)
def test_other_tables_are_not_recognised(tmp_path: Path, lines: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="no annotations of a known format"):
        opened(tmp_path, *lines)


def test_images_without_objects_alone_have_no_category(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no category"):
        opened(tmp_path, "a.jpg,,,,,", "b.jpg,,,,,")


def test_one_file_is_a_dataset(tmp_path: Path) -> None:
    opened(tmp_path, "a.jpg,1,2,3,4,cat", "b.jpg,,,,,")
    path = tmp_path / "data" / "val.csv"
    assert len(open_dataset(DatasetConfig(name="one", path=path), tmp_path / "cache").split("val")) == 2
