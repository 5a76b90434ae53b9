"""COCO JSON: `annotations/instances_*.json` with picture folders, or one JSON beside the pictures of each split.

Crowds are ignored objects. Polygons are skipped unread. Large files are decoded piece by piece.
"""

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from jaxtyping import Bool, Float, Int

from metr.boxes import xywh_to_xyxy
from metr.data.readers.base import RawImage, Reader, Reading, corners, locate, picture_folders, plain_name, whole_size
from metr.data.readers.files import glance, there
from metr.errors import DataError

# What tools call the file that lies in the folder of a split (Roboflow, FiftyOne, Label Studio, ...).
_IN_SPLIT_FOLDERS = ("_annotations.coco.json", "annotations.json", "labels.json", "coco.json", "result.json")
# Files beside `instances_*.json` that describe the same pictures in other ways.
_OTHER_TASKS = re.compile(r"^(captions|person_keypoints|panoptic|stuff|image_info)_")
_SNIFF_BYTES = 1 << 20
_PIECE_BYTES = 1 << 24
_BETWEEN_OBJECTS = re.compile(rb"\}\s*,\s*\{")

Id = int | str


class _Category(msgspec.Struct):
    id: Id
    name: str
    supercategory: str | None = None


class _Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str
    height: float | None = None
    width: float | None = None


