"""Hugging Face imagefolder: `metadata.jsonl` (or `.csv`, `.parquet`) with a row an image, beside the images.

A row has `file_name` and `objects`, whose boxes are [x, y, width, height] in pixels. Categories are names or numbers;
numbers are named by a file of names, or by `class_label` in the dataset's card (README.md). Without either they are
called "category 3". Objects with `iscrowd` or `ignore` are ignored ones.
"""

import ast
import csv
import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from metr.boxes import xywh_to_xyxy
from metr.data.formats.base import (
    UNREADABLE,
    RawImage,
    Reader,
    Reading,
    corners,
    locate,
    note_unannotated,
    plain_name,
    whole_size,
)
from metr.data.formats.files import Files, folders_within, glance, there
from metr.data.formats.json_lines import json_lines, numbers, read_label_map
from metr.data.formats.text import encoding_of, note_encoding, read_text
from metr.data.splits import canonical_split
from metr.errors import DataError

_DEPTH = 2
_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_NAME_LISTS = ("classes.txt", "labels.txt", "names.txt")
_NAME_MAPS = ("id2label.json", "label_map.json", "classes.json")
_CARD = "README.md"
_BOXES = ("bbox", "bboxes", "boxes", "box")
_CATEGORIES = (
    *("categories", "category", "category_id", "category_ids", "label", "labels", "class", "classes"),
    *("class_id", "class_ids", "name", "names"),
)
_IGNORED = ("iscrowd", "is_crowd", "crowd", "ignore", "ignored")
_AREAS = ("area", "areas")
_ROWS_A_BATCH = 1024
# Rows that are looked at to recognise a file.
_SAMPLED = 20

