"""COCO JSON: `annotations/instances_*.json` with picture folders, or one JSON beside the pictures of each split.

Crowds are ignored objects. Polygons are skipped unread. Large files are decoded piece by piece.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar, TypeVar

import msgspec
import numpy as np
from jaxtyping import Bool, Float, Int

from metr.boxes import xywh_to_xyxy
from metr.data.readers.base import RawImage, Reader, Reading, corners, locate, picture_folders, plain_name, whole_size
from metr.data.readers.files import glance, there
from metr.data.readers.json_pieces import Value, values_of
from metr.errors import DataError

# What tools call the file that lies in the folder of a split (Roboflow, FiftyOne, Label Studio, ...).
_IN_SPLIT_FOLDERS = ("_annotations.coco.json", "annotations.json", "labels.json", "coco.json", "result.json")
# Files beside `instances_*.json` that describe the same pictures in other ways.
_OTHER_TASKS = re.compile(r"^(captions|person_keypoints|panoptic|stuff|image_info)_")
_FIRST_BYTES, _SNIFF_BYTES = 1 << 12, 1 << 20
_LABELME = re.compile(rb'"(shapes|imagePath)"\s*:')
_PIECE_BYTES = 1 << 24

Id = int | str


class CocoCategory(msgspec.Struct):
    """A category as the file declares it."""

    id: Id
    name: str
    supercategory: str | None = None
    synset: str | None = None


class CocoImage(msgspec.Struct, gc=False):
    """A picture as the file lists it."""

    id: Id
    file_name: str
    height: float | None = None
    width: float | None = None


class CocoAnnotation(msgspec.Struct, gc=False):
    """A box as the file lists it."""

    image_id: Id
    category_id: Id
    bbox: list[float] | None = None
    area: float | None = None
    iscrowd: int | bool | None = None

    @property
    def ignored(self) -> bool:
        """Whether finding the object is neither right nor wrong."""
        return bool(self.iscrowd)


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file with its long lists still undecoded; None where it has none."""

    images: Value | None
    annotations: Value | None
    categories: list[CocoCategory]


Item = TypeVar("Item", CocoImage, CocoAnnotation)


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Annotations column by column: `image` is the place of their picture in the file's list."""

    image: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    boxes: Float[np.ndarray, "n 4"]
    areas: Float[np.ndarray, "n"]
    ignore: Bool[np.ndarray, "n"]


