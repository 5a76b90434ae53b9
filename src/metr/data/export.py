"""Writes a dataset into a folder that is complete or not there; counts what is lost."""

import contextlib
import logging
import math
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

import msgspec
import numpy as np
import yaml

from metr.boxes import converted, xyxy_to_cxcywh, xyxy_to_xywh
from metr.data.datasets_file import DatasetConfig
from metr.data.formats.files import fold, there
from metr.data.images import exif_oriented_record
from metr.data.records import TEST, TRAIN, VAL, Annotations, ImageRecord
from metr.errors import DataError, counted

logger = logging.getLogger(__name__)


@runtime_checkable
class ExportSource(Protocol):
    """What is written: an opened `DatasetSource`, or images and boxes in memory."""

    @property
    def name(self) -> str:
        """The dataset's name."""
        ...

    @property
    def root(self) -> Path:
        """Its folder, which is not written into."""
        ...

    @property
    def place(self) -> Path | str:
        """Where it is, for messages."""
        ...

    @property
    def config(self) -> DatasetConfig:
        """The options that it was opened with."""
        ...

    @property
    def categories(self) -> tuple[str, ...]:
        """Its names in the order of the labels."""
        ...

    @property
    def splits(self) -> Mapping[str, Annotations]:
        """Its annotations by split."""
        ...


@dataclass(frozen=True, kw_only=True)
class MemorySource:
    """An `ExportSource` that is in memory; `root` is the folder of its images."""

    name: str
    root: Path
    config: DatasetConfig
    categories: tuple[str, ...]
    splits: Mapping[str, Annotations]

    @property
    def place(self) -> Path | str:
        """Where it is, for messages."""
        return self.root


