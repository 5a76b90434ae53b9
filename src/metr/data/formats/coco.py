"""COCO JSON: `annotations/instances_*.json` with image folders, or one JSON beside the images of each split.

Crowds are ignored objects. Segmentations are skipped unread, unless an annotation has no box but that around its own.
Large files are decoded piece by piece.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from metr.data.formats.base import (
    UNREADABLE,
    BoxTable,
    RawImage,
    Reader,
    Reading,
    plain_name,
    whole_size,
)
from metr.data.formats.box_kinds import Written, judged, sizes_of, to_corners
from metr.data.formats.coco_json import (
    CocoAnnotation,
    CocoCategory,
    CocoFile,
    CocoImage,
    Id,
    coco_ends,
    look_through,
    pieces_of,
)
from metr.data.formats.files import files_in, folders_in, signature, there
from metr.data.formats.locating import ImageConflicts, dataset_root, image_folders, locate, resolve_conflicts
from metr.data.records import TEST, UNNAMED, canonical_split
from metr.errors import DataError, counted

# What tools call the file that lies in the folder of a split (Roboflow, FiftyOne, Label Studio, ...).
_IN_SPLIT_FOLDERS = ("_annotations.coco.json", "annotations.json", "labels.json", "coco.json", "result.json")
# Files beside `instances_*.json` that describe the same images in other ways.
_OTHER_TASKS = re.compile(r"^(captions|panoptic|stuff|image_info)_")
_KEYPOINTS = "person_keypoints_"
# The number of an image whose id is that of another image, too.
_SHARED = -2
_PIECE_BYTES = 1 << 24


class CocoReader(Reader):
    """COCO JSON, plain or one file in the folder of each split (Roboflow).

    Formats that differ from COCO in a few rules inherit from it. They may override `fits`, `image_finder`,
    `image_names`, `category_name`, `annotated` and the class variables.
    """

    format = "coco"
    looks_like = "COCO: annotations/*.json, or a JSON file with images, annotations and categories beside the images"
    declares_categories = True
    takes_boxes = True
    annotates_whole_images = False
    image_type: ClassVar[type[CocoImage]] = CocoImage
    annotation_type: ClassVar[type[CocoAnnotation]] = CocoAnnotation
    # Whether the same name under two ids is one image, whose boxes belong together.
    joins_images: ClassVar[bool] = True
    # Whether each image lists the categories that are annotated in it.
    federated: ClassVar[bool] = False

    def __init__(self, root: Path, splits: Mapping[str, tuple[Path, ...]]) -> None:
        super().__init__(root, splits)
        self._contents: dict[tuple[Path, tuple[int, ...]], CocoFile] = {}

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with COCO files, or of one such file."""
        if path.is_file():
            if path.suffix.lower() != ".json" or not cls.fits(path):
                return None
            return cls(dataset_root(path), {split_of(path): (path,)})
        for folder in (path / "annotations", path):
            files = _coco_files(folder, cls.fits)
            if files:
                return cls(path, {split_of(file): (file,) for file in files})
        found = {folder.name: _file_in(folder, cls.fits) for folder in folders_in(path)}
        splits = {name: (file,) for name, file in found.items() if file is not None}
        return cls(path, splits) if splits else None

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a JSON file looks like this format; a cheap look."""
        return bool(coco_ends(path))

    def image_finder(self, split: str, file: Path, reading: Reading) -> Callable[[CocoImage], str | None]:
        """Finds the images that an annotation file lists; where one is missing, None and an issue."""
        where, folders = self.within(file), image_folders(reading.files, split, self.within(file.parent))
        return lambda image: locate(image.file_name, folders, where, reading)

    def image_names(self, image: CocoImage) -> Sequence[str]:
        """The names that an image may have, likeliest first."""
        return (image.file_name,)

    def category_name(self, category: CocoCategory) -> str:
        """The name of a declared category."""
        return plain_name(category.name) or f"category {category.id}"

    def annotated(
        self,
        image: CocoImage,  # noqa: ARG002
        labels: Int[np.ndarray, "m"],  # noqa: ARG002
        numbers: Mapping[Id, int],  # noqa: ARG002
    ) -> Sequence[int] | None:
        """The categories that are annotated exhaustively in an image with boxes of `labels`; None means all."""
        return None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of the file."""
        files = self.splits[split]
        for file in files:
            prefix = f"{file.stem}/" if len(files) > 1 else ""
            yield from self._read_file(file, split, prefix, reading)

    def _read_file(self, file: Path, split: str, prefix: str, reading: Reading) -> Iterator[RawImage]:
        where = self.within(file)
        reading.files.touch(where)
        content = self._content(file)
        if not self._has_annotations(content, file, split, reading):
            return
        numbers = self._number_categories(content, where, reading)
        declared = None if self.federated else self._declared(content, numbers, reading)
        images, positions = self._images(content, where, reading)
        table = _table(content, self.annotation_type, positions, numbers, where, reading)
        find, listed = self.image_finder(split, file, reading), list(images.values())
        paths = list(map(find, listed))
        written = self._corners(table, listed, paths, where, reading)
        conflicts = resolve_conflicts(paths, lambda entry: self.image_names(listed[entry]))
        joined = self._join(conflicts, listed, table, where, reading)
        for path, position in conflicts.owners.items():
            image, rows = listed[position], table.by_image[position]
            if position in joined:
                rows = _different(table, rows)
            annotated = self.annotated(image, table.labels[rows], numbers)
            yield RawImage(
                where=f"{where}, image {image.id}",
                image_id=f"{prefix}{image.id}" if prefix else image.id,
                path=path,
                size=whole_size(image.height, image.width),
                boxes=table.boxes[rows],
                labels=table.labels[rows],
                relative=written.as_fractions,
                areas=None if table.areas is None or written.as_fractions else table.areas[rows],
                ignore=table.ignore[rows],
                annotated=declared if annotated is None else annotated,
                corners=written.corners,
            )

    def _corners(
        self,
        table: BoxTable,
        images: Sequence[CocoImage],
        paths: Sequence[str | None],
        where: str,
        reading: Reading,
    ) -> Written:
        """Makes the boxes xyxy, in place; returns what they were."""
        own = ~table.outlined if table.outlined is not None and table.outlined.any() else slice(None)
        sizes = sizes_of([whole_size(image.height, image.width) for image in images], paths, reading)
        boxes = table.boxes[own]
        asked = Written.asked(self.options.boxes)
        written = asked or judged(boxes, table.image[own], sizes, "xywh", where, reading)
        to_corners(boxes, written.kind)
        if not isinstance(own, slice):
            outlines = table.boxes[~own]
            to_corners(outlines, "xywh")
            table.boxes[own] = boxes
            table.boxes[~own] = outlines / np.tile(sizes[table.image[~own]], 2) if written.as_fractions else outlines
        return written

    def _content(self, file: Path) -> CocoFile:
        """A file, looked through once while it stays the same."""
        key = file, signature(file)
        if key not in self._contents:
            self._contents[key] = look_through(file, _PIECE_BYTES)
        return self._contents[key]

    def _has_annotations(self, content: CocoFile, file: Path, split: str, reading: Reading) -> bool:
        """Whether a file has annotations. Test images, whose annotations often are kept secret, are left out.

        Raises:
            DataError: it has none, and is not for tests.
        """
        if content.annotations is not None:
            return True
        what = f"`annotations` {content.instead}, expected a list"
        if canonical_split(split) == TEST and len(self.splits) > 1:
            detail = f"{what}: nothing can be learnt or measured on this split"
            reading.issues.add("unannotated image", self.within(file), detail)
            return False
        hint = 'leave the file out; where truly nothing is in any image, write "annotations": []'
        raise DataError(what, where=file, hint=hint)

    def _declared(self, content: CocoFile, numbers: Mapping[Id, int], reading: Reading) -> Sequence[int] | None:
        """The categories that a file declares, where others of the dataset declare more; None where it has all."""
        others: set[str] = set()
        for file in dict.fromkeys(chain.from_iterable(self.splits.values())):
            reading.files.touch(self.within(file))
            with contextlib.suppress(DataError):  # an error in it is raised when it is read itself
                other = self._content(file)
                others.update(map(self.category_name, other.categories if other.annotations is not None else ()))
        return None if others <= set(map(self.category_name, content.categories)) else sorted(set(numbers.values()))

    def _join(
        self, conflicts: ImageConflicts, images: Sequence[CocoImage], table: BoxTable, where: str, reading: Reading
    ) -> set[int]:
        """Moves the boxes of images that are listed again to the first one; returns the positions that got some."""
        homes, joined = np.arange(len(images), dtype=np.int32), set()
        counts = np.bincount(table.image, minlength=len(images)).tolist()
        for position, path in conflicts.misled:
            detail = f"{images[position].file_name}, with {counted(counts[position], 'box', 'boxes')}"
            detail += f"; {path} is called alike, but is that of another image"
            reading.issues.add("missing image", f"{where}, image {images[position].id}", detail)
        for position, owner in conflicts.repeats:
            image, first = images[position], images[owner]
            sizes = {whole_size(item.height, item.width) for item in (image, first)} - {None}
            fits = self.joins_images and len(sizes) <= 1
            if fits:
                homes[position] = owner
                joined.add(owner)
            detail = f"{image.file_name} again, with {counted(counts[position], 'box', 'boxes')}: "
            detail += f"{'joined to' if fits else 'left out beside'} image {first.id}"
            reading.issues.add("duplicate image", f"{where}, image {image.id}", detail)
        table.image[:] = homes[table.image]
        return joined

    def _number_categories(self, content: CocoFile, where: str, reading: Reading) -> "_ById":
        """The number of each declared category, by its id in the file.

        Raises:
            DataError: an id means two of them.
        """
        numbers = _ById()
        names = list(map(self.category_name, content.categories))
        declared = reading.number_declared(names, where)
        for category, name, number in zip(content.categories, names, declared, strict=True):
            if not plain_name(category.name):
                detail = f"the category of id {category.id} has no name: called {name!r}"
                reading.notes.once("unnamed category", where, detail)
            if numbers.setdefault(category.id, number) != number:
                known = list(reading.names)[numbers[category.id]]
                what, hint = f"category id {category.id} is {known!r} and {name!r}", "give each an id of its own"
                raise DataError(what, where=self.root / where, hint=hint)
            if category.supercategory:
                reading.names.parents[name] = plain_name(category.supercategory)
        return numbers

    def _images(self, content: CocoFile, where: str, reading: Reading) -> tuple[dict[Id, CocoImage], "_ById"]:
        """The images by their ids, and the number of each id in that order.

        Ids that several images have are `_SHARED`; those images are left out.
        """
        images: dict[Id, CocoImage] = {}
        shared: dict[Id, list[str]] = {}
        for piece in pieces_of(content.images, self.image_type, where, reading):
            for image in piece:
                first = images.setdefault(image.id, image)
                if first.file_name != image.file_name:
                    shared.setdefault(image.id, [first.file_name]).append(image.file_name)
                elif first is not image:
                    detail = f"id {image.id} again, for {image.file_name}: left out"
                    reading.issues.add("duplicate image", where, detail)
        for image_id, names in shared.items():
            del images[image_id]
            detail = f"id {image_id} is that of {' and '.join(dict.fromkeys(names))}: left out, with all boxes of it"
            reading.issues.add("duplicate image id", where, f"{detail}; give each image an id of its own")
        return images, _ById(
            {image_id: number for number, image_id in enumerate(images)}, dict.fromkeys(shared, _SHARED)
        )


