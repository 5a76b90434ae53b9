"""Boxes as CSV, one a line: with a header (TensorFlow Object Detection) or without one (keras-retinanet).

A line without a box says that its image has no objects. Coordinates that are fractions of the image are recognised.
"""

import csv
import io
import math
import posixpath
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from metr.data.formats.base import UNREADABLE, BoxTable, RawImage, Reader, Reading, count_boxes, whole_size
from metr.data.formats.files import files_in, folders_within, is_image, start_of
from metr.data.formats.locating import image_folders, locate, resolve_conflicts, split_of_file, splits_of_files

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


class _Rows:
    """The boxes of the files of a split, column by column: 50 bytes a box, so that large files fit into memory.

    An entry is the part of a file about one image; `entries` numbers them by file and name, `sizes` are the sizes that
    the files give. `relative` says which files give their boxes as fractions of the image.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], int] = {}
        self.sizes: list[tuple[int, int] | None] = []
        self.relative: dict[str, bool] = {}
        self.entry, self.label, self.line, self.ignore = array("i"), array("i"), array("i"), array("b")
        self.corners = array("d")

    def entry_number(self, where: str, name: str, size: tuple[int, int] | None) -> int:
        """The number of an entry, a new one where it is new."""
        number = self.entries.setdefault((where, name), len(self.entries))
        if number == len(self.sizes):
            self.sizes.append(size)
        return number

    def table(self) -> BoxTable:
        """The boxes by their entries, xyxy as the files give them."""
        return BoxTable(
            image=np.array(self.entry),
            labels=np.array(self.label),
            boxes=np.array(self.corners, dtype=np.float64).reshape(-1, 4),
            ignore=np.array(self.ignore, dtype=bool),
        )


class CsvReader(Reader):
    """CSV with a line a box. A split is made of files."""

    format = "csv"
    looks_like = "CSV: filename,width,height,class,xmin,ymin,xmax,ymax with a header, or path,x1,y1,x2,y2,class without"
    annotates_whole_images = False

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with CSV files, at most two folders deep, or of one such file."""
        if path.is_file():
            fits = path.suffix.lower() == ".csv" and _dialect(path) is not None
            return cls(path.parent, {split_of_file(path): (path,)}) if fits else None
        files = (file for folder in folders_within(path, _DEPTH) for file in files_in(folder, ".csv"))
        splits = splits_of_files(file for file in files if _dialect(file) is not None)
        return cls(path, splits) if splits else None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order in which they first come up, with the boxes of all its files."""
        rows = _Rows()
        for file in self.splits[split]:
            _read_file(file, self.within(file), rows, reading)
        folders = {where: image_folders(reading.files, split, posixpath.dirname(where)) for where in rows.relative}
        found = [((name,), locate(name, folders[where], where, reading)) for where, name in rows.entries]
        table, lines, places = rows.table(), np.array(rows.line), list(rows.entries)

        def image(entry: int) -> RawImage:
            mine, where, path = table.by_image[entry], places[entry][0], found[entry][1] or ""
            return RawImage(
                where=where,
                image_id=path,
                path=path,
                size=rows.sizes[entry],
                boxes=table.boxes[mine],
                labels=table.labels[mine],
                relative=rows.relative[where],
                ignore=table.ignore[mine],
                marks=lines[mine].tolist(),
            )

        conflicts = resolve_conflicts(found)
        for entry, path in conflicts.misled:
            raw = image(entry)
            detail = f"{path} is called alike, but is that of other lines: {count_boxes(len(raw.boxes))} left out"
            reading.issues.add("missing image", raw.where, detail)
        more: dict[int, list[RawImage]] = {}
        for entry, owner in conflicts.repeats:
            parts, new = more.setdefault(owner, [image(owner)]), image(entry)
            if all(_measured_alike(new, part) for part in parts):
                parts.append(_without(new, parts))
            else:
                boxes, first = count_boxes(len(new.boxes)), parts[0].where
                detail = f"its {boxes} are measured in another way than in {first}: left out"
                reading.issues.add("duplicate image", new.where, detail)
        for owner in conflicts.owners.values():
            yield _joined(more[owner]) if owner in more else image(owner)


def _measured_alike(one: RawImage, other: RawImage) -> bool:
    """Whether the boxes that two files have of an image are measured in the same way."""
    same_size = len({one.size, other.size} - {None}) <= 1
    return same_size and (one.relative == other.relative or min(len(one.boxes), len(other.boxes)) == 0)


def _box_keys(raw: RawImage) -> list[tuple[int, tuple[float, ...]]]:
    """Category and corners of each box."""
    return list(zip(raw.labels.tolist(), map(tuple, raw.boxes.tolist()), strict=True))


def _without(raw: RawImage, others: Sequence[RawImage]) -> RawImage:
    """An image with those of its boxes that others do not have. Their marks name the file, too."""
    known = {key for other in others for key in _box_keys(other)}
    new = np.array([key not in known for key in _box_keys(raw)], dtype=bool)
    marks = [f"{raw.where}:{line}" for line, is_new in zip(raw.marks or (), new, strict=True) if is_new]
    ignore = None if raw.ignore is None else raw.ignore[new]
    return replace(raw, boxes=raw.boxes[new], labels=raw.labels[new], ignore=ignore, marks=marks)


def _joined(parts: Sequence[RawImage]) -> RawImage:
    """One image with the boxes of several files."""
    return replace(
        parts[0],
        size=next((part.size for part in parts if part.size is not None), None),
        boxes=np.concatenate([part.boxes for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        relative=any(part.relative for part in parts if len(part.boxes) > 0),
        ignore=np.concatenate([part.ignore for part in parts if part.ignore is not None]),
        marks=list(chain.from_iterable(part.marks or () for part in parts)),
    )


def _read_file(file: Path, where: str, rows: _Rows, reading: Reading) -> None:
    """Adds the lines of a file to `rows`; those that cannot be read are noted."""
    dialect = _dialect(file)
    if dialect is None:
        reading.issues.add("unreadable annotation", where, "changed while it was read")
        return
    columns, start = dialect.columns, len(rows.corners)
    last = max(columns[name] for name in _NEEDED)
    for line, row in _lines(reading.text(where), dialect, where, reading):
        place = f"{where}:{line}"
        if len(row) <= last or not row[columns["path"]].strip():
            reading.issues.add("unreadable annotation", place, f"expected {last + 1} columns: {','.join(row)[:80]}")
            continue
        entry = rows.entry_number(where, row[columns["path"]].strip(), _size(row, columns))
        corners = [row[columns[name]].strip() for name in _CORNERS]
        if not any(corners):
            continue  # an image without objects
        name = row[columns["name"]].strip()
        if not name or len(row) <= columns.get("group", 0):
            kind = "unreadable annotation" if name else "unknown category"
            reading.issues.add(kind, place, ",".join(row)[:80])
            continue
        rows.entry.append(entry)
        rows.label.append(reading.names.number(name))
        rows.line.append(line)
        rows.ignore.append("group" in columns and row[columns["group"]].strip() == "1")
        rows.corners.extend(_numbers(corners) or UNREADABLE)
    boxes = np.array(rows.corners[start:]).reshape(-1, 4)
    read = boxes[np.isfinite(boxes).all(axis=1)]
    rows.relative[where] = bool(read.max(initial=-1) <= 1.001 and (read % 1 > 0).any())


def _lines(text: str, dialect: _Dialect, where: str, reading: Reading) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not blank, without the header, with their numbers."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=dialect.delimiter)
    try:
        if dialect.header:
            next(row for row in lines if any(row))
        yield from ((lines.line_num, row) for row in lines if any(row))
    except csv.Error as error:
        reading.issues.add("unreadable annotation", f"{where}:{lines.line_num}", f"{error}; the rest is left out")


def _dialect(path: Path) -> _Dialect | None:
    """How a CSV file is written, from its first lines; None if it holds no boxes."""
    lines = start_of(path, _SNIFF_BYTES).decode("utf-8-sig", errors="replace").splitlines()
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
    """(height, width) where a line gives them."""
    if "height" not in columns or "width" not in columns:
        return None
    values = _numbers([row[columns[name]] if columns[name] < len(row) else "" for name in ("height", "width")])
    return None if values is None else whole_size(values[0], values[1])


def _numbers(cells: Sequence[str]) -> list[float] | None:
    """The cells as finite numbers; None if any is not one."""
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None
