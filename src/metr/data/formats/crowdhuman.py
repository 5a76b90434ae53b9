"""CrowdHuman: a JSON line an image in `annotation_train.odgt` and `annotation_val.odgt`.

The full boxes (`fbox`) of persons are read, as the benchmark scores them and as most loaders do: whole persons, also
where others hide them or the image's border cuts them, where they are cut without an issue. The boxes of heads and of
visible parts show the same persons again and are left out. Boxes with the tag `mask` (crowds, reflections, statues) and
those with `ignore` are ignored objects of "person". Any other tag, which files of the same form have, is a category.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from metr.boxes import xywh_to_xyxy
from metr.data.formats.base import BoxList, RawImage, Reader, Reading, without_repeats
from metr.data.formats.files import files_in
from metr.data.formats.json_lines import first_keys, json_lines, numbers
from metr.data.formats.locating import dataset_root, image_folders, locate

_PERSON, _MASK = "person", "mask"


class _Box(msgspec.Struct, gc=False):
    tag: str
    fbox: Any = None
    extra: dict[str, Any] | None = None


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
            return cls(dataset_root(path), {path.stem: (path,)}) if _looks_like_odgt(path) else None
        for folder in (path, path / "annotations"):
            files = files_in(folder, ".odgt")
            if any(map(_looks_like_odgt, files)):
                return cls(path, {file.stem: (file,) for file in files})
        return None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of the file."""
        seen: set[str] = set()
        for file in self.splits[split]:
            yield from without_repeats(self._read_file(file, split, reading), seen, reading)

    def _read_file(self, file: Path, split: str, reading: Reading) -> Iterator[RawImage]:
        folders = image_folders(reading.files, split, self.within(file.parent), anywhere=True)
        for place, line in json_lines(self.within(file), _DECODER, reading):
            path = locate(line.id, folders, place, reading)
            if path is None:
                continue
            boxes = BoxList(place, reading)
            for index, item in enumerate(line.gtboxes, start=1):
                is_mask = item.tag == _MASK
                boxes.add(
                    _PERSON if is_mask else item.tag,
                    numbers(item.fbox, 4),
                    f"box {index}",
                    ignore=is_mask or bool((item.extra or {}).get("ignore")),
                    found=f"tag {item.tag!r}, fbox {item.fbox!r}",
                )
            yield boxes.image(path, image_id=line.id, convert=xywh_to_xyxy, amodal=True)


def _looks_like_odgt(path: Path) -> bool:
    return path.suffix.lower() == ".odgt" and any({"ID", "gtboxes"} <= keys for keys in first_keys(path))
