"""The entries of COCO JSON, and how they are decoded: piece by piece where they are many."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from metr.data.formats.base import Reading
from metr.data.formats.files import BYTE_ORDER_MARK, ends_of, start_of
from metr.data.formats.json_pieces import Value, values_of
from metr.errors import DataError

_FIRST_BYTES, _SNIFF_BYTES = 1 << 12, 1 << 20
_LABELME = re.compile(rb'"(shapes|imagePath)"\s*:')

Id = int | str


class CocoCategory(msgspec.Struct):
    """A category as the file declares it."""

    id: Id
    name: str
    supercategory: str | None = None
    synset: str | None = None


class CocoImage(msgspec.Struct, gc=False):
    """An image as the file lists it."""

    id: Id
    file_name: str
    height: float | None = None
    width: float | None = None


class CocoAnnotation(msgspec.Struct, gc=False):
    """A box as the file lists it."""

    image_id: Id
    category_id: Id
    bbox: list[float] | None = None
    area: float | None = None
    iscrowd: int | bool | None = None

    @property
    def ignored(self) -> bool:
        """Whether finding the object is neither right nor wrong."""
        return bool(self.iscrowd)


@dataclass(frozen=True, kw_only=True)
class CocoFile:
    """A file whose long lists are not decoded yet; None where it has none."""

    images: Value | None
    annotations: Value | None
    categories: list[CocoCategory]
    # What the file has in place of a list of annotations, where it has none: "is missing".
    instead: str = ""


Item = TypeVar("Item", CocoImage, CocoAnnotation)


def coco_ends(path: Path) -> bytes:
    """The first and the last bytes of a file, a mebibyte of each, if they hold the keys of COCO JSON; else nothing."""
    if _LABELME.search(start_of(path, _FIRST_BYTES)):
        return b""  # folders of labelme hold thousands of such files, with an image in each
    ends = ends_of(path, _SNIFF_BYTES)
    keys = sum(key in ends for key in (b'"images"', b'"annotations"', b'"categories"'))
    is_object = ends.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"{"
    return ends if is_object and keys >= 2 and b'"segments_info"' not in ends else b""


def look_through(path: Path, piece_bytes: int) -> CocoFile:
    """Finds the long lists of a file, and decodes its categories.

    Raises:
        DataError: the file is not JSON, or its categories cannot be decoded.
    """
    try:
        values = values_of(path, piece_bytes)
        text = values["categories"].text() if "categories" in values else b"null"
        categories = msgspec.json.decode(_plain(text), type=list[CocoCategory] | None)
        annotations, instead = values.get("annotations"), "is missing"
        if annotations is not None and not annotations.is_array:
            kinds = {b"{": "an object", b'"': "a string", b"n": "null"}
            instead = f"is {kinds.get(annotations.text()[:1], 'a single value')}"
            annotations = None
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _unreadable(path, error) from None
    return CocoFile(images=values.get("images"), annotations=annotations, categories=categories or [], instead=instead)


def pieces_of(array: Value | None, kind: type[Item], where: str, reading: Reading) -> Iterator[list[Item]]:
    """The objects of a JSON array, decoded piece by piece, so that those of a large file are never all in memory.

    Raises:
        DataError: the array is not valid JSON.
    """
    if array is None:
        return
    decoder = msgspec.json.Decoder(list[kind])  # type: ignore[valid-type]
    try:
        for text in array.pieces():
            try:
                yield decoder.decode(text)
            except msgspec.DecodeError:
                yield _one_by_one(text, kind, where, reading)
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _unreadable(array.path, error) from None


def _one_by_one(text: bytes, kind: type[Item], where: str, reading: Reading) -> list[Item]:
    """The objects of a JSON array that can be decoded; the others are noted."""
    items = []
    for raw in msgspec.json.decode(_plain(text), type=list[msgspec.Raw]):
        try:
            items.append(msgspec.json.decode(raw, type=kind, strict=False))
        except msgspec.ValidationError as error:
            item = _without_box(raw, kind)
            if item is None:
                start = bytes(raw)[:80].decode(errors="replace")
                reading.issues.add("unreadable annotation", where, f"{error}: {start}")
            else:
                items.append(item)
    return items


def _without_box(raw: msgspec.Raw, kind: type[Item]) -> Item | None:
    """An object of which only the box cannot be decoded: its category is known to be in the image."""
    values = msgspec.json.decode(raw)
    if not isinstance(values, dict) or values.pop("bbox", None) is None:
        return None
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError:
        return None


def _plain(text: bytes) -> bytes:
    """Valid JSON, also where Python wrote NaN and Infinity: they become null, and their boxes issues."""
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError:
        return msgspec.json.encode(json.loads(text))
    return text


def _unreadable(path: Path, error: Exception) -> DataError:
    what = f"not readable as COCO JSON: {error}"
    return DataError(what, where=path, hint="check that the file is complete (it may be cut off)")
