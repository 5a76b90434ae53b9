"""Boxes belong to the image that they were drawn on, and each image is one record, whatever the names look like."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import save_image, write_json, write_text

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset

HEADER = "filename,class,xmin,ymin,xmax,ymax\n"


def opened(root: Path) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root), root.parent / "cache")


def found(source: DatasetSource, split: str = "val") -> dict[str, list[tuple[str, float]]]:
    """Category and left side of each image's boxes; an image that comes up twice would show."""
    records = list(source.split(split))
    assert len({record.path for record in records}) == len(records) == len({record.image_id for record in records})
    return {
        record.path.name: [
            (source.categories[label], float(box[0])) for label, box in zip(record.labels, record.boxes, strict=True)
        ]
        for record in records
    }


def voc(filename: str, name: str = "cat", left: int = 2) -> str:
    corners = f"<xmin>{left}</xmin><ymin>2</ymin><xmax>20</xmax><ymax>20</ymax>"
    item = f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    size = "<size><width>40</width><height>30</height></size>"
    return f"<annotation><filename>{filename}</filename>{size}{item}</annotation>"


def labelme(image: str, name: str = "cat", left: int = 2) -> dict[str, Any]:
    shape = {"label": name, "points": [[left, 2], [20, 20]], "shape_type": "rectangle"}
    return {"shapes": [shape], "imagePath": image, "imageHeight": 30, "imageWidth": 40}


def one_each(root: Path, kind: str, files: Mapping[str, tuple[str, str, int]], images: Sequence[str]) -> Path:
    """Files of VOC or labelme (image, name, left side), by their stems, beside images."""
    for image in images:
        save_image(root / "val" / image)
    for stem, values in files.items():
        if kind == "voc":
            write_text(root / "val" / f"{stem}.xml", voc(*values))
        else:
            write_json(root / "val" / f"{stem}.json", labelme(*values))
    return root


@pytest.mark.parametrize("kind", ["voc", "labelme"])
@pytest.mark.parametrize("stale", ["a", "c"])
def test_an_image_with_a_file_of_its_own_is_no_fallback(tmp_path: Path, kind: str, stale: str) -> None:
    """The stale file comes before the true one or after it."""
    files = {stale: ("b.jpg", "dog", 5), "b": ("b.jpg", "cat", 2)}
    source = opened(one_each(tmp_path / "data", kind, files, ["b.jpg"]))
    assert found(source) == {"b.jpg": [("cat", 2)]}
    assert source.issue_counts == {"missing image": 1}
    assert "b.jpg" in source.issues[0].detail


@pytest.mark.parametrize("kind", ["voc", "labelme"])
def test_the_named_one_of_two_suffixes(tmp_path: Path, kind: str) -> None:
    source = opened(one_each(tmp_path / "data", kind, {"a": ("old/a.png", "cat", 2)}, ["a.jpg", "a.png"]))
    assert found(source) == {"a.png": [("cat", 2)]}
    assert source.issue_counts == {"unannotated image": 1}


@pytest.mark.parametrize("kind", ["voc", "labelme"])
def test_stems_that_differ_in_case_keep_apart(tmp_path: Path, kind: str) -> None:
    files = {"A": ("A.png", "dog", 5), "a": ("a.jpg", "cat", 2)}
    source = opened(one_each(tmp_path / "data", kind, files, ["a.jpg", "A.png"]))
    assert found(source) == {"A.png": [("dog", 5)], "a.jpg": [("cat", 2)]}
    assert source.issue_counts == {}


@pytest.mark.parametrize("kind", ["voc", "labelme"])
def test_a_stem_in_another_case_gives_way_to_the_very_same(tmp_path: Path, kind: str) -> None:
    files = {"A": ("A.jpg", "dog", 5), "a": ("a.jpg", "cat", 2)}
    source = opened(one_each(tmp_path / "data", kind, files, ["a.jpg"]))
    assert found(source) == {"a.jpg": [("cat", 2)]}
    assert source.issue_counts == {"missing image": 1}


@pytest.mark.parametrize("kind", ["voc", "labelme"])
def test_two_files_that_name_one_image(tmp_path: Path, kind: str) -> None:
    files = {"x": ("b.jpg", "dog", 5), "y": ("b.jpg", "cat", 2)}
    source = opened(one_each(tmp_path / "data", kind, files, ["b.jpg"]))
    assert found(source) == {"b.jpg": [("dog", 5)]}
    assert source.issue_counts == {"duplicate image": 1}
    assert "1 box" in source.issues[0].detail


