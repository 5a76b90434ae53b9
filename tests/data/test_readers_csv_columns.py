"""CSV as spreadsheets and other tools write it: headers, layouts without one, encodings, boxes in one cell, splits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import save_image, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.errors import DataError

WIDTH, HEIGHT = 100, 80
CORNERS = [[50, 40, 90, 70], [10, 5, 60, 50], [60, 10, 99, 20], [5, 50, 40, 79], [30, 30, 80, 60], [20, 2, 45, 75]]


def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        save_image(root / "images" / name, WIDTH, HEIGHT)
    return root


def opened(root: Path, **options: Any) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root, **options), root.parent / "cache")


def found(source: DatasetSource) -> dict[str, list[tuple[str, list[float]]]]:
    """Category and box of each image's objects."""
    return {
        record.path.name: [
            (source.categories[label], box.tolist()) for label, box in zip(record.labels, record.boxes, strict=True)
        ]
        for annotations in source.splits.values()
        for record in annotations
    }


EXPECTED = {"a.jpg": [("cat", [1, 2, 30, 40])], "b.jpg": [("dog", [5, 6, 7, 9])]}

TABLES = {
    "image_name, label_name": "image_name,label_name,x1,y1,x2,y2\na.jpg,cat,1,2,30,40\nb.jpg,dog,5,6,7,9",
    "x, y, w, h": "filename,class,x,y,w,h\na.jpg,cat,1,2,29,38\nb.jpg,dog,5,6,2,3",
    "x, y, width, height": "filename,class,x,y,width,height\na.jpg,cat,1,2,29,38\nb.jpg,dog,5,6,2,3",
    "bbox_x": "label_name,bbox_x,bbox_y,bbox_width,bbox_height,image_name,image_width,image_height\n"
    "cat,1,2,29,38,a.jpg,100,80\ndog,5,6,2,3,b.jpg,100,80",
    "both widths": "file_name,width,height,class,bbox_x,bbox_y,bbox_width,bbox_height\n"
    "a.jpg,100,80,cat,1,2,29,38\nb.jpg,100,80,dog,5,6,2,3",
    "centres": "image,category,x_center,y_center,width,height\na.jpg,cat,15.5,21,29,38\nb.jpg,dog,6,7.5,2,3",
    "spaces and case": "Image Path, Class Name ,X Min,Y Min,X Max,Y Max\na.jpg,cat,1,2,30,40\nb.jpg,dog,5,6,7,9",
    "x0": "image_id,label,x0,y0,x1,y1\na,cat,1,2,30,40\nb,dog,5,6,7,9",
    "left, top": "path,label,left,top,right,bottom\nimages/a.jpg,cat,1,2,30,40\nimages/b.jpg,dog,5,6,7,9",
    "left, top, width": "path,label,left,top,width,height\na.jpg,cat,1,2,29,38\nb.jpg,dog,5,6,2,3",
    "a name and a class": "name,class,xmin,ymin,xmax,ymax\na.jpg,cat,1,2,30,40\nb.jpg,dog,5,6,7,9",
    "one cell": 'image_id,bbox,label\na,"[1.0, 2.0, 29.0, 38.0]",cat\nb,"(5, 6, 2, 3)",dog',
    "one cell of blanks": "image_id;bbox;label\na;[ 1. 2. 29. 38.];cat\nb;5 6 2 3;dog",
    "SKU-110K": "a.jpg,1,2,30,40,cat,100,80\nb.jpg,5,6,7,9,dog,100,80",
    "class second": "a.jpg,cat,1,2,30,40\nb.jpg,dog,5,6,7,9",
    "TensorFlow without its header": "a.jpg,100,80,cat,1,2,30,40\nb.jpg,100,80,dog,5,6,7,9",
    "Excel": "sep=;\nfilename;width;height;class;xmin;ymin;xmax;ymax\na.jpg;100;80;cat;1;2;30;40\nb.jpg;;;dog;5;6;7;9",
    "Excel, no header": '"sep=|"\na.jpg|1|2|30|40|cat\nb.jpg|5|6|7|9|dog',
    "decimal commas": "filename;class;xmin;ymin;xmax;ymax\na.jpg;cat;1,0;2,0;30,0;40,0\nb.jpg;dog;5;6;7;9",
    "bars": "filename|class|xmin|ymin|xmax|ymax\na.jpg|cat|1|2|30|40\nb.jpg|dog|5|6|7|9",
    "shares": "a.jpg,0.01,0.025,0.3,0.5,cat\nb.jpg,0.05,0.075,0.07,0.1125,dog",
    "AutoML": "TRAIN,gs://bucket/a.jpg,cat,0.01,0.025,,,0.3,0.5,,\nTRAIN,gs://b/b.jpg,dog,0.05,0.075,,,0.07,0.1125,,",
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES.keys())
def test_tables_that_tools_write(tmp_path: Path, text: str) -> None:
    root = folder(tmp_path)
    write_text(root / "train.csv", text + "\n")
    got = found(opened(root))
    assert got.keys() == EXPECTED.keys()
    for name, boxes in EXPECTED.items():
        assert [category for category, _ in got[name]] == [category for category, _ in boxes]
        np.testing.assert_allclose([box for _, box in got[name]], [box for _, box in boxes], rtol=1e-5)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    root = folder(tmp_path)
    (root / "train.csv").write_bytes("filename,class,x1,y1,x2,y2\na.jpg,bébé,1,2,30,40\n".encode(encoding))
    source = opened(root)
    assert source.categories == ("bébé",)
    assert set(source.issue_counts) == ({"not UTF-8"} if encoding == "cp1252" else set()), "only a guess is told"


