"""A dataset written in any format and read again is the same; what a format has no place for is counted."""

import errno
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from line_trees import LINE_LAYOUTS, odvg_line, write_lines
from PIL import Image
from reader_trees import LAYOUTS, NAMES, coco_content, made_up, save_image, write_json

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.export import ExportReport, ImageFolder, MemorySource, write_coco, write_yolo
from metr.data.export_tools import WRITERS as ALL_WRITERS
from metr.data.export_tools import write_label_studio
from metr.data.images import exif_oriented_record
from metr.data.records import ImageRecord, InMemoryAnnotations
from metr.errors import DataError

Writer = Callable[..., ExportReport]
WRITERS: dict[str, Writer] = {kind: write for kind, write in ALL_WRITERS.items() if kind != "webdataset"}
# formats that have no place for ignored boxes, and those that declare their categories
WITHOUT_IGNORED = {"yolo", "cvat", "label_studio"}
DECLARING = {"coco", "yolo", "cvat"}


def opened(root: Path, **options: object) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root, **options), root.parent / f"cache of {root.name}")


def made(root: Path, layout: str = "coco images folder", **options: object) -> DatasetSource:
    """The made-up dataset, opened."""
    (LAYOUTS | LINE_LAYOUTS)[layout][1](root, made_up())
    return opened(root, **options)


def odd(root: Path) -> DatasetSource:
    """COCO with crowds, areas of polygons, corners between pixels, and names that have no box or only a crowd."""
    rng = np.random.default_rng(0)
    for split, images in made_up().items():
        content = coco_content(images)
        content["categories"] += [{"id": 90, "name": "никто"}, {"id": 91, "name": "yes"}]
        for item in content["annotations"]:
            left, top, width, height = item["bbox"]
            if min(width, height) > 1:  # no box is dropped: its category would be unknown in its image
                item["bbox"] = [left + 0.1234, top + 0.05, width - 0.2, height - 0.0501]
            item["iscrowd"] = int(rng.random() < 0.3)
            item["area"] = width * height * float(rng.random())
        content["annotations"].append(
            {"image_id": 3, "category_id": 91, "bbox": [0, 0, 9, 9], "iscrowd": 1, "area": 7.5, "id": 99}
        )
        write_json(root / "annotations" / f"{split}.json", content)
        for item in images:
            save_image(root / "images" / item.name, item.width, item.height)
    return opened(root)


def assert_same(one: ImageRecord, other: ImageRecord) -> None:
    assert (one.width, one.height) == (other.width, other.height)
    np.testing.assert_allclose(one.boxes, other.boxes, atol=0.01)
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_allclose(one.areas, other.areas, atol=0.01, rtol=1e-3)
    np.testing.assert_array_equal(one.ignore, other.ignore)
    assert one.annotated == other.annotated


def by_name(source: DatasetSource, split: str) -> dict[str, ImageRecord]:
    return {record.path.name: record for record in source.split(split)}


def counts(source: DatasetSource) -> tuple[int, int]:
    records = [record for annotations in source.splits.values() for record in annotations]
    return len(records), sum(len(record.boxes) for record in records)


def test_coco_round_trip(tmp_path: Path) -> None:
    source = odd(tmp_path / "data")
    report = write_coco(source, tmp_path / "out")
    found = opened(tmp_path / "out")
    assert (report.images, report.boxes) == counts(source)
    assert (report.format, report.left_out, report.renamed, found.issue_counts) == ("coco", {}, 0, {})
    assert found.format == "coco"
    assert found.categories == source.categories == (*NAMES, "никто", "yes")
    assert list(found.splits) == list(source.splits)
    for split in source.splits:
        for one, other in zip(source.split(split), found.split(split), strict=True):
            assert_same(one, other)
            assert (one.image_id, one.path.name) == (other.image_id, other.path.name)
            assert other.path.parent == tmp_path / "out" / "images" / split


@pytest.mark.parametrize("layout", ["voc listed", "csv plain", "labelme apart", "imagefolder card"])
@pytest.mark.parametrize("kind", WRITERS)
def test_round_trips_of_other_formats(tmp_path: Path, layout: str, kind: str) -> None:
    source = made(tmp_path / "data", layout)
    report = WRITERS[kind](source, tmp_path / "out")
    found = opened(tmp_path / "out")
    assert (report.images, report.boxes, report.left_out) == (*counts(source), {})
    names = source.categories if kind in DECLARING else tuple(sorted(source.categories))
    assert (found.format, found.categories, found.issue_counts) == (kind, names, {})
    for split in source.splits:
        mine, written = by_name(source, split), by_name(found, split)
        assert mine.keys() == written.keys()
        for name, record in mine.items():
            assert_same(record, written[name])


