"""Open Images (V4 to V7): CSV files with boxes, with verified labels of whole images, and with the classes' names.

Groups of objects in one box (`IsGroupOf`) are ignored objects; drawings and other depictions are objects, as are those
seen from the inside; the Open Images Challenge counts them in the same way.

With `bbox_labels_600_hierarchy.json` a box of a class is a box of all classes above it as well: a man is a person.

Which categories are annotated in an image follows from the labels that people verified. One that is verified as absent
is annotated, and so is all below it: without a vehicle there is no car. One with boxes is annotated, because all its
objects were boxed; but where something is verified as present and has no box, neither it nor what is above it is
annotated. Of all others nothing is known. Without the file of verified labels only those with boxes are known.
"""

import contextlib
import csv
import io
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from metr.data.formats.base import BoxTable, RawImage, Reader, Reading, plain_name
from metr.data.formats.files import decoded, files_in, folders_within, text_start_of
from metr.data.formats.locating import dataset_root, grouped, image_folders, locate
from metr.data.formats.open_images_tables import (
    BOX_COLUMNS,
    LABEL_COLUMNS,
    Classes,
    LabelTable,
    header,
    read_boxes,
    read_labels,
)
from metr.data.records import canonical_split
from metr.errors import DataError

_DEPTH = 2
_SNIFF_BYTES = 4096
# Identifiers of classes; other datasets have names in their place.
_CLASS_PREFIXES = ("/m/", "/g/", "/t/", "/j/")
# Folders that hold annotations beside those with images.
_ANNOTATION_FOLDERS = frozenset({"annotations", "labels", "csv", "csv_folder", "metadata", "boxes"})


@dataclass(frozen=True, kw_only=True)
class OpenImagesFiles:
    """The files beside the boxes: the names of the classes, their hierarchy, the verified labels of each split."""

    classes: Path
    hierarchy: Path | None
    labels: Mapping[str, Path]
    folders: tuple[Path, ...]


class OpenImagesReader(Reader):
    """Open Images CSV. A split is made of the files with its boxes.

    Args:
        root: The dataset's folder.
        splits: For each split its files with boxes.
        files: The files beside them.
    """

    format = "open_images"
    looks_like = "Open Images: *-annotations-bbox.csv, class-descriptions-boxable.csv, and the folders of the images"
    declares_categories = True
    annotates_whole_images = False

    def __init__(self, root: Path, splits: Mapping[str, tuple[Path, ...]], *, files: OpenImagesFiles) -> None:
        super().__init__(root, splits)
        self.files = files

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with such files, at most two folders deep, or of one file with boxes.

        Raises:
            DataError: there are boxes of Open Images, but no names of its classes.
        """
        if path.is_file():
            if path.suffix.lower() != ".csv" or not _has_boxes(path):
                return None
            root = dataset_root(path, _ANNOTATION_FOLDERS)
            return cls(root, {_split_of(path, root): (path,)}, files=_files_beside(root, _tables(root)))
        found = _tables(path)
        splits = grouped((_split_of(file, path), file) for file in filter(_has_boxes, found))
        return cls(path, splits, files=_files_beside(path, found)) if splits else None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order in which they first come up, first those that have boxes."""
        for folder in self.files.folders:
            reading.files.touch(self.within(folder))
        classes = self._classes(reading)
        files, verified = self.splits[split], self.files.labels.get(_split_key(split))
        folders = image_folders(reading.files, split, self.within(files[0].parent))
        images: dict[str, int] = {}
        boxes = read_boxes(files, images, classes.numbers, reading)
        with_boxes = len(images)
        labels = None
        if verified is None:
            detail = "no verified labels of whole images: only the categories with boxes count as annotated"
            reading.notes.once("no verified labels", self.within(files[0]), detail)
        else:
            labels = read_labels(verified, _number_if_there(images, folders, reading), classes.numbers, reading)
        tables, where = _Tables(classes, boxes, labels), self.within(files[0])
        for image, number in images.items():
            path = _beside(image, folders, reading) or locate(image, folders, where, reading, by_end=False)
            if path is not None:
                raw = tables.image(image, number, path, where)
                if number < with_boxes or raw.annotated:
                    yield raw

    def _classes(self, reading: Reading) -> Classes:
        """The classes, numbered in the order of the file, and their hierarchy.

        Raises:
            DataError: one of the two files cannot be read.
        """
        where = self.within(self.files.classes)
        lines = [line for line in _lines(reading.text(where)) if len(line) >= 2 and line[0].startswith(_CLASS_PREFIXES)]
        counted = reading.number_declared((plain_name(line[1]) or line[0] for line in lines), where)
        numbers = {line[0]: number for line, number in zip(lines, counted, strict=True)}
        if self.files.hierarchy is not None:
            reading.files.touch(self.within(self.files.hierarchy))
        return Classes.read(list(reading.names), numbers, self.files.hierarchy)