class CocoReader(Reader):
    """COCO JSON, plain or one file in the folder of each split (Roboflow).

    Formats that are COCO but for a few rules of their own inherit from it: `fits`, `picture_finder`, `category_name`,
    `annotated` and the two types are what they may change.
    """

    format = "coco"
    looks_like = "COCO: annotations/*.json, or a JSON file with images, annotations and categories beside the pictures"
    declares_categories = True
    image_type: ClassVar[type[CocoImage]] = CocoImage
    annotation_type: ClassVar[type[CocoAnnotation]] = CocoAnnotation

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with COCO files, or of one such file."""
        if path.is_file():
            if path.suffix.lower() != ".json" or not cls.fits(path):
                return None
            root = path.parent.parent if path.parent.name == "annotations" else path.parent
            return cls(root, {split_of(path): (path,)})
        for folder in (path / "annotations", path):
            files = _coco_files(folder, cls.fits)
            if files:
                return cls(path, {split_of(file): (file,) for file in files})
        folders = [Path(entry.path) for entry in glance(path) if entry.is_dir()]
        found = {folder.name: _file_in(folder, cls.fits) for folder in folders}
        splits = {name: (file,) for name, file in found.items() if file is not None}
        return cls(path, splits) if splits else None

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a JSON file looks like this format; a cheap look."""
        return looks_like_coco(file_ends(path))

    def picture_finder(self, split: str, file: Path, reading: Reading) -> Callable[[CocoImage], str | None]:
        """Finds the pictures that an annotation file lists; where one is missing, None and a fault."""
        where, folders = self.within(file), picture_folders(reading.files, split, self.within(file.parent))
        return lambda image: locate(image.file_name, folders, where, reading)

    def category_name(self, category: CocoCategory) -> str:
        """The name of a declared category."""
        return plain_name(category.name) or f"category {category.id}"

    def annotated(
        self,
        image: CocoImage,  # noqa: ARG002
        labels: Int[np.ndarray, "m"],  # noqa: ARG002
        numbers: Mapping[Id, int],  # noqa: ARG002
    ) -> Sequence[int] | None:
        """The categories that are annotated exhaustively in a picture with boxes of `labels`; None means all."""
        return None

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
        columns = _annotations(content, self.annotation_type, images, numbers, where, reading)
        order = np.argsort(columns.image, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(columns.image, minlength=len(images)))])
        find = self.picture_finder(split, file, reading)
        for position, image in enumerate(images.values()):
            path = find(image)
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
                ignore=columns.ignore[rows],
                annotated=self.annotated(image, columns.labels[rows], numbers),
            )

    def _number_categories(self, content: _File, where: str, reading: Reading) -> dict[Id, int]:
        """The number of each declared category, by its id in the file."""
        numbers: dict[Id, int] = {}
        seen: set[int] = set()
        for category in content.categories:
            name = self.category_name(category)
            number = reading.names.number(name)
            if number in seen:
                reading.notes.once("duplicate category", where, f"{name!r} is declared more than once: joined")
            seen.add(number)
            numbers[category.id] = number
            if category.supercategory:
                reading.names.parents[name] = plain_name(category.supercategory)
        return numbers

    def _images(self, content: _File, where: str, reading: Reading) -> dict[Id, CocoImage]:
        images: dict[Id, CocoImage] = {}
        for piece in _pieces(content.images, self.image_type, where, reading):
            for image in piece:
                if image.id in images:
                    reading.faults.add(
                        "duplicate image", where, f"id {image.id} again, for {image.file_name}: left out"
                    )
                else:
                    images[image.id] = image
        return images


def _annotations(
    content: _File,
    kind: type[CocoAnnotation],
    images: Mapping[Id, CocoImage],
    numbers: Mapping[Id, int],
    where: str,
    reading: Reading,
) -> _Columns:
    """The annotations that belong to a picture and a category and have a box."""
    positions = {image_id: position for position, image_id in enumerate(images)}
    parts = {name: [column] for name, column in vars(_columns([], {}, {})).items()}
    for annotations in _pieces(content.annotations, kind, where, reading):
        columns = _columns(annotations, positions, numbers)
        bad = (columns.image < 0) | (columns.labels < 0) | np.isnan(columns.boxes[:, 0])
        for row in np.flatnonzero(bad):
            _note_annotation(annotations[row], positions, numbers, where, reading)
        for name, column in vars(columns).items():
            parts[name].append(column[~bad] if bad.any() else column)
    # One column after another, its parts let go: all of them twice is what would not fit.
    return _Columns(**{name: np.concatenate(parts.pop(name)) for name in list(parts)})


def _columns(annotations: list[CocoAnnotation], positions: Mapping[Id, int], numbers: Mapping[Id, int]) -> _Columns:
    count, absent = len(annotations), [np.nan] * 4
    boxes = (item.bbox if item.bbox and len(item.bbox) == 4 else absent for item in annotations)
    areas = (np.nan if item.area is None else item.area for item in annotations)
    flat = np.fromiter(chain.from_iterable(boxes), np.float64, 4 * count)
    with np.errstate(over="ignore"):  # what is too large for the type is infinite: its box is found to be unreadable
        return _Columns(
            image=np.fromiter((positions.get(item.image_id, -1) for item in annotations), np.int32, count),
            labels=np.fromiter((numbers.get(item.category_id, -1) for item in annotations), np.int32, count),
            boxes=corners(flat.reshape(count, 4), xywh_to_xyxy).astype(np.float32),
            areas=np.fromiter(areas, np.float32, count),
            ignore=np.fromiter((item.ignored for item in annotations), np.bool_, count),
        )