ODD_NAMES = (
    "a,b;c",
    "<b> & \"d\" 'e'",
    "=1+1",
    "no",
    "007",
    "null",
    "пятно / 斑点",
    "tab and [x]{y}: #1 %",
    "\\n\\",
    "é" * 80,
)


@pytest.mark.parametrize("kind", WRITERS)
def test_odd_names_splits_and_ignored_boxes(tmp_path: Path, kind: str) -> None:
    """Each format is read again with the names, sizes, boxes and ignored boxes that it has a place for."""
    content = coco_content(made_up()["train"])
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(ODD_NAMES, start=1)]
    content["annotations"] = [
        {"id": n, "image_id": item["id"], "category_id": 1 + n % len(ODD_NAMES), "bbox": box, "iscrowd": int(n == 3)}
        for n, (item, box) in enumerate(
            (item, [1.25, 2.5, 9.125, 7.0]) for item in content["images"][1:] for _ in range(4)
        )
    ]
    root = tmp_path / "data"
    for number, item in enumerate(content["images"]):
        item["file_name"] = f"{'ab'[number % 2]} & 'c' <d> №{number}%20.jpg"
        save_image(root / "images" / item["file_name"], item["width"], item["height"])
    write_json(root / "annotations" / "train.json", content)
    source = opened(root)
    assert list(source.splits) == ["train", "val"]
    report = WRITERS[kind](source, tmp_path / "out")
    found = opened(tmp_path / "out")
    assert (found.format, found.issue_counts, list(found.splits)) == (kind, {}, list(source.splits))
    assert report.left_out == ({"ignored box": 1} if kind in WITHOUT_IGNORED else {})
    assert set(found.categories) == set(ODD_NAMES)
    for split in source.splits:
        mine, written = by_name(source, split), by_name(found, split)
        assert mine.keys() == written.keys()
        for name, record in mine.items():
            kept = ~record.ignore if kind in WITHOUT_IGNORED else np.ones(len(record.boxes), dtype=bool)
            other = written[name]
            assert (record.width, record.height) == (other.width, other.height)
            np.testing.assert_allclose(record.boxes[kept], other.boxes, atol=0.01)
            np.testing.assert_array_equal(record.ignore[kept], other.ignore)
            own, again = (
                [one.categories[label] for label in labels]
                for one, labels in ((source, record.labels[kept]), (found, other.labels))
            )
            assert own == again


@pytest.mark.parametrize("kind", WRITERS)
def test_names_without_a_box_are_counted_where_nothing_declares_them(tmp_path: Path, kind: str) -> None:
    source = odd(tmp_path / "data")
    report = WRITERS[kind](source, tmp_path / "out")
    assert report.left_out.get("name without a box", 0) == (0 if kind in DECLARING else 1)


@pytest.mark.parametrize("kind", ["voc", "cvat"])
def test_control_characters_are_no_xml(tmp_path: Path, kind: str) -> None:
    source = made(tmp_path / "data", renames={NAMES[0]: "cell \x01"})
    report = WRITERS[kind](source, tmp_path / "out")
    assert report.left_out == {"old name": 1, "name with control characters": 1}
    assert "cell \ufffd" in opened(tmp_path / "out").categories


def test_boxes_of_a_detector_have_their_score(tmp_path: Path) -> None:
    """COCO, CSV, labelme, CVAT and Label Studio say which boxes are a detector's; YOLO and VOC have no place for it."""
    source = made(tmp_path / "data")
    records = tuple(
        replace(record, scores=np.where(np.arange(len(record.boxes)) == 0, 0.5, np.nan))
        for record in source.split("val")
    )
    boxes = sum(len(record.boxes) > 0 for record in records)
    scored = InMemoryAnnotations(name="made", split="val", categories=source.categories, records=records)
    scored_source = MemorySource(
        name="made", root=source.root, config=source.config, categories=source.categories, splits={"val": scored}
    )
    marks = {
        "coco": '"score":0.5',
        "csv": ",0.50000",
        "labelme": '"score": 0.5',
        "cvat": 'source="auto"',
        "label_studio": '"score":0.5',
    }
    for kind, write in WRITERS.items():
        write(scored_source, tmp_path / kind)
        texts = [path.read_text() for path in (tmp_path / kind).rglob("*") if path.suffix in {".json", ".xml", ".csv"}]
        assert sum(text.count(marks.get(kind, "score")) for text in texts) == (boxes if kind in marks else 0)
        assert counts(opened(tmp_path / kind)) == (len(records), sum(len(record.boxes) for record in records))


