"""CrowdHuman: a JSON line an image in `annotation_train.odgt` and `annotation_val.odgt`.

Read are the full boxes (`fbox`) of persons, as the benchmark scores them and as most loaders do: whole persons, also
where others hide them or the image's border cuts them, where they are cut without an issue. The boxes of heads and of
visible parts show the same persons again and are left out. Boxes with the tag `mask` (crowds, reflections, statues) and
those with `ignore` are ignored objects of "person". Any other tag, which files of the same form have, is a category.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from metr.boxes import xywh_to_xyxy
from metr.data.formats.base import UNREADABLE, RawImage, Reader, Reading, corners, locate, plain_name
from metr.data.formats.files import glance
from metr.data.formats.json_lines import first_keys, json_lines, numbers, wide_image_folders

_PERSON, _MASK = "person", "mask"


class _Box(msgspec.Struct, gc=False):
    tag: str
    fbox: Any = None
    extra: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The category."""
        return _PERSON if self.tag == _MASK else plain_name(self.tag)

    @property
    def ignored(self) -> bool:
        """Whether it is neither an object nor background."""
        return self.tag == _MASK or bool((self.extra or {}).get("ignore"))


class _Line(msgspec.Struct):
    id: str = msgspec.field(name="ID")
    gtboxes: list[_Box]


_DECODER = msgspec.json.Decoder(_Line)


class CrowdHumanReader(Reader):
    """CrowdHuman's odgt files. A split is one of them."""

    format = "crowdhuman"
    looks_like = "CrowdHuman: annotation_train.odgt and annotation_val.odgt with the images in Images"

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with odgt files, or of one such file."""
        if path.is_file():
            root = path.parent.parent if path.parent.name == "annotations" else path.parent
            return cls(root, {path.stem: (path,)}) if _looks_like_odgt(path) else None
        for folder in (path, path / "annotations"):
            files = [Path(entry.path) for entry in glance(folder) if entry.name.lower().endswith(".odgt")]
            if any(map(_looks_like_odgt, files)):
                return cls(path, {file.stem: (file,) for file in files})
        return None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of the file."""
        seen: set[str] = set()
        for file in self.splits[split]:
            folders = wide_image_folders(reading.files, split, self.within(file.parent))
            for place, line in json_lines(file, _DECODER, self.within(file), reading):
                path = locate(line.id, folders, place, reading)
                if path is not None and path in seen:
                    reading.issues.add("duplicate image", place, f"{line.id} again: left out")
                elif path is not None:
                    seen.add(path)
                    yield _raw_image(line, path, place, reading)


def _raw_image(line: _Line, path: str, place: str, reading: Reading) -> RawImage:
    boxes, kept = [], []
    for index, item in enumerate(line.gtboxes, start=1):
        box = numbers(item.fbox, 4)
        if not item.name:
            detail = f"tag {item.tag!r}, fbox {item.fbox!r}"[:80]
            reading.issues.add("unknown category", f"{place}, box {index}", detail)
            continue
        boxes.append(box or UNREADABLE)
        kept.append((index, item))
    return RawImage(
        where=place,
        image_id=line.id,
        path=path,
        size=None,
        boxes=corners(np.array(boxes, dtype=np.float64).reshape(-1, 4), xywh_to_xyxy),
        labels=np.array([reading.names.number(item.name) for _, item in kept], dtype=np.int64),
        ignore=np.array([item.ignored for _, item in kept], dtype=bool),
        marks=[f"box {index}" for index, _ in kept],
        amodal=True,
    )


def _looks_like_odgt(path: Path) -> bool:
    return path.suffix.lower() == ".odgt" and any({"ID", "gtboxes"} <= keys for keys in first_keys(path))
