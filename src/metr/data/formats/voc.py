"""Pascal VOC: one XML file an image, listed in `ImageSets/Main`, beside the images or in a folder of its own.

Objects marked `difficult` are ignored ones, as in the VOC protocol. The corners of the original VOC files count pixels
from 1, those of the tools that write the format today from 0.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from metr.data.formats.base import BoxList, RawImage, Reader, Reading, whole_size, without_repeats
from metr.data.formats.file_per_image import ANNOTATION_WORDS, AnnotationFolder, FilePerImageReader, called_like
from metr.data.formats.files import files_in, fold, folders_in, folders_within, is_image, start_of
from metr.data.formats.labelme_xml import looks_like_labelme_xml
from metr.data.formats.locating import grouped
from metr.data.formats.written import WrittenBox, WrittenImage, rounded, xml_text
from metr.data.records import canonical_split
from metr.errors import DataError

# How deep below the dataset's folder the lists lie, in folders of the years.
_DEPTH = 2
_SNIFF_BYTES = 1024
_LISTS, _MAIN = "imagesets", "main"
# Where a file says that it is written otherwise than it is, its text says it.
_DECLARED = re.compile(rb"<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([\w.:-]{1,40})[\"']")
# What some tools leave after the end of a file, and an `&` that stands for itself.
_AFTER = b"\0\x1a \r\n\t"
_AMPERSAND = re.compile(r"&(?!(?:[A-Za-z_][\w.-]*|#\d+|#x[0-9A-Fa-f]+);)")


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
        head = start_of(path, _SNIFF_BYTES).replace(b"\0", b"")
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
        folder = AnnotationFolder(self.within(_annotations_beside(source)), self.suffix, reading.files)
        known = {fold(name): name for name in folder.names} | {name: name for name in folder.names}
        seen: set[str] = set()
        for number, line in enumerate(reading.text(self.within(source)).splitlines(), start=1):
            name = _listed(line, known)
            where = f"{self.within(source)}:{number}"
            if name in seen:
                reading.issues.add("duplicate image", where, f"{name} is listed again: left out")
            elif name is not None:
                seen.add(name)
                raw = self.read_file(posixpath.join(folder.path, name), folder, reading)
                if raw is not None:
                    yield raw
            elif line.strip():
                reading.issues.add("missing annotation", where, f"no {line.strip()[:80]}.xml in {folder.path}")

    def read_file(self, where: str, folder: AnnotationFolder, reading: Reading) -> RawImage | None:
        """The image of an XML file; None, and an issue, where the file cannot be used."""
        try:
            root = _parsed(reading.files.read(where), where, reading)
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
            mark, box = f"object {index}", _corners(item)
            if box is not None:
                for low, high in ((0, 2), (1, 3)):
                    box[low if box[low] <= box[high] else high] -= first  # corners may be swapped
            boxes.add(_text(item, "name"), box, mark, ignore=ignore, found="no <name>")
        size = whole_size(_number(root, "size/height"), _number(root, "size/width"))
        return boxes.image(path, size=size, corners=True)


def _listed_splits(root: Path) -> dict[str, tuple[Path, ...]]:
    """The lists of `ImageSets/Main`, by their name; those of several years (VOC2007, VOC2012) belong together.

    They may also lie in `ImageSets` itself. Folders with annotations must lie beside it.
    """
    splits = grouped(
        (file.stem, file)
        for folder in folders_within(root, _DEPTH)
        for sets in folders_in(folder)
        if fold(sets.name) == _LISTS and _annotation_folder(folder) is not None
        for file in _lists(sets)
    )
    # `aeroplane_train.txt` lists the images of one category.
    whole = {name: files for name, files in splits.items() if canonical_split(name) and "_" not in name}
    if {"train", "val"} <= whole.keys():
        whole.pop("trainval", None)
    return whole or splits


def _lists(sets: Path) -> list[Path]:
    main = next((folder for folder in folders_in(sets) if fold(folder.name) == _MAIN), sets)
    return files_in(main, ".txt") or files_in(sets, ".txt")


def _annotations_beside(source: Path) -> Path:
    """The folder of annotations that belongs to a list."""
    above = next(folder for folder in source.parents if fold(folder.name) == _LISTS).parent
    return _annotation_folder(above) or above / "Annotations"


def _annotation_folder(folder: Path) -> Path | None:
    names = [entry.name for entry in folders_in(folder)]
    found = next((name for name in names if name == "Annotations"), None) or next(
        (name for name in called_like(ANNOTATION_WORDS, names) if files_in(folder / name, ".xml")), None
    )
    return None if found is None else folder / found


def _listed(line: str, known: Mapping[str, str]) -> str | None:
    """The annotation file that a line of a list means, of those `known`; None where there is none.

    A line is the name of an image, with or without suffix and folders. Names may hold spaces. A second column tells
    whether the category of a list is in the image.
    """
    for option in (line.strip(), *line.split()[:1]):
        base = posixpath.basename(option.replace("\\", "/"))
        stem, suffix = posixpath.splitext(base)
        stems = [option, base, stem] if is_image(base) or suffix.lower() == ".xml" else [option, base]
        for name in stems:
            found = known.get(f"{name}.xml") or known.get(fold(f"{name}.xml"))
            if found is not None:
                return found
    return None


def _parsed(data: bytes, where: str, reading: Reading) -> ET.Element:
    """The content of an XML file, also of one in another encoding than it says, or with zero bytes after its end.

    Raises:
        ParseError, LookupError, ValueError: it is no XML.
    """
    try:
        return ET.fromstring(data)
    except (ET.ParseError, LookupError, ValueError):
        text = _decoded(data.strip(_AFTER), where, reading)
        if "<!" in text.replace("<!--", "").replace("<![CDATA[", ""):
            raise  # what declares entities is not mended
        return ET.fromstring(_AMPERSAND.sub("&amp;", text))


def _decoded(data: bytes, where: str, reading: Reading) -> str:
    """The text of an XML file: in the encoding that it names, if it is that; else as it looks."""
    declared = _DECLARED.match(data)
    named = [] if declared is None else [declared[1].decode()]
    if named and named[0].lower() in {"gb2312", "gbk"}:
        named = ["gb18030"]  # which holds both
    for encoding in named:
        try:
            return data.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
    if _looks_chinese(data):
        reading.notes.once("not UTF-8", where, "read as gb18030: save it as UTF-8 if names look wrong")
        return data.decode("gb18030")
    return data.decode(reading.encoding(data, where))


def _looks_chinese(data: bytes) -> bool:
    """Whether bytes are GBK: those that are not ASCII come in pairs, which words in Western encodings hardly do."""
    try:
        data.decode()
    except UnicodeDecodeError:
        runs = re.findall(rb"[\x80-\xff]+", data)
        try:
            data.decode("gb18030")
        except UnicodeDecodeError:
            return False
        return all(len(run) % 2 == 0 for run in runs)
    return False


def _corners(item: ET.Element) -> list[float] | None:
    """The corners of an object as its file gives them; None where they cannot be read."""
    values = [_number(item, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _text(element: ET.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _number(element: ET.Element, path: str) -> float | None:
    try:
        return float(_text(element, path))
    except ValueError:
        return None


def voc_file(image: WrittenImage, folder: str) -> str:
    """The XML of an image, whose corners count from 0; `folder` is the name of that of the images."""
    return (
        f"<annotation>\n\t<folder>{_escaped(folder)}</folder>\n\t<filename>{_escaped(image.name)}</filename>\n"
        f"\t<size>\n\t\t<width>{image.width}</width>\n\t\t<height>{image.height}</height>\n"
        "\t\t<depth>3</depth>\n\t</size>\n\t<segmented>0</segmented>\n"
        f"{''.join(map(voc_object, image.boxes))}</annotation>\n"
    )


def voc_object(box: WrittenBox, first: int = 0) -> str:
    """The XML of an object; ignored ones are difficult. `first` is the number of the first pixel of a row."""
    values = zip(("xmin", "ymin", "xmax", "ymax"), box.box, strict=True)
    corners = "".join(f"\t\t\t<{corner}>{rounded(value + first)}</{corner}>\n" for corner, value in values)
    return (
        f"\t<object>\n\t\t<name>{_escaped(box.name)}</name>\n\t\t<pose>Unspecified</pose>\n"
        f"\t\t<truncated>0</truncated>\n\t\t<difficult>{int(box.ignore)}</difficult>\n"
        f"\t\t<bndbox>\n{corners}\t\t</bndbox>\n\t</object>\n"
    )


def _escaped(text: str) -> str:
    return escape(xml_text(text))