def test_a_line_of_a_voc_list_twice(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for stem in "ab":
        save_image(root / "JPEGImages" / f"{stem}.jpg")
        write_text(root / "Annotations" / f"{stem}.xml", voc(f"{stem}.jpg"))
    write_text(root / "ImageSets" / "Main" / "train.txt", "a")
    write_text(root / "ImageSets" / "Main" / "val.txt", "b\nb\n")
    source = opened(root)
    assert found(source) == {"b.jpg": [("cat", 2)]}
    assert source.issue_counts == {"duplicate image": 1}
    assert source.issues[0].where == "ImageSets/Main/val.txt:2"


def test_two_images_do_not_share_a_yolo_file(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("a.jpg", "a.png", "b.jpg", "b.png"):
        save_image(root / "images" / "val" / name)
    write_text(root / "labels" / "val" / "a.txt", "0 0.5 0.5 0.5 0.5")
    write_text(root / "data.yaml", "names: [cat]\nval: images/val\n")
    source = opened(root)
    assert found(source) == {"a.jpg": [("cat", 10)], "b.jpg": [], "b.png": []}
    assert source.issue_counts == {"shared annotation": 1, "few label files": 1}
    assert source.issues[0].where == "images/val/a.png"


def coco(root: Path, *images: Mapping[str, Any], boxes: Sequence[tuple[int, int, float]]) -> DatasetSource:
    """A file whose images, of 40 x 30, have boxes (image, category, left side)."""
    for name in ("a.jpg", "b.jpg"):
        save_image(root / "val" / name)
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": [left, 2, 9, 9]}
        for number, (image, category, left) in enumerate(boxes)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    entries = [{"width": 40, "height": 30} | image for image in images]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    write_json(root / "annotations" / "instances_val.json", content)
    return opened(root)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("near", ["A.JPG", "a"])
def test_coco_names_that_are_nearly_the_same(tmp_path: Path, order: int, near: str) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 3, "file_name": near}]
    source = coco(tmp_path / "data", *images[::order], boxes=[(1, 1, 2), (3, 2, 5)])
    assert found(source) == {"a.jpg": [("cat", 2)], "b.jpg": []}
    assert [record.image_id for record in source.split("val")] == [1, 2][::order]
    assert source.issue_counts == {"missing image": 1}
    assert "a.jpg" in source.issues[0].detail


def test_two_near_names_of_one_coco_image(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "A.jpg"}, {"id": 2, "file_name": "A.JPG"}, {"id": 3, "file_name": "A.jpg"}]
    source = coco(tmp_path / "data", *images, boxes=[(1, 1, 2), (2, 2, 5), (3, 2, 7)])
    assert found(source) == {"a.jpg": [("cat", 2), ("dog", 7)]}
    assert source.issue_counts == {"missing image": 1, "duplicate image": 1}


def test_a_coco_image_with_two_ids_is_joined(tmp_path: Path) -> None:
    """Boxes that both have are one."""
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}]
    source = coco(tmp_path / "data", *images, boxes=[(2, 2, 5), (1, 1, 2), (3, 1, 3), (1, 2, 7), (2, 1, 2)])
    assert {name: sorted(boxes) for name, boxes in found(source).items()} == {
        "a.jpg": [("cat", 2), ("dog", 5), ("dog", 7)],
        "b.jpg": [("cat", 3)],
    }
    assert source.issue_counts == {"duplicate image": 1}
    assert "2 boxes" in source.issues[0].detail


