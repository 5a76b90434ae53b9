"""Boxes as CSV, one a line, with a header or without one (see `csv_columns`).

A line without a box says that its image has no objects. A column `split` says which split a line belongs to.
Coordinates that are fractions of the image are recognised.
"""

import csv
import posixpath
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from metr.data.formats.base import UNREADABLE, BoxTable, RawImage, Reader, Reading
from metr.data.formats.box_kinds import BoxKind, Written, judged, sizes_of, to_corners
from metr.data.formats.csv_columns import Dialect, dialect_of, finite, header_faults
from metr.data.formats.files import Files, decoded, files_in, folders_within
from metr.data.formats.locating import dataset_root, grouped, image_folders, locate, resolve_conflicts, split_of_file
from metr.data.formats.written import WrittenImage, rounded
from metr.data.records import UNNAMED, canonical_split
from metr.errors import DataError, counted

_DEPTH = 2


class _Rows:
    """The boxes of the files of a split, column by column: 50 bytes a box, so that large files fit into memory.

    An entry is the part of a file about one image; `entries` numbers them by file and name, `sizes` are the sizes that
    the files give. `kinds` says how each file writes its boxes, and `rows` which they are.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], int] = {}
        self.sizes: list[tuple[int, int] | None] = []
        self.kinds: dict[str, BoxKind] = {}
        self.rows: dict[str, slice] = {}
        self.entry, self.label, self.line, self.ignore = array("i"), array("i"), array("i"), array("b")
        self.corners = array("d")

    def entry_number(self, where: str, name: str, size: tuple[int, int] | None) -> int:
        """The number of an entry, a new one where it is new."""
        number = self.entries.setdefault((where, name), len(self.entries))
        if number == len(self.sizes):
            self.sizes.append(size)
        return number

    def table(self) -> BoxTable:
        """The boxes by their entries, as the files give them."""
        return BoxTable(
            image=np.array(self.entry),
            labels=np.array(self.label),
            boxes=np.array(self.corners, dtype=np.float64).reshape(-1, 4),
            ignore=np.array(self.ignore, dtype=bool),
        )


class CsvReader(Reader):
    """CSV with a line a box. A split is made of files, or of the lines whose column `split` says so."""

    format = "csv"
    looks_like = "CSV: filename,width,height,class,xmin,ymin,xmax,ymax with a header, or path,x1,y1,x2,y2,class without"
    takes_boxes = True
    annotates_whole_images = False

    def __init__(self, root: Path, files: Mapping[Path, Dialect]) -> None:
        self.by_column = {file: found for file, dialect in files.items() if (found := _splits_in(file, dialect))}
        splits = grouped((name, file) for file in files for name in self.by_column.get(file, [split_of_file(file)]))
        # Where some name a split, the others are left out: they often repeat what is in those.
        super().__init__(root, {name: paths for name, paths in splits.items() if canonical_split(name)} or splits)
        self.unnamed = any("name" not in dialect.columns for dialect in files.values())
        # how each file that was read writes its boxes
        self.written: dict[str, Written] = {}

    @property
    def options_used(self) -> tuple[str | None, ...]:
        """The options that the result depends on."""
        return (self.options.boxes, self.options.name) if self.unnamed else (self.options.boxes,)

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with CSV files, at most two folders deep, or of one such file."""
        files = {file: dialect for file in _tables(path) if (dialect := dialect_of(file)) is not None}
        return cls(dataset_root(path) if path.is_file() else path, files) if files else None

    @classmethod
    def why_not(cls, path: Path) -> str | None:
        """The columns of a CSV file that has some of those of boxes, and those that it lacks."""
        said = ((file, header_faults(file)) for file in _tables(path))
        return next((f"{file.name} {faults}" for file, faults in said if faults is not None), None)

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order in which they first come up, with the boxes of all its files."""
        rows = _Rows()
        for file in self.splits[split]:
            self._read_file(file, split, rows, reading)
        folders = {where: image_folders(reading.files, split, posixpath.dirname(where)) for where in rows.kinds}
        found = [locate(name, folders[where], where, reading) for where, name in rows.entries]
        table, lines, places = rows.table(), np.array(rows.line), list(rows.entries)
        sizes = sizes_of(rows.sizes, found, reading)
        written = self.written
        for where, mine in rows.rows.items():
            written[where] = Written.asked(self.options.boxes) or judged(
                table.boxes[mine], table.image[mine], sizes, rows.kinds[where], where, reading
            )
            to_corners(table.boxes[mine], written[where].kind)

        def image(entry: int) -> RawImage:
            mine, where, path = table.by_image[entry], places[entry][0], found[entry] or ""
            return RawImage(
                where=where,
                image_id=path,
                path=path,
                size=rows.sizes[entry],
                boxes=table.boxes[mine],
                labels=table.labels[mine],
                relative=written[where].as_fractions,
                ignore=table.ignore[mine],
                marks=lines[mine].tolist(),
                corners=written[where].corners,
            )

        conflicts = resolve_conflicts(found, lambda entry: places[entry][1:])
        for entry, path in conflicts.misled:
            raw = image(entry)
            boxes = counted(len(raw.boxes), "box", "boxes")
            detail = f"{path} is called alike, but is that of other lines: {boxes} left out"
            reading.issues.add("missing image", raw.where, detail)
        more: dict[int, list[RawImage]] = {}
        for entry, owner in conflicts.repeats:
            parts, new = more.setdefault(owner, [image(owner)]), image(entry)
            if all(_measured_alike(new, part) for part in parts):
                parts.append(_without(new, parts))
            else:
                boxes, first = counted(len(new.boxes), "box", "boxes"), parts[0].where
                detail = f"its {boxes} are measured in another way than in {first}: left out"
                reading.issues.add("duplicate image", new.where, detail)
        for owner in conflicts.owners.values():
            yield _joined(more[owner]) if owner in more else image(owner)

    def _read_file(self, file: Path, split: str, rows: _Rows, reading: Reading) -> None:
        """Adds the lines of a file that belong to a split to `rows`; those that cannot be read are noted."""
        dialect, where = dialect_of(file), self.within(file)
        if dialect is None:
            reading.issues.add("unreadable annotation", where, "changed while it was read")
            return
        own = self._own_name(dialect, where, reading)
        start = len(rows.line)
        for line, row in _lines(reading.text(where), dialect, where, reading):
            if file in self.by_column and _split_of(row, dialect, file) != split:
                continue
            _add_line(row, line, own, dialect, where, rows, reading)
        rows.kinds[where] = dialect.boxes
        rows.rows[where] = slice(start, len(rows.line))

    def _own_name(self, dialect: Dialect, where: str, reading: Reading) -> str:
        """The category of all boxes of a file without a column of categories: the dataset's name; else ""."""
        if "name" in dialect.columns:
            return ""
        name = self.options.name or self.root.name
        unread = f" (not read: {', '.join(dialect.others)})" if dialect.others else ""
        detail = (
            f"no column of categories{unread}: all boxes are called {name!r}; `renames` in a datasets file changes it"
        )
        reading.notes.once("no categories", where, detail)
        return name


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