class _ById(dict[Id, int]):
    """Numbers by ids. A number and a text that is that number are one id, where no two ids are meant; -1 for others.

    `mixed` is an id that was found in that way.
    """

    def __init__(self, *numbers: Mapping[Id, int]) -> None:
        super().__init__()
        for more in numbers:
            self.update(more)
        self._texts: dict[int, list[Id]] | None = None
        self.mixed: Id | None = None

    def __missing__(self, key: Id) -> int:
        """The number of the one id that is spelt as another type, else -1."""
        value = _integer(key)
        if value is None:
            return -1
        if self._texts is None:
            self._texts = {}
            for known in self:
                if (number := _integer(known)) is not None:
                    self._texts.setdefault(number, []).append(known)
        options = self._texts.get(value, [])
        if len(options) != 1:
            return -1
        self.mixed = key if self.mixed is None else self.mixed
        return self[options[0]]


def _integer(key: Id) -> int | None:
    """An id as a number, also where it is written as a text."""
    if isinstance(key, int):
        return key
    return int(key) if key.isascii() and key.isdigit() and len(key) < 20 else None


def _different(table: BoxTable, rows: Int[np.ndarray, "m"]) -> Int[np.ndarray, "k"]:
    """The first of those rows that have the same category and box."""
    values = np.column_stack([table.labels[rows], table.boxes[rows]])
    return rows[np.sort(np.unique(values, axis=0, return_index=True)[1])]