def test_predictions_of_label_studio(tmp_path: Path) -> None:
    """They are tasks that nobody has annotated yet, as Label Studio imports them."""
    source = made(tmp_path / "data")
    write_label_studio(source, tmp_path / "out", model_version="run 7")
    tasks = json.loads((tmp_path / "out" / "train.json").read_text())
    assert [task["id"] for task in tasks] == list(range(1, 6))
    for task, record in zip(tasks, source.split("train"), strict=True):
        (prediction,) = task["predictions"]
        assert "annotations" not in task
        assert (prediction["model_version"], len(prediction["result"])) == ("run 7", len(record.boxes))
    config = ElementTree.parse(tmp_path / "out" / "label_config.xml")
    assert [label.get("value") for label in config.iter("Label")] == list(source.categories)


@pytest.mark.parametrize(("name", "kind"), [("coco_mini", "coco"), ("aquarium", "yolo"), ("doc_tables", "coco")])
def test_real_datasets(shared: Path, tmp_path: Path, name: str, kind: str) -> None:
    source = open_dataset(DatasetConfig(name=name, path=shared / "data" / name), tmp_path / "cache")
    report = WRITERS[kind](source, tmp_path / "out")
    # two images of the aquarium have a box that is dropped
    left_out = {"set of annotated categories": 2} if name == "aquarium" else {}
    found = opened(tmp_path / "out")
    assert (report.images, report.boxes, report.left_out) == (*counts(source), left_out)
    for split in source.splits:
        mine, written = by_name(source, split), by_name(found, split)
        for key, record in mine.items():
            assert_same(record if kind == "coco" else replace(record, annotated=None), written[key])


def test_renamed_categories_are_written_as_they_are_called(tmp_path: Path) -> None:
    source = made(tmp_path / "data", renames={NAMES[0]: "cell", NAMES[1]: "cell"})
    for kind, write in WRITERS.items():
        write(source, tmp_path / kind)
        assert set(opened(tmp_path / kind).categories) == {"cell", NAMES[2]}


def test_what_yolo_has_no_place_for_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = odd(tmp_path / "data")
    ignored = sum(int(record.ignore.sum()) for split in source.splits.values() for record in split)
    source = replace(source, splits={**source.splits, "extra": source.split("test")})
    with caplog.at_level(logging.WARNING):
        report = write_yolo(source, tmp_path / "out")
    assert report.left_out == {"ignored box": ignored, "image of the split 'extra'": 2}
    assert f"{ignored} x ignored box" in caplog.text
    found = opened(tmp_path / "out")
    assert list(found.splits) == ["train", "val", "test"]
    for split, annotations in found.splits.items():
        for name, record in by_name(found, split).items():
            mine = by_name(source, split)[name]
            np.testing.assert_allclose(record.boxes, mine.boxes[~mine.ignore], atol=0.01)
            np.testing.assert_array_equal(record.labels, mine.labels[~mine.ignore])
        assert len(annotations) == len(source.split(split))


def test_the_description_of_yolo_is_what_ultralytics_reads(tmp_path: Path) -> None:
    """Paths relative to the file, names by number, quoted where YAML would take them for something else."""
    write_yolo(odd(tmp_path / "data"), tmp_path / "out")
    description = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text(encoding="utf-8"))
    assert description == {
        **{split: f"images/{split}" for split in ("train", "val", "test")},
        "nc": 5,
        "names": dict(enumerate([*NAMES, "никто", "yes"])),
    }
    labels = sorted(path.stem for path in (tmp_path / "out" / "labels" / "train").iterdir())
    assert labels == sorted(path.stem for path in (tmp_path / "out" / "images" / "train").iterdir())


