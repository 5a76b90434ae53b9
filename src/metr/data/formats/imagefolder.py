"""Hugging Face imagefolder: `metadata.jsonl` (or `.csv`, `.parquet`) with a row an image, beside the images.

A row has `file_name` and `objects`, whose boxes are [x, y, width, height] in pixels, unless all boxes of the dataset
show that they are something else (see `box_kinds`). Categories are names or numbers; numbers are named by a file of
names, or by `class_label` in the dataset's card (README.md). Without either they are called "category 3". Objects with
`iscrowd` or `ignore` are ignored ones.
"""

import ast
import contextlib
import csv
import json
import math
import posixpath
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from metr.bounded_yaml import load_yaml
from metr.data.formats.base import BoxList, RawImage, Reader, Reading, plain_name, whole_size, without_repeats
from metr.data.formats.box_kinds import Written, judged, sizes_of, to_corners
from metr.data.formats.file_per_image import note_unannotated
from metr.data.formats.files import Files, folders_in, folders_within, there
from metr.data.formats.json_lines import json_lines, numbers, read_label_map
from metr.data.formats.locating import grouped, locate, split_of_folder
from metr.data.records import canonical_split
from metr.data.regular_files import read_regular
from metr.errors import DataError

_DEPTH = 2
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_NAME_LISTS = ("classes.txt", "labels.txt", "names.txt")
_NAME_MAPS = ("id2label.json", "label_map.json", "classes.json")
NAMES_OF_NUMBERS = (*_NAME_LISTS, *_NAME_MAPS)
_CARD = "README.md"
_IMAGES = ("file_name", "image", "filename", "image_path", "path", "image_file", "file")
# The keys of an object that hold its box, and its category: the first that is there counts.
BOX_KEYS = ("bbox", "bboxes", "boxes", "box")
CATEGORY_KEYS = (
    *("categories", "category", "category_id", "category_ids", "label", "labels", "class", "classes"),
    *("class_id", "class_ids", "name", "names"),
)
_IGNORED = ("iscrowd", "is_crowd", "crowd", "ignore", "ignored")
_AREAS = ("area", "areas")
_ROWS_A_BATCH = 1024
# Rows that recognising a file looks at.
_SAMPLED = 20

Row = Mapping[str, Any]
_DECODER = msgspec.json.Decoder(dict[str, Any])