def test_a_class_that_is_a_number(tmp_path: Path) -> None:
    root = folder(tmp_path)
    write_text(root / "train.csv", "a.jpg,1,2,30,40,3\nb.jpg,5,6,7,9,4")
    assert found(opened(root)) == {"a.jpg": [("3", [1, 2, 30, 40])], "b.jpg": [("4", [5, 6, 7, 9])]}


def test_no_column_of_categories(tmp_path: Path) -> None:
    root = folder(tmp_path)
    write_text(root / "train.csv", 'image_id,width,height,bbox,source\na,100,80,"[1, 2, 29, 38]",x\nb,100,80,[],x\n')
    source = opened(root)
    assert found(source) == {"a.jpg": [("made", [1, 2, 30, 40])], "b.jpg": []}
    assert source.issue_counts == {"no categories": 1}
    assert "not read: source" in source.issues[0].detail
    other = open_dataset(DatasetConfig(name="wheat", path=root), tmp_path / "cache")
    assert other.categories == ("wheat",)
    assert opened(root, renames={"made": "wheat head"}).categories == ("wheat head",)


def test_a_column_says_the_split(tmp_path: Path) -> None:
    root = folder(tmp_path)
    lines = ["filename,class,x1,y1,x2,y2,Split", "a.jpg,cat,1,2,3,4,Train", "b.jpg,cat,1,2,3,4,VALIDATION"]
    write_text(root / "labels.csv", "\n".join([*lines, "c.jpg,cat,1,2,3,4,test", "a.jpg,dog,1,2,3,4,training"]))
    source = opened(root)
    paths = {split: [record.path.name for record in records] for split, records in source.splits.items()}
    assert paths == {"train": ["a.jpg"], "val": ["b.jpg"], "test": ["c.jpg"]}
    assert len(source.split("train")[0].boxes) == 2


def test_a_column_that_names_no_split(tmp_path: Path) -> None:
    root = folder(tmp_path)
    write_text(root / "val.csv", "filename,class,x1,y1,x2,y2,set\na.jpg,cat,1,2,3,4,7\nb.jpg,cat,1,2,3,4,8")
    assert {split: len(records) for split, records in opened(root).splits.items()} == {"val": 2}


def test_lines_without_a_split_are_those_of_the_file(tmp_path: Path) -> None:
    root = folder(tmp_path)
    write_text(root / "val.csv", "filename,class,x1,y1,x2,y2,split\na.jpg,cat,1,2,3,4,train\nb.jpg,cat,1,2,3,4,")
    paths = {split: [record.path.name for record in records] for split, records in opened(root).splits.items()}
    assert paths == {"train": ["a.jpg"], "val": ["b.jpg"]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("filename,kind,xmin,ymin,wide,high", ["xmin, ymin, wide, high", "missing: the box"]),
        ("pic,class,xmin,ymin,xmax,ymax", ["has the columns pic, class", "missing: the image"]),
    ],
)
def test_an_unknown_header_is_said(tmp_path: Path, header: str, said: list[str]) -> None:
    root = folder(tmp_path)
    write_text(root / "labels.csv", f"{header}\na.jpg,cat,1,2,3,4\n")
    with pytest.raises(DataError) as caught:
        opened(root)
    assert all(part in str(caught.value) for part in ["labels.csv", *said])


def cells(boxes: list[list[float]], name: str = "bbox") -> str:
    return f"image_id,{name},label\n" + "".join(f'a,"{box}",cat\n' for box in boxes)


def test_a_cell_with_corners(tmp_path: Path) -> None:
    root = folder(tmp_path)
    write_text(root / "train.csv", cells(CORNERS))
    source = opened(root)
    assert [box for _, box in found(source)["a.jpg"]] == CORNERS
    assert source.issue_counts == {"boxes are not xywh": 1}
    assert opened(root, boxes="xyxy").issue_counts == {}
    assert opened(root, boxes="xywh").issue_counts["box clipped"] > 0


def test_a_header_of_corners_is_believed(tmp_path: Path) -> None:
    """Corners that are swapped may look like widths and heights: nothing is changed, but it is said."""
    root = folder(tmp_path)
    lines = [f"a.jpg,cat,{left},{top},{right - left},{bottom - top}" for left, top, right, bottom in CORNERS]
    write_text(root / "train.csv", "filename,class,xmin,ymin,xmax,ymax\n" + "\n".join(lines))
    assert opened(root).issue_counts["boxes are doubtful"] == 1
    source = opened(root, boxes="xywh")
    assert [box for _, box in found(source)["a.jpg"]] == CORNERS


def test_one_file_in_a_folder_of_annotations(tmp_path: Path) -> None:
    file = write_text(folder(tmp_path) / "annotations" / "annotations_train.csv", TABLES["SKU-110K"])
    assert found(open_dataset(DatasetConfig(name="one", path=file), tmp_path / "cache")) == EXPECTED
