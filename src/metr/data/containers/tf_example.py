"""TFRecord files without TensorFlow: their framing with checksums, and the `tf.train.Example` in each record.

A record is its length (8 bytes), a checksum of that (4), the data, and a checksum of it (4), all little-endian. The
checksums are CRC-32C, rotated and shifted by a constant. A file may be compressed as a whole by gzip or zlib.
"""

import contextlib
import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from jaxtyping import UInt32

from metr.data.formats.files import start_of
from metr.data.regular_files import open_regular
from metr.errors import DataError

# No record of images is longer, in bytes; a length beyond it is damage.
_LONGEST = 1 << 30
_PIECE = 1 << 20
_POLYNOMIAL = 0x82F63B78  # CRC-32C, its bits reversed
_MASK = 0xA282EAD8
_LANE = 64  # bytes of a piece whose checksum is taken beside those of the others
_SHORT = 1024
_ALL_32 = 0xFFFFFFFF

Feature = list[bytes] | list[float] | list[int]


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes:
        """So many bytes, fewer at the end."""


def is_tfrecord(path: Path) -> bool:
    """Whether a file begins with a record, compressed or not."""
    try:
        with _opened(path) as file:
            return _length(file.read(12)) is not None
    except (OSError, EOFError, zlib.error):
        return False


def records(path: Path) -> Iterator[bytes]:
    """The data of each record of a file.

    Raises:
        DataError: the file is damaged or cut off, or cannot be read.
    """
    number = 0
    try:
        with _opened(path) as file:
            while head := file.read(12):
                number += 1
                length = _length(head)
                if length is None:
                    raise _damaged(path, number, "its length and the checksum of that do not fit")
                data = file.read(length)
                tail = file.read(4)
                if len(data) < length or len(tail) < 4:
                    raise _damaged(path, number, "the file ends in it")
                if masked_crc32c(data) != struct.unpack("<I", tail)[0]:
                    raise _damaged(path, number, "its data and the checksum of them do not fit")
                yield data
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, number + 1, f"it cannot be read ({error})") from None


def parse_example(data: bytes) -> dict[str, Feature]:
    """The features of a `tf.train.Example` by their keys.

    Raises:
        ValueError: the data are no such message.
    """
    features: dict[str, Feature] = {}
    for message in _messages(data, 1):
        for entry in _messages(message, 1):
            key = b"".join(_messages(entry, 1)).decode()
            values: Feature = []
            for feature in _messages(entry, 2):
                values = _values(feature)
            features[key] = values
    return features


