"""COCO JSON: `annotations/instances_SPLIT.json` with the images in `images/SPLIT`.

Ignored boxes become crowds. Where some image is not annotated exhaustively with all categories, all images list theirs
as LVIS does: `neg_category_ids` are the annotated categories without a box, `not_exhaustive_category_ids` those with
boxes that are not annotated exhaustively. Prompts, weights and the names from before renaming have no place in the
format, and are counted.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from metr.boxes import xyxy_to_xywh
from metr.data.datasets_file import DatasetSource
from metr.data.export import ExportReport, Placement, in_order, new_export
from metr.data.formats.base import corners
from metr.data.records import Annotations, ImageRecord

# Boxes and areas are rounded to so many digits: a thousandth of a pixel.
_DIGITS = 3


def write_coco(source: DatasetSource, out: Path, placement: Placement = "link") -> ExportReport:
    """Writes a dataset as COCO JSON.

    Image ids stay where a split has nothing but numbers, else images are numbered from 1. Category ids count from 1
    in the order of the dataset's categories.

    Args:
        source: The dataset.
        out: A folder that is empty or not there.
        placement: As hard links, where the file system can, or as copies.

    Returns:
        What was written, and how many of what was left out.

    Raises:
        DataError: `out` is not empty, lies in the dataset's folder, or cannot be written.
    """
    federated = any(record.annotated is not None for split in source.splits.values() for record in in_order(split))
    with new_export(source, out, placement) as export:
        (export.folder / "annotations").mkdir()
        for split, annotations in source.splits.items():
            place = export.image_folder(split)
            names = [place.put(record.path) for record in in_order(annotations)]
            with (export.folder / "annotations" / f"instances_{split}.json").open("wb") as file:
                export.boxes += _write_split(file, annotations, names, federated)
    return export.report(source.name, out, "coco")


def _write_split(file: BinaryIO, annotations: Annotations, names: Sequence[str | None], federated: bool) -> int:
    """Writes the JSON of a split, an image at a time, and counts its boxes. `names` are its images' new names."""
    ids = _image_ids(annotations)
    categories = [{"id": row + 1, "name": name} for row, name in enumerate(annotations.categories)]
    kept = [index for index, name in enumerate(names) if name is not None]
    file.write(b'{"categories": ' + msgspec.json.encode(categories) + b',\n"images": [')
    everything = range(len(categories))
    _write_items(
        file,
        (
            {"id": ids[index], "file_name": names[index], "width": record.width, "height": record.height}
            | (_federation(record, everything) if federated else {})
            for index in kept
            for record in [annotations[index]]
        ),
    )
    file.write(b'],\n"annotations": [')
    count = _write_items(file, _boxes((ids[index], annotations[index]) for index in kept))
    file.write(b"]}\n")
    return count


def _image_ids(annotations: Annotations) -> list[int]:
    """The ids of the images, where they are different numbers; else numbers from 1."""
    ids = [record.image_id for record in in_order(annotations)]
    whole = [image_id for image_id in ids if isinstance(image_id, int)]
    return whole if len(set(whole)) == len(ids) else list(range(1, len(ids) + 1))


def _federation(record: ImageRecord, everything: Iterable[int]) -> dict[str, list[int]]:
    """The categories that an image annotates, in the keys of LVIS."""
    annotated = set(everything if record.annotated is None else record.annotated)
    present = set(record.labels.tolist())
    return {
        "neg_category_ids": [label + 1 for label in sorted(annotated - present)],
        "not_exhaustive_category_ids": [label + 1 for label in sorted(present - annotated)],
    }


def _boxes(images: Iterable[tuple[int, ImageRecord]]) -> Iterator[dict[str, Any]]:
    """The annotations of images, numbered from 1."""
    number = 0
    for image_id, record in images:
        boxes = corners(record.boxes.astype(np.float64), xyxy_to_xywh).round(_DIGITS)
        areas = record.areas.astype(np.float64).round(_DIGITS)
        for box, label, area, ignored in zip(boxes, record.labels, areas, record.ignore, strict=True):
            number += 1
            yield {
                "id": number,
                "image_id": image_id,
                "category_id": int(label) + 1,
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(ignored),
            }


def _write_items(file: BinaryIO, items: Iterable[dict[str, Any]]) -> int:
    """Writes the items of a JSON array, one a line, and counts them."""
    count = 0
    for item in items:
        file.write(b",\n" if count else b"\n")
        file.write(msgspec.json.encode(item))
        count += 1
    return count