def _note_annotation(
    item: CocoAnnotation, positions: Mapping[Id, int], numbers: Mapping[Id, int], where: str, reading: Reading
) -> None:
    if item.image_id not in positions:
        reading.faults.add("unknown image", where, f"an annotation of image {item.image_id}, which is not listed")
    elif item.category_id not in numbers:
        detail = f"category_id {item.category_id} is not declared"
        reading.faults.add("unknown category", f"{where}, image {item.image_id}", detail)
    else:
        detail = f"bbox {item.bbox}, expected [x, y, width, height]"
        reading.faults.add("unreadable box", f"{where}, image {item.image_id}", detail)


def split_of(file: Path) -> str:
    """The dataset's own name of the split that a file describes."""
    return file.stem.removeprefix("instances_")


def _file_in(folder: Path, fits: Callable[[Path], bool]) -> Path | None:
    files = (folder / name for name in _IN_SPLIT_FOLDERS)
    return next((file for file in files if there(file, Path.is_file) and fits(file)), None)


def _coco_files(folder: Path, fits: Callable[[Path], bool]) -> list[Path]:
    files = [Path(entry.path) for entry in glance(folder) if entry.name.lower().endswith(".json") and entry.is_file()]
    files = [file for file in files if not _OTHER_TASKS.match(file.name) and fits(file)]
    return [file for file in files if file.name.startswith("instances_")] or files


def file_ends(path: Path) -> bytes:
    """The first and the last bytes of a file, a mebibyte of each; nothing where it cannot be read or is of labelme."""
    try:
        with path.open("rb") as file:
            ends = file.read(_FIRST_BYTES)
            if _LABELME.search(ends):
                return b""  # folders of labelme hold thousands of such files, with a picture in each
            ends += file.read(_SNIFF_BYTES - _FIRST_BYTES)
            file.seek(max(len(ends), path.stat().st_size - _SNIFF_BYTES))
            return ends + file.read()
    except OSError:
        return b""


def looks_like_coco(ends: bytes) -> bool:
    """Whether the ends of a JSON file (see `file_ends`) hold the keys of COCO."""
    keys = sum(key in ends for key in (b'"images"', b'"annotations"', b'"categories"'))
    return ends.lstrip()[:1] == b"{" and keys >= 2 and b'"segments_info"' not in ends


def _decoded(path: Path) -> _File:
    """The file with its long lists still undecoded.

    Raises:
        DataError: it is no JSON, or its categories are no categories.
    """
    try:
        values = values_of(path, _PIECE_BYTES)
        text = values["categories"].text() if "categories" in values else b"null"
        categories = msgspec.json.decode(_plain(text), type=list[CocoCategory] | None)
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _unreadable(path, error) from None
    return _File(images=values.get("images"), annotations=values.get("annotations"), categories=categories or [])


def _pieces(array: Value | None, kind: type[Item], where: str, reading: Reading) -> Iterator[list[Item]]:
    """A JSON array of objects, decoded piece by piece, so that a large file never is held as objects at once.

    Raises:
        DataError: it is no JSON.
    """
    if array is None:
        return
    decoder = msgspec.json.Decoder(list[kind])  # type: ignore[valid-type]
    try:
        for text in array.pieces():
            try:
                yield decoder.decode(text)
            except msgspec.DecodeError:
                yield _one_by_one(text, kind, where, reading)
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _unreadable(array.path, error) from None


def _one_by_one(text: bytes, kind: type[Item], where: str, reading: Reading) -> list[Item]:
    """The objects of a JSON array that can be understood."""
    items = []
    for raw in msgspec.json.decode(_plain(text), type=list[msgspec.Raw]):
        try:
            items.append(msgspec.json.decode(raw, type=kind, strict=False))
        except msgspec.ValidationError as error:
            start = bytes(raw)[:80].decode(errors="replace")
            reading.faults.add("unreadable annotation", where, f"{error}: {start}")
    return items


def _plain(text: bytes) -> bytes:
    """JSON, also where Python wrote NaN and Infinity, which are none: they become null, and their boxes faults."""
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError:
        return msgspec.json.encode(json.loads(text))
    return text


def _unreadable(path: Path, error: Exception) -> DataError:
    what = f"not readable as COCO JSON: {error}"
    return DataError(what, where=path, hint="check that the file is complete (it may be cut off)")
