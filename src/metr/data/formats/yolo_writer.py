"""YOLO: `data.yaml`, the images in `images/SPLIT`, a text file an image in `labels/SPLIT`.

The format knows neither ignored boxes nor areas, nor which categories an image is annotated with, nor splits other
than train, val and test, nor prompts, weights and the names from before renaming. What cannot be said is left out and
counted: an ignored box becomes background. Boxes in the pixels as stored are turned as viewers turn the image.
"""

from pathlib import Path

import numpy as np
import yaml

from metr.boxes import xyxy_to_cxcywh
from metr.data.datasets_file import DatasetSource
from metr.data.export import ExportReport, ImageFolder, Placement, in_order, new_folder, unsaid_options
from metr.data.formats.base import corners
from metr.data.images import exif_oriented_record
from metr.data.records import ImageRecord
from metr.data.splits import TEST, TRAIN, VAL


def write_yolo(source: DatasetSource, out: Path, placement: Placement = "link") -> ExportReport:
    """Writes a dataset as YOLO text files, as Ultralytics reads them.

    Args:
        source: The dataset.
        out: A folder that is empty or not there.
        placement: As hard links, where the file system can, or as copies.

    Returns:
        What was written, and how many of what was left out.

    Raises:
        DataError: `out` is not empty, lies in the dataset's folder, or cannot be written.
    """
    images, boxes, renamed, copied = 0, 0, 0, 0
    left_out = unsaid_options(source)
    with new_folder(out, source.root) as folder:
        description: dict[str, object] = {}
        for split, annotations in source.splits.items():
            if split not in {TRAIN, VAL, TEST}:
                left_out[f"image of the split {split!r}"] += len(annotations)
                continue
            description[split] = f"images/{split}"
            place, labels = ImageFolder(folder / "images" / split, placement, stems=True), folder / "labels" / split
            labels.mkdir(parents=True)
            for record in map(exif_oriented_record, in_order(annotations)):
                name = place.put(record.path)
                left_out["missing image"] += name is None
                if name is not None:
                    lines = _lines(record)
                    (labels / name).with_suffix(".txt").write_text("".join(lines), encoding="utf-8")
                    images, boxes = images + 1, boxes + len(lines)
                    left_out["ignored box"] += len(record.boxes) - len(lines)
                    left_out["set of annotated categories"] += record.annotated is not None
            renamed, copied = renamed + place.renamed, copied + place.copied
        description |= {"nc": len(source.categories), "names": dict(enumerate(source.categories))}
        text = yaml.safe_dump(description, allow_unicode=True, sort_keys=False)
        (folder / "data.yaml").write_text(text, encoding="utf-8")
    return ExportReport(
        out=out,
        format="yolo",
        images=images,
        boxes=boxes,
        renamed=renamed,
        copied=copied,
        left_out=dict(+left_out),
    ).log(source.name)


def _lines(record: ImageRecord) -> list[str]:
    """Class, centre and size of each box that is not ignored, as shares of the image."""
    shares = corners(record.boxes.astype(np.float64), xyxy_to_cxcywh)
    shares /= np.array([record.width, record.height] * 2)
    return [
        f"{label} {box[0]:.8f} {box[1]:.8f} {box[2]:.8f} {box[3]:.8f}\n"
        for label, box in zip(record.labels[~record.ignore], shares[~record.ignore], strict=True)
    ]