def masked_crc32c(data: bytes) -> int:
    """The checksum of some bytes as TFRecord files have it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK) & _ALL_32


def crc32c(data: bytes) -> int:
    """CRC-32C. Long data are cut into pieces, whose checksums are taken side by side and then joined.

    Zeros in front change nothing where the register starts with 0. It starts with ones: that is the same as to turn the
    first four bytes of the data around.
    """
    if len(data) < _SHORT:
        crc = _ALL_32
        for byte in data:
            crc = _INTEGERS[(crc ^ byte) & 0xFF] ^ crc >> 8
        return crc ^ _ALL_32
    lanes = 1 << (-(-len(data) // _LANE) - 1).bit_length()
    padded = np.zeros(lanes * _LANE, dtype=np.uint8)
    padded[-len(data) :] = np.frombuffer(data, dtype=np.uint8)
    start = len(padded) - len(data)
    padded[start : start + 4] ^= 0xFF
    crcs = np.zeros(lanes, dtype=np.uint32)
    for column in np.ascontiguousarray(padded.reshape(lanes, _LANE).T):
        crcs = _TABLE[(crcs ^ column) & 0xFF] ^ crcs >> 8
    shift = _SHIFT_BY_A_LANE
    while len(crcs) > 1:
        crcs = _shifted(crcs[0::2], shift) ^ crcs[1::2]
        shift = _shifted(shift, shift)
    return int(crcs[0]) ^ _ALL_32


def _shifted(crcs: UInt32[np.ndarray, "n"], shift: UInt32[np.ndarray, "32"]) -> UInt32[np.ndarray, "n"]:
    """The checksums after zeros, whose number `shift` stands for: what each bit of a checksum becomes."""
    bits = crcs[:, None] >> np.arange(32, dtype=np.uint32) & 1
    result: UInt32[np.ndarray, "n"] = np.bitwise_xor.reduce(np.where(bits, shift, np.uint32(0)), axis=1)
    return result


def _table() -> UInt32[np.ndarray, "256"]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table.astype(np.uint32)


def _shift_by_a_lane() -> UInt32[np.ndarray, "32"]:
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    shift: UInt32[np.ndarray, "32"] = _TABLE[bits & 0xFF] ^ bits >> 8  # by one byte
    for _ in range(_LANE.bit_length() - 1):
        shift = _shifted(shift, shift)
    return shift


_TABLE = _table()
_INTEGERS: list[int] = _TABLE.tolist()
_SHIFT_BY_A_LANE = _shift_by_a_lane()


def _length(head: bytes) -> int | None:
    """The length of a record by its first 12 bytes; None where they are none of a record."""
    if len(head) < 12:
        return None
    length, crc = struct.unpack("<QI", head)
    return int(length) if length <= _LONGEST and masked_crc32c(head[:8]) == crc else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Readable]:
    """A file, its contents as they were before they were compressed."""
    start = start_of(path, 12)
    with open_regular(path) as file:
        if _length(start) is not None:
            yield file
        elif start.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=file) as inflated:
                yield inflated
        elif start[:1] == b"\x78":
            yield _Inflated(file)
        else:
            yield file


class _Inflated:
    """Reads a file that is compressed by zlib."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._inflate = file, zlib.decompressobj()

    def read(self, size: int, /) -> bytes:
        """So many bytes, fewer at the end.

        Raises:
            EOFError: the file ends before the compressed data do.
        """
        parts, left = [], size
        while left > 0 and not self._inflate.eof:
            piece = self._inflate.unconsumed_tail or self._file.read(_PIECE)
            if not piece:
                raise EOFError("the compressed data end too early")
            parts.append(self._inflate.decompress(piece, left))
            left -= len(parts[-1])
        return b"".join(parts)


def _values(feature: bytes) -> Feature:
    """The values of a feature, a list of bytes, of floating-point numbers or of integers."""
    values: Feature = []
    for kind, wire, content in _fields(feature):
        if kind not in {1, 2, 3} or wire != 2 or not isinstance(content, bytes):
            continue
        items = [(number, item) for field, number, item in _fields(content) if field == 1]
        if kind == 1:
            values = [item for _, item in items if isinstance(item, bytes)]
        elif kind == 2:
            packed = b"".join(item for _, item in items if isinstance(item, bytes))
            if len(packed) % 4:
                raise ValueError("floating-point numbers are cut off")
            values = list(struct.unpack(f"<{len(packed) // 4}f", packed))
        else:
            values = [
                number
                for _, item in items
                for number in (_integers(item) if isinstance(item, bytes) else [_signed(item)])
            ]
    return values


def _integers(packed: bytes) -> list[int]:
    values, place = [], 0
    while place < len(packed):
        value, place = _varint(packed, place)
        values.append(_signed(value))
    return values


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _messages(data: bytes, number: int) -> Iterator[bytes]:
    """The fields of a number that are messages, texts or bytes."""
    for field, wire, content in _fields(data):
        if field == number:
            if wire != 2 or not isinstance(content, bytes):
                raise ValueError(f"field {number} is of another kind")
            yield content


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes | int]]:
    """The fields of a protocol buffer: number, kind on the wire, and contents; four bytes (kind 5) as bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, wire, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        else:
            length = {1: 8, 5: 4}.get(wire, -1)
        if number == 0 or length < 0 or place + length > len(data):
            raise ValueError("a field that is broken or cut off")
        yield number, wire, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("a number that is cut off")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & ((1 << 64) - 1), place
    raise ValueError("a number of more than 64 bits")


def _damaged(path: Path, number: int, what: str) -> DataError:
    return DataError(f"damaged or cut off at record {number}: {what}", where=path, hint="download or copy it again")
