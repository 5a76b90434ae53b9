"""CSV: headers and their absence, fractions and pixels, and everything that may be wrong in a line."""

from pathlib import Path

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
