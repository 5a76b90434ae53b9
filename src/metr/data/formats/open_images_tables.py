"""The tables of Open Images: CSV files read in batches into columns of numbers, and the hierarchy of the classes.

Rows of one image mostly stand together, but nothing here depends on it. A file of 15 million boxes takes some 400 MB.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from pyarrow import csv as arrow_csv

from metr.data.formats.base import BoxTable, Reading, RowsByImage
from metr.data.formats.files import decoded, text_start_of
from metr.data.regular_files import open_regular, read_regular
from metr.errors import DataError

BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax")
LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")

_HEADER_BYTES = 4096
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """The labels of whole images that people verified: whether a class is `present`."""

    image: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    present: Bool[np.ndarray, "n"]

    @cached_property
    def by_image(self) -> RowsByImage:
        """Finds the rows of an image."""
        return RowsByImage(self.image)


class _Node(msgspec.Struct, rename="pascal"):
    """A class of the hierarchy. Parts (a wheel of a car) are not subclasses and are not read."""

    label_name: str
    subcategory: list["_Node"] = []


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes: their names by number, and their numbers by identifier.

    `above` is, for each number, the class and all its superclasses; `below` the class and all its subclasses.
    """

    names: tuple[str, ...]
    numbers: Mapping[str, int]
    above: tuple[tuple[int, ...], ...]
    below: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, names: Sequence[str], numbers: Mapping[str, int], hierarchy: Path | None) -> "Classes":
        """The classes with the hierarchy in a JSON file; without one, each class stands alone.

        Raises:
            DataError: the file is not a hierarchy.
        """
        above: list[set[int]] = [set() for _ in names]
        below: list[set[int]] = [set() for _ in names]
        waiting: list[tuple[_Node, tuple[int, ...]]] = [] if hierarchy is None else [(_tree(hierarchy), ())]
        while waiting:
            node, heads = waiting.pop()
            number = numbers.get(node.label_name)
            if number is not None:
                above[number].update(heads)
                for head in heads:
                    below[head].add(number)
                heads = (*heads, number)
            waiting += [(child, heads) for child in node.subcategory]
        above_each, below_each = (
            tuple((number, *sorted(others - {number})) for number, others in enumerate(sets)) for sets in (above, below)
        )
        return cls(names=tuple(names), numbers=numbers, above=above_each, below=below_each)


def header(path: Path) -> tuple[str, ...]:
    """The cells of the first line of a CSV file; none where it is no such file or cannot be read."""
    if path.suffix.lower() != ".csv":
        return ()
    lines = text_start_of(path, _HEADER_BYTES).decode(errors="replace").splitlines()
    try:
        return tuple(cell.strip() for cell in next(csv.reader(lines[:1]), []))
    except csv.Error:
        return ()


def read_boxes(files: Sequence[Path], images: dict[str, int], numbers: Mapping[str, int], reading: Reading) -> BoxTable:
    """The boxes in files. New images are added to `images`; rows that cannot be read are noted.

    Raises:
        DataError: a file is not CSV with these columns.
    """
    pieces = [(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 4), np.float32), np.zeros(0, np.bool_))]
    for file in files:
        where = file.relative_to(reading.files.root).as_posix()
        for batch in _batches(file, BOX_COLUMNS, "IsGroupOf", reading):
            image = _codes(batch["ImageID"], lambda name: images.setdefault(name, len(images)) if name else -1)
            label = _codes(batch["LabelName"], lambda name: numbers.get(name, -1))
            corners = np.stack([_floats(batch[name]) for name in BOX_COLUMNS[2:]], axis=1)
            good = (image >= 0) & (label >= 0) & ~np.isnan(corners).any(axis=1)
            for row in np.flatnonzero(~good):
                _note_box({name: _text(column[row].as_py()) for name, column in batch.items()}, numbers, where, reading)
            group = np.zeros(len(image), np.bool_)
            if "IsGroupOf" in batch:
                group = _codes(batch["IsGroupOf"], lambda flag: int(flag == "1")) == 1
            pieces.append((image[good], label[good], corners[good].astype(np.float32), group[good]))
    image, label, corners, group = map(np.concatenate, zip(*pieces, strict=True))
    return BoxTable(image=image, labels=label, boxes=corners, ignore=group)


