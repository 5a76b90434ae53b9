"""labelme (and X-AnyLabeling): one JSON file an image, beside it or in a folder of its own.

Rectangles, circles, polygons, rotated boxes and masks are read as the boxes around them; lines and points are no
objects. Shapes of one label and one `group_id` are parts of one object, as in labelme's own converters. Objects with
`difficult`, or with a flag of that name or `ignore` or `crowd`, are ignored ones. The image itself, which a file may
hold as text (`imageData`), is skipped unread.
"""

import contextlib
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Float

from metr.data.formats.base import (
    UNREADABLE,
    RawImage,
    Reader,
    Reading,
    note_unannotated,
    plain_name,
    twin_folders,
    whole_size,
)
from metr.data.formats.files import OutsideError, folders_within, glance
from metr.data.formats.image_conflicts import Stems, boxes_of, locate_own
from metr.data.formats.json_lines import numbers
from metr.data.formats.text import BYTE_ORDER_MARK
from metr.data.splits import canonical_split
from metr.errors import DataError

_DEPTH = 3
# A folder's first files may be broken or something else. What tells a file stands before and after the image in it.
_SNIFFED, _SNIFF_BYTES = 20, 1 << 14
_KEYS = (re.compile(rb'"shapes"\s*:'), re.compile(rb'"(imagePath|imageData|shape_type)"\s*:'))
# The fewest points of the shapes that have an extent.
_SHAPES = {"rectangle": 2, "circle": 2, "mask": 2, "polygon": 3, "rotation": 3, "oriented_rectangle": 3}
_IGNORING_FLAGS = frozenset({"difficult", "ignore", "ignored", "crowd", "iscrowd", "is_crowd"})
# What labelme's lists of labels call pixels that belong to nothing.
_NO_OBJECT = frozenset({"__ignore__", "_background_"})


class _Shape(msgspec.Struct):
    label: str | int | None = None
    points: Any = None
    shape_type: str | None = None
    group_id: int | str | None = None
    flags: Any = None
    difficult: bool | None = None


class _File(msgspec.Struct):
    shapes: list[_Shape]
    image: str | None = msgspec.field(name="imagePath", default=None)
    height: float | None = msgspec.field(name="imageHeight", default=None)
    width: float | None = msgspec.field(name="imageWidth", default=None)


@dataclass(kw_only=True)
class _Object:
    """An object, whose box grows with each of its shapes."""

    label: int
    box: Float[np.ndarray, "4"]
    ignored: bool
    mark: str


class LabelmeReader(Reader):
    """labelme JSON beside the images or in folders of its own. A split is made of folders with such files."""

    format = "labelme"
    looks_like = "labelme: a JSON file with shapes for each image, beside it"

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with labelme files, at most a few folders deep."""
        if not path.is_dir():
            return None
        splits: dict[str, tuple[Path, ...]] = {}
        for folder in folders_within(path, _DEPTH):
            files = (Path(entry.path) for entry in glance(folder) if entry.name.lower().endswith(".json"))
            if any(map(_looks_like_labelme, islice(files, _SNIFFED))):
                parts = folder.relative_to(path).parts
                name = next((part for part in reversed(parts) if canonical_split(part)), "all")
                splits[name] = (*splits.get(name, ()), folder)
        return cls(path, splits) if splits else None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split, sorted by the names of their files."""
        annotated: set[str] = set()
        for source in self.splits[split]:
            folder = self.within(source)
            folders = twin_folders(reading.files, folder)
            stems = Stems(reading.files.listing(folder), ".json")
            for name in sorted(reading.files.listing(folder)):
                if not name.lower().endswith(".json"):
                    continue
                raw = _read_file(posixpath.join(folder, name), folders, stems, reading)
                if raw is not None and raw.path in annotated:
                    detail = f"{raw.path} again, with {boxes_of(len(raw.boxes))}: left out"
                    reading.issues.add("duplicate image", raw.where, detail)
                elif raw is not None:
                    annotated.add(raw.path)
                    yield raw
        note_unannotated(annotated, "no JSON file for it: left out", reading)