class ImageFolderReader(Reader):
    """Hugging Face imagefolder with metadata. A split is made of folders whose images one metadata file lists.

    Such a file lies in the folder, or in the one above it for the folders of several splits; or its rows name their
    splits in a column `split`.
    """

    format = "imagefolder"
    looks_like = "Hugging Face imagefolder: metadata.jsonl with file_name and objects (bbox, categories) by the images"
    takes_boxes = True

    def __init__(
        self, root: Path, splits: Mapping[str, tuple[Path, ...]], *, by_row: frozenset[Path] = frozenset()
    ) -> None:
        super().__init__(root, splits)
        self._by_row = by_row
        self._boxes: Written | None = None

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with metadata, at most two folders deep, or of one such file."""
        alone = path.is_file()
        root = path.parent if alone else path
        samples = {
            folder: _sample(metadata)
            for folder in ([root] if alone else folders_within(root, _DEPTH))
            if (metadata := _metadata(folder)) is not None and (metadata == path or not alone)
        }
        fitting = {
            folder for folder, rows in samples.items() if any("objects" in row and _file_name(row) for row in rows)
        }
        # Beside one that fits, a file without any readable row is a damaged one; it is noted when it is read.
        parts = (
            part
            for folder, sample in samples.items()
            if folder in fitting or (fitting and not sample)
            for part in _parts(folder, sample) or [folder]
        )
        pairs = [(split_of_folder(part, root.parent if alone else root), part) for part in parts]
        named = {part: splits_of_rows for split, part in pairs if split == "all" and (splits_of_rows := _splits(part))}
        splits = grouped((name, part) for split, part in pairs for name in named.get(part, (split,)))
        return cls(root, splits, by_row=frozenset(named)) if splits else None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of the files."""
        seen: set[str] = set()
        for folder in self.splits[split]:
            yield from without_repeats(self._read_folder(folder, split, seen, reading), seen, reading)
        note_unannotated(seen, "not in the metadata: left out", reading)

    def _read_folder(self, folder: Path, split: str, seen: set[str], reading: Reading) -> Iterator[RawImage]:
        """The images of a folder, or those of its rows that name this split; `seen` takes what others name."""
        home = folder if _metadata(folder) is not None or folder == self.root else folder.parent
        metadata = _metadata(home)
        if metadata is None:
            reading.issues.add("unreadable annotation", self.within(folder), "changed while it was read")
            return
        names = self._names(home, reading)
        written = Written.asked(self.options.boxes) or self._kind_of_boxes(reading)
        prefix = "" if home == folder else f"{folder.name}/"
        left_out: set[str] = set()
        for line, row in _rows(self.within(metadata), reading):
            name, place = _file_name(row), self._place(line)
            if name is None:
                reading.issues.add("unreadable annotation", place, "names no image")
            elif name.startswith(prefix):
                path = locate(name, [self.within(home)], place, reading)
                if path is not None and folder in self._by_row and _split(row) != split:
                    seen.add(path)
                    continue
                raw = None if path is None else raw_image(row, path, place, names, reading)
                if raw is not None:
                    yield as_written(raw, written)
                elif path is not None:
                    left_out.add(path)
        seen |= left_out  # they have been told of

    def _place(self, line: str) -> str:
        """A line of the metadata as the user has it."""
        return line

    def _kind_of_boxes(self, reading: Reading) -> Written:
        """How the boxes of all files are written, for one writer wrote them: a small file alone may not show it."""
        if self._boxes is None:
            folders = dict.fromkeys(folder for folders in self.splits.values() for folder in folders)
            homes = dict.fromkeys(
                folder if _metadata(folder) is not None or folder == self.root else folder.parent for folder in folders
            )
            files = ((_metadata(home), self.within(home)) for home in homes)
            self._boxes = _kind_of_boxes([(found, home) for found, home in files if found is not None], reading)
        return self._boxes

    def _names(self, folder: Path, reading: Reading) -> Mapping[str, str]:
        """The names of numbered categories: from the folder of the metadata, else from one above it in the dataset."""
        names = declared_names(self.within(folder), reading)
        if not names and folder != self.root:
            return self._names(folder.parent, reading)
        for name in names.values():
            reading.names.number(name)
        return names


def _kind_of_boxes(files: Sequence[tuple[Path, str]], reading: Reading) -> Written:
    """How the boxes of files are written, as all of them together show. A file comes with its folder."""
    image, boxes = array("i"), array("d")
    sizes: list[tuple[int, int] | None] = []
    paths: list[str | None] = []
    quiet = Reading(files=reading.files)  # what is wrong in the files is noted when they are read
    for metadata, home in files:
        with contextlib.suppress(DataError):
            for place, row in _rows(posixpath.join(home, metadata.name), quiet):
                found = [numbers(box, 4) for box, *_ in as_objects(row.get("objects")) or ()]
                known = [box for box in found if box is not None]
                image.extend([len(sizes)] * len(known))
                boxes.extend(value for box in known for value in box)
                sizes.append(_size(row))
                name = _file_name(row) if known and sizes[-1] is None else None
                paths.append(None if name is None else locate(name, [home], place, quiet))
    values = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    where = posixpath.join(files[0][1], files[0][0].name) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    return judged(values, np.array(image, dtype=np.int64), sizes_of(sizes, paths, reading), "xywh", where, reading)


def _size(row: Row) -> tuple[int, int] | None:
    return whole_size(_number(row.get("height")), _number(row.get("width")))


