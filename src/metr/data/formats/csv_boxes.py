"""Boxes as CSV, one a line: with a header (TensorFlow Object Detection) or without one (keras-retinanet).

A line without a box says that its image has no objects. Coordinates that are shares of the image are recognised.
"""

import csv
import io
import math
from array import array
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from metr.data.formats.base import UNREADABLE, RawImage, Reader, Reading, image_folders, locate, whole_size
from metr.data.formats.files import folders_within, glance, is_image
from metr.data.formats.image_conflicts import boxes_of, claim
from metr.data.formats.text import read_text
from metr.data.splits import canonical_split

_DEPTH = 2
_SNIFF_BYTES = 4096
# What the columns are called, in lower case.
_ALIASES = {
    "path": ("filename", "file_name", "image_path", "imagepath", "path", "image", "file", "imageid", "image_id", "img"),
    "name": ("class", "label", "class_name", "classname", "labelname", "category", "name", "label_name"),
    "xmin": ("xmin", "x_min", "x1", "left", "bbox_xmin"),
    "ymin": ("ymin", "y_min", "y1", "top", "bbox_ymin"),
    "xmax": ("xmax", "x_max", "x2", "right", "bbox_xmax"),
    "ymax": ("ymax", "y_max", "y2", "bottom", "bbox_ymax"),
    "width": ("width", "image_width", "img_width"),
    "height": ("height", "image_height", "img_height"),
    "group": ("isgroupof", "is_group_of", "iscrowd"),
}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_NEEDED = ("path", "name", *_CORNERS)
_WITHOUT_HEADER = {"path": 0, "xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4, "name": 5}


@dataclass(frozen=True, kw_only=True)
class _Dialect:
    """How a file is written: its delimiter, where its columns stand, and whether the first line names them."""

    delimiter: str
    columns: Mapping[str, int]
    header: bool


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What a file says of one image. `relative` says that its boxes are shares of the image."""

    where: str
    size: tuple[int, int] | None
    boxes: Float[np.ndarray, "m 4"]
    labels: Int[np.ndarray, "m"]
    lines: Int[np.ndarray, "m"]
    group: Bool[np.ndarray, "m"]
    relative: bool

    def fits(self, other: "_Part") -> bool:
        """Whether the boxes of both are measured alike."""
        sizes = {self.size, other.size} - {None}
        return len(sizes) <= 1 and (self.relative == other.relative or min(len(self.boxes), len(other.boxes)) == 0)

    def without(self, others: Iterable["_Part"]) -> "_Part":
        """Its boxes that others do not have."""
        known = {key for other in others for key in other.boxes_told()}
        new = np.array([key not in known for key in self.boxes_told()], dtype=bool)
        columns = {name: getattr(self, name)[new] for name in ("boxes", "labels", "lines", "group")}
        return replace(self, **columns)

    def boxes_told(self) -> list[tuple[int, tuple[float, ...]]]:
        """Category and corners of each box."""
        return list(zip(self.labels.tolist(), map(tuple, self.boxes.tolist()), strict=True))


class _Rows:
    """The boxes of a file, column by column: 50 bytes a box, so that large files fit into memory."""

    def __init__(self) -> None:
        self.images: dict[str, int] = {}
        self.sizes: list[tuple[int, int] | None] = []
        self.image, self.label, self.line, self.group = array("i"), array("i"), array("i"), array("b")
        self.corners = array("d")

    def image_number(self, name: str, size: tuple[int, int] | None) -> int:
        """The number of an image, a new one where it is new."""
        number = self.images.setdefault(name, len(self.images))
        if number == len(self.sizes):
            self.sizes.append(size)
        return number

    def boxes(self) -> Float[np.ndarray, "n 4"]:
        """All boxes, xyxy as the file gives them."""
        return np.array(self.corners, dtype=np.float64).reshape(-1, 4)


class CsvReader(Reader):
    """CSV with a line a box. A split is made of files."""

    format = "csv"
    looks_like = "CSV: filename,width,height,class,xmin,ymin,xmax,ymax with a header, or path,x1,y1,x2,y2,class without"

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with CSV files, at most two folders deep, or of one such file."""
        if path.is_file():
            fits = path.suffix.lower() == ".csv" and _dialect(path) is not None
            return cls(path.parent, {_split_of(path): (path,)}) if fits else None
        splits: dict[str, tuple[Path, ...]] = {}
        for folder in folders_within(path, _DEPTH):
            for entry in glance(folder):
                if entry.name.lower().endswith(".csv") and _dialect(Path(entry.path)) is not None:
                    file = Path(entry.path)
                    splits[_split_of(file)] = (*splits.get(_split_of(file), ()), file)
        # Beside the files of splits, one with all boxes says the same again.
        named = {name: files for name, files in splits.items() if canonical_split(name)}
        return cls(path, named or splits) if splits else None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order in which they first come up, with the boxes of all its files."""
        tables = [table for file in self.splits[split] if (table := self._table(file, reading)) is not None]
        firsts = list(accumulate((len(table.names) for table in tables), initial=0))

        def part(entry: int) -> _Part:
            number = bisect(firsts, entry) - 1
            return tables[number].part(entry - firsts[number])

        image_conflicts = claim(chain.from_iterable(table.images(split, reading) for table in tables))
        more: dict[int, list[_Part]] = {}
        for entry, path in image_conflicts.strangers:
            detail = f"{path} is called alike, but is that of other lines: {boxes_of(len(part(entry).boxes))} left out"
            reading.issues.add("missing image", part(entry).where, detail)
        for entry, owner in image_conflicts.again:
            parts, new = more.setdefault(owner, [part(owner)]), part(entry)
            if all(map(new.fits, parts)):
                parts.append(new.without(parts))
            else:
                detail = (
                    f"its {boxes_of(len(new.boxes))} are measured in another way than in {parts[0].where}: left out"
                )
                reading.issues.add("duplicate image", new.where, detail)
        for path, owner in image_conflicts.owners.items():
            yield _raw_image(path, more.get(owner) or [part(owner)])

    def _table(self, file: Path, reading: Reading) -> "_Table | None":
        where, dialect = self.within(file), _dialect(file)
        if dialect is None:
            reading.issues.add("unreadable annotation", where, "changed while it was read")
            return None
        return _Table(_rows(read_text(where, reading), dialect, where, reading), where, self.within(file.parent))


class _Table:
    """A file, by its images.

    Args:
        rows: Its boxes.
        where: The file, relative to the dataset's folder.
        folder: Its folder.
    """

    def __init__(self, rows: _Rows, where: str, folder: str) -> None:
        self.where, self.folder = where, folder
        self.names, self.sizes = list(rows.images), rows.sizes
        self.boxes, self.labels, self.lines = rows.boxes(), np.array(rows.label), np.array(rows.line)
        self.group = np.array(rows.group, dtype=bool)
        read = self.boxes[np.isfinite(self.boxes).all(axis=1)]
        self.relative = len(read) > 0 and bool(read.max() <= 1.001) and bool((read % 1 > 0).any())
        image = np.array(rows.image)
        self._order = np.argsort(image, kind="stable")
        self._starts = np.searchsorted(image, np.arange(len(self.names) + 1), sorter=self._order)

    def images(self, split: str, reading: Reading) -> Iterator[tuple[Sequence[str], str | None]]:
        """The names of the images, and the images that were found."""
        folders = image_folders(reading.files, split, self.folder)
        return (((name,), locate(name, folders, self.where, reading)) for name in self.names)

    def part(self, number: int) -> _Part:
        """What the file says of image `number`."""
        mine = self._order[self._starts[number] : self._starts[number + 1]]
        return _Part(
            where=self.where,
            size=self.sizes[number],
            boxes=self.boxes[mine],
            labels=self.labels[mine],
            lines=self.lines[mine],
            group=self.group[mine],
            relative=self.relative,
        )


def _raw_image(path: str, parts: Sequence[_Part]) -> RawImage:
    """One image with what one or more files say of it."""
    first = parts[0]
    marks = [f"{part.where}:{line}" if part is not first else int(line) for part in parts for line in part.lines]
    return RawImage(
        where=first.where,
        image_id=path,
        path=path,
        size=next((part.size for part in parts if part.size is not None), None),
        boxes=np.concatenate([part.boxes for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        relative=any(part.relative for part in parts if len(part.boxes) > 0),
        ignore=np.concatenate([part.group for part in parts]),
        marks=marks,
    )


def _rows(text: str, dialect: _Dialect, where: str, reading: Reading) -> _Rows:
    """The lines of a file; those that cannot be understood are noted."""
    rows, columns = _Rows(), dialect.columns
    last = max(columns[name] for name in _NEEDED)
    for line, row in _lines(text, dialect, where, reading):
        place = f"{where}:{line}"
        if len(row) <= last or not row[columns["path"]].strip():
            reading.issues.add("unreadable annotation", place, f"expected {last + 1} columns: {','.join(row)[:80]}")
            continue
        number = rows.image_number(row[columns["path"]].strip(), _size(row, columns))
        corners = [row[columns[name]].strip() for name in _CORNERS]
        if not any(corners):
            continue  # an image without objects
        name = row[columns["name"]].strip()
        if not name or len(row) <= columns.get("group", 0):
            kind = "unreadable annotation" if name else "unknown category"
            reading.issues.add(kind, place, ",".join(row)[:80])
            continue
        rows.image.append(number)
        rows.label.append(reading.names.number(name))
        rows.line.append(line)
        rows.group.append("group" in columns and row[columns["group"]].strip() == "1")
        rows.corners.extend(_numbers(corners) or UNREADABLE)
    return rows


def _lines(text: str, dialect: _Dialect, where: str, reading: Reading) -> Iterator[tuple[int, list[str]]]:
    """The lines that hold anything, but for the header, with their numbers."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=dialect.delimiter)
    try:
        if dialect.header:
            next(row for row in lines if any(row))
        yield from ((lines.line_num, row) for row in lines if any(row))
    except csv.Error as error:
        reading.issues.add("unreadable annotation", f"{where}:{lines.line_num}", f"{error}; the rest is left out")


def _split_of(file: Path) -> str:
    """The name of the split of a file: in its own name, else in that of its folder."""
    if canonical_split(file.stem) is None and canonical_split(file.parent.name):
        return file.parent.name
    return file.stem


def _dialect(path: Path) -> _Dialect | None:
    """How a CSV file is written, from its first lines; None if it holds no boxes."""
    try:
        with path.open("rb") as file:
            lines = file.read(_SNIFF_BYTES).decode("utf-8-sig", errors="replace").splitlines()
    except OSError:
        return None
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    row = next(csv.reader([first], delimiter=delimiter), [])
    places = {cell.strip().lower(): index for index, cell in reversed(list(enumerate(row)))}
    columns = {
        name: next(places[alias] for alias in aliases if alias in places)
        for name, aliases in _ALIASES.items()
        if any(alias in places for alias in aliases)
    }
    if all(name in columns for name in _NEEDED):
        return _Dialect(delimiter=delimiter, columns=columns, header=True)
    corners = [cell.strip() for cell in row[1:5]]
    if (
        len(row) == 6
        and is_image(row[0].strip())
        and (_numbers(corners) is not None or not any(cell.strip() for cell in row[1:]))
    ):
        return _Dialect(delimiter=delimiter, columns=_WITHOUT_HEADER, header=False)
    return None


def _size(row: Sequence[str], columns: Mapping[str, int]) -> tuple[int, int] | None:
    """(height, width) where a line tells them."""
    if "height" not in columns or "width" not in columns:
        return None
    values = _numbers([row[columns[name]] if columns[name] < len(row) else "" for name in ("height", "width")])
    return None if values is None else whole_size(values[0], values[1])


def _numbers(cells: Sequence[str]) -> list[float] | None:
    """The cells as numbers; None if any is not one."""
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None