def _read_file(where: str, folders: Sequence[str], stems: Stems, reading: Reading) -> RawImage | None:
    try:
        data = reading.files.read(where).removeprefix(BYTE_ORDER_MARK)
        content = msgspec.json.decode(data, type=_File, strict=False)
    except (msgspec.MsgspecError, DataError, RecursionError, ValueError) as error:
        reading.issues.add("unreadable annotation", where, error.what if isinstance(error, DataError) else str(error))
        return None
    path = _image(where, content.image or "", folders, stems, reading)
    if path is None:
        return None
    objects = _objects(content.shapes, where, reading)
    return RawImage(
        where=where,
        image_id=path,
        path=path,
        size=whole_size(content.height, content.width),
        boxes=np.array([item.box for item in objects], dtype=np.float64).reshape(-1, 4),
        labels=np.array([item.label for item in objects], dtype=np.int64),
        ignore=np.array([item.ignored for item in objects], dtype=bool),
        marks=[item.mark for item in objects],
    )


def _objects(shapes: Sequence[_Shape], where: str, reading: Reading) -> list[_Object]:
    """The objects of a file: its shapes, those of one group joined."""
    objects: list[_Object] = []
    groups: dict[tuple[int, int | str], _Object] = {}
    for index, shape in enumerate(shapes, start=1):
        place, kind = f"{where}, shape {index}", shape.shape_type or "polygon"
        name = plain_name(str("" if shape.label is None else shape.label))
        if kind not in _SHAPES:
            reading.issues.add("unsupported shape", place, f"a {kind} of {name!r}: left out")
            continue
        box = _around(shape.points, kind)
        if not name or name in _NO_OBJECT:
            reading.issues.add("unknown category", place, f"a {kind} of {name!r}, {shape.points!r}"[:80])
            continue
        corners = np.array(UNREADABLE) if box is None else box
        item = _Object(label=reading.names.number(name), box=corners, ignored=_ignored(shape), mark=f"shape {index}")
        known = None if shape.group_id is None or box is None else groups.setdefault((item.label, shape.group_id), item)
        if known is None or known is item:
            objects.append(item)
        else:
            known.box = np.concatenate([np.minimum(known.box[:2], corners[:2]), np.maximum(known.box[2:], corners[2:])])
            known.ignored = known.ignored or item.ignored
    return objects


def _around(points: Any, kind: str) -> Float[np.ndarray, "4"] | None:
    """The corners of the box around a shape; None where its points are none, or too few."""
    rows = [numbers(point, 2) for point in points] if isinstance(points, list) else []
    known = [row for row in rows if row is not None]
    if len(known) < max(len(rows), _SHAPES[kind]):
        return None
    corners = np.array(known, dtype=np.float64)
    if kind == "circle":  # the centre, and a point of the line
        radius = np.hypot(*(corners[1] - corners[0]))
        return np.concatenate([corners[0] - radius, corners[0] + radius])
    return np.concatenate([corners.min(axis=0), corners.max(axis=0)])


def _ignored(shape: _Shape) -> bool:
    flags = shape.flags if isinstance(shape.flags, dict) else {}
    return bool(shape.difficult) or any(flags.get(flag) is True for flag in _IGNORING_FLAGS)


def _image(where: str, named: str, folders: Sequence[str], stems: Stems, reading: Reading) -> str | None:
    """The image of a file: of the same name beside it, else the one it names, else of the same name elsewhere.

    What is called like another file is that file's.
    """
    folder, name = posixpath.split(where)
    stem = posixpath.splitext(name)[0]
    options = [reading.files.find_stem(stem, [folder], named)]
    if named:
        # Paths that lead elsewhere were written where the folders lay otherwise.
        with contextlib.suppress(OutsideError):
            options.append(reading.files.find(named, [folder]))
    options.append(reading.files.find_stem(stem, folders, named))
    path = next((option for option in options if option and stems.belongs(option, stem)), None)
    return path or locate_own(named or stem, stem, folders, stems, where, reading)


def _looks_like_labelme(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            ends = file.read(_SNIFF_BYTES)
            file.seek(max(len(ends), path.stat().st_size - _SNIFF_BYTES))
            ends += file.read()
    except OSError:
        return False
    return ends.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"{" and all(key.search(ends) for key in _KEYS)
