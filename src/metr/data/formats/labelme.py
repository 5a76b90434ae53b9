"""labelme (and X-AnyLabeling): one JSON file an image, beside it or in a folder of its own.

Rectangles, circles, polygons, rotated boxes and masks are read as the boxes around them; lines and points are no
objects. Shapes of one label and one `group_id` are parts of one object, as in labelme's own converters. Objects with
`difficult`, or with a flag of that name or `ignore` or `crowd`, are ignored ones. The image itself, which a file may
hold as text (`imageData`), is skipped unread.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Float

from metr.data.formats.base import BoxList, RawImage, Reading, plain_name, whole_size
from metr.data.formats.file_per_image import AnnotationFolder, FilePerImageReader
from metr.data.formats.files import ends_of, utf_8
from metr.data.formats.json_lines import numbers
from metr.data.formats.written import WrittenBox, WrittenImage, rounded
from metr.errors import DataError

# The keys that identify a file stand before and after the image in it.
_SNIFF_BYTES = 1 << 14
_KEYS = (re.compile(rb'"shapes"\s*:'), re.compile(rb'"(imagePath|imageData|shape_type)"\s*:'))
# The fewest points of the shapes that have an extent.
_SHAPES = {"rectangle": 2, "circle": 2, "mask": 2, "polygon": 3, "rotation": 3, "oriented_rectangle": 3}
_IGNORING_FLAGS = frozenset({"difficult", "ignore", "ignored", "crowd", "iscrowd", "is_crowd"})
# What labelme's lists of labels call pixels that belong to nothing.
_NO_OBJECT = frozenset({"__ignore__", "_background_"})
# The version of labelme whose files the written ones are like.
_WRITTEN_AS = "5.5.0"


class _Shape(msgspec.Struct):
    label: str | int | None = None
    points: Any = None
    shape_type: str | None = None
    group_id: int | str | None = None
    flags: Any = None
    difficult: bool | None = None

    @property
    def name(self) -> str:
        """The category; empty where the shape has none."""
        name = plain_name(str("" if self.label is None else self.label))
        return "" if name in _NO_OBJECT else name

    @property
    def ignored(self) -> bool:
        """Whether finding the object is neither right nor wrong."""
        flags = self.flags if isinstance(self.flags, dict) else {}
        return bool(self.difficult) or any(flags.get(flag) is True for flag in _IGNORING_FLAGS)


class _File(msgspec.Struct):
    shapes: list[_Shape]
    image: str | None = msgspec.field(name="imagePath", default=None)
    height: float | None = msgspec.field(name="imageHeight", default=None)
    width: float | None = msgspec.field(name="imageWidth", default=None)


@dataclass(kw_only=True)
class _Object:
    """An object, whose box grows with each of its shapes; `box` is None where it cannot be read."""

    name: str
    box: Float[np.ndarray, "4"] | None
    ignored: bool
    number: int
    found: str


class LabelmeReader(FilePerImageReader):
    """labelme JSON beside the images or in folders of its own."""

    format = "labelme"
    looks_like = "labelme: a JSON file with shapes for each image, beside it"
    suffix = ".json"

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like labelme JSON; a cheap look."""
        ends = utf_8(ends_of(path, _SNIFF_BYTES))
        return ends.lstrip()[:1] == b"{" and all(key.search(ends) for key in _KEYS)

    def read_file(self, where: str, folder: AnnotationFolder, reading: Reading) -> RawImage | None:
        """The image of a JSON file; None, and an issue, where the file cannot be used."""
        try:
            data = utf_8(reading.files.read(where))
            content = msgspec.json.decode(data, type=_File, strict=False)
        except (msgspec.MsgspecError, DataError, RecursionError, ValueError) as error:
            detail = error.what if isinstance(error, DataError) else str(error)
            reading.issues.add("unreadable annotation", where, detail)
            return None
        path = folder.image_of(where, content.image or "", reading, beside_first=True)
        if path is None:
            return None
        boxes = BoxList(where, reading)
        for item in _objects(content.shapes, boxes):
            box = None if item.box is None else item.box.tolist()
            boxes.add(item.name, box, f"shape {item.number}", ignore=item.ignored, found=item.found)
        return boxes.image(path, size=whole_size(content.height, content.width))


def _objects(shapes: Sequence[_Shape], boxes: BoxList) -> list[_Object]:
    """The objects of a file: its shapes, those of one group joined; `boxes` notes those without an extent."""
    objects: list[_Object] = []
    groups: dict[tuple[str, int | str], _Object] = {}
    for number, shape in enumerate(shapes, start=1):
        kind = shape.shape_type or "polygon"
        if kind not in _SHAPES:
            boxes.leave_out(shape.name, f"shape {number}", kind)
            continue
        found = f"a {kind} of {shape.label!r}, {shape.points!r}"
        box = _around(shape.points, kind)
        item = _Object(name=shape.name, box=box, ignored=shape.ignored, number=number, found=found)
        known = item
        if shape.group_id is not None and box is not None and item.name:
            known = groups.setdefault((item.name, shape.group_id), item)
        if known is item or known.box is None or box is None:
            objects.append(item)
        else:
            known.box = np.concatenate([np.minimum(known.box[:2], box[:2]), np.maximum(known.box[2:], box[2:])])
            known.ignored = known.ignored or item.ignored
    return objects


def _around(points: Any, kind: str) -> Float[np.ndarray, "4"] | None:
    """The corners of the box around a shape; None where its points cannot be read, or are too few."""
    rows = [numbers(point, 2) for point in points] if isinstance(points, list) else []
    known = [row for row in rows if row is not None]
    if len(known) < max(len(rows), _SHAPES[kind]):
        return None
    corners = np.array(known, dtype=np.float64)
    if kind == "circle":  # the centre, and a point of the line
        radius = np.hypot(*(corners[1] - corners[0]))
        return np.concatenate([corners[0] - radius, corners[0] + radius])
    return np.concatenate([corners.min(axis=0), corners.max(axis=0)])


def labelme_file(image: WrittenImage) -> dict[str, Any]:
    """The JSON of an image that lies beside it, without the image itself."""
    return {
        "version": _WRITTEN_AS,
        "flags": {},
        "shapes": [labelme_shape(box) for box in image.boxes],
        "imagePath": image.name,
        "imageData": None,
        "imageHeight": image.height,
        "imageWidth": image.width,
    }


def labelme_shape(box: WrittenBox) -> dict[str, Any]:
    """A rectangle. One that a detector found has its `score`, as X-AnyLabeling writes it, and a description."""
    left, top, right, bottom = map(rounded, box.box)
    shape: dict[str, Any] = {
        "label": box.name,
        "points": [[left, top], [right, bottom]],
        "group_id": None,
        "description": "" if box.score is None else f"found by METR, score {box.score:.3f}",
        "shape_type": "rectangle",
        "flags": {"ignore": True} if box.ignore else {},
    }
    return shape if box.score is None else {**shape, "score": round(box.score, 5)}
