"""CVAT for images 1.1: one XML file for all images, which declares the labels.

Boxes (also turned ones), polygons, polylines, ellipses, masks and cuboids are read as the boxes around them; points and
skeletons have no extent. Subsets are splits. Tags describe an image as a whole and are left out.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape, quoteattr

from metr.data.formats.base import BoxList, RawImage, Reading, plain_name, whole_size
from metr.data.formats.files import text_start_of, utf_8
from metr.data.formats.json_lines import numbers
from metr.data.formats.locating import grouped, locate, split_of_file
from metr.data.formats.many_images import ManyImagesReader
from metr.data.formats.shapes import around, around_ellipse, around_rectangle, pairs
from metr.data.formats.written import WrittenBox, WrittenImage, xml_text
from metr.data.regular_files import read_regular
from metr.errors import DataError

# The labels of a project stand before its first image.
_SNIFF_BYTES = 1 << 20
_SUBSET = re.compile(rb"<image\s[^>]*?\bsubset=[\"']([^\"']*)[\"']")
_NO_SUBSET = "default"
_NO_EXTENT = frozenset({"points", "skeleton"})


class CvatReader(ManyImagesReader):
    """CVAT's XML. A split is a subset, or, where there are none, made of files."""

    format = "cvat"
    looks_like = "CVAT for images: annotations.xml (<annotations> with <image>) with the images in images"
    suffixes = (".xml",)
    declares_categories = True

    @classmethod
    def recognise(cls, path: Path) -> "CvatReader | None":
        """A reader of a folder with such files, at most a few folders deep, or of one such file."""
        found = super().recognise(path)
        if not isinstance(found, CvatReader):
            return None
        files = sorted({file for files in found.splits.values() for file in files})
        subsets = {file: _subsets(file) for file in files}
        if any(subsets.values()):
            splits = grouped((name, file) for file in files for name in subsets[file] or {split_of_file(file)})
            return cls(found.root, splits, by_subset=frozenset(file for file in files if subsets[file]))
        return found

    def __init__(
        self, root: Path, splits: Mapping[str, tuple[Path, ...]], *, by_subset: frozenset[Path] = frozenset()
    ) -> None:
        super().__init__(root, splits)
        self._by_subset = by_subset
        self._split: str | None = None

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like CVAT's XML of images; a cheap look."""
        head = text_start_of(path, _SNIFF_BYTES)
        return re.search(rb"<annotations[\s>]", head) is not None and re.search(rb"<image\s", head) is not None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of its files."""
        self._split = split
        yield from super().read(split, reading)

    def read_file(self, where: str, folders: tuple[str, ...], reading: Reading) -> Iterator[RawImage]:
        """The images of a file, or those of its subset."""
        split = self._split if self.root / where in self._by_subset else None
        for image in _images(where, reading):
            if split is None or (image.get("subset") or _NO_SUBSET) == split:
                at = f"{where}, image {image.get('id')}"
                path = locate(image.get("name", ""), folders, at, reading)
                if path is not None:
                    yield _boxes(image, at, reading).image(path, size=_size(image), corners=True)


def _subsets(file: Path) -> set[str]:
    """The names of the subsets of a file; none where its images are in no other than the default one."""
    try:
        names = {name.decode(errors="replace") or _NO_SUBSET for name in _SUBSET.findall(utf_8(read_regular(file)))}
    except OSError:
        return set()
    return set() if names == {_NO_SUBSET} else names


def _images(where: str, reading: Reading) -> Iterator[ET.Element]:
    """The images of a file, one in memory at a time; its labels are declared first.

    Raises:
        DataError: the file cannot be read, or is cut off.
    """
    reading.files.touch(where)
    file = reading.files.root / where
    try:
        parser = ET.iterparse(file, events=("start", "end"))
        _, root = next(parser)
        for event, element in parser:
            if event == "end" and element.tag == "meta":
                labels = (label for label in element.iterfind(".//labels/label") if not label.findtext("parent"))
                names = (plain_name(label.findtext("name") or "") for label in labels)  # a project repeats its labels
                reading.number_declared(filter(None, dict.fromkeys(names)), where)
            elif event == "end" and element.tag == "image":
                yield element
                root.clear()
    except (ET.ParseError, LookupError, ValueError, StopIteration) as error:
        hint = "export it anew: it may be cut off"
        raise DataError(f"not readable as CVAT's XML: {error}", where=file, hint=hint) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=file) from None


def _boxes(image: ET.Element, where: str, reading: Reading) -> BoxList:
    """The boxes of an image."""
    boxes = BoxList(where, reading)
    for number, shape in enumerate(image, start=1):
        name, mark = shape.get("label"), f"{shape.tag} {number}"
        if shape.tag in _SHAPES:
            boxes.add(name, _SHAPES[shape.tag](shape), mark, found=f"a {shape.tag} without a label")
        elif shape.tag in _NO_EXTENT:
            boxes.leave_out(name, mark, shape.tag)
    return boxes


def _size(image: ET.Element) -> tuple[int, int] | None:
    size = numbers(_values(image, "height", "width"), 2)
    return None if size is None else whole_size(*size)


def _values(shape: ET.Element, *keys: str) -> list[str | None]:
    return [shape.get(key) for key in keys]


def _box(shape: ET.Element) -> list[float] | None:
    corners = numbers(_values(shape, "xtl", "ytl", "xbr", "ybr"), 4)
    if corners is None or not shape.get("rotation"):
        return corners
    x, y, right, bottom = corners
    return around_rectangle([x, y], [right - x, bottom - y], shape.get("rotation"), around_centre=True)


def _points(shape: ET.Element) -> list[float] | None:
    return around([point.split(",") for point in (shape.get("points") or "").split(";")], fewest=2)


def _ellipse(shape: ET.Element) -> list[float] | None:
    return around_ellipse(_values(shape, "cx", "cy"), _values(shape, "rx", "ry"), shape.get("rotation") or 0)


def _mask(shape: ET.Element) -> list[float] | None:
    return around_rectangle(_values(shape, "left", "top"), _values(shape, "width", "height"))


def _cuboid(shape: ET.Element) -> list[float] | None:
    corners = (f"{axis}{side}{number}" for side in ("tl", "bl", "tr", "br") for number in (1, 2) for axis in "xy")
    return around(pairs(_values(shape, *corners)))


_SHAPES: Mapping[str, Callable[[ET.Element], list[float] | None]] = {
    "box": _box,
    "polygon": _points,
    "polyline": _points,
    "ellipse": _ellipse,
    "mask": _mask,
    "cuboid": _cuboid,
}


def cvat_start(categories: Sequence[str]) -> str:
    """What stands before the images of a file: the labels of its project."""
    labels = "".join(map(cvat_label, categories))
    opened = '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
    return f"{opened}  <meta>\n    <project>\n      <labels>\n{labels}      </labels>\n    </project>\n  </meta>\n"


CVAT_END = "</annotations>\n"


def cvat_label(name: str) -> str:
    """The declaration of a category."""
    return (
        f"        <label>\n          <name>{escape(xml_text(name))}</name>\n          <type>any</type>\n"
        "          <attributes></attributes>\n        </label>\n"
    )


def cvat_image(image: WrittenImage, number: int, subset: str | None) -> str:
    """An image with its boxes; without a subset it belongs to none."""
    part = "" if subset is None else f" subset={quoteattr(xml_text(subset))}"
    name, boxes = quoteattr(xml_text(image.name)), "".join(map(cvat_box, image.boxes))
    size = f'width="{image.width}" height="{image.height}"'
    return f'  <image id="{number}" name={name}{part} {size}>\n{boxes}  </image>\n'


def cvat_box(box: WrittenBox) -> str:
    """A box, whose source is `auto` where a detector found it."""
    corners = " ".join(f'{key}="{value:.3f}"' for key, value in zip(("xtl", "ytl", "xbr", "ybr"), box.box, strict=True))
    source = "manual" if box.score is None else "auto"
    label = quoteattr(xml_text(box.name))
    return f'    <box label={label} source="{source}" occluded="0" {corners} z_order="0">\n    </box>\n'