def test_a_coco_image_with_two_sizes_is_not_joined(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg", "width": 80, "height": 60}]
    source = coco(tmp_path / "data", *images, boxes=[(1, 1, 2), (2, 2, 5)])
    assert found(source) == {"a.jpg": [("cat", 2)]}
    assert source.issue_counts == {"duplicate image": 1}
    assert "1 box" in source.issues[0].detail


def tables(root: Path, **files: str) -> DatasetSource:
    """CSV files below `val`, with the images a.jpg and b.jpg of 40 x 30."""
    for name in ("a.jpg", "b.jpg"):
        save_image(root / "val" / name)
    for name, text in files.items():
        write_text(root / "val" / f"{name}.csv", text)
    return opened(root)


def test_csv_files_of_a_split_are_joined(tmp_path: Path) -> None:
    source = tables(
        tmp_path / "data",
        cats=f"{HEADER}a.jpg,cat,1,1,20,20\nb.jpg,,,,,\n",
        dogs=f"{HEADER}a.jpg,dog,30,1,38,20\na.jpg,cat,1,1,20,20\na.jpg,dog,30,1,30,20\n",
    )
    assert found(source) == {"a.jpg": [("cat", 1), ("dog", 30)], "b.jpg": []}
    assert source.issue_counts == {"degenerate box": 1}
    assert "val/dogs.csv:4" in source.issues[0].where


def test_csv_files_in_fractions_and_in_pixels(tmp_path: Path) -> None:
    source = tables(
        tmp_path / "data",
        cats=f"{HEADER}a.jpg,cat,1,1,20,20\nb.jpg,cat,1,1,20,20\n",
        dogs=f"{HEADER}a.jpg,dog,0.5,0.1,0.9,0.9\n",
        none=f"{HEADER}b.jpg,,,,,\n",
    )
    assert found(source) == {"a.jpg": [("cat", 1)], "b.jpg": [("cat", 1)]}
    assert source.issue_counts == {"duplicate image": 1}
    assert "1 box" in source.issues[0].detail


def test_the_same_box_twice_in_one_csv_file_is_kept(tmp_path: Path) -> None:
    """Only equal boxes of two files are joined: why one file lists a box twice is unknown."""
    source = tables(tmp_path / "data", all=HEADER + "a.jpg,cat,1,1,20,20\n" * 2)
    assert len(source.split("val")[0].boxes) == 2


@pytest.mark.parametrize(
    "lines", [("A.JPG,dog,5,1,20,20", "a.jpg,cat,1,1,20,20"), ("a.jpg,cat,1,1,20,20", "a,dog,5,1,9,9")]
)
def test_csv_names_that_are_nearly_the_same(tmp_path: Path, lines: tuple[str, str]) -> None:
    source = tables(tmp_path / "data", all=HEADER + "\n".join(lines))
    assert found(source) == {"a.jpg": [("cat", 1)]}
    assert source.issue_counts == {"missing image": 1}


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    source = coco(tmp_path / "coco", {"id": 1, "file_name": "a.jpg"}, boxes=[(1, 1, 2)])
    file = tmp_path / "coco" / "annotations" / "instances_val.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert found(opened(tmp_path / "coco")) == found(source)
    save_image(tmp_path / "labelme" / "val" / "a.jpg")
    text = json.dumps(labelme("a.jpg"))
    (tmp_path / "labelme" / "val" / "a.json").write_text(text, encoding="utf-8-sig")
    assert found(opened(tmp_path / "labelme")) == {"a.jpg": [("cat", 2)]}


def annotated(source: DatasetSource, split: str) -> Sequence[Any]:
    """The names that each image of a split was searched for; None for all."""
    return [
        None if record.annotated is None else [source.categories[label] for label in record.annotated]
        for record in source.split(split)
    ]


def declared(root: Path, **names: Sequence[str]) -> Path:
    """An image, without boxes but for one of the first name, and the declared names of each split."""
    for split, mine in names.items():
        save_image(root / split / "a.jpg")
        categories = [{"id": number, "name": name} for number, name in enumerate(mine)]
        image = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}
        annotations = [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [1, 1, 9, 9]}]
        content = {"images": [image], "annotations": annotations, "categories": categories}
        write_json(root / "annotations" / f"instances_{split}.json", content)
    return root


def test_a_coco_file_speaks_of_its_own_categories(tmp_path: Path) -> None:
    source = opened(declared(tmp_path / "data", train=("cat", "cow"), val=("dog", "cat")))
    assert annotated(source, "train") == [["cat", "cow"]]
    assert annotated(source, "val") == [["cat", "dog"]]


def test_a_coco_file_of_all_categories_speaks_of_all(tmp_path: Path) -> None:
    source = opened(declared(tmp_path / "data", train=("cat", "dog"), val=("dog",), test=("dog", " cat ")))
    assert [annotated(source, split) for split in ("train", "val", "test")] == [[None], [["dog"]], [None]]


def test_a_change_of_another_coco_file_is_noticed(tmp_path: Path) -> None:
    root = declared(tmp_path / "data", train=("cat",), val=("cat",))
    assert annotated(opened(root), "train") == [None]
    declared(root, val=("cat", "dog"))
    assert annotated(opened(root), "train") == [["cat"]]


def latin(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("cp1252"))


TWO = ("pâté", "pété")


def latin_csv(root: Path) -> None:
    save_image(root / "a.jpg")
    latin(root / "val.csv", HEADER + "".join(f"a.jpg,{name},1,1,20,20\n" for name in TWO))


def latin_yolo(root: Path) -> None:
    save_image(root / "a.jpg")
    write_text(root / "a.txt", "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5")
    latin(root / "classes.txt", "\n".join(TWO))


