"""Pascal VOC: one XML file an image, listed in `ImageSets/Main`, beside the images or in a folder of its own.

Objects marked `difficult` are ignored ones, as in the VOC protocol. The corners of the original VOC files count pixels
from 1, those of the tools that write the format today from 0.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

from metr.data.formats.base import BoxList, RawImage, Reader, Reading, whole_size, without_repeats
from metr.data.formats.file_per_image import AnnotationFolder, FilePerImageReader
from metr.data.formats.files import folders_within, start_of, there
from metr.data.formats.labelme_xml import looks_like_labelme_xml
from metr.data.formats.locating import grouped
from metr.data.records import canonical_split
from metr.errors import DataError

# How deep below the dataset's folder the lists lie, in folders of the years.
_DEPTH = 2
_SNIFF_BYTES = 1024


class VocReader(FilePerImageReader):
    """Pascal VOC XML in its usual layouts. A split is made of lists of image names, or of folders with XML files."""

    format = "voc"
    looks_like = "Pascal VOC: ImageSets/Main/*.txt with Annotations/*.xml, or XML files beside the images"
    suffix = ".xml"

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with lists of images, else of one with XML files, at most a few folders deep."""
        splits = _listed_splits(path) if path.is_dir() else {}
        return cls(path, splits) if splits else super().recognise(path)

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like VOC XML; a cheap look."""
        head = start_of(path, _SNIFF_BYTES)
        return re.search(rb"<annotation[\s>]", head) is not None and not looks_like_labelme_xml(head)

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of its lists, or sorted by name."""
        if self.splits[split][0].suffix.lower() != ".txt":
            yield from super().read(split, reading)
            return
        seen: set[str] = set()
        for source in self.splits[split]:
            yield from without_repeats(self._read_list(source, reading), seen, reading)

    def _read_list(self, source: Path, reading: Reading) -> Iterator[RawImage]:
        """The images that a file of `ImageSets/Main` names."""
        folder = AnnotationFolder(
            posixpath.join(self.within(source.parents[2]), "Annotations"), self.suffix, reading.files
        )
        known, seen = set(folder.names), set()
        for number, line in enumerate(reading.text(self.within(source)).splitlines(), start=1):
            # A second column tells whether the category of a list is in the image. Names may hold spaces.
            options = [line.strip(), *line.split()[:1]]
            name = next((f"{option}.xml" for option in options if f"{option}.xml" in known), None)
            where = f"{self.within(source)}:{number}"
            if name in seen:
                reading.issues.add("duplicate image", where, f"{name} is listed again: left out")
            elif name is not None:
                seen.add(name)
                raw = self.read_file(posixpath.join(folder.path, name), folder, reading)
                if raw is not None:
                    yield raw
            elif line.strip():
                reading.issues.add("missing annotation", where, f"no {options[0]}.xml in {folder.path}")

    def read_file(self, where: str, folder: AnnotationFolder, reading: Reading) -> RawImage | None:
        """The image of an XML file; None, and an issue, where the file cannot be used."""
        try:
            root = ET.fromstring(reading.files.read(where))
        except (ET.ParseError, DataError, LookupError, ValueError) as error:
            reading.issues.add("unreadable annotation", where, str(error))
            return None
        if root.tag != "annotation":
            reading.issues.add("unreadable annotation", where, f"<{root.tag}>, expected <annotation>")
            return None
        path = folder.image_of(where, _text(root, "filename"), reading)
        if path is None:
            return None
        first = 1 if _text(root, "source/database").startswith("The VOC") else 0
        boxes = BoxList(where, reading)
        for index, item in enumerate(root.iterfind("object"), start=1):
            ignore = _text(item, "difficult") == "1"
            boxes.add(_text(item, "name"), _box(item, first), f"object {index}", ignore=ignore, found="no <name>")
        size = whole_size(_number(root, "size/height"), _number(root, "size/width"))
        return boxes.image(path, size=size)


def _listed_splits(root: Path) -> dict[str, tuple[Path, ...]]:
    """The lists of `ImageSets/Main`, by their name; those of several years (VOC2007, VOC2012) belong together."""
    splits = grouped(
        (file.stem, file)
        for folder in folders_within(root, _DEPTH)
        if there(folder / "ImageSets" / "Main", Path.is_dir) and there(folder / "Annotations", Path.is_dir)
        for file in sorted((folder / "ImageSets" / "Main").glob("*.txt"))
    )
    # `aeroplane_train.txt` lists the images of one category.
    whole = {name: files for name, files in splits.items() if canonical_split(name) and "_" not in name}
    if {"train", "val"} <= whole.keys():
        whole.pop("trainval", None)
    return whole or splits


def _box(item: ET.Element, first: int) -> list[float] | None:
    """The corners of an object whose file counts pixels from `first`; None where they cannot be read."""
    values = [_number(item, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    known = [value for value in values if value is not None]
    return [known[0] - first, known[1] - first, *known[2:]] if len(known) == 4 else None


def _text(element: ET.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _number(element: ET.Element, path: str) -> float | None:
    try:
        return float(_text(element, path))
    except ValueError:
        return None