def test_boxes_in_the_stored_pixels_are_turned_for_yolo(tmp_path: Path) -> None:
    source = made(tmp_path / "data")
    path = source.split("train")[0].path
    with Image.open(path) as image:
        exif = Image.Exif()
        exif[274] = 6
        image.save(path, exif=exif.tobytes())
    assert write_yolo(source, tmp_path / "yolo").left_out == write_coco(source, tmp_path / "coco").left_out == {}
    turned = exif_oriented_record(source.split("train")[0])
    assert (turned.height, turned.width) == (source.split("train")[0].width, source.split("train")[0].height)
    again = by_name(opened(tmp_path / "yolo"), "train")[path.name]
    np.testing.assert_allclose(again.boxes, turned.boxes, atol=0.01)


def test_what_a_dataset_was_opened_with_is_counted(tmp_path: Path) -> None:
    options = {"renames": {NAMES[0]: "cell"}, "prompts": {"cell": "a cell", NAMES[1]: "a white cell"}, "weight": 2.0}
    source = made(tmp_path / "data", **options)
    for kind, write in WRITERS.items():
        assert write(source, tmp_path / kind).left_out == {"prompt": 2, "weight": 1, "old name": 1}


def partly_annotated(root: Path) -> DatasetSource:
    """Images with phrases, which annotate nothing exhaustively, beside detections, which do not annotate phrases."""
    truth = made_up()
    for images in truth.values():
        for item in images:
            save_image(root / "images" / item.name, item.width, item.height)
    write_lines(root / "val.jsonl", [odvg_line(item) for item in truth["val"]])
    regions = [{"bbox": [1, 1, 9, 9], "phrase": "a phrase"}]
    size = {"height": truth["train"][0].height, "width": truth["train"][0].width}
    line = {"filename": truth["train"][0].name, **size, "grounding": {"regions": regions}}
    write_lines(root / "train.jsonl", [line])
    write_json(root / "label_map.json", list(NAMES))
    return opened(root)


def test_annotated_sets_are_written_as_lvis_does(tmp_path: Path) -> None:
    source = partly_annotated(tmp_path / "data")
    write_coco(source, tmp_path / "out")
    known = {}
    for split in source.splits:
        content = json.loads((tmp_path / "out" / "annotations" / f"instances_{split}.json").read_text())
        names = {item["id"]: item["name"] for item in content["categories"]}
        for image, record in zip(content["images"], source.split(split), strict=True):
            present = {item["category_id"] for item in content["annotations"] if item["image_id"] == image["id"]}
            absent, partly = set(image["neg_category_ids"]), set(image["not_exhaustive_category_ids"])
            assert not absent & present
            assert partly <= present
            known[record.path.name] = {names[number] for number in (absent | present) - partly}
            assert known[record.path.name] == {source.categories[label] for label in record.annotated or ()}
    assert set(map(frozenset, known.values())) == {frozenset(), frozenset(NAMES)}
    assert write_yolo(source, tmp_path / "yolo").left_out == {"set of annotated categories": len(known)}


def test_annotated_sets_are_read_again(tmp_path: Path) -> None:
    source = partly_annotated(tmp_path / "data")
    write_coco(source, tmp_path / "out")
    found = opened(tmp_path / "out")
    assert (found.format, found.categories, list(found.splits)) == ("lvis", source.categories, ["train", "val"])
    for split in source.splits:
        for one, other in zip(source.split(split), found.split(split), strict=True):
            assert_same(one, other)


def test_fully_annotated_images_list_all_categories_beside_partly_annotated_ones(tmp_path: Path) -> None:
    """A reader takes a missing list for an empty one: then only categories with boxes would be annotated."""
    source = partly_annotated(tmp_path / "data")
    plain = made(tmp_path / "plain").split("val")
    write_coco(replace(source, splits={**source.splits, "val": plain}), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "annotations" / "instances_val.json").read_text())
    for image, record in zip(content["images"], plain, strict=True):
        assert image["neg_category_ids"] == sorted({1, 2, 3} - {label + 1 for label in record.labels.tolist()})
        assert image["not_exhaustive_category_ids"] == []


