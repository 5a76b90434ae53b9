"""The size and orientation of an image, read from the first bytes of its file without decoding it."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# The EXIF orientations that lie on their side: showing them swaps width and height.
_SIDEWAYS = frozenset({5, 6, 7, 8})
_TAG_WIDTH, _TAG_HEIGHT, _TAG_COLOURS, _TAG_ORIENTATION, _TAG_EXTRA = 256, 257, 262, 274, 338
_TIFF_RGB = 2


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of its image: `height` and `width` in pixels as stored, and the EXIF orientation (1 to 8).

    `offset` is a byte before which no pixels lie. `transparent` says that colours may have an opacity, `premultiplied`
    that they are stored multiplied by it.
    """

    kind: str
    height: int
    width: int
    orientation: int = 1
    offset: int = 0
    transparent: bool = False
    premultiplied: bool = False

    @property
    def stored_size(self) -> tuple[int, int]:
        """(height, width) of the pixels as they are stored."""
        return self.height, self.width

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) as viewers show the image, which obey the EXIF orientation."""
        return (self.width, self.height) if self.orientation in _SIDEWAYS else (self.height, self.width)


def parse_header(data: bytes) -> Header | None:
    """The header of a JPEG, PNG, BMP, GIF, WebP or TIFF file that starts with `data`; None for anything else.

    Raises:
        EOFError: the header goes on past the end of `data`.
        ValueError: the header contradicts the format.
    """
    for magic, parse in _FORMATS:
        if data.startswith(magic):
            try:
                header = parse(data)
            except (struct.error, IndexError):
                raise EOFError from None
            if header.width < 1 or header.height < 1:
                raise ValueError(f"the header says {header.width} x {header.height} pixels")
            return header
    return None


def without_orientation(tiff: bytes) -> bytes:
    """The bytes of a TIFF file that calls itself upright: versions of OpenCV differ in which orientations they obey."""
    changed = bytearray(tiff)
    for tag, form, place in _tiff_entries(tiff):
        if tag == _TAG_ORIENTATION:
            struct.pack_into(form, changed, place, 1)
    return bytes(changed)


def _jpeg(data: bytes) -> Header:
    orientation, position = 1, 2
    while True:
        if data[position] != 0xFF:
            raise ValueError(f"no JPEG marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:  # padding between segments
            position += 1
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        body = position + 4
        # Frame headers are C0 to CF but for Huffman tables, extensions and arithmetic conditioning.
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}:
            height, width = struct.unpack_from(">HH", data, body + 1)
            return Header(kind="jpeg", height=height, width=width, orientation=orientation, offset=body)
        if marker in {0xD9, 0xDA}:
            raise ValueError("no JPEG frame before the pixels")
        if marker == 0xE1 and data[body : body + 6] == b"Exif\0\0":
            orientation = _exif_orientation(data[body + 6 : body + length - 2])
        position = body + length - 2


def _png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    orientation, position = 1, 8
    while True:
        length, name = struct.unpack_from(">I4s", data, position)
        if name in {b"IDAT", b"IEND"}:
            return Header(kind="png", height=height, width=width, orientation=orientation, transparent=True)
        if name == b"eXIf":
            orientation = _exif_orientation(data[position + 8 : position + 8 + length])
        position += length + 12


def _bmp(data: bytes) -> Header:
    (size,) = struct.unpack_from("<I", data, 14)
    # The short header is that of OS/2. A negative height says that the rows run from the top.
    width, height = struct.unpack_from("<HH" if size == 12 else "<ii", data, 18)
    return Header(kind="bmp", height=abs(height), width=width)


def _gif(data: bytes) -> Header:
    width, height = struct.unpack_from("<HH", data, 6)
    return Header(kind="gif", height=height, width=width, transparent=True)


def _webp(data: bytes) -> Header:
    if data[8:12] != b"WEBP":
        raise ValueError("a RIFF file that is not a WebP image")
    name = data[12:16]
    if name == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header(kind="webp", height=height & 0x3FFF, width=width & 0x3FFF, transparent=True)
    if name == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        return Header(kind="webp", height=height, width=width, transparent=True)
    low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
    width, height = (high_width << 16 | low_width) + 1, (high_height << 16 | low_height) + 1
    has_exif = data[20] & 0x08
    orientation = _webp_orientation(data) if has_exif else 1
    return Header(kind="webp", height=height, width=width, orientation=orientation, transparent=True)


def _webp_orientation(data: bytes) -> int:
    position, (end,) = 12, struct.unpack_from("<I", data, 4)
    while position < end:
        name, length = struct.unpack_from("<4sI", data, position)
        if name == b"EXIF":
            return _exif_orientation(data[position + 8 : position + 8 + length].removeprefix(b"Exif\0\0"))
        position += 8 + length + length % 2
    return 1


def _tiff(data: bytes) -> Header:
    tags = _tiff_tags(data)
    if not {_TAG_WIDTH, _TAG_HEIGHT} <= tags.keys():
        raise ValueError("a TIFF file without the size of its image")
    extra = tags.get(_TAG_EXTRA, 0)  # 1 and 2 mean opacity
    return Header(
        kind="tiff",
        height=tags[_TAG_HEIGHT],
        width=tags[_TAG_WIDTH],
        orientation=tags.get(_TAG_ORIENTATION, 1),
        transparent=tags.get(_TAG_COLOURS) == _TIFF_RGB and extra in {1, 2},
        premultiplied=extra == 1,
    )


def _exif_orientation(block: bytes) -> int:
    """The orientation in an EXIF block; 1 (upright) where the block is broken, as viewers take it."""
    try:
        orientation = _tiff_tags(block).get(_TAG_ORIENTATION, 1)
    except (struct.error, ValueError):
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _tiff_tags(data: bytes) -> dict[int, int]:
    """The whole numbers in the first directory of a TIFF structure, by tag."""
    return {tag: struct.unpack_from(form, data, place)[0] for tag, form, place in _tiff_entries(data)}


def _tiff_entries(data: bytes) -> Iterator[tuple[int, str, int]]:
    """Tag, form (as `struct` names it) and place of each whole number in the first directory of a TIFF structure."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(data[:2]))
    if order is None:
        raise ValueError("no byte order in a TIFF structure")
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", data, entry)
        if kind in {3, 4}:  # 16 and 32 bits
            yield tag, order + ("H" if kind == 3 else "I"), entry + 8


_FORMATS: tuple[tuple[bytes, Callable[[bytes], Header]], ...] = (
    (b"\xff\xd8", _jpeg),
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"BM", _bmp),
    (b"GIF8", _gif),
    (b"RIFF", _webp),
    (b"II*\0", _tiff),
    (b"MM\0*", _tiff),
)