def raw_image(row: Row, path: str, place: str, names: Mapping[str, str], reading: Reading) -> RawImage | None:
    """The image of a row, with the boxes as they are written."""
    value = row.get("objects")
    if value in (None, ""):
        reading.issues.add("unannotated image", place, f"{path} has no objects, not even an empty list: left out")
        return None
    objects = as_objects(value)
    if objects is None:
        detail = f"objects are not lists of the same length: {value!r}"[:120]
        reading.issues.add("unreadable annotation", place, detail)
        return None
    boxes = BoxList(place, reading)
    for index, (box, category, ignored, area) in enumerate(objects, start=1):
        boxes.add(
            _name(category, names, place, reading),
            numbers(box, 4),
            f"box {index}",
            ignore=bool(ignored),
            area=_number(area),
            found=f"category {category!r}, bbox {box!r}",
        )
    return boxes.image(path, size=_size(row))


def as_written(raw: RawImage, written: Written) -> RawImage:
    """An image whose boxes are as its file writes them, with corners."""
    to_corners(raw.boxes, written.kind)
    fractions = written.as_fractions
    return replace(raw, relative=fractions, areas=None if fractions else raw.areas, corners=written.corners)


def as_objects(value: Any) -> list[tuple[Any, Any, Any, Any]] | None:
    """Box, category, ignored and area of each object of a row, as the file gives them, None where it gives none.

    They come from lists side by side or from a list of objects; None if they are neither.
    """
    value = _literal(value) if isinstance(value, str) else value
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        keys = dict.fromkeys(key for item in value for key in item)
        value = {key: [item.get(key) for item in value] for key in keys} or {BOX_KEYS[0]: [], CATEGORY_KEYS[0]: []}
    if not isinstance(value, dict):
        return None
    boxes, categories, ignored, areas = (
        next((value[key] for key in keys if isinstance(value.get(key), list)), None)
        for keys in (BOX_KEYS, CATEGORY_KEYS, _IGNORED, _AREAS)
    )
    if boxes is None or categories is None:
        return None
    missing = [None] * len(boxes)
    columns = (boxes, categories, missing if ignored is None else ignored, missing if areas is None else areas)
    return list(zip(*columns, strict=True)) if {*map(len, columns)} == {len(boxes)} else None


