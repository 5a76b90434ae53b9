"""The entries of COCO JSON, and how they are decoded: piece by piece where they are many."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from metr.data.formats.base import Reading
from metr.data.formats.coco_outlines import outline_box
from metr.data.formats.files import ends_of, start_of, utf_8
from metr.data.formats.json_pieces import Value, values_of
from metr.errors import DataError

_FIRST_BYTES, _SNIFF_BYTES = 1 << 12, 1 << 20
_DATUMARO = re.compile(rb'"categories"\s*:\s*\{\s*"(label|points|mask)"\s*:\s*\{')
_LABELME = re.compile(rb'"(shapes|imagePath)"\s*:')

Id = int | str


class CocoCategory(msgspec.Struct):
    """A category as the file declares it. A name that is no text (a number, true, null) is taken as it is written."""

    id: Id
    name: str
    supercategory: str | None = None
    synset: str | None = None


class _WrittenCategory(msgspec.Struct):
    """A category whose names are not decoded yet."""

    id: Id
    name: msgspec.Raw
    supercategory: msgspec.Raw = msgspec.Raw(b"null")
    synset: str | None = None

    def read(self) -> CocoCategory:
        above = None if bytes(self.supercategory) == b"null" else _as_written(self.supercategory)
        return CocoCategory(id=self.id, name=_as_written(self.name), supercategory=above, synset=self.synset)


def _as_written(value: msgspec.Raw) -> str:
    text = bytes(value).strip()
    if text[:1] in {b"[", b"{"}:
        raise ValueError(f"a category's name is {text[:40].decode(errors='replace')}, expected a text")
    return msgspec.json.decode(text, type=str) if text[:1] == b'"' else text.decode()


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
    # Whether the box is not the file's but that around the object's segmentation; it is x, y, width, height in pixels.
    outlined: bool = msgspec.field(default=False, name="outlined by METR")

    @property
    def ignored(self) -> bool:
        """Whether finding the object is neither right nor wrong."""
        return bool(self.iscrowd)


class _Outline(msgspec.Struct):
    """What is read of an annotation without a box."""

    segmentation: Any = None


@dataclass(frozen=True, kw_only=True)
class CocoFile:
    """A file whose long lists are not decoded yet; None where it has none."""

    images: Value | None
    annotations: Value | None
    categories: list[CocoCategory]
    # What the file has in place of a list of annotations, where it has none: "is missing".
    instead: str = ""


Item = TypeVar("Item", bound="CocoImage | CocoAnnotation")


def coco_ends(path: Path) -> bytes:
    """The first and the last bytes of a file, a mebibyte of each, if they hold the keys of COCO JSON; else nothing."""
    if _LABELME.search(utf_8(start_of(path, _FIRST_BYTES))):
        return b""  # folders of labelme hold thousands of such files, with an image in each
    ends = utf_8(ends_of(path, _SNIFF_BYTES))
    keys = sum(key in ends for key in (b'"images"', b'"annotations"', b'"categories"'))
    is_object = ends.lstrip()[:1] == b"{"
    other = b'"segments_info"' in ends or _DATUMARO.search(ends) is not None
    return ends if is_object and keys >= 2 and not other else b""


def look_through(path: Path, piece_bytes: int) -> CocoFile:
    """Finds the long lists of a file, and decodes its categories.

    Raises:
        DataError: the file is not JSON, or its categories cannot be decoded.
    """
    try:
        values = values_of(path, piece_bytes)
        text = values["categories"].text() if "categories" in values else b"null"
        written = msgspec.json.decode(_plain(text), type=list[_WrittenCategory] | None)
        categories = [category.read() for category in written or []]
        annotations, instead = values.get("annotations"), "is missing"
        if annotations is not None and not annotations.is_array:
            kinds = {b"{": "an object", b'"': "a string", b"n": "null"}
            instead = f"is {kinds.get(annotations.text()[:1], 'a single value')}"
            annotations = None
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _unreadable(path, error) from None
    return CocoFile(images=values.get("images"), annotations=annotations, categories=categories, instead=instead)


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
                items = decoder.decode(text)
            except msgspec.DecodeError:
                items = _one_by_one(text, kind, where, reading)
            else:
                if any(map(_lacks_box, items)):
                    _outline(items, msgspec.json.decode(text, type=list[_Outline]), where, reading)
            yield items
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise _unreadable(array.path, error) from None


def _one_by_one(text: bytes, kind: type[Item], where: str, reading: Reading) -> list[Item]:
    """The objects of a JSON array that can be decoded; the others are noted."""
    items = []
    for raw in msgspec.json.decode(_plain(text), type=list[msgspec.Raw]):
        try:
            item = msgspec.json.decode(raw, type=kind, strict=False)
        except msgspec.ValidationError as error:
            found = _without_box(raw, kind)
            if found is None:
                start = bytes(raw)[:80].decode(errors="replace")
                reading.issues.add("unreadable annotation", where, f"{error}: {start}")
                continue
            item = found
        items.append(item)
        if _lacks_box(item):
            _outline([item], [msgspec.json.decode(raw, type=_Outline)], where, reading)
    return items


def _lacks_box(item: CocoImage | CocoAnnotation) -> bool:
    """Whether an annotation has no box, or one that was never filled in."""
    return isinstance(item, CocoAnnotation) and not (item.bbox and any(item.bbox))


def _outline(items: Sequence[Item], outlines: Sequence[_Outline], where: str, reading: Reading) -> None:
    """Gives annotations without a box the one around their segmentation, where they have one."""
    for item, outline in zip(items, outlines, strict=True):
        if isinstance(item, CocoAnnotation) and _lacks_box(item):
            box = outline_box(outline.segmentation)
            if box is not None:
                item.bbox, item.outlined = box, True
                detail = "annotations without bbox have the box around their segmentation"
                reading.notes.once("box of a segmentation", where, detail)


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
    wrong = isinstance(error, msgspec.ValidationError)
    hint = "correct this value" if wrong else "check that the file is complete (it may be cut off)"
    return DataError(what, where=path, hint=hint)