# How images get into the new folder: as hard links, where the file system can, or as copies.
Placement = Literal["link", "copy"]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written: images and boxes in all splits.

    `renamed` images had the name of another one of their split; `copied` ones are copies, the others hard links.
    `left_out` counts what the new folder lacks, by kind.
    """

    out: Path
    format: str
    images: int
    boxes: int
    renamed: int = 0
    copied: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)


class Export:
    """A dataset on its way into a new folder, with counts of what is written and what is left out.

    Args:
        folder: The folder.
        placement: Images as links or as copies.
        left_out: What is known to be left out already.
    """

    def __init__(self, folder: Path, placement: Placement, left_out: Counter[str]) -> None:
        self.folder, self.placement, self.left_out = folder, placement, left_out
        self.images = self.boxes = self.renamed = self.copied = 0

    def image_folder(self, split: str, *, stems: bool = False) -> "ImageFolder":
        """The folder `images/SPLIT`, which is made. `stems`: names must differ without their suffixes."""
        return ImageFolder(self.folder / "images" / split, self, stems=stems)

    def report(self, name: str, out: Path, format_name: str) -> ExportReport:
        """Logs what was written of the dataset `name`, and as a warning what was left out."""
        report = ExportReport(
            out=out,
            format=format_name,
            images=self.images,
            boxes=self.boxes,
            renamed=self.renamed,
            copied=self.copied,
            left_out=dict(+self.left_out),
        )
        images, boxes = counted(report.images, "image"), counted(report.boxes, "box", "boxes")
        logger.info("%s: %s with %s written to %s", name, images, boxes, out)
        if report.left_out:
            listed = ", ".join(f"{count} x {kind}" for kind, count in report.left_out.items())
            logger.warning("%s: not in %s, as %s: %s", name, out, format_name, listed)
        return report


class ImageFolder:
    """The images of one split, put into one folder under names that differ.

    A hard link shares the file with the dataset: editing one edits both.
    """

    def __init__(self, folder: Path, export: Export, *, stems: bool) -> None:
        self.folder, self.export, self.stems = folder, export, stems
        self._taken: set[str] = set()
        folder.mkdir(parents=True)

    def put(self, record: ImageRecord) -> str | None:
        """The name under which an image lies in the folder now; None where it cannot be read, which is counted.

        Raises:
            OSError: the folder cannot be written to.
        """
        image = record.path
        try:
            content = image.open("rb") if record.source is None else record.source.open()
        except (OSError, ValueError):
            self.export.left_out["missing image"] += 1
            return None
        with content:
            name = self._free_name(image.name)
            self.export.images += 1
            self.export.renamed += name != image.name
            if self.export.placement == "link" and record.source is None:
                # another disk, too many links, no permission
                with contextlib.suppress(OSError):
                    (self.folder / name).hardlink_to(image.resolve())
                    return name
            with (self.folder / name).open("wb") as copy:
                shutil.copyfileobj(content, copy)
            self.export.copied += 1
        return name

    def _free_name(self, name: str) -> str:
        """`name`, or `name-2` and so on where another image has it; case does not make names differ."""
        stem, suffix, number = PurePath(name).stem, PurePath(name).suffix, 1
        while (key := fold(stem if self.stems else stem + suffix)) in self._taken:
            number += 1
            stem = f"{PurePath(name).stem}-{number}"
        self._taken.add(key)
        return stem + suffix


def check_new_export(source: ExportSource, out: Path) -> Path:
    """The absolute path of a folder into which a dataset may be exported; symbolic links stay.

    Raises:
        DataError: `out` is a file, is not empty, or lies in the dataset's folder.
    """
    target = Path(os.path.abspath(out.expanduser()))  # noqa: PTH100  (symbolic links stay)
    if any(target.is_relative_to(own) for own in (source.root, source.place) if isinstance(own, Path)):
        raise DataError("would be written into the dataset's own folder", where=target, hint="name a folder outside")
    if there(target) and (not target.is_dir() or any(target.iterdir())):
        what = "the folder is not empty" if target.is_dir() else "there is a file of that name"
        raise DataError(what, where=target, hint="name another folder, or remove what is there")
    return target


@contextlib.contextmanager
def new_export(source: ExportSource, out: Path, placement: Placement) -> Iterator[Export]:
    """A dataset's export into a folder that is moved to `out` when all is written.

    Where writing fails, the folder is removed, so that a part of a dataset is never taken for all of it. Options that
    the dataset was opened with and that no format has a place for are counted as left out. Categories are written under
    their new names.

    Args:
        source: The dataset.
        out: A folder that is empty or not there.
        placement: Images as links or as copies.

    Raises:
        DataError: `out` is a file, is not empty, lies in the dataset's folder, or cannot be written.
    """
    spec = source.config
    options = {"prompt": len(spec.prompts), "weight": int(spec.weight != 1), "old name": len(spec.renames)}
    target = check_new_export(source, out)
    building = target.with_name(f".{target.name}.writing-{secrets.token_hex(4)}")
    try:
        building.mkdir(parents=True)
        yield Export(building, placement, Counter(options))
        if target.is_dir():
            target.rmdir()
        building.rename(target)
    except OSError as error:
        hint = "free some disk space, or name another folder"
        raise DataError(f"cannot be written: {error}", where=target, hint=hint) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def in_order(annotations: Annotations) -> Iterator[ImageRecord]:
    """The records of a split."""
    return (annotations[index] for index in range(len(annotations)))


def write_yolo(source: ExportSource, out: Path, placement: Placement = "link") -> ExportReport:
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
    description: dict[str, object] = {}
    with new_export(source, out, placement) as export:
        for split, annotations in source.splits.items():
            if split not in {TRAIN, VAL, TEST}:
                export.left_out[f"image of the split {split!r}"] += len(annotations)
                continue
            description[split] = f"images/{split}"
            place, labels = export.image_folder(split, stems=True), export.folder / "labels" / split
            labels.mkdir(parents=True)
            for record in map(exif_oriented_record, in_order(annotations)):
                name = place.put(record)
                if name is not None:
                    lines = _lines(record)
                    (labels / name).with_suffix(".txt").write_text("".join(lines), encoding="utf-8")
                    export.boxes += len(lines)
                    export.left_out["ignored box"] += len(record.boxes) - len(lines)
                    export.left_out["set of annotated categories"] += record.annotated is not None
        description |= {"nc": len(source.categories), "names": dict(enumerate(source.categories))}
        text = yaml.safe_dump(description, allow_unicode=True, sort_keys=False)
        (export.folder / "data.yaml").write_text(text, encoding="utf-8")
    return export.report(source.name, out, "yolo")


def _lines(record: ImageRecord) -> list[str]:
    """Class, centre and size of each box that is not ignored, as fractions of the image."""
    fractions = converted(record.boxes.astype(np.float64), xyxy_to_cxcywh)
    fractions /= np.array([record.width, record.height] * 2)
    return [
        f"{label} {box[0]:.8f} {box[1]:.8f} {box[2]:.8f} {box[3]:.8f}\n"
        for label, box in zip(record.labels[~record.ignore], fractions[~record.ignore], strict=True)
    ]


# Boxes and areas are rounded to so many digits: a thousandth of a pixel.
_DIGITS = 3


def write_coco(source: ExportSource, out: Path, placement: Placement = "link") -> ExportReport:
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
            names = [place.put(record) for record in in_order(annotations)]
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
        boxes = converted(record.boxes.astype(np.float64), xyxy_to_xywh).round(_DIGITS)
        areas = record.areas.astype(np.float64).round(_DIGITS)
        scores = np.full(len(boxes), math.nan) if record.scores is None else record.scores
        for box, label, area, ignored, score in zip(boxes, record.labels, areas, record.ignore, scores, strict=True):
            number += 1
            item = {
                "id": number,
                "image_id": image_id,
                "category_id": int(label) + 1,
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(ignored),
            }
            yield item if math.isnan(score) else item | {"score": round(float(score), 5)}


def _write_items(file: BinaryIO, items: Iterable[dict[str, Any]]) -> int:
    """Writes the items of a JSON array, one a line, and counts them."""
    count = 0
    for item in items:
        file.write(b",\n" if count else b"\n")
        file.write(msgspec.json.encode(item))
        count += 1
    return count