def latin_imagefolder_names(root: Path) -> None:
    save_image(root / "a.jpg")
    row = {"file_name": "a.jpg", "objects": {"bbox": [[1, 1, 9, 9]] * 2, "categories": [0, 1]}}
    write_text(root / "metadata.jsonl", json.dumps(row))
    latin(root / "classes.txt", "\n".join(TWO))


def latin_imagefolder_table(root: Path) -> None:
    save_image(root / "a.jpg")
    objects = str({"bbox": [[1, 1, 9, 9]] * 2, "categories": list(TWO)})
    latin(root / "metadata.csv", f'file_name,objects\na.jpg,"{objects}"\n')


def latin_open_images(root: Path) -> None:
    save_image(root / "a.jpg")
    boxes = "".join(f"a,{label},0.1,0.5,0.1,0.5\n" for label in ("/m/01", "/m/02"))
    write_text(root / "val-annotations-bbox.csv", "ImageID,LabelName,XMin,XMax,YMin,YMax\n" + boxes)
    latin(root / "class-descriptions-boxable.csv", "".join(f"/m/0{n + 1},{name}\n" for n, name in enumerate(TWO)))


@pytest.mark.parametrize(
    "write", [latin_csv, latin_yolo, latin_imagefolder_names, latin_imagefolder_table, latin_open_images]
)
def test_names_that_are_not_utf_8_stay_apart(tmp_path: Path, write: Any) -> None:
    save_image(tmp_path / "data" / "b.jpg")
    write(tmp_path / "data")
    source = opened(tmp_path / "data")
    assert source.categories == TWO
    assert source.issue_counts["not UTF-8"] == 1
    labels = [record.labels for split in source.splits.values() for record in split if len(record.labels)]
    np.testing.assert_array_equal(labels, [[0, 1]])


def unreadable_csv(root: Path) -> None:
    save_image(root / "a.jpg")
    write_text(root / "val.csv", f"{HEADER}a.jpg,cat,x,1,20,20\na.jpg,dog,1,1,20,20\n")


def unreadable_voc(root: Path) -> None:
    both = voc("a.jpg", "dog").replace("<object>", "<object><name>cat</name></object><object>")
    save_image(root / "val" / "a.jpg")
    write_text(root / "val" / "a.xml", both)


def unreadable_labelme(root: Path) -> None:
    content = labelme("a.jpg", "dog")
    content["shapes"].append({"label": "cat", "points": [[1, "x"], [2, 3]], "shape_type": "rectangle", "group_id": 1})
    save_image(root / "val" / "a.jpg")
    write_json(root / "val" / "a.json", content)


def unreadable_imagefolder(root: Path) -> None:
    save_image(root / "val" / "a.jpg")
    row = {"file_name": "a.jpg", "objects": {"bbox": [None, [1, 1, 9, 9]], "categories": ["cat", "dog"]}}
    write_text(root / "val" / "metadata.jsonl", json.dumps(row))


def unreadable_crowdhuman(root: Path) -> None:
    save_image(root / "Images" / "a.jpg")
    boxes = [{"tag": "cat", "fbox": [1]}, {"tag": "dog", "fbox": [1, 1, 9, 9]}]
    write_text(root / "annotation_val.odgt", json.dumps({"ID": "a", "gtboxes": boxes}))


def unreadable_odvg(root: Path) -> None:
    save_image(root / "images" / "a.jpg")
    instances = [{"bbox": 5, "category": "cat"}, {"bbox": [1, 1, 9, 9], "category": "dog"}]
    write_text(root / "val.jsonl", json.dumps({"filename": "a.jpg", "detection": {"instances": instances}}))


def unreadable_coco(root: Path) -> None:
    save_image(root / "val" / "a.jpg")
    boxes = [{"image_id": 1, "category_id": 1, "bbox": None}, {"image_id": 1, "category_id": 2, "bbox": [1, 1, 9, 9]}]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": boxes, "categories": categories}
    write_json(root / "annotations" / "instances_val.json", content)


@pytest.mark.parametrize(
    "write",
    [
        unreadable_csv,
        unreadable_voc,
        unreadable_labelme,
        unreadable_imagefolder,
        unreadable_crowdhuman,
        unreadable_odvg,
        unreadable_coco,
    ],
)
def test_the_category_of_an_unreadable_box_is_not_absent(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "data")
    source = opened(tmp_path / "data")
    assert source.categories == ("cat", "dog")
    assert source.issue_counts == {"unreadable box": 1}
    (annotations,) = (split for split in source.splits.values() if len(split))
    assert annotations[0].labels.tolist() == [1]
    assert annotations[0].annotated == (1,)
