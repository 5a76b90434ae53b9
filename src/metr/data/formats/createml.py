"""CreateML (Apple): a JSON list with an entry for each image; boxes by their centre and size, in pixels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from metr.boxes import cxcywh_to_xyxy
from metr.data.formats.base import BoxList, RawImage, Reading
from metr.data.formats.json_lines import json_items, numbers, starts_like
from metr.data.formats.locating import locate
from metr.data.formats.many_images import ManyImagesReader


class _Object(msgspec.Struct):
    label: str | int | None = None
    coordinates: dict[str, Any] | None = None


class _Image(msgspec.Struct):
    """An entry; the first versions of CreateML called its keys otherwise."""

    image: str | None = None
    imagefilename: str | None = None
    annotations: list[_Object] | None = None
    annotation: list[_Object] | None = None


_DECODER = msgspec.json.Decoder(_Image, strict=False)


class CreateMLReader(ManyImagesReader):
    """CreateML's JSON, as Roboflow, RectLabel and others export it. A split is made of files."""

    format = "createml"
    looks_like = "CreateML: _annotations.createml.json (a list of image, annotations, coordinates) beside the images"

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like CreateML; a cheap look."""
        return starts_like(path, b"[", "image|imagefilename", "annotations?", "coordinates")

    def read_file(self, where: str, folders: tuple[str, ...], reading: Reading) -> Iterator[RawImage]:
        """The images of a file."""
        for place, entry in json_items(where, _DECODER, reading):
            name = entry.image or entry.imagefilename or ""
            objects = entry.annotation if entry.annotations is None else entry.annotations
            path = locate(name, folders, place, reading)
            if path is None:
                continue
            if objects is None:
                reading.issues.add("unannotated image", path, f"{place} has no `annotations`: left out")
                continue
            boxes = BoxList(place, reading)
            for number, item in enumerate(objects, start=1):
                box = numbers([(item.coordinates or {}).get(key) for key in ("x", "y", "width", "height")], 4)
                label = None if item.label is None else str(item.label)
                boxes.add(label, box, f"annotation {number}", found=f"label {item.label!r}")
            yield boxes.image(path, convert=cxcywh_to_xyxy)