class _Tables:
    """The boxes and annotated categories of each image, from the tables and the hierarchy."""

    def __init__(self, classes: Classes, boxes: BoxTable, labels: LabelTable | None) -> None:
        self.classes, self.boxes, self.labels = classes, boxes, labels

    def image(self, image: str, number: int, path: str, where: str) -> RawImage:
        """One image with its boxes under their own classes and under those above."""
        mine = self.boxes.by_image[number]
        rows, labels = self._expanded(mine)
        own = self.boxes.labels[mine]
        marks = [
            f"box {row + 1}" if own[row] == label else f"box {row + 1} as {self.classes.names[label]}"
            for row, label in zip(rows, labels, strict=True)
        ]
        return RawImage(
            where=f"{where}, image {image}",
            image_id=image,
            path=path,
            size=None,
            boxes=self.boxes.boxes[mine[rows]].astype(np.float64),
            labels=np.array(labels, dtype=np.int64),
            relative=True,
            ignore=self.boxes.ignore[mine[rows]],
            marks=marks,
            annotated=self._annotated(number, set(labels)),
            corners=True,
        )

    def _expanded(self, mine: Int[np.ndarray, "m"]) -> tuple[list[int], list[int]]:
        """The rows of boxes and their classes, those above included; equal boxes of a class count once."""
        found: dict[tuple[float, ...], int] = {}
        rows = zip(self.boxes.labels[mine].tolist(), self.boxes.boxes[mine].tolist(), strict=True)
        for row, (own, box) in enumerate(rows):
            for label in self.classes.above[own]:
                found.setdefault((label, *box), row)
        return list(found.values()), [int(key[0]) for key in found]

    def _annotated(self, number: int, boxed: set[int]) -> list[int]:
        """The classes that are annotated exhaustively: "no box" means "none there"."""
        if self.labels is None:
            return sorted(boxed)
        above, below = self.classes.above, self.classes.below
        rows = self.labels.by_image[number]
        verified = list(zip(self.labels.labels[rows].tolist(), self.labels.present[rows].tolist(), strict=True))
        absent = {lower for label, present in verified if not present for lower in below[label]}
        partly = {upper for label, present in verified if present and label not in boxed for upper in above[label]}
        return sorted((boxed | absent) - partly)


def _number_if_there(images: dict[str, int], folders: Sequence[str], reading: Reading) -> Callable[[str], int]:
    """Numbers the images of verified labels; -1 for those without a box whose file is missing.

    The files list millions of images that people who want boxes do not download.
    """

    def number(image: str) -> int:
        if image not in images and _beside(image, folders, reading) is None:
            return -1
        return images.setdefault(image, len(images))

    return number


def _beside(image: str, folders: Sequence[str], reading: Reading) -> str | None:
    """The image with the usual suffix, in one of the folders."""
    name = f"{image}.jpg"
    return next((posixpath.join(folder, name) for folder in folders if name in reading.files.listing(folder)), None)


def _tables(root: Path) -> list[Path]:
    """The CSV and JSON files of a folder, at most two folders deep."""
    return [file for folder in folders_within(root, _DEPTH) for file in files_in(folder, ".csv", ".json")]


def _files_beside(root: Path, found: Sequence[Path]) -> OpenImagesFiles:
    """The files that belong to the boxes. Those of the 600 classes with boxes are preferred to those of 20,000.

    Raises:
        DataError: no file names the classes.
    """

    def preferred(file: Path) -> tuple[bool, str]:
        return "boxable" not in file.name, str(file)

    classes = sorted(filter(_has_classes, found), key=preferred)
    if not classes:
        hint = "put class-descriptions-boxable.csv beside it, or name the format csv to keep the identifiers as names"
        raise DataError("boxes of Open Images, but no file with the names of the classes", where=root, hint=hint)
    labels: dict[str, Path] = {}
    for file in sorted(filter(_has_labels, found), key=preferred):
        labels.setdefault(_split_key(_split_of(file, root)), file)
    trees = sorted(filter(_is_hierarchy, found), key=lambda file: file.name)
    return OpenImagesFiles(
        classes=classes[0],
        hierarchy=trees[-1] if trees else None,
        labels=labels,
        folders=tuple(dict.fromkeys(file.parent for file in found)),
    )


def _split_of(file: Path, root: Path) -> str:
    """The name of a file's split: in its own name, else in that of a folder that it lies in."""
    folders = [folder.name for folder in file.parents if folder.is_relative_to(root) and folder != root]
    return next((name for name in (file.stem, *folders) if canonical_split(name)), file.stem)


def _split_key(split: str) -> str:
    """What the names of files of one split have in common."""
    return canonical_split(split) or ""


def _has_boxes(file: Path) -> bool:
    cells = header(file)
    if not set(BOX_COLUMNS) <= set(cells):
        return False
    first, place = next(iter(_first_lines(file)[1:]), []), cells.index("LabelName")
    return len(first) > place and first[place].startswith(_CLASS_PREFIXES)


def _has_labels(file: Path) -> bool:
    cells = set(header(file))
    return set(LABEL_COLUMNS) <= cells and not cells & set(BOX_COLUMNS[2:]) and "machine" not in file.name


def _has_classes(file: Path) -> bool:
    """Whether a file holds identifiers with names, with or without a header."""
    pairs = [line[:2] for line in _first_lines(file)[:2] if len(line) >= 2]
    return any(key.startswith(_CLASS_PREFIXES) and not name.startswith(_CLASS_PREFIXES) for key, name in pairs)


def _is_hierarchy(file: Path) -> bool:
    start = text_start_of(file, _SNIFF_BYTES)
    return file.suffix.lower() == ".json" and b'"LabelName"' in start and b'"Subcategory"' in start


def _first_lines(file: Path) -> list[list[str]]:
    """The first lines of a CSV file that are not blank."""
    return [] if file.suffix.lower() != ".csv" else _lines(decoded(text_start_of(file, _SNIFF_BYTES)))


def _lines(text: str) -> list[list[str]]:
    """The lines of a small CSV file that are not blank; where its quotes are wrong, those before."""
    lines: list[list[str]] = []
    with contextlib.suppress(csv.Error):
        rows = csv.reader(io.StringIO(text, newline=""))
        lines.extend([cell.strip() for cell in row] for row in rows if any(row))
    return lines