def _literal(text: str) -> Any:
    """The value in a cell of a CSV file: JSON, or a dictionary as Python prints it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _name(category: Any, names: Mapping[str, str], place: str, reading: Reading) -> str | None:
    """The name of a category as an object gives it; None if it is neither a name nor a number."""
    if isinstance(category, str):
        return plain_name(category) or None
    if isinstance(category, bool) or not isinstance(category, int):
        return None
    name = plain_name(names.get(str(category), ""))
    if not name:
        name = f"category {category}"
        detail = f"number {category} has no name (no {_NAME_LISTS[0]}, no class_label in {_CARD}): called {name!r}"
        reading.notes.once("unnamed category", place.rpartition(":")[0], detail)
    return name


def _number(value: Any) -> float:
    """A decoded value as a number; NaN if it is not one."""
    return (numbers([value], 1) or (math.nan,))[0]


def _file_name(row: Row) -> str | None:
    """The image of a row: its `file_name`, or a column that is called alike; it may hold `{"path": ...}`."""
    keys = [*_IMAGES[:1], *(key for key in row if key.endswith("_file_name")), *_IMAGES[1:]]
    values = (value.get("path") if isinstance(value := row.get(key), dict) else value for key in keys)
    return next((value for value in values if isinstance(value, str) and value), None)


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA_NAMES if there(folder / name, Path.is_file)), None)


def _sample(metadata: Path) -> list[Row]:
    """The first rows of a file, a cheap look."""
    try:
        return [row for _, row in islice(_rows(metadata.name, Reading(files=Files(metadata.parent))), _SAMPLED)]
    except DataError:
        return []


def _parts(folder: Path, sample: Sequence[Row]) -> list[Path]:
    """The folders of splits below a folder if its metadata lists their images, too."""
    first = {(_file_name(row) or "").partition("/")[0] for row in sample}
    below = [part for part in folders_in(folder) if canonical_split(part.name)]
    return below if first & {part.name for part in below} else []


def _splits(folder: Path) -> list[str]:
    """The splits that rows of the metadata in a folder name; none where its first rows name none."""
    metadata = _metadata(folder)
    if metadata is None or not any(canonical_split(_split(row)) for row in _sample(metadata)):
        return []
    try:
        return sorted({_split(row) for _, row in _rows(metadata.name, Reading(files=Files(folder)))})
    except DataError:
        return []


def _split(row: Row) -> str:
    return str(row.get("split") or "all")


def _rows(where: str, reading: Reading) -> Iterator[tuple[str, Row]]:
    """The rows of a metadata file with their places.

    Raises:
        DataError: the file cannot be read.
    """
    metadata = reading.files.root / where
    if metadata.suffix == ".jsonl":
        yield from json_lines(where, _DECODER, reading)
        return
    reading.files.touch(where)
    try:
        yield from _csv_rows(metadata, where, reading) if metadata.suffix == ".csv" else _parquet_rows(metadata, where)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"cannot be read: {error}", where=metadata) from None


def _csv_rows(metadata: Path, where: str, reading: Reading) -> Iterator[tuple[str, Row]]:
    with metadata.open(encoding=reading.encoding(read_regular(metadata), where), newline="") as file:
        rows = csv.DictReader(file, restkey="rest")
        for row in rows:
            yield f"{where}:{rows.line_num}", row


def _parquet_rows(metadata: Path, where: str) -> Iterator[tuple[str, Row]]:
    with pq.ParquetFile(metadata) as file:
        rows = (row for batch in file.iter_batches(_ROWS_A_BATCH) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{where}:{number}", row


def declared_names(folder: str, reading: Reading) -> Mapping[str, str]:
    """The names by number that a folder's files declare; none where they declare none."""
    present = reading.files.listing(folder)
    for name in (*NAMES_OF_NUMBERS, _CARD):
        if name not in present:
            continue
        where = posixpath.join(folder, name)
        try:
            found = _read_names(where, reading)
        except (DataError, yaml.YAMLError) as error:
            reading.notes.once("unreadable annotation", where, f"names: {error}"[:200])
            continue
        if found:
            return found
    return {}


def _read_names(where: str, reading: Reading) -> Mapping[str, str]:
    name = posixpath.basename(where)
    if name in _NAME_MAPS:
        return read_label_map(where, reading.files)
    text = reading.text(where)
    if name != _CARD:
        return {str(number): line for number, line in enumerate(filter(None, map(str.strip, text.splitlines())))}
    return _class_labels(card_header(text))


def card_header(card: str) -> Any:
    """What the YAML header of a dataset's card holds; None where it has none.

    Raises:
        YAMLError: the header is no YAML.
    """
    header = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    return None if header is None else load_yaml(header[1])


def _class_labels(card: Any) -> dict[str, str]:
    """The names of the first `class_label` in the feature `objects` of a dataset's card."""
    rest, seen = [(card, False)], set()
    while rest:
        value, inside = rest.pop(0)
        if (id(value), inside) in seen:
            continue  # YAML can contain itself
        seen.add((id(value), inside))
        if isinstance(value, dict):
            inside = inside or value.get("name") == "objects"
            label = value.get("class_label")
            names = label.get("names") if inside and isinstance(label, dict) else None
            names = dict(enumerate(names)) if isinstance(names, list) else names
            if isinstance(names, dict):
                return {str(number): str(name) for number, name in names.items()}
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        rest += [(child, inside) for child in children]
    return {}
