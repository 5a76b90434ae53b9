"""LabelMe (MIT): one XML file an image, `Annotations/FOLDER/x.xml` with `Images/FOLDER/x.jpg`.

Polygons and masks are read as the boxes around them; objects that were deleted are left out, as the tool shows them.
"""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

from metr.data.formats.base import BoxList, RawImage, Reading, whole_size
from metr.data.formats.file_per_image import AnnotationFolder, FilePerImageReader
from metr.data.formats.files import text_start_of
from metr.data.formats.json_lines import numbers
from metr.data.formats.shapes import around
from metr.errors import DataError

_SNIFF_BYTES = 1 << 14
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class LabelMeXmlReader(FilePerImageReader):
    """The XML of MIT's LabelMe. A split is made of folders with XML files."""

    format = "labelme_xml"
    looks_like = "LabelMe (MIT): Annotations/FOLDER/*.xml (<object> with <polygon> of <pt>) with Images/FOLDER"
    suffix = ".xml"

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like LabelMe's XML; a cheap look."""
        return looks_like_labelme_xml(text_start_of(path, _SNIFF_BYTES))

    def read_file(self, where: str, folder: AnnotationFolder, reading: Reading) -> RawImage | None:
        """The image of an XML file; None, and an issue, where the file cannot be used."""
        try:
            root = ET.fromstring(reading.files.read(where))
        except (ET.ParseError, DataError, LookupError, ValueError) as error:
            reading.issues.add("unreadable annotation", where, str(error))
            return None
        path = folder.image_of(where, (root.findtext("filename") or "").strip(), reading)
        if path is None:
            return None
        boxes = BoxList(where, reading)
        for index, item in enumerate(root.iterfind("object"), start=1):
            name, mark = (item.findtext("name") or "").strip(), f"object {index}"
            if (item.findtext("deleted") or "").strip() == "1":
                continue
            points = [[point.findtext("x"), point.findtext("y")] for point in item.iterfind("polygon/pt")]
            if points and len(points) < 3:
                boxes.leave_out(name, mark, "point" if len(points) == 1 else "line")
            else:
                corners = [item.findtext(f"segm/box/{corner}") for corner in _CORNERS]
                boxes.add(name, around(points) if points else numbers(corners, 4), mark, found="no <name>")
        size = numbers([root.findtext("imagesize/nrows"), root.findtext("imagesize/ncols")], 2)
        return boxes.image(path, size=None if size is None else whole_size(*size), corners=True)


def looks_like_labelme_xml(head: bytes) -> bool:
    """Whether the beginning of a file is LabelMe's XML, and not that of Pascal VOC."""
    own = re.search(rb"<(deleted|pt|nrows)>", head) is not None
    return re.search(rb"<annotation[\s>]", head) is not None and own and b"<bndbox" not in head
