"""The entries of COCO JSON, and how they are decoded: piece by piece where they are many."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from metr.data.formats.base import Reading
from metr.data.formats.files import BYTE_ORDER_MARK, ends_of, start_of
from metr.errors import DataError

# A key with the space around it is shorter than this.
_KEY_BYTES = 1 << 16
# How many places to cut are tried before brackets are counted.
_GUESSES = 3

_BLANK = b" \t\r\n"
_KEY = re.compile(rb'[\s,]*("[^"\\]*+(?:\\.[^"\\]*+)*+")\s*:\s*(?=\S)', re.DOTALL)
_SCALAR = re.compile(rb"[^\s,}\]]+")
_CLOSING = re.compile(rb"\}\s*\]")
# A string, the quote of one that does not end in the text, or a bracket.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["{}\[\]]', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Value:
    """A value in a file. `spans` are byte offsets (start, end), the end excluded.

    An array has a span for each piece, which is made of whole elements, without the array's brackets.
    """

    path: Path
    spans: tuple[tuple[int, int], ...]
    is_array: bool

    def pieces(self) -> Iterator[bytes]:
        """The texts of the pieces of an array, each an array itself; none for other values.

        Raises:
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as file:
            for start, stop in self.spans if self.is_array else ():
                yield b"[" + _read(file, start, stop - start) + b"]"

    def text(self) -> bytes:
        """The whole value.

        Raises:
            OSError: the file cannot be read.
        """
        if self.is_array:
            return b"[" + b",".join(piece[1:-1] for piece in self.pieces()) + b"]"
        with self.path.open("rb") as file:
            return _read(file, self.spans[0][0], self.spans[0][1] - self.spans[0][0])


def values_of(path: Path, piece_bytes: int) -> dict[str, Value]:
    """The values of the object that a JSON file holds, by their keys.

    Only their places are found. Whether a value is valid JSON shows when its text is decoded.

    Args:
        path: The file.
        piece_bytes: The approximate length of the pieces of an array. A longer element is a piece of its own.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no object, or ends before the object does.
    """
    found: dict[str, Value] = {}
    with path.open("rb") as file:
        place = _expect(file, len(BYTE_ORDER_MARK) if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0, b"{")
        while True:
            window = _read(file, place, _KEY_BYTES)
            match = _KEY.match(window)
            if match is None:
                _expect_end(file, _expect(file, place, b"}"))
                return found
            key, start = json.loads(match[1]), place + match.end()
            if window[match.end()] == ord("["):
                spans, place = _array(file, start + 1, piece_bytes)
                found[key] = Value(path=path, spans=spans, is_array=True)
            else:
                place = _value_end(file, start, piece_bytes)
                found[key] = Value(path=path, spans=((start, place),), is_array=False)


def _read(file: BinaryIO, place: int, size: int) -> bytes:
    file.seek(place)
    return file.read(size)


def _expect(file: BinaryIO, place: int, byte: bytes) -> int:
    """The offset after the byte that must come next."""
    window = _read(file, place, _KEY_BYTES)
    text = window.lstrip(_BLANK)
    if not text.startswith(byte):
        found = f"{text[:20]!r}" if text else "the end of the file"
        raise ValueError(f"expected {byte.decode()!r}, found {found} (byte {place + len(window) - len(text)})")
    return place + len(window) - len(text) + 1


def _expect_end(file: BinaryIO, place: int) -> None:
    rest = _read(file, place, _KEY_BYTES).strip(_BLANK)
    if rest:
        raise ValueError(f"expected the end of the file, found {rest[:20]!r} (byte {place})")


def _array(file: BinaryIO, place: int, piece_bytes: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """The pieces of the array whose first element is at `place`, and the offset after the array."""
    spans: list[tuple[int, int]] = []
    size = piece_bytes
    while True:
        chunk = _read(file, place, size)
        text = chunk.lstrip(_BLANK + b",")
        place += len(chunk) - len(text)
        if text.startswith(b"]"):
            return tuple(spans), place + 1
        end = _whole_elements(text)
        if end:
            spans.append((place, place + end))
            place, size = place + end, piece_bytes
        elif len(chunk) < size:
            raise ValueError(f"the file ends in the middle of an array (byte {place})")
        else:
            size *= 2


def _whole_elements(text: bytes) -> int:
    """The offset after the last whole element in a part of an array; 0 where no element ends in it.

    Likely offsets are tried first: if the text before one is valid JSON, it is right. All may be wrong, inside of an
    object or a string, or the text may hold numbers that only Python writes (NaN). Then the brackets are counted.
    """
    for end in _guesses(text):
        try:
            msgspec.json.decode(b"[" + text[:end] + b"]", type=msgspec.Raw)
        except (msgspec.MsgspecError, RecursionError):
            continue
        return end
    return _counted(text)


def _guesses(text: bytes) -> Iterator[int]:
    """The offsets of the commas before the last objects, then those of ends of an array of objects."""
    brace = len(text)
    for _ in range(_GUESSES):
        brace = text.rfind(b"{", 0, brace)
        comma = text.rfind(b",", 0, max(0, brace))
        if comma < 0:
            break
        if not text[comma + 1 : brace].strip(_BLANK):
            yield comma
    for match in islice(_CLOSING.finditer(text), _GUESSES):
        yield match.start() + 1


def _counted(text: bytes) -> int:
    """The offset after the last whole element in a part of an array, found by counting brackets."""
    depth = end = 0
    for token in _TOKEN.finditer(text):
        first = token[0][:1]
        if token[0] == b'"':
            break
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
            if depth < 0:
                # The end of the array itself; elements that are neither objects nor arrays end here.
                return token.start()
            end = token.end() if depth == 0 else end
    return end


def _value_end(file: BinaryIO, place: int, window_bytes: int) -> int:
    """The offset after a value that is not an array."""
    first = _SCALAR.match(_read(file, place, _KEY_BYTES))
    if first is None:
        raise ValueError(f"expected a value (byte {place})")
    if first[0][:1] not in b'{"':
        return place + first.end()
    depth, size = 0, window_bytes
    while True:
        chunk, used = _read(file, place, size), 0
        for token in _TOKEN.finditer(chunk):
            if token[0] == b'"':
                break
            used = token.end()
            depth += {b"{": 1, b"[": 1, b"}": -1, b"]": -1}.get(token[0], 0)
            if depth <= 0:
                return place + used
        else:
            used = len(chunk)
        if len(chunk) < size:
            raise ValueError(f"the file ends in the middle of a value (byte {place})")
        place, size = place + used, size if used else 2 * size


_FIRST_BYTES, _SNIFF_BYTES = 1 << 12, 1 << 20
_DATUMARO = re.compile(rb'"categories"\s*:\s*\{\s*"(label|points|mask)"\s*:\s*\{')
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
