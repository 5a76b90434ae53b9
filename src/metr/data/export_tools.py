"""Writes a dataset in the formats of annotation tools: Pascal VOC, labelme, CSV, CVAT's XML, Label Studio's JSON."""

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import TextIO

import msgspec

from metr.data.export import (
    Export,
    ExportReport,
    ExportSource,
    ImageFolder,
    Placement,
    in_order,
    new_export,
    write_coco,
    write_yolo,
)
from metr.data.export_shards import write_webdataset
from metr.data.formats.csv_boxes import CSV_HEADER, csv_rows
from metr.data.formats.cvat import CVAT_END, cvat_image, cvat_start
from metr.data.formats.label_studio import label_studio_config, label_studio_task
from metr.data.formats.labelme import labelme_file
from metr.data.formats.voc import voc_file
from metr.data.formats.written import WrittenImage, written_image, xml_text
from metr.data.images import exif_oriented_record
from metr.data.records import TEST, TRAIN, VAL

Writer = Callable[[ExportSource, Path, Placement], ExportReport]


def write_voc(source: ExportSource, out: Path, placement: Placement = "link") -> ExportReport:
    """Writes a dataset as Pascal VOC: `JPEGImages`, `Annotations` and the lists in `ImageSets/Main`.

    Ignored boxes are difficult ones. VOC declares no categories, so names without a box are left out.

    Args:
        source: The dataset.
        out: A folder that is empty or not there.
        placement: As hard links, where the file system can, or as copies.

    Returns:
        What was written, and how many of what was left out.

    Raises:
        DataError: `out` is not empty, lies in the dataset's folder, or cannot be written.
    """
    with new_export(source, out, placement) as export, ExitStack() as files:
        images = export.folder / "JPEGImages"
        annotations, lists = export.folder / "Annotations", export.folder / "ImageSets" / "Main"
        for folder in (annotations, lists):
            folder.mkdir(parents=True)
        place = ImageFolder(images, export, stems=True)  # of all splits: their names must differ
        names = {
            split: files.enter_context((lists / f"{split}.txt").open("w", encoding="utf-8"))
            for split in _usual_splits(source, export)
        }
        for split, image in _images(source, export, dict.fromkeys(names, place), keeps_ignored=True):
            stem = PurePath(image.name).stem
            (annotations / f"{stem}.xml").write_text(voc_file(image, images.name), encoding="utf-8")
            names[split].write(f"{stem}\n")
        _count_names(source, export, declared=False, xml=True)
    return export.report(source.name, out, "voc")


def write_labelme(source: ExportSource, out: Path, placement: Placement = "link") -> ExportReport:
    """Writes a dataset as labelme: a JSON file beside each image, in a folder a split.

    Ignored boxes have the flag `ignore`. Names without a box are left out. Arguments, result and errors as `write_voc`.
    """
    with new_export(source, out, placement) as export:
        places = {split: export.image_folder(split, stems=True) for split in _usual_splits(source, export)}
        for split, image in _images(source, export, places, keeps_ignored=True):
            content = msgspec.json.format(msgspec.json.encode(labelme_file(image)))
            (places[split].folder / image.name).with_suffix(".json").write_bytes(content + b"\n")
        _count_names(source, export, declared=False)
    return export.report(source.name, out, "labelme")


def write_csv(source: ExportSource, out: Path, placement: Placement = "link") -> ExportReport:
    """Writes a dataset as CSV, a file a split with the columns of `CSV_HEADER`: corners in pixels.

    The columns `iscrowd` and `confidence` are there where a box of the dataset is ignored or a detector's. Names
    without a box are left out. Arguments, result and errors as `write_voc`.
    """
    with new_export(source, out, placement) as export, ExitStack() as files:
        places = {split: export.image_folder(split) for split in _usual_splits(source, export)}
        records = [record for split in places for record in in_order(source.splits[split])]
        needed = (any(one.ignore.any() for one in records), any(one.scores is not None for one in records))
        columns = [*range(len(CSV_HEADER) - 2), *(len(CSV_HEADER) - 2 + n for n, is_ in enumerate(needed) if is_)]
        tables: dict[str, TextIO] = {}
        for split in places:
            tables[split] = files.enter_context(
                (export.folder / f"{split}.csv").open("w", encoding="utf-8", newline="")
            )
            csv.writer(tables[split], lineterminator="\n").writerow([CSV_HEADER[column] for column in columns])
        for split, image in _images(source, export, places, keeps_ignored=True, below="images"):
            rows = ([row[column] for column in columns] for row in csv_rows(image))
            csv.writer(tables[split], lineterminator="\n").writerows(rows)
        _count_names(source, export, declared=False)
    return export.report(source.name, out, "csv")


