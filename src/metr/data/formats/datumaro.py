"""Datumaro: `annotations/SUBSET.json` with categories and items, and the images in `images/SUBSET`.

Boxes, polygons and polylines are read as the boxes around them, crowds (`is_crowd`) as ignored objects. Masks, points
and other annotations of objects are left out, and their categories count as unknown in that image.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from metr.data.formats.base import BoxList, RawImage, Reading, plain_name, whole_size
from metr.data.formats.files import utf_8
from metr.data.formats.json_lines import numbers, starts_like
from metr.data.formats.locating import locate
from metr.data.formats.many_images import ManyImagesReader
from metr.data.formats.shapes import around, around_rectangle, pairs
from metr.errors import DataError

# What is said of a whole image.
_NO_OBJECTS = frozenset({"label", "caption"})


class _Label(msgspec.Struct):
    name: str


class _Labels(msgspec.Struct):
    labels: list[_Label] = msgspec.field(default_factory=list)


class _Categories(msgspec.Struct):
    label: _Labels = msgspec.field(default_factory=_Labels)


class _Annotation(msgspec.Struct):
    type: str
    label_id: int | None = None
    bbox: list[Any] | None = None
    points: list[Any] | None = None
    attributes: dict[str, Any] = msgspec.field(default_factory=dict)


class _Image(msgspec.Struct):
    path: str = ""
    size: list[Any] | None = None


class _Item(msgspec.Struct):
    id: str
    annotations: list[_Annotation]
    image: _Image = msgspec.field(default_factory=_Image)


class _File(msgspec.Struct):
    categories: _Categories
    items: list[_Item]


class DatumaroReader(ManyImagesReader):
    """Datumaro's JSON. A split is made of files."""

    format = "datumaro"
    looks_like = "Datumaro: annotations/train.json (categories and items) with the images in images/train"
    declares_categories = True

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like Datumaro's JSON; a cheap look."""
        return starts_like(path, b"{", "info|dm_format_version", "categories", "label", "items")

    def read_file(self, where: str, folders: tuple[str, ...], reading: Reading) -> Iterator[RawImage]:
        """The images of a file.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            content = msgspec.json.decode(utf_8(reading.files.read(where)), type=_File)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise DataError(f"not readable as Datumaro's JSON: {error}", where=self.root / where) from None
        names = [plain_name(label.name) for label in content.categories.label.labels]
        reading.number_declared(names, where)
        for item in content.items:
            place = f"{where}, item {item.id}"
            path = locate(item.image.path or item.id, folders, place, reading)
            if path is None:
                continue
            boxes = BoxList(place, reading)
            for number, annotation in enumerate(item.annotations, start=1):
                _add(annotation, number, names, boxes)
            size = numbers(item.image.size, 2)
            yield boxes.image(path, size=None if size is None else whole_size(*size))


def _add(annotation: _Annotation, number: int, names: list[str], boxes: BoxList) -> None:
    """Adds an annotation to the boxes of its image."""
    if annotation.type in _NO_OBJECTS:
        return
    label, mark = annotation.label_id, f"annotation {number}"
    name = names[label] if label is not None and 0 <= label < len(names) else None
    ignore = annotation.attributes.get("is_crowd") is True
    if annotation.type == "bbox":
        box = numbers(annotation.bbox, 4)
        corners = None if box is None else around_rectangle(box[:2], box[2:])
    elif annotation.type in {"polygon", "polyline"}:
        corners = around(pairs(annotation.points or ()), fewest=2)
    else:
        boxes.leave_out(name, mark, annotation.type)
        return
    boxes.add(name, corners, mark, ignore=ignore, found=f"label_id {label}, {len(names)} labels are declared")
