"""Where the values of a large JSON file stand, and the pieces of its long arrays, so that it is never all in memory."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import islice
from pathlib import Path

import msgspec

from metr.data.formats.files import BYTE_ORDER_MARK, open_json

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
        with open_json(self.path) as file:
            for start, stop in self.spans if self.is_array else ():
                yield b"[" + _read(file, start, stop - start) + b"]"

    def text(self) -> bytes:
        """The whole value.

        Raises:
            OSError: the file cannot be read.
        """
        if self.is_array:
            return b"[" + b",".join(piece[1:-1] for piece in self.pieces()) + b"]"
        with open_json(self.path) as file:
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
    with open_json(path) as file:
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


def _read(file: BufferedIOBase, place: int, size: int) -> bytes:
    file.seek(place)
    return file.read(size)


def _expect(file: BufferedIOBase, place: int, byte: bytes) -> int:
    """The offset after the byte that must come next."""
    window = _read(file, place, _KEY_BYTES)
    text = window.lstrip(_BLANK)
    if not text.startswith(byte):
        found = f"{text[:20]!r}" if text else "the end of the file"
        raise ValueError(f"expected {byte.decode()!r}, found {found} (byte {place + len(window) - len(text)})")
    return place + len(window) - len(text) + 1


def _expect_end(file: BufferedIOBase, place: int) -> None:
    rest = _read(file, place, _KEY_BYTES).strip(_BLANK)
    if rest:
        raise ValueError(f"expected the end of the file, found {rest[:20]!r} (byte {place})")


def _array(file: BufferedIOBase, place: int, piece_bytes: int) -> tuple[tuple[tuple[int, int], ...], int]:
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


def _value_end(file: BufferedIOBase, place: int, window_bytes: int) -> int:
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