def _table(
    content: CocoFile, kind: type[CocoAnnotation], positions: _ById, numbers: _ById, where: str, reading: Reading
) -> BoxTable:
    """The annotations that belong to an image; `image` is the position of theirs in the list.

    The label of a category that is not declared is `UNNAMED`. The boxes are as the file has them; those that cannot be
    read are NaN.
    """
    parts = {name: [column] for name, column in _columns([], positions, numbers).items()}
    for annotations in pieces_of(content.annotations, kind, where, reading):
        columns = _columns(annotations, positions, numbers)
        bad = (columns["image"] < 0) | (columns["labels"] < 0)
        for row in np.flatnonzero(bad & (columns["image"] != _SHARED)):
            _note_annotation(annotations[row], positions, where, reading)
        columns["labels"][columns["labels"] < 0] = UNNAMED
        owned = columns["image"] >= 0
        for name, column in columns.items():
            parts[name].append(column if owned.all() else column[owned])
    for ids, what in ((positions, "image_id"), (numbers, "category_id")):
        if ids.mixed is not None:
            listed = "a number" if isinstance(ids.mixed, str) else "a text"
            detail = f"{what} {ids.mixed!r} is declared as {listed}: taken for the same, and so are others"
            reading.notes.once("ids of two types", where, detail)
    # One column after another, and its parts let go: all columns twice would need too much memory.
    return BoxTable(**{name: np.concatenate(parts.pop(name)) for name in list(parts)})