def colliding(root: Path) -> DatasetSource:
    """Images of one name in several folders, or of names that differ in case or suffix alone."""
    names = ["a/x.jpg", "b/x.jpg", "b/X.JPG", "c/x.png", "c/x-2.jpg"]
    images = [{"id": f"i{n}", "file_name": name, "width": 40 + n, "height": 30} for n, name in enumerate(names)]
    boxes = [{"image_id": f"i{n}", "category_id": 1, "bbox": [n, 1, 5, 5]} for n in range(len(names))]
    for number, name in enumerate(names):
        save_image(root / name, 40 + number, 30)
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    write_json(root / "val.json", content)
    return opened(root)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("coco", ["x.jpg", "x-2.jpg", "X-3.JPG", "x.png", "x-2-2.jpg"]),
        ("yolo", ["x.jpg", "x-2.jpg", "X-3.JPG", "x-4.png", "x-2-2.jpg"]),
    ],
)
def test_images_of_the_same_name_stay_apart(tmp_path: Path, kind: str, names: list[str]) -> None:
    source = colliding(tmp_path / "data")
    report = WRITERS[kind](source, tmp_path / "out")
    assert report.renamed == sum(
        record.path.name != name for record, name in zip(source.split("val"), names, strict=True)
    )
    found = opened(tmp_path / "out")
    for record, name in zip(source.split("val"), names, strict=True):
        assert_same(record, by_name(found, "val")[name])
    if kind == "coco":  # names are no numbers
        assert [record.image_id for record in found.split("val")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", WRITERS)
def test_images_are_linked_or_copied(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(tmp_path / "data")
    record = source.split("train")[0]
    record.path.rename(tmp_path / "elsewhere.jpg")
    record.path.symlink_to(tmp_path / "elsewhere.jpg")
    reports = {"link": WRITERS[kind](source, tmp_path / "link")}
    reports["copy"] = WRITERS[kind](source, tmp_path / "copy", placement="copy")

    def refused(self: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    reports["refused"] = WRITERS[kind](source, tmp_path / "refused")
    assert {name: report.copied for name, report in reports.items()} == {"link": 0, "copy": 10, "refused": 10}
    for name in reports:
        folder = tmp_path / name / ("JPEGImages" if kind == "voc" else "images/train")
        image = folder / record.path.name
        assert image.read_bytes() == record.path.read_bytes()
        assert not image.is_symlink()
        assert image.samefile(record.path) == (name == "link")


@pytest.mark.parametrize("kind", WRITERS)
def test_missing_images_are_left_out(tmp_path: Path, kind: str) -> None:
    source = made(tmp_path / "data")
    gone = source.split("train")[0]
    gone.path.unlink()
    report = WRITERS[kind](source, tmp_path / "out")
    assert report.left_out == {"missing image": 1}
    assert (report.images, report.boxes) == (9, counts(source)[1] - len(gone.boxes))
    found = opened(tmp_path / "out")
    assert found.issue_counts == {}
    assert gone.path.name not in by_name(found, "train")


@pytest.mark.parametrize("kind", WRITERS)
def test_folders_that_are_not_written_to(tmp_path: Path, kind: str) -> None:
    source, full, file = made(tmp_path / "data"), tmp_path / "full", save_image(tmp_path / "file")
    save_image(full / "mine.jpg")
    before = sorted(tmp_path.rglob("*"))
    for out, what in ((full, "not empty"), (file, "a file of that name"), (tmp_path / "data" / "out", "own folder")):
        with pytest.raises(DataError, match=what):
            WRITERS[kind](source, out)
    with pytest.raises(DataError, match="cannot be written"):
        WRITERS[kind](source, file / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", WRITERS)
def test_an_empty_folder_is_taken_and_missing_ones_are_made(tmp_path: Path, kind: str) -> None:
    source = made(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        WRITERS[kind](source, out)
        assert opened(out).format == kind
        assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space left"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_broken_export(
    tmp_path: Path, kind: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(tmp_path / "data")
    put = ImageFolder.put

    def breaking(self: ImageFolder, image: ImageRecord) -> Any:
        if image.path.name.startswith("test"):
            raise error
        return put(self, image)

    monkeypatch.setattr(ImageFolder, "put", breaking)
    with pytest.raises(DataError if isinstance(error, OSError) else KeyboardInterrupt):
        WRITERS[kind](source, tmp_path / "exports" / "out")
    assert list((tmp_path / "exports").iterdir()) == []
