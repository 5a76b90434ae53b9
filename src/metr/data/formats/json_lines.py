"""What the readers of JSON lines and of JSON lists share: decoding item by item, cheap looks, and label maps."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from metr.data.formats.base import Reading
from metr.data.formats.files import BYTE_ORDER_MARK, Files, open_json, start_of, utf_8
from metr.errors import DataError

# Formats are told apart by a file's first lines, several because some may be broken.
_SNIFFED, _SNIFF_BYTES = 20, 1 << 20

Item = TypeVar("Item")


def json_lines(where: str, decoder: msgspec.json.Decoder[Item], reading: Reading) -> Iterator[tuple[str, Item]]:
    """The objects of a file with their places (`file:line`), one line in memory at a time.

    Lines that cannot be decoded are noted.

    Args:
        where: The file, relative to the dataset's folder.
        decoder: Decodes a line.
        reading: The dataset's files, and its issues.

    Raises:
        DataError: the file cannot be read.
    """
    reading.files.touch(where)
    file = reading.files.root / where
    try:
        with open_json(file) as lines:
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(BYTE_ORDER_MARK).strip()
                item = _decoded_line(text, decoder, f"{where}:{number}", reading) if text else None
                if item is not None:
                    yield f"{where}:{number}", item
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=file) from None


def json_items(where: str, decoder: msgspec.json.Decoder[Item], reading: Reading) -> Iterator[tuple[str, Item]]:
    """The items of a file that holds one JSON list, with their places (`file, entry 3`).

    Items that cannot be decoded are noted.

    Args:
        where: The file, relative to the dataset's folder.
        decoder: Decodes an item.
        reading: The dataset's files, and its issues.

    Raises:
        DataError: the file cannot be read, or holds no list.
    """
    data = utf_8(reading.files.read(where))
    for number, text in enumerate(_raw_items(data, reading.files.root / where), start=1):
        item = _decoded_line(text, decoder, f"{where}, entry {number}", reading)
        if item is not None:
            yield f"{where}, entry {number}", item


def _raw_items(data: bytes, file: Path) -> Iterator[bytes]:
    """The text of each item of a JSON list.

    Raises:
        DataError: it is no list.
    """
    try:
        try:
            items = msgspec.json.decode(data, type=list[msgspec.Raw])
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            values = json.loads(data)  # NaN and Infinity, as below
            items = [msgspec.Raw(json.dumps(value).encode()) for value in values]
    except (ValueError, TypeError, RecursionError, msgspec.MsgspecError) as error:
        raise DataError(f"not readable as a JSON list: {error}", where=file, hint="export it anew") from None
    yield from map(bytes, items)


def starts_like(path: Path, opening: bytes, *keys: str) -> bool:
    """Whether a JSON file opens with a bracket, and all of these keys stand near its beginning; a cheap look.

    Args:
        path: The file.
        opening: `[` for a list, `{` for an object.
        keys: Regular expressions of keys without their quotes.
    """
    if path.suffix.lower() != ".json":
        return False
    head = utf_8(start_of(path, _SNIFF_BYTES)).lstrip()
    return head[:1] == opening and all(re.search(rf'"({key})"\s*:'.encode(), head) for key in keys)


def _decoded_line(text: bytes, decoder: msgspec.json.Decoder[Item], place: str, reading: Reading) -> Item | None:
    try:
        try:
            return decoder.decode(text)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            # Python writes NaN and Infinity, which are not valid JSON.
            return msgspec.convert(json.loads(text), decoder.type, strict=False)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        start = text[:80].decode(errors="replace")
        reading.issues.add("unreadable annotation", place, f"{error}: {start}")
        return None


def first_keys(file: Path) -> Iterator[frozenset[str]]:
    """The keys of those of a file's first lines that are JSON objects; a cheap look."""
    head = start_of(file, _SNIFF_BYTES)
    whole = utf_8(head).splitlines()
    for line in whole[: -1 if len(head) == _SNIFF_BYTES else None][:_SNIFFED]:
        keys = _keys(line)
        if keys is not None:
            yield keys


def _keys(line: bytes) -> frozenset[str] | None:
    try:
        try:
            return frozenset(msgspec.json.decode(line, type=dict[str, msgspec.Raw]))
        except msgspec.DecodeError:
            value = json.loads(line)  # NaN and Infinity, as above
    except (ValueError, RecursionError):
        return None
    return frozenset(value) if isinstance(value, dict) else None


def numbers(value: Any, count: int) -> list[float] | None:
    """A decoded JSON value as so many numbers; None if it is anything else."""
    if not isinstance(value, list) or len(value) != count:
        return None
    try:
        return [float(item) for item in value]
    except (TypeError, ValueError, OverflowError):
        return None


def read_label_map(where: str, files: Files) -> dict[str, str]:
    """The names by label, from a JSON file {"0": "person", ...} or a list of names.

    Raises:
        DataError: the file cannot be read, or holds neither.
    """
    try:
        values = msgspec.json.decode(utf_8(files.read(where)), type=dict[str, str] | list[str])
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        hint = 'write {"0": "cat", "1": "dog"}'
        raise DataError(f"not readable as a label map: {error}", where=files.root / where, hint=hint) from None
    return values if isinstance(values, dict) else {str(label): name for label, name in enumerate(values)}