Row = Mapping[str, Any]
_DECODER = msgspec.json.Decoder(dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class _Objects:
    """The objects of a row: lists of the same length, as the file gives their values; None where it gives none."""

    boxes: list[Any]
    categories: list[Any]
    ignored: list[Any] | None = None
    areas: list[Any] | None = None


class ImageFolderReader(Reader):
    """Hugging Face imagefolder with metadata. A split is made of folders whose images one metadata file lists.

    Such a file lies in the folder, or in the one above it for the folders of several splits.
    """

    format = "imagefolder"
    looks_like = "Hugging Face imagefolder: metadata.jsonl with file_name and objects (bbox, categories) by the images"

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
        splits: dict[str, tuple[Path, ...]] = {}
        for folder, sample in samples.items():
            # Beside one that fits, a file without any row that can be read is a damaged one, which reading tells.
            if folder in fitting or (fitting and not sample):
                for part in _parts(folder, sample) or [folder]:
                    name = _split_of(part, root.parent if alone else root)
                    splits[name] = (*splits.get(name, ()), part)
        return cls(root, splits) if splits else None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of the files."""
        annotated: set[str] = set()
        for folder in self.splits[split]:
            for raw in self._read_folder(folder, reading):
                if raw.path in annotated:
                    reading.issues.add("duplicate image", raw.where, f"{raw.path} again: left out")
                else:
                    annotated.add(raw.path)
                    yield raw
        note_unannotated(annotated, "not in the metadata: left out", reading)

    def _read_folder(self, folder: Path, reading: Reading) -> Iterator[RawImage]:
        home = folder if _metadata(folder) is not None or folder == self.root else folder.parent
        metadata = _metadata(home)
        if metadata is None:
            reading.issues.add("unreadable annotation", self.within(folder), "changed while it was read")
            return
        names = self._names(home, reading)
        prefix = "" if home == folder else f"{folder.name}/"
        for place, row in _rows(metadata, self.within(metadata), reading):
            name = _file_name(row)
            if name is None:
                reading.issues.add("unreadable annotation", place, "no file_name")
            elif name.startswith(prefix):
                path = locate(name, [self.within(home)], place, reading)
                if path is not None:
                    yield from _raw_image(row, path, place, names, reading)

    def _names(self, folder: Path, reading: Reading) -> Mapping[str, str]:
        """The names of numbered categories: from the folder of the metadata, or from one on the way to the root."""
        names = _declared_names(self.within(folder), reading)
        if not names and folder != self.root:
            return self._names(folder.parent, reading)
        for name in names.values():
            reading.names.number(name)
        return names


def _raw_image(row: Row, path: str, place: str, names: Mapping[str, str], reading: Reading) -> Iterator[RawImage]:
    objects = _objects(row.get("objects"))
    if row.get("objects") in (None, ""):
        reading.issues.add("unannotated image", place, f"{path} has no objects, not even an empty list: left out")
        return
    if objects is None:
        detail = f"objects are not lists of the same length: {row['objects']!r}"[:120]
        reading.issues.add("unreadable annotation", place, detail)
        return
    kept, boxes, labels = [], [], []
    for index, (item, category) in enumerate(zip(objects.boxes, objects.categories, strict=True)):
        box, name = numbers(item, 4), _name(category, names, place, reading)
        if name is None:
            detail = f"category {category!r}, bbox {item!r}"[:80]
            reading.issues.add("unknown category", f"{place}, box {index + 1}", detail)
            continue
        kept.append(index)
        boxes.append(box or UNREADABLE)
        labels.append(reading.names.number(name))
    ignored = None if objects.ignored is None else [bool(objects.ignored[index]) for index in kept]
    areas = None if objects.areas is None else [_number(objects.areas[index]) for index in kept]
    yield RawImage(
        where=place,
        image_id=path,
        path=path,
        size=whole_size(_number(row.get("height")), _number(row.get("width"))),
        boxes=corners(np.array(boxes, dtype=np.float64).reshape(-1, 4), xywh_to_xyxy),
        labels=np.array(labels, dtype=np.int64),
        ignore=None if ignored is None else np.array(ignored, dtype=bool),
        areas=None if areas is None else np.array(areas, dtype=np.float64),
        marks=[f"box {index + 1}" for index in kept],
    )


def _objects(value: Any) -> _Objects | None:
    """The objects of a row, from lists side by side or from a list of objects; None if they are neither."""
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        keys = dict.fromkeys(key for item in value for key in item)
        value = {key: [item.get(key) for item in value] for key in keys} or {_BOXES[0]: [], _CATEGORIES[0]: []}
    if not isinstance(value, dict):
        return None
    boxes, categories, ignored, areas = (
        next((value[key] for key in keys if isinstance(value.get(key), list)), None)
        for keys in (_BOXES, _CATEGORIES, _IGNORED, _AREAS)
    )
    if boxes is None or categories is None:
        return None
    if any(len(column) != len(boxes) for column in (categories, ignored, areas) if column is not None):
        return None
    return _Objects(boxes=boxes, categories=categories, ignored=ignored, areas=areas)


def _literal(text: str) -> Any:
    """What a cell of a CSV file holds: JSON, or what Python prints of a dictionary."""
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
    """A decoded value as a number; NaN if it is none."""
    found = numbers([value], 1)
    return math.nan if found is None else found[0]


def _file_name(row: Row) -> str | None:
    """The image of a row: its `file_name`, or the column whose name ends so."""
    keys = ["file_name", *(key for key in row if key.endswith("_file_name"))]
    return next((row[key] for key in keys if isinstance(row.get(key), str) and row[key]), None)


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in _FILES if there(folder / name, Path.is_file)), None)


def _sample(metadata: Path) -> list[Row]:
    """The first rows of a file, a cheap look."""
    try:
        return [
            row for _, row in islice(_rows(metadata, metadata.name, Reading(files=Files(metadata.parent))), _SAMPLED)
        ]
    except DataError:
        return []


def _parts(folder: Path, sample: Sequence[Row]) -> list[Path]:
    """The folders of splits below a folder if its metadata names their images, too."""
    first = {(_file_name(row) or "").partition("/")[0] for row in sample}
    below = [Path(entry.path) for entry in glance(folder) if canonical_split(entry.name) and entry.is_dir()]
    return below if first & {part.name for part in below} else []


def _split_of(folder: Path, root: Path) -> str:
    parts = folder.relative_to(root).parts
    return next((part for part in reversed(parts) if canonical_split(part)), "all")


def _rows(metadata: Path, where: str, reading: Reading) -> Iterator[tuple[str, Row]]:
    """The rows of a metadata file with their places.

    Raises:
        DataError: the file cannot be read.
    """
    if metadata.suffix == ".jsonl":
        yield from json_lines(metadata, _DECODER, where, reading)
        return
    reading.files.touch(where)
    try:
        yield from _csv_rows(metadata, where, reading) if metadata.suffix == ".csv" else _parquet_rows(metadata, where)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"cannot be read: {error}", where=metadata) from None


def _csv_rows(metadata: Path, where: str, reading: Reading) -> Iterator[tuple[str, Row]]:
    encoding = encoding_of(metadata.read_bytes())
    note_encoding(encoding, where, reading)
    with metadata.open(encoding=encoding, newline="") as file:
        rows = csv.DictReader(file, restkey="rest")
        for row in rows:
            yield f"{where}:{rows.line_num}", row


def _parquet_rows(metadata: Path, where: str) -> Iterator[tuple[str, Row]]:
    number = 0
    with pq.ParquetFile(metadata) as file:
        for batch in file.iter_batches(_ROWS_A_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"{where}:{number}", row


def _declared_names(folder: str, reading: Reading) -> Mapping[str, str]:
    """The names by number that a folder's files declare; none where they declare none."""
    present = reading.files.listing(folder)
    for name in (*_NAME_LISTS, *_NAME_MAPS, _CARD):
        if name not in present:
            continue
        where = posixpath.join(folder, name)
        try:
            found = _read_names(where, reading)
        except (DataError, yaml.YAMLError, ValueError, RecursionError) as error:
            reading.notes.once("unreadable annotation", where, f"names: {error}"[:200])
            continue
        if found:
            return found
    return {}


def _read_names(where: str, reading: Reading) -> Mapping[str, str]:
    name = posixpath.basename(where)
    if name in _NAME_MAPS:
        return read_label_map(reading.files.root / where, where, reading.files)
    text = read_text(where, reading)
    if name != _CARD:
        return {str(number): line for number, line in enumerate(filter(None, map(str.strip, text.splitlines())))}
    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    return {} if header is None else _class_labels(yaml.safe_load(header[1]))


def _class_labels(card: Any) -> dict[str, str]:
    """The names of the first `class_label` in the feature `objects` of a dataset's card."""
    rest, seen = [(card, False)], set()
    while rest:
        value, inside = rest.pop(0)
        if (id(value), inside) in seen:
            continue  # YAML can hold what holds itself
        seen.add((id(value), inside))
        if isinstance(value, dict):
            inside = inside or value.get("name") == "objects"
            label = value.get("class_label")
            names = label.get("names") if inside and isinstance(label, dict) else None
            if isinstance(names, list):
                names = dict(enumerate(names))
            if isinstance(names, dict):
                return {str(number): str(name) for number, name in names.items()}
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        rest += [(child, inside) for child in children]
    return {}
