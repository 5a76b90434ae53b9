"""Boxes are added to datasets of every layout; people's boxes, and the bytes around them, stay as they were."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from line_trees import LINE_LAYOUTS
from PIL import Image
from reader_trees import LAYOUTS, NAMES, made_up, save_image, write_json, write_text
from tool_trees import TOOL_LAYOUTS

from metr.completion.datasets import AddedBoxes, WrittenDataset, original_of, write_completed
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.records import ImageRecord
from metr.errors import DataError

ALL = LAYOUTS | LINE_LAYOUTS | TOOL_LAYOUTS
# Formats whose files boxes are added to.
FORMATS = {"coco", "yolo", "voc", "labelme", "csv", "cvat", "label_studio"}
OWN = [name for name, (kind, _) in ALL.items() if kind in FORMATS and name != "label studio minimal"]
NEW = ("new & <name>", "ещё, одно")


def opened(root: Path, **options: object) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root, **options), root.parent / f"cache of {root.name}")


def hashes(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def boxes_in(record: ImageRecord, number: int) -> ImageRecord:
    """A record of `number` boxes of a detector, inside of the image of another record."""
    sides = np.array([record.width, record.height] * 2, dtype=np.float32)
    boxes = np.array([[0.1, 0.2, 0.5, 0.7], [0.25, 0.3, 1, 1]], dtype=np.float32)[:number] * sides
    spans = boxes[:, 2:] - boxes[:, :2]
    return replace(
        record,
        boxes=boxes,
        labels=np.arange(number),
        areas=spans[:, 0] * spans[:, 1],
        ignore=np.zeros(number, dtype=bool),
        scores=np.full(number, 0.75, dtype=np.float32),
    )


def additions(source: DatasetSource, split: str = "train", names: Sequence[str] = NEW) -> list[AddedBoxes]:
    """Two boxes in every image, but for the third."""
    counts = [0 if index == 2 else len(names) for index in range(len(source.split(split)))]
    return [
        AddedBoxes(split=split, index=index, record=boxes_in(record, count), names=tuple(names[:count]))
        for index, (count, record) in enumerate(zip(counts, source.split(split), strict=True))
    ]


def completed(source: DatasetSource, out: Path, added: Sequence[AddedBoxes]) -> tuple[WrittenDataset, DatasetSource]:
    result = write_completed(source, original_of(source), added, out)
    return result, open_dataset(result.config, out.parent / f"cache of {out.name}")


def named(source: DatasetSource, record: ImageRecord) -> list[str]:
    return [source.categories[label] for label in record.labels.tolist()]


@pytest.mark.parametrize("layout", ALL)
def test_every_layout(tmp_path: Path, layout: str) -> None:
    expected, write = ALL[layout]
    write(tmp_path / "data set", made_up())
    source = opened(tmp_path / "data set")
    before, added = hashes(tmp_path / "data set"), additions(source)
    result, now = completed(source, tmp_path / "out", added)
    assert hashes(tmp_path / "data set") == before
    assert [path.name for path in tmp_path.iterdir() if ".writing" in path.name] == []
    assert (result.format, bool(result.why_coco)) == ((expected, False) if layout in OWN else ("coco", True))
    assert set(now.categories) == {*NAMES, *NEW}
    assert now.issue_counts == {}
    assert list(now.splits) == list(source.splits)
    new = {(one.split, one.index): one for one in added}
    for split in source.splits:
        records = {record.path.name: record for record in now.split(split)}
        for index, record in enumerate(source.split(split)):
            other, one = records[record.path.name], new.get((split, index))
            more = () if one is None else one.names
            assert named(now, other) == [*named(source, record), *more]
            np.testing.assert_allclose(other.boxes[: len(record.boxes)], record.boxes, atol=0.01)
            if one is not None:
                np.testing.assert_allclose(other.boxes[len(record.boxes) :], one.record.boxes, atol=0.51)
            # where an added name is missing, nothing is known
            known = range(len(now.categories)) if other.annotated is None else other.annotated
            assert {now.categories[row] for row in known} == set(NAMES)
    assert now.split("train")[0].path.is_relative_to(tmp_path / "out")


@pytest.mark.parametrize("layout", OWN)
def test_what_people_wrote_stays_byte_for_byte(tmp_path: Path, layout: str) -> None:
    """Each file is what it was with something put in; only a YAML file of names has its names written anew."""
    ALL[layout][1](tmp_path / "data", made_up())
    source = opened(tmp_path / "data")
    completed(source, tmp_path / "out", additions(source))
    old, new = (
        {path.relative_to(root): path for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "data", tmp_path / "out")
    )
    assert old.keys() <= new.keys()
    for name, path in old.items():
        if name.suffix in {".yaml", ".yml"}:
            continue
        rest = iter(new[name].read_bytes())
        assert all(byte in rest for byte in path.read_bytes()), name


def test_unknown_keys_odd_numbers_and_layout_of_coco_stay(tmp_path: Path) -> None:
    text = (
        '{ "info": {"by": "me", "n": 1.50e1},\n\t"images": [ {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30,'
        ' "flickr": "]}"} ],\n "categories":[\n {"id": 5, "name": "кот", "skeleton": [[1,2]]}\n ], "annotations" : [\n'
        '   {"id":12, "image_id": 7, "category_id": 5, "bbox": [1.0, 2.00, 3e0, 4], "attributes": {"x": null}}\n   ],'
        '"licenses": [] }\n'
    )
    save_image(tmp_path / "data" / "train" / "a.jpg")
    write_text(tmp_path / "data" / "annotations" / "train.json", text)
    source = opened(tmp_path / "data", splits={"train": "train"})
    completed(source, tmp_path / "out", additions(source, names=NEW[:1]))
    now = (tmp_path / "out" / "annotations" / "train.json").read_text(encoding="utf-8")
    row = json.loads(now)["annotations"][1]
    assert (row["id"], row["image_id"], row["category_id"], row["score"], row["source"]) == (13, 7, 6, 0.75, "metr")
    added = json.dumps(row, ensure_ascii=False)
    category = json.dumps({"id": 6, "name": NEW[0]}, ensure_ascii=False)
    assert now.replace(f", {added}", "").replace(f", {category}", "") == text


def test_lines_of_yolo_are_appended(tmp_path: Path) -> None:
    """Also to a file that does not end its last line, and where an image has no file yet."""
    root = tmp_path / "data"
    for name in "abc":
        save_image(root / "images" / "train" / f"{name}.jpg")
    write_text(root / "labels" / "train" / "a.txt", "0 0.5 0.50 .5 0.5")
    write_text(root / "labels" / "train" / "b.txt", "1 0.5 0.5 0.25 0.5\r\n")
    description = (
        "# mine\npath: .  # here\ntrain: images/train\nnc: 2\nnames:\n  0: cat\n  1: 'no'\n\nroboflow: {a: 1}\n"
    )
    write_text(root / "data.yaml", description)
    source = opened(root, splits={"train": "train"})
    added = [
        AddedBoxes(split="train", index=index, record=boxes_in(record, 1), names=("new",))
        for index, record in enumerate(source.split("train"))
    ]
    result, now = completed(source, tmp_path / "out", added)
    labels = tmp_path / "out" / "labels" / "train"
    line = "2 0.30000000 0.45000000 0.40000000 0.50000000\n"
    assert (labels / "a.txt").read_bytes().decode() == f"0 0.5 0.50 .5 0.5\n{line}"
    assert (labels / "b.txt").read_bytes().decode() == f"1 0.5 0.5 0.25 0.5\r\n{line}"
    assert (labels / "c.txt").read_text() == line
    text = (tmp_path / "out" / "data.yaml").read_text()
    assert text == description.replace("nc: 2", "nc: 3").replace(
        "names:\n  0: cat\n  1: 'no'\n", 'names: ["cat", "no", "new"]\n'
    )
    assert now.categories == ("cat", "no", "new")
    assert result.config.exhaustive == ("cat", "no")


def test_a_yolo_dataset_named_by_its_place_on_the_disk_moves(tmp_path: Path) -> None:
    root = tmp_path / "data"
    save_image(root / "images" / "train" / "a.jpg")
    write_text(root / "labels" / "train" / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    write_text(root / "data.yaml", f"path: {root}\ntrain: images/train\nnames: [cat]\n")
    source = opened(root, splits={"train": "train"})
    result, now = completed(source, tmp_path / "out", additions(source))
    assert result.format == "yolo"
    assert now.split("train")[0].path == tmp_path / "out" / "images" / "train" / "a.jpg"


def test_boxes_of_turned_images_are_turned_back(tmp_path: Path) -> None:
    """Files that mean the pixels as stored get boxes in these."""
    from metr.completion.boxes import Wanted, completed_record
    from metr.completion.thresholds import Found
    from metr.data.images import exif_oriented_record

    for orientation in range(2, 9):
        path = save_image(tmp_path / f"{orientation}.jpg", 40, 30)
        with Image.open(path) as image:
            exif = Image.Exif()
            exif[274] = orientation
            image.save(path, exif=exif.tobytes())
        nothing = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64)}
        nothing |= {"areas": np.zeros(0, np.float32), "ignore": np.zeros(0, bool)}
        record = replace(boxes_in(ImageRecord(image_id=1, path=path, width=40, height=30, **nothing), 2), scores=None)
        upright = exif_oriented_record(record)
        found = Found(
            size=(upright.height, upright.width),
            boxes=upright.boxes.astype(np.float64),
            scores=np.array([0.9, 0.8]),
            labels=np.array([0, 1]),
        )
        rows = {0: 0.5, 1: 0.5}
        wanted = Wanted(own=("cat",), names=NEW, rows=rows, same={}, given=frozenset(rows))  # people's boxes lie there
        added, names = completed_record(record, upright, found, wanted, 0.5)
        np.testing.assert_allclose(added.boxes, record.boxes, atol=1e-4)
        assert names == NEW


def test_a_dataset_that_is_one_file_or_has_options_keeps_them(tmp_path: Path) -> None:
    for name in "ab":
        save_image(tmp_path / "data" / f"{name}.jpg")
    write_text(
        tmp_path / "data" / "all.csv", "filename;label;x1;y1;x2;y2;by\na.jpg;cat;1;2;9;9;me\nb.jpg;old;3;4;9;9;you"
    )
    write_text(tmp_path / "data" / "other.csv", "filename,class,x1,y1,x2,y2\na.jpg,dog,1,2,9,9\n")
    options = {"splits": {"train": "all"}, "renames": {"old": "dog"}, "weight": 2.0}
    source = opened(tmp_path / "data" / "all.csv", **options)
    result, now = completed(source, tmp_path / "out", additions(source, names=("new", "other; one")))
    assert (result.format, result.config.path) == ("csv", tmp_path / "out" / "all.csv")
    assert set(now.categories) == {"cat", "dog", "new", "other; one"}
    assert (result.config.weight, result.config.renames) == (2.0, {"old": "dog"})
    lines = (tmp_path / "out" / "all.csv").read_text().splitlines()
    assert lines[:3] == (tmp_path / "data" / "all.csv").read_text().splitlines()
    assert lines[3] == "a.jpg;new;4;6;20;21;"


def test_ignored_regions_are_written_as_coco(tmp_path: Path) -> None:
    """In its own format they would be regions of the new names, too, which changes nothing that people wrote."""
    save_image(tmp_path / "data" / "a.jpg")
    write_text(
        tmp_path / "data" / "train.csv", "filename,class,x1,y1,x2,y2\na.jpg,cat,1,2,9,9\na.jpg,DontCare,9,9,20,20\n"
    )
    source = opened(tmp_path / "data", splits={"train": "train"})
    result, now = completed(source, tmp_path / "out", additions(source))
    assert result.format == "csv"
    record = now.split("train")[0]
    assert record.ignore.sum() == 1
    assert named(now, record)[1:3] == list(NEW)


def test_annotated_sets_of_images_stay(tmp_path: Path) -> None:
    """Where files say for each image what is annotated, the copy is COCO with the keys of LVIS."""
    save_image(tmp_path / "data" / "train" / "a.jpg")
    image = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}
    image |= {"neg_category_ids": [2], "not_exhaustive_category_ids": []}
    content = {
        "images": [image],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 8, 8]}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(("cat", "dog", "cow"), start=1)],
    }
    write_json(tmp_path / "data" / "annotations" / "lvis_train.json", content)
    source = opened(tmp_path / "data", splits={"train": "train"})
    assert source.format == "lvis"
    _, now = completed(source, tmp_path / "out", additions(source))
    record = now.split("train")[0]
    assert [now.categories[row] for row in record.annotated or ()] == ["cat", "dog"]
    assert named(now, record) == ["cat", *NEW]


def test_folders_that_are_not_written_into(tmp_path: Path) -> None:
    ALL["coco plain"][1](tmp_path / "data", made_up())
    source = opened(tmp_path / "data")
    for out in (tmp_path / "data" / "out", tmp_path):
        with pytest.raises(DataError, match="own folder"):
            write_completed(source, original_of(source), [], out)
