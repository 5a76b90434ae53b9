"""Boxes in XML files: Pascal VOC and CVAT."""

import re
from collections.abc import Mapping
from xml.etree import ElementTree as ET
from xml.parsers import expat

from metr.data.appending.base import Appending, CannotAppendError, by_file, names_of
from metr.data.formats.base import plain_name
from metr.data.formats.cvat import cvat_box, cvat_label
from metr.data.formats.voc import voc_object

_DATABASE = re.compile(rb"<database>\s*The VOC")


def append_to_voc(work: Appending) -> None:
    """Adds objects behind the others."""
    for one in work.additions:
        path = work.root / one.where
        data = path.read_bytes()
        place = data.rfind(b"</annotation>")
        if place < 0:
            raise CannotAppendError(f"{one.where} does not end in </annotation>")
        first = int(_DATABASE.search(data) is not None)
        text = "".join(voc_object(box, first) for box in one.boxes)
        newline = b"" if data[:place].endswith(b"\n") else b"\n"
        # other characters as references: right in every encoding that ASCII is a part of
        path.write_bytes(data[:place] + newline + text.encode("ascii", "xmlcharrefreplace") + data[place:])
        try:
            ET.fromstring(path.read_bytes())
        except ET.ParseError as error:
            raise CannotAppendError(f"{one.where} is no proper XML: {error}") from None


def append_to_cvat(work: Appending) -> None:
    """Adds boxes, and the labels that are new."""
    for file, listed in by_file(work.additions, ", image ").items():
        data = (work.root / file).read_bytes()
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise CannotAppendError(f"{file} is UTF-16")
        places = _CvatPlaces(data)
        wanted = dict(listed)
        if len(wanted) < len(listed) or any(places.images.get(number) is None for number in wanted):
            raise CannotAppendError(f"{file} has work.images of one number")
        fresh = [name for name in names_of([one for _, one in listed]) if name not in places.labels]
        edits = {places.labels_end: "".join(map(cvat_label, fresh)).strip(" ") + "      "} if fresh else {}
        for number, one in wanted.items():
            edits[places.images[number] or 0] = "".join(map(cvat_box, one.boxes)).strip(" ") + "  "
        parts, start = [], 0
        for place, inserted in sorted(edits.items()):
            closed = places.self_closed.get(place)
            added = inserted.encode("ascii", "xmlcharrefreplace")
            parts += [data[start:place], added] if closed is None else [data[start:closed], b">\n", added, b"</image>"]
            start = place
        (work.root / file).write_bytes(b"".join([*parts, data[start:]]))


class _CvatPlaces:
    """Where in a file of CVAT labels and boxes go: byte offsets.

    `images` by their number, None where two have it; `self_closed` gives the offset of the slash of `<image .../>` by
    the offset after it.
    """

    def __init__(self, data: bytes) -> None:
        self.images: dict[str, int | None] = {}
        self.labels: set[str] = set()
        self.self_closed: dict[int, int] = {}
        self.labels_end = 0
        self._data, self._path, self._number, self._start, self._name = data, [""], "", 0, ""
        parser = expat.ParserCreate()
        self._parser = parser
        parser.StartElementHandler, parser.EndElementHandler = self._started, self._ended
        parser.CharacterDataHandler = self._said
        try:
            parser.Parse(data, True)
        except expat.ExpatError as error:
            raise CannotAppendError(f"not readable as XML: {error}") from None
        if not self.labels_end:
            raise CannotAppendError("the file declares no labels")

    def _started(self, name: str, attributes: Mapping[str, str]) -> None:
        self._path.append(name)
        self._name = ""
        if name == "image":
            self._number, self._start = str(attributes.get("id")), self._parser.CurrentByteIndex

    def _said(self, text: str) -> None:
        self._name += text

    def _ended(self, name: str) -> None:
        self._path.pop()
        place = self._parser.CurrentByteIndex
        if name == "name" and self._path[-1] == "label":
            self.labels.add(plain_name(self._name))
        elif name == "labels" and not self.labels_end and self._data[place : place + 2] == b"</":
            self.labels_end = place
        elif name == "image":
            if place == self._start:
                match = _TAG.match(self._data, place)
                place = match.end() if match else place
                self.self_closed[place] = place - 2
            self.images[self._number] = None if self._number in self.images else place


_TAG = re.compile(rb"<image(?:\s+[\w:.-]+\s*=\s*(?:\"[^\"]*\"|'[^']*'))*\s*/>")
