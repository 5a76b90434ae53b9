"""Pascal VOC: one XML file an image, listed in `ImageSets/Main`, beside the images or in a folder of its own.

Objects marked `difficult` are ignored ones, as in the VOC protocol. The corners of the original VOC files count pixels
from 1, those of the tools that write the format today from 0.
"""

import posixpath
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np

from metr.data.formats.base import UNREADABLE, RawImage, Reader, Reading, note_unannotated, twin_folders, whole_size
from metr.data.formats.files import folders_within, glance, there
from metr.data.formats.image_conflicts import Stems, boxes_of, locate_own
from metr.data.formats.text import read_text
from metr.data.splits import canonical_split
from metr.errors import DataError

_DEPTH = 3
# A folder's first XML files may be broken or something else; its first bytes tell what a file is.
_SNIFFED, _SNIFF_BYTES = 20, 1024
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocReader(Reader):
    """Pascal VOC XML in its usual layouts. A split is made of lists of image names, or of folders with XML files."""

    format = "voc"
    looks_like = "Pascal VOC: ImageSets/Main/*.txt with Annotations/*.xml, or XML files beside the images"

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with VOC files, at most a few folders deep."""
        if not path.is_dir():
            return None
        splits = _listed_splits(path) or _folder_splits(path)
        return cls(path, splits) if splits else None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of its lists, or sorted by name."""
        annotated: set[str] = set()
        for source in self.splits[split]:
            listed = source.suffix.lower() == ".txt"
            found = self._read_list(source, reading) if listed else self._read_folder(source, reading)
            for raw in found:
                if raw.path in annotated:
                    detail = f"{raw.path} again, with {boxes_of(len(raw.boxes))}: left out"
                    reading.issues.add("duplicate image", raw.where, detail)
                else:
                    annotated.add(raw.path)
                    yield raw

    def _read_list(self, source: Path, reading: Reading) -> Iterator[RawImage]:
        """The images that a file of `ImageSets/Main` names."""
        base = self.within(source.parents[2])
        annotations = posixpath.join(base, "Annotations")
        folders = twin_folders(reading.files, annotations)
        known = reading.files.listing(annotations)
        stems, seen = Stems(known, ".xml"), set()
        for number, line in enumerate(read_text(self.within(source), reading).splitlines(), start=1):
            # A second column tells whether the category of a list is in the image. Names may hold spaces.
            options = [line.strip(), *line.split()[:1]]
            name = next((f"{option}.xml" for option in options if f"{option}.xml" in known), None)
            where = f"{self.within(source)}:{number}"
            if name in seen:
                reading.issues.add("duplicate image", where, f"{name} is listed again: left out")
            elif name is not None:
                seen.add(name)
                yield from self._read_xml(posixpath.join(annotations, name), folders, stems, reading)
            elif line.strip():
                reading.issues.add("missing annotation", where, f"no {options[0]}.xml in {annotations}")

    def _read_folder(self, source: Path, reading: Reading) -> Iterator[RawImage]:
        """The images whose XML files lie in a folder."""
        folder = self.within(source)
        names = sorted(name for name in reading.files.listing(folder) if name.lower().endswith(".xml"))
        folders, stems = twin_folders(reading.files, folder), Stems(names, ".xml")
        annotated = set()
        for name in names:
            for raw in self._read_xml(posixpath.join(folder, name), folders, stems, reading):
                annotated.add(raw.path)
                yield raw
        note_unannotated(annotated, "no XML file for it: left out", reading)

    def _read_xml(self, where: str, folders: Sequence[str], stems: Stems, reading: Reading) -> Iterator[RawImage]:
        try:
            root = ET.fromstring(reading.files.read(where))
        except (ET.ParseError, DataError, LookupError, ValueError) as error:
            reading.issues.add("unreadable annotation", where, str(error))
            return
        if root.tag != "annotation":
            reading.issues.add("unreadable annotation", where, f"<{root.tag}>, expected <annotation>")
            return
        path = _image(where, _text(root, "filename"), folders, stems, reading)
        if path is None:
            return
        offset = 1 if _text(root, "source/database").startswith("The VOC") else 0
        labels, boxes, ignore, marks = [], [], [], []
        for index, item in enumerate(root.iterfind("object"), start=1):
            name, box = _text(item, "name"), [_number(item, f"bndbox/{corner}") for corner in _CORNERS]
            if not name:
                reading.issues.add("unknown category", f"{where}, object {index}", "no <name>")
                continue
            labels.append(reading.names.number(name))
            boxes.append(UNREADABLE if None in box else box)
            ignore.append(_text(item, "difficult") == "1")
            marks.append(f"object {index}")
        corners = np.array(boxes, dtype=np.float64).reshape(-1, 4) - np.array([offset, offset, 0, 0])
        yield RawImage(
            where=where,
            image_id=path,
            path=path,
            size=whole_size(_number(root, "size/height"), _number(root, "size/width")),
            boxes=corners,
            labels=np.array(labels, dtype=np.int64),
            ignore=np.array(ignore, dtype=bool),
            marks=marks,
        )


def _listed_splits(root: Path) -> dict[str, tuple[Path, ...]]:
    """The lists of `ImageSets/Main`, by their name; those of several years (VOC2007, VOC2012) belong together."""
    splits: dict[str, tuple[Path, ...]] = {}
    for folder in folders_within(root, _DEPTH - 1):
        lists = folder / "ImageSets" / "Main"
        if there(lists, Path.is_dir) and there(folder / "Annotations", Path.is_dir):
            for file in sorted(lists.glob("*.txt")):
                splits[file.stem] = (*splits.get(file.stem, ()), file)
    # `aeroplane_train.txt` lists the images of one category.
    whole = {name: files for name, files in splits.items() if canonical_split(name) and "_" not in name}
    if {"train", "val"} <= whole.keys():
        whole.pop("trainval", None)
    return whole or splits


def _folder_splits(root: Path) -> dict[str, tuple[Path, ...]]:
    """The folders with XML files, by the folder on the way to them that is called like a split."""
    splits: dict[str, tuple[Path, ...]] = {}
    for folder in folders_within(root, _DEPTH):
        files = (Path(entry.path) for entry in glance(folder) if entry.name.lower().endswith(".xml"))
        if any(map(_looks_like_voc, islice(files, _SNIFFED))):
            parts = folder.relative_to(root).parts
            name = next((part for part in reversed(parts) if canonical_split(part)), "all")
            splits[name] = (*splits.get(name, ()), folder)
    return splits


def _looks_like_voc(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"<annotation" in file.read(_SNIFF_BYTES)
    except OSError:
        return False


def _image(where: str, filename: str, folders: Sequence[str], stems: Stems, reading: Reading) -> str | None:
    """The image of an XML file: of the same name, else the one that the file names, which tools let grow stale.

    What is called like another file is that file's.
    """
    stem = posixpath.splitext(posixpath.basename(where))[0]
    path = reading.files.find_stem(stem, folders, filename)
    if path is not None and stems.belongs(path, stem):
        return path
    return locate_own(filename or stem, stem, folders, stems, where, reading)


def _text(element: ET.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _number(element: ET.Element, path: str) -> float | None:
    try:
        return float(_text(element, path))
    except ValueError:
        return None
