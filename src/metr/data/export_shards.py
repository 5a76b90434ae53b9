"""Writes a dataset as shards of WebDataset: tars of samples, the images as they are and JSON that tells of them."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from metr.boxes import converted, xyxy_to_xywh
from metr.data.export import Export, ExportReport, ExportSource, Placement, in_order, new_export
from metr.data.images import image_bytes
from metr.data.records import Annotations, ImageRecord

# Images and bytes of a shard, at most. Stores and readers work best with files of some hundred megabytes.
IMAGES_A_SHARD, BYTES_A_SHARD = 10_000, 256 << 20


def write_webdataset(
    source: ExportSource, out: Path, placement: Placement = "copy", *, images_a_shard: int = IMAGES_A_SHARD
) -> ExportReport:
    """Writes a dataset as tars, `SPLIT-000000.tar` and so on, and the names of its categories in `classes.txt`.

    The sample of an image are its bytes as they are, `KEY.jpg` for example, and `KEY.json`: `width`, `height`,
    `image_id`, `annotations` with `bbox` as [x, y, width, height], `category`, `area` and `iscrowd`, and `exhaustive`
    where not all categories are annotated exhaustively. Nothing is rounded.

    Args:
        source: The dataset.
        out: A folder that is empty or not there.
        placement: Without effect: the images are in the shards.
        images_a_shard: Images of a shard, at most; a shard ends before at 256 MB.

    Returns:
        What was written, and how many of what was left out.

    Raises:
        DataError: `out` is not empty, lies in the dataset's folder, or cannot be written.
        StoreError: images are in a store that does not answer.
    """
    with new_export(source, out, placement) as export:
        text = "".join(f"{name}\n" for name in source.categories)
        (export.folder / "classes.txt").write_text(text, encoding="utf-8")
        for split, annotations in source.splits.items():
            _write_split(export, split, annotations, images_a_shard)
    return export.report(source.name, out, "webdataset")


def _write_split(export: Export, split: str, annotations: Annotations, images_a_shard: int) -> None:
    samples = _samples(export, annotations)
    sample = next(samples, None)
    shard = 0
    while sample is not None:
        images = size = 0
        with tarfile.open(export.folder / f"{split}-{shard:06d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            while sample is not None and images < images_a_shard and size < BYTES_A_SHARD:
                key, suffix, image, told = sample
                for name, content in ((f"{key}{suffix}", image), (f"{key}.json", told)):
                    member = tarfile.TarInfo(name)  # without times and owners: equal data makes equal shards
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                images, size = images + 1, size + len(image)
                sample = next(samples, None)
        shard += 1


def _samples(export: Export, annotations: Annotations) -> Iterator[tuple[str, str, bytes, bytes]]:
    """Key, suffix, image and JSON of each image that can be read."""
    for number, record in enumerate(in_order(annotations)):
        try:
            with image_bytes(record.path, record.source) as file:
                image = file.read()
        except OSError:
            export.left_out["missing image"] += 1
            continue
        export.images += 1
        export.copied += 1
        export.boxes += len(record.boxes)
        suffix = record.path.suffix.lower()
        yield f"{number:09d}", suffix, image, msgspec.json.encode(_told(record, annotations.categories))


def _told(record: ImageRecord, categories: tuple[str, ...]) -> dict[str, Any]:
    """The JSON of an image."""
    boxes = converted(record.boxes.astype(np.float64), xyxy_to_xywh).tolist()
    told: dict[str, Any] = {
        "file_name": record.path.name.encode(errors="replace").decode(),
        "image_id": record.image_id,
        "width": record.width,
        "height": record.height,
        "annotations": [
            {"bbox": box, "category": categories[label], "area": float(area), "iscrowd": int(ignored)}
            for box, label, area, ignored in zip(
                boxes, record.labels.tolist(), record.areas, record.ignore, strict=True
            )
        ],
    }
    if record.annotated is not None:
        told["exhaustive"] = [categories[label] for label in record.annotated]
    return told
