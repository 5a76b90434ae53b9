"""BDD100K: a JSON list with an entry for each image, of 2018 (`bdd100k_labels_images_train.json`) or 2020 (`det_20`).

Crowds are ignored objects. As in the benchmark of 2020, "other person", "other vehicle" and "trailer" are ignored
objects of "pedestrian", "car" and "truck". Lanes and drivable areas are no objects and are left out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from metr.data.formats.base import BoxList, RawImage, Reading
from metr.data.formats.json_lines import json_items, numbers, starts_like
from metr.data.formats.locating import locate
from metr.data.formats.many_images import ManyImagesReader
from metr.data.records import canonical_split

_IGNORED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}
# What 2018 called areas and lines in the same list; `lane/...` are the lanes of 2020.
_NO_OBJECTS = ("lane", "drivable area", "area/")


class _Label(msgspec.Struct):
    category: str | None = None
    box: dict[str, Any] | None = msgspec.field(name="box2d", default=None)
    attributes: dict[str, Any] | None = None


class _Image(msgspec.Struct):
    name: str
    labels: list[_Label] | None = None


_DECODER = msgspec.json.Decoder(_Image)


class Bdd100kReader(ManyImagesReader):
    """BDD100K's detection labels. A split is made of files."""

    format = "bdd100k"
    looks_like = "BDD100K: labels/det_20/det_train.json or bdd100k_labels_images_train.json, images in images/100k"
    depth = 3

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like BDD100K's labels; a cheap look."""
        return starts_like(path, b"[", "name", "labels", "category", "box2d")

    def read_file(self, where: str, folders: tuple[str, ...], reading: Reading) -> Iterator[RawImage]:
        """The images of a file."""
        split = canonical_split(Path(where).stem)
        own = (f"{base}images/{size}/{split}" for size in ("100k", "10k") for base in ("", "bdd100k/"))
        places = (*(folder for folder in own if reading.files.listing(folder)), *folders)
        for place, entry in json_items(where, _DECODER, reading):
            path = locate(entry.name, places, place, reading)
            if path is None:
                continue
            if entry.labels is None:
                reading.issues.add("unannotated image", path, f"{place} has no `labels`: left out")
                continue
            boxes = BoxList(place, reading)
            for number, label in enumerate(entry.labels, start=1):
                _add(label, number, boxes)
            yield boxes.image(path, corners=True)


def _add(label: _Label, number: int, boxes: BoxList) -> None:
    """Adds an object to the boxes of its image."""
    name, flags = label.category, label.attributes or {}
    if label.box is None:
        if not (name or "").startswith(_NO_OBJECTS):
            boxes.leave_out(name, f"label {number}", "shape without box2d")
        return
    ignore = name in _IGNORED or any(flags.get(flag) is True for flag in ("crowd", "ignored"))
    box = numbers([label.box.get(corner) for corner in ("x1", "y1", "x2", "y2")], 4)
    boxes.add(_IGNORED.get(name or "", name), box, f"label {number}", ignore=ignore, found=f"category {name!r}")