def _columns(annotations: Sequence[CocoAnnotation], positions: _ById, numbers: _ById) -> dict[str, np.ndarray]:
    """The columns of a table of boxes; -1 stands for an unknown image or category."""
    count = len(annotations)
    boxes = (item.bbox if item.bbox and len(item.bbox) == 4 else UNREADABLE for item in annotations)
    areas = (np.nan if item.area is None else item.area for item in annotations)
    flat = np.fromiter(chain.from_iterable(boxes), np.float64, 4 * count)
    with np.errstate(over="ignore"):  # what is too large for the type becomes infinite, and so an unreadable box
        return {
            "image": np.fromiter((positions[item.image_id] for item in annotations), np.int32, count),
            "labels": np.fromiter((numbers[item.category_id] for item in annotations), np.int32, count),
            "boxes": flat.reshape(count, 4).astype(np.float32),
            "areas": np.fromiter(areas, np.float32, count),
            "ignore": np.fromiter((item.ignored for item in annotations), np.bool_, count),
            "outlined": np.fromiter((item.outlined for item in annotations), np.bool_, count),
        }


def _note_annotation(item: CocoAnnotation, positions: _ById, where: str, reading: Reading) -> None:
    if positions[item.image_id] < 0:
        reading.issues.add("unknown image", where, f"an annotation of image {item.image_id}, which is not listed")
    else:
        detail = f"category_id {item.category_id} is not declared"
        reading.issues.add("unknown category", f"{where}, image {item.image_id}", detail)


def split_of(file: Path) -> str:
    """The dataset's own name of the split that a file describes."""
    return file.stem.removeprefix("instances_").removeprefix(_KEYPOINTS)


def _file_in(folder: Path, fits: Callable[[Path], bool]) -> Path | None:
    files = (folder / name for name in _IN_SPLIT_FOLDERS)
    return next((file for file in files if there(file, Path.is_file) and fits(file)), None)


def _coco_files(folder: Path, fits: Callable[[Path], bool]) -> list[Path]:
    files = [file for file in files_in(folder, ".json") if not _OTHER_TASKS.match(file.name) and fits(file)]
    others = [file for file in files if not file.name.startswith(_KEYPOINTS)]
    return [file for file in others if file.name.startswith("instances_")] or others or files