class _Annotation(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: list[float] | None = None
    area: float | None = None
    iscrowd: int | bool | None = None


class _File(msgspec.Struct):
    images: msgspec.Raw = msgspec.Raw(b"[]")
    annotations: msgspec.Raw = msgspec.Raw(b"[]")
    categories: list[_Category] | None = None


Item = TypeVar("Item", _Image, _Annotation)


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Annotations column by column: `image` is the place of their picture in the file's list."""

    image: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    boxes: Float[np.ndarray, "n 4"]
    areas: Float[np.ndarray, "n"]
    crowd: Bool[np.ndarray, "n"]


class CocoReader(Reader):
    """COCO JSON, plain or one file in the folder of each split (Roboflow)."""

    format = "coco"
    looks_like = "COCO: annotations/*.json, or a JSON file with images, annotations and categories beside the pictures"
    declares_categories = True

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with COCO files, or of one such file."""
        if path.is_file():
            if path.suffix.lower() != ".json" or not _looks_like_coco(path):
                return None
            root = path.parent.parent if path.parent.name == "annotations" else path.parent
            return cls(root, {_split_of(path): (path,)})
        for folder in (path / "annotations", path):
            files = _coco_files(folder)
            if files:
                return cls(path, {_split_of(file): (file,) for file in files})
        folders = [Path(entry.path) for entry in glance(path) if entry.is_dir()]
        found = {folder.name: _file_in(folder) for folder in folders}
        splits = {name: (file,) for name, file in found.items() if file is not None}
        return cls(path, splits) if splits else None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The pictures of a split in the order of the file."""
        files = self.splits[split]
        for file in files:
            prefix = f"{file.stem}/" if len(files) > 1 else ""
            yield from self._read_file(file, split, prefix, reading)

    def _read_file(self, file: Path, split: str, prefix: str, reading: Reading) -> Iterator[RawImage]:
        where = self.within(file)
        reading.files.touch(where)
        content = _decoded(file)
        numbers = self._number_categories(content, where, reading)
        images = self._images(content, where, reading)
        columns = _annotations(content, images, numbers, where, reading)
        order = np.argsort(columns.image, kind="stable")
        starts = np.searchsorted(columns.image, np.arange(len(images) + 1), sorter=order)
        folders = picture_folders(reading.files, split, self.within(file.parent))
        for position, image in enumerate(images.values()):
            path = locate(image.file_name, folders, where, reading)
            if path is None:
                continue
            rows = order[starts[position] : starts[position + 1]]
            yield RawImage(
                where=f"{where}, image {image.id}",
                image_id=f"{prefix}{image.id}" if prefix else image.id,
                path=path,
                size=whole_size(image.height, image.width),
                boxes=columns.boxes[rows],
                labels=columns.labels[rows],
                areas=columns.areas[rows],
                ignore=columns.crowd[rows],
            )

    def _number_categories(self, content: _File, where: str, reading: Reading) -> dict[Id, int]:
        """The number of each declared category, by its id in the file."""
        numbers: dict[Id, int] = {}
        seen: set[int] = set()
        for category in content.categories or []:
            name = plain_name(category.name) or f"category {category.id}"
            number = reading.names.number(name)
            if number in seen:
                reading.notes.once("duplicate category", where, f"{name!r} is declared more than once: joined")
            seen.add(number)
            numbers[category.id] = number
            if category.supercategory:
                reading.names.parents[name] = plain_name(category.supercategory)
        return numbers

    def _images(self, content: _File, where: str, reading: Reading) -> dict[Id, _Image]:
        images: dict[Id, _Image] = {}
        for piece in _pieces(content.images, _Image, where, reading):
            for image in piece:
                if image.id in images:
                    reading.faults.add(
                        "duplicate image", where, f"id {image.id} again, for {image.file_name}: left out"
                    )
                else:
                    images[image.id] = image
        return images


def _annotations(
    content: _File, images: Mapping[Id, _Image], numbers: Mapping[Id, int], where: str, reading: Reading
) -> _Columns:
    """The annotations that belong to a picture and a category and have a box."""
    positions = {image_id: position for position, image_id in enumerate(images)}
    pieces = [_columns([], {}, {})]
    for annotations in _pieces(content.annotations, _Annotation, where, reading):
        columns = _columns(annotations, positions, numbers)
        bad = (columns.image < 0) | (columns.labels < 0) | np.isnan(columns.boxes[:, 0])
        for row in np.flatnonzero(bad):
            _note_annotation(annotations[row], positions, numbers, where, reading)
        pieces.append(_taken(columns, ~bad) if bad.any() else columns)
    return _Columns(
        image=np.concatenate([piece.image for piece in pieces]),
        labels=np.concatenate([piece.labels for piece in pieces]),
        boxes=np.concatenate([piece.boxes for piece in pieces]),
        areas=np.concatenate([piece.areas for piece in pieces]),
        crowd=np.concatenate([piece.crowd for piece in pieces]),
    )


def _columns(annotations: list[_Annotation], positions: Mapping[Id, int], numbers: Mapping[Id, int]) -> _Columns:
    count, absent = len(annotations), [np.nan] * 4
    boxes = [item.bbox if item.bbox and len(item.bbox) == 4 else absent for item in annotations]
    areas = (np.nan if item.area is None else item.area for item in annotations)
    return _Columns(
        image=np.fromiter((positions.get(item.image_id, -1) for item in annotations), np.int32, count),
        labels=np.fromiter((numbers.get(item.category_id, -1) for item in annotations), np.int32, count),
        boxes=corners(np.array(boxes, dtype=np.float64).reshape(count, 4), xywh_to_xyxy).astype(np.float32),
        areas=np.fromiter(areas, np.float32, count),
        crowd=np.fromiter((bool(item.iscrowd) for item in annotations), np.bool_, count),
    )


def _taken(columns: _Columns, rows: Bool[np.ndarray, "n"]) -> _Columns:
    return _Columns(
        image=columns.image[rows],
        labels=columns.labels[rows],
        boxes=columns.boxes[rows],
        areas=columns.areas[rows],
        crowd=columns.crowd[rows],
    )


def _note_annotation(
    item: _Annotation, positions: Mapping[Id, int], numbers: Mapping[Id, int], where: str, reading: Reading
) -> None:
    if item.image_id not in positions:
        reading.faults.add("unknown image", where, f"an annotation of image {item.image_id}, which is not listed")
    elif item.category_id not in numbers:
        detail = f"category_id {item.category_id} is not declared"
        reading.faults.add("unknown category", f"{where}, image {item.image_id}", detail)
    else:
        detail = f"bbox {item.bbox}, expected [x, y, width, height]"
        reading.faults.add("unreadable box", f"{where}, image {item.image_id}", detail)


def _split_of(file: Path) -> str:
    return file.stem.removeprefix("instances_")


def _file_in(folder: Path) -> Path | None:
    files = (folder / name for name in _IN_SPLIT_FOLDERS)
    return next((file for file in files if there(file, Path.is_file) and _looks_like_coco(file)), None)


def _coco_files(folder: Path) -> list[Path]:
    files = [Path(entry.path) for entry in glance(folder) if entry.name.lower().endswith(".json") and entry.is_file()]
    files = [file for file in files if not _OTHER_TASKS.match(file.name) and _looks_like_coco(file)]
    return [file for file in files if file.name.startswith("instances_")] or files


def _looks_like_coco(path: Path) -> bool:
    """Whether the first and the last bytes of a JSON file hold the keys of COCO."""
    try:
        with path.open("rb") as file:
            ends = file.read(_SNIFF_BYTES)
            file.seek(max(len(ends), path.stat().st_size - _SNIFF_BYTES))
            ends += file.read()
    except OSError:
        return False
    keys = sum(key in ends for key in (b'"images"', b'"annotations"', b'"categories"'))
    return ends.lstrip()[:1] == b"{" and keys >= 2 and b'"segments_info"' not in ends


def _decoded(path: Path) -> _File:
    """The file with its long lists still undecoded.

    Raises:
        DataError: it is no JSON, or its parts are not lists.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return msgspec.json.decode(data, type=_File)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            # Python writes NaN and Infinity, which are no JSON; they become null, and their boxes faults.
            return msgspec.json.decode(msgspec.json.encode(json.loads(data[:])), type=_File)
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        what = f"not readable as COCO JSON: {error}"
        raise DataError(what, where=path, hint="check that the file is complete (it may be cut off)") from None


def _pieces(array: msgspec.Raw, kind: type[Item], where: str, reading: Reading) -> Iterator[list[Item]]:
    """A JSON array of objects, decoded piece by piece, so that a large file never is held as objects at once."""
    decoder = msgspec.json.Decoder(list[kind])  # type: ignore[valid-type]
    for text in _cut(memoryview(array)):
        try:
            yield decoder.decode(text)
        except msgspec.ValidationError:
            yield _one_by_one(text, kind, where, reading)


def _one_by_one(text: bytes, kind: type[Item], where: str, reading: Reading) -> list[Item]:
    """The objects of a JSON array that can be understood."""
    items = []
    for raw in msgspec.json.decode(text, type=list[msgspec.Raw]):
        try:
            items.append(msgspec.json.decode(raw, type=kind, strict=False))
        except msgspec.ValidationError as error:
            start = bytes(raw)[:80].decode(errors="replace")
            reading.faults.add("unreadable annotation", where, f"{error}: {start}")
    return items


def _cut(array: memoryview) -> Iterator[bytes]:
    """Cuts the text of a JSON array of objects into texts of shorter arrays.

    A cut between `}` and `{` may fall inside of an object or a string. Then the piece before it is no JSON, and the
    next cut is tried: what parses was cut in the right place.
    """
    if array[:1].tobytes() != b"[":
        return  # null
    start, size = 1, _PIECE_BYTES
    while array.nbytes - start > size:
        chunk = bytes(array[start : start + size])
        cut = _last_cut(chunk)
        if cut is None:
            size *= 2
            continue
        yield b"[" + chunk[:cut] + b"]"
        start += chunk.index(b"{", cut)
        size = _PIECE_BYTES
    yield b"[" + bytes(array[start:])


def _last_cut(chunk: bytes) -> int | None:
    """Where the last whole object of a chunk ends."""
    ends = [match.start() + 1 for match in _BETWEEN_OBJECTS.finditer(chunk)][-50:]
    for end in reversed(ends):
        try:
            msgspec.json.decode(b"[" + chunk[:end] + b"]", type=list[msgspec.Raw])
        except msgspec.DecodeError:
            continue
        return end
    return None