def write_cvat(source: ExportSource, out: Path, placement: Placement = "link") -> ExportReport:
    """Writes a dataset as CVAT for images 1.1: `annotations.xml` with the splits as subsets, images in `images`.

    CVAT knows no ignored boxes: they are left out. Arguments, result and errors as `write_voc`.
    """
    with new_export(source, out, placement) as export:
        places = {split: export.image_folder(split) for split in source.splits}
        with (export.folder / "annotations.xml").open("w", encoding="utf-8") as file:
            file.write(cvat_start(source.categories))
            for number, (split, image) in enumerate(_images(source, export, places, keeps_ignored=False, below="")):
                file.write(cvat_image(image, number, split))
            file.write(CVAT_END)
        _count_names(source, export, declared=True, xml=True)
    return export.report(source.name, out, "cvat")


def write_label_studio(
    source: ExportSource, out: Path, placement: Placement = "link", *, model_version: str | None = None
) -> ExportReport:
    """Writes a dataset as Label Studio's JSON, a file a split, and its labelling configuration `label_config.xml`.

    Images are named as its storage of local files serves them with `out` as its root. Ignored boxes and names without
    a box are left out. Arguments, result and errors as `write_voc`.

    Args:
        source: The dataset.
        out: A folder that is empty or not there.
        placement: As hard links, where the file system can, or as copies.
        model_version: The detector that found the boxes, which are then predictions; None: they are annotations.
    """
    with new_export(source, out, placement) as export, ExitStack() as files:
        places = {split: export.image_folder(split) for split in _usual_splits(source, export)}
        texts = {
            split: files.enter_context((export.folder / f"{split}.json").open("w", encoding="utf-8"))
            for split in places
        }
        counts = dict.fromkeys(places, 0)
        for split, image in _images(source, export, places, keeps_ignored=False, below="images"):
            counts[split] += 1
            task = label_studio_task(image, sum(counts.values()), model_version)
            texts[split].write(("[\n" if counts[split] == 1 else ",\n") + msgspec.json.encode(task).decode())
        for split, file in texts.items():
            file.write("\n]\n" if counts[split] else "[]\n")
        config = label_studio_config(source.categories)
        (export.folder / "label_config.xml").write_text(config, encoding="utf-8")
        _count_names(source, export, declared=False)
    return export.report(source.name, out, "label_studio")


WRITERS: Mapping[str, Writer] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "voc": write_voc,
    "csv": write_csv,
    "labelme": write_labelme,
    "cvat": write_cvat,
    "label_studio": write_label_studio,
    "webdataset": write_webdataset,
}
"""The formats that a dataset can be written in."""


def _usual_splits(source: ExportSource, export: Export) -> list[str]:
    """The splits that readers of the format tell from names; images of others are counted as left out."""
    usual = [split for split in source.splits if split in {TRAIN, VAL, TEST}]
    for split, annotations in source.splits.items():
        if split not in usual:
            export.left_out[f"image of the split {split!r}"] += len(annotations)
    return usual


def _images(
    source: ExportSource,
    export: Export,
    places: Mapping[str, ImageFolder],
    *,
    keeps_ignored: bool,
    below: str | None = None,
) -> Iterator[tuple[str, WrittenImage]]:
    """The images of each split, upright, once each lies in its place; what is left out of them is counted.

    Args:
        source: The dataset.
        export: Where it goes.
        places: The splits that are written, and where their images go.
        keeps_ignored: Whether ignored boxes are written.
        below: What stands in names before the split and the name of the file; None: the name alone.
    """
    for split, place in places.items():
        for record in map(exif_oriented_record, in_order(source.splits[split])):
            name = place.put(record)
            if name is None:
                continue
            path = name if below is None else "/".join(filter(None, (below, split, name)))
            image = written_image(record, path, source.categories)
            boxes = tuple(box for box in image.boxes if keeps_ignored or not box.ignore)
            export.boxes += len(boxes)
            export.left_out["ignored box"] += len(image.boxes) - len(boxes)
            export.left_out["set of annotated categories"] += record.annotated is not None
            yield split, WrittenImage(name=image.name, width=image.width, height=image.height, boxes=boxes)


def _count_names(source: ExportSource, export: Export, *, declared: bool, xml: bool = False) -> None:
    """Counts names that are not `declared` and have no box, and those with characters that XML cannot say."""
    if not declared:
        export.left_out["name without a box"] += len(source.categories) - len(_names_of_boxes(source))
    if xml:
        export.left_out["name with control characters"] += sum(xml_text(name) != name for name in source.categories)


def _names_of_boxes(source: ExportSource) -> set[int]:
    return {label for split in source.splits.values() for one in in_order(split) for label in one.labels.tolist()}