def read_labels(
    file: Path, image_number: Callable[[str], int], numbers: Mapping[str, int], reading: Reading
) -> LabelTable:
    """The verified labels in a file; those of images without a number (-1) and of other classes are left out.

    Raises:
        DataError: the file is not CSV with these columns.
    """
    where = file.relative_to(reading.files.root).as_posix()
    pieces = [(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.bool_))]
    for batch in _batches(file, LABEL_COLUMNS, "Source", reading):
        label = _codes(batch["LabelName"], lambda name: numbers.get(name, -1))
        confidence = _floats(batch["Confidence"])
        for row in np.flatnonzero(np.isnan(confidence)):
            cells = ",".join(_text(batch[name][row].as_py()) for name in LABEL_COLUMNS)
            reading.issues.add("unreadable label", where, cells[:80])
        # Values between 0 and 1 are those of machines.
        keep = (label >= 0) & ((confidence == 0) | (confidence == 1))
        if "Source" in batch:
            keep &= _codes(batch["Source"], lambda source: int(source == "machine")) == 0
        image = _codes(batch["ImageID"].filter(pa.array(keep)), image_number)
        known = image >= 0
        pieces.append((image[known], label[keep][known], confidence[keep][known] == 1))
    image, label, present = map(np.concatenate, zip(*pieces, strict=True))
    return LabelTable(image=image, labels=label, present=present)


def _batches(path: Path, needed: Sequence[str], optional: str, reading: Reading) -> Iterator[dict[str, pa.Array]]:
    """The named columns of a file, as bytes, some ten thousand rows at a time; rows of odd length are noted."""
    where = path.relative_to(reading.files.root).as_posix()
    reading.files.touch(where)

    def skip(row: arrow_csv.InvalidRow) -> str:
        detail = f"expected {row.expected_columns} columns: {_text(row.text.encode()[:80])}"
        reading.issues.add("unreadable annotation", f"{where}:{row.number}", detail)
        return "skip"

    cells = header(path)
    places = {name: str(cells.index(name)) for name in (*needed, optional) if name in cells}
    if not set(needed) <= places.keys():
        raise DataError(f"expected the columns {', '.join(needed)}", where=path)
    try:
        with open_regular(path) as file:
            if not (file.readline() and file.read(1)):
                return  # a header alone
        with arrow_csv.open_csv(
            path,
            # With threads, line numbers are unknown. Bytes that are not UTF-8 would raise an error that cannot be
            # caught, so the file is read as Latin-1, which all bytes are; `_text` undoes it.
            arrow_csv.ReadOptions(
                encoding="latin-1",
                column_names=[str(place) for place in range(len(cells))],
                skip_rows=1,
                block_size=_BLOCK_BYTES,
                use_threads=False,
            ),
            # No cell needs quotes, and a stray quote would swallow lines.
            arrow_csv.ParseOptions(quote_char=False, invalid_row_handler=skip),
            arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(places.values(), pa.binary()), include_columns=list(places.values())
            ),
        ) as reader:
            for batch in reader:
                yield {name: batch.column(place) for name, place in places.items()}
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"not readable as CSV: {error}", where=path, hint="check that the file is complete") from None


def _codes(column: pa.Array, number: Callable[[str], int]) -> Int[np.ndarray, "n"]:
    """The number of each cell; `number` is called once for each different cell."""
    encoded = column.dictionary_encode()
    table: Int[np.ndarray, "u"] = np.array([number(_text(cell)) for cell in encoded.dictionary.to_pylist()], np.int32)
    return np.asarray(table[encoded.indices.to_numpy(zero_copy_only=False)])


def _floats(column: pa.Array) -> Float[np.ndarray, "n"]:
    """The cells as numbers; NaN where a cell is not one."""
    try:
        return np.asarray(column.cast(pa.utf8()).cast(pa.float64()).to_numpy(zero_copy_only=False))
    except pa.ArrowInvalid:
        return np.array([_float(_text(cell)) for cell in column.to_pylist()], np.float64)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _text(cell: bytes) -> str:
    return decoded(cell.decode(errors="replace").encode("latin-1", errors="replace")).strip(' "')


def _note_box(cells: Mapping[str, str], numbers: Mapping[str, int], where: str, reading: Reading) -> None:
    place = f"{where}, image {cells['ImageID'][:80]}"
    if not cells["ImageID"]:
        reading.issues.add("unreadable annotation", where, f"a box of no image: {','.join(cells.values())[:80]}")
    elif cells["LabelName"] not in numbers:
        reading.issues.add("unknown category", place, f"{cells['LabelName'][:80]!r} is not described")
    else:
        corners = ", ".join(f"{name} {cells[name][:20]!r}" for name in BOX_COLUMNS[2:])
        reading.issues.add("unreadable box", place, corners)


def _tree(file: Path) -> _Node:
    try:
        return msgspec.json.decode(read_regular(file), type=_Node)
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        hint = "expected LabelName and Subcategory, as in bbox_labels_600_hierarchy.json; remove it to do without"
        raise DataError(f"not readable as a hierarchy of classes: {error}", where=file, hint=hint) from None