def _tables(path: Path) -> Iterator[Path]:
    """The CSV files of a folder, at most two folders deep, or the one that is named."""
    if path.is_file():
        yield from [path] if path.suffix.lower() == ".csv" else []
    else:
        yield from (file for folder in folders_within(path, _DEPTH) for file in files_in(folder, ".csv"))


def _splits_in(file: Path, dialect: Dialect) -> list[str]:
    """The splits that the column `split` of a file names; none where it has no such column, or that names no split."""
    if "split" not in dialect.columns:
        return []
    try:
        rows = [row for _, row in dialect.lines(decoded(Files(file.parent).read(file.name)))]
    except (DataError, csv.Error):
        return []
    if not any(canonical_split(dialect.cell(row, "split")) for row in rows):
        return []
    return list(dict.fromkeys(_split_of(row, dialect, file) for row in rows))


def _split_of(row: Sequence[str], dialect: Dialect, file: Path) -> str:
    """The split of a line: what its column says, else that of the file."""
    written = dialect.cell(row, "split")
    if written.lower() in {"", "unassigned"}:
        return split_of_file(file)
    return canonical_split(written) or written


def _add_line(
    row: Sequence[str], line: int, own: str, dialect: Dialect, where: str, rows: _Rows, reading: Reading
) -> None:
    """Adds a line to `rows`; `own` is the category where the file has no column of them."""
    place, path = f"{where}:{line}", dialect.cell(row, "path")
    if len(row) < dialect.needed or not path:
        reading.issues.add("unreadable annotation", place, f"expected {dialect.needed} columns: {','.join(row)[:80]}")
        return
    entry = rows.entry_number(where, path, dialect.size(row))
    box = dialect.box(row)
    if not box:
        return  # an image without objects
    name = own or dialect.cell(row, "name")
    if len(row) <= dialect.columns.get("group", 0):
        reading.issues.add("unreadable annotation", place, ",".join(row)[:80])
        return
    if not name:
        reading.issues.add("unknown category", place, ",".join(row)[:80])
    rows.entry.append(entry)
    rows.label.append(reading.names.number(name) if name else UNNAMED)
    rows.line.append(line)
    rows.ignore.append(dialect.cell(row, "group").lower() in {"1", "true"})
    numbers = finite(box)
    rows.corners.extend(numbers if numbers is not None and len(numbers) == len(UNREADABLE) else UNREADABLE)


def _lines(text: str, dialect: Dialect, where: str, reading: Reading) -> Iterator[tuple[int, list[str]]]:
    """The lines of a file with their numbers, as far as they can be told apart."""
    try:
        yield from dialect.lines(text)
    except csv.Error as error:
        reading.issues.add("unreadable annotation", where, f"{error}; the rest is left out")


CSV_HEADER = ("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax", "iscrowd", "confidence")
"""The columns of written files; the last two stand there where they are needed."""


def csv_rows(image: WrittenImage) -> Iterator[list[str]]:
    """A line for each box in the columns of `CSV_HEADER`, or one without a box."""
    start = [image.name, str(image.width), str(image.height)]
    if not image.boxes:
        yield [*start, *[""] * (len(CSV_HEADER) - len(start))]
    for box in image.boxes:
        score = "" if box.score is None else f"{box.score:.5f}"
        yield [*start, box.name, *(str(rounded(value)) for value in box.box), str(int(box.ignore)), score]
