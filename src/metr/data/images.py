"""Images: their size without decoding, and reading them as 8-bit RGB whatever the file holds."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from metr.data.image_headers import Header, parse_header, without_orientation
from metr.data.records import DataIssue, ImageRecord
from metr.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".gif", ".tif", ".tiff"})

# A file of a few kilobytes may unfold to gigabytes: 2^27 pixels take 400 MB as RGB.
MAX_PIXELS = 1 << 27

# The EXIF orientations, after rows and columns have changed places where they must.
_FLIP_ROWS, _FLIP_COLUMNS = frozenset({3, 4, 7, 8}), frozenset({2, 3, 6, 7})

# OpenCV writes to the standard error what it finds wrong in an image; the errors raised here say it, naming the file.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)

# Headers nearly always end within this many bytes; the rest of the file is read only where they do not.
_HEAD_BYTES = 1 << 15


def probe_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image in pixels as viewers show it (EXIF orientation applied), without decoding it.

    Raises:
        DataError: the file is missing, empty, cut off or not an image of a known format.
    """
    return read_header(path).shown_size


def read_header(path: Path) -> Header:
    """Size and orientation of an image, without decoding it.

    Raises:
        DataError: the file is missing, empty, cut off or not an image of a known format.
    """
    with _file_errors(path), path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        return _header_of(path, head, lambda: head + file.read())


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS, orient: bool = True) -> UInt8[np.ndarray, "h w 3"]:
    """An image as 8-bit RGB.

    Grey, palette, CMYK and 16-bit images are converted; transparency is laid on white (that of grey TIFF files is
    forgotten). Of an animation, the first frame is read.

    Args:
        path: A JPEG, PNG, BMP, GIF, WebP or TIFF file.
        max_pixels: An image with more pixels is refused before it is decoded.
        orient: Turn the image as its EXIF orientation says, as viewers do; else leave the pixels as stored.

    Raises:
        DataError: the file is missing, empty, cut off, not an image, or has too many pixels.
    """
    with _file_errors(path):
        data = path.read_bytes()  # cv2.imread fails on non-Latin paths on some systems
    header = _header_of(path, data[:_HEAD_BYTES], lambda: data)
    _refuse_too_large(path, header, max_pixels)
    image = _decoded(data, header)
    if image is None or image.shape[:2] != header.stored_size:
        what = f"a {header.kind.upper()} image that cannot be decoded: cut off, damaged or of an unusual pixel type"
        raise DataError(what, where=path, hint="open it in a viewer and save it again, or remove it")
    image = _as_rgb(image, header)
    return np.ascontiguousarray(_turned(image, header.orientation) if orient else image)


def read_annotated(
    record: ImageRecord, *, max_pixels: int = MAX_PIXELS
) -> tuple[UInt8[np.ndarray, "h w 3"], ImageRecord, DataIssue | None]:
    """The image of a record, the record fitted to it, and what did not agree, if anything.

    Boxes are meant in an image of the size that the annotations declare. Where that is the size of the stored pixels
    and not of the image as viewers turn it, the boxes are turned with it (a DataIssue "orientation"). Where it is
    neither, they are scaled to the image (a DataIssue "size differs").

    Raises:
        DataError: as `read_image`.
    """
    header = read_header(record.path)
    issue = _disagreement(record, header)
    image = read_image(record.path, max_pixels=max_pixels)
    record = _turned_record(record, header)
    height, width = int(image.shape[0]), int(image.shape[1])
    if (height, width) == (record.height, record.width):
        return image, record, issue
    across, down = width / record.width, height / record.height
    boxes = record.boxes * np.array([across, down, across, down], dtype=record.boxes.dtype)
    areas = record.areas * record.areas.dtype.type(across * down)
    return image, replace(record, width=width, height=height, boxes=boxes, areas=areas), issue


def exif_oriented_record(record: ImageRecord) -> ImageRecord:
    """A record whose boxes are turned with its image where they are meant in the pixels as stored.

    It stays as it is where they are not, and where the image cannot be read.
    """
    try:
        return _turned_record(record, read_header(record.path))
    except DataError:
        return record


def check_image(record: ImageRecord, *, decode: bool = False) -> DataIssue | None:
    """What is wrong with a record's image as far as its header tells; None where nothing is.

    With `decode` the whole image is read, which alone finds one that is cut off or damaged further on.
    """
    try:
        header = read_header(record.path)
        _refuse_too_large(record.path, header, MAX_PIXELS)
        if decode:
            read_image(record.path)
        return _disagreement(record, header)
    except DataError as error:
        return DataIssue(kind="unreadable image", where=str(record.path), detail=error.what)


def _disagreement(record: ImageRecord, header: Header) -> DataIssue | None:
    declared = (record.height, record.width)
    if declared == header.shown_size:
        return None
    if declared == header.stored_size:
        detail = f"boxes refer to the pixels as stored: they are turned as EXIF orientation {header.orientation} says"
        return DataIssue(kind="orientation", where=str(record.path), detail=detail)
    height, width = header.shown_size
    detail = f"annotated as {record.width} x {record.height}, is {width} x {height}: boxes are scaled"
    return DataIssue(kind="size differs", where=str(record.path), detail=detail)


@contextlib.contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says of a file into a DataError."""
    try:
        yield
    except FileNotFoundError:
        raise DataError("no such image", where=path, hint="check the path") from None
    except OSError as error:
        raise DataError(f"an image that cannot be read: {os.strerror(error.errno or 0)}", where=path) from None


def _header_of(path: Path, head: bytes, whole: Callable[[], bytes]) -> Header:
    """The header in the first bytes of a file, or in the whole file where it does not end within them."""
    try:
        try:
            header = parse_header(head)
        except EOFError:
            header = parse_header(whole())
    except EOFError:
        raise DataError("an image that ends within its header", where=path, hint="copy it again") from None
    except ValueError as error:
        raise DataError(f"a broken image: {error}", where=path) from None
    if header is not None:
        return header
    if not head:
        raise DataError("an empty file (0 bytes), not an image", where=path, hint="copy it again or remove it")
    kinds = "JPEG, PNG, BMP, GIF, WebP or TIFF"
    raise DataError(f"not an image in a known format ({kinds})", where=path, hint="convert it, for example to PNG")


def _refuse_too_large(path: Path, header: Header, max_pixels: int) -> None:
    if header.height * header.width > max_pixels:
        what = f"{header.width} x {header.height} pixels, more than the limit of {max_pixels:,}"
        raise DataError(what, where=path, hint="scale the image down or cut it into tiles, its boxes alike")


def _decoded(data: bytes, header: Header) -> np.ndarray | None:
    """The pixels as stored: [h w], [h w 3] BGR or [h w 4] BGRA; None where they cannot be decoded."""
    if header.kind == "jpeg" and data.rfind(b"\xff\xd9", header.offset) < 0:
        return None  # some decoders fill what is cut off with grey
    if header.kind == "tiff" and header.orientation != 1:
        data = without_orientation(data)
    flags = cv2.IMREAD_UNCHANGED if header.transparent else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image: np.ndarray | None = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error:
        return None
    return image


def _as_rgb(image: np.ndarray, header: Header) -> UInt8[np.ndarray, "h w 3"]:
    # libtiff, under OpenCV, multiplies 8-bit colours by their opacity whatever the file says
    premultiplied = header.premultiplied or (header.kind == "tiff" and image.dtype == np.uint8)
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.ndim == 2:
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_GRAY2RGB))
    if image.shape[2] == 3:
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    colour, opacity = image[..., 2::-1].astype(np.uint16), image[..., 3:].astype(np.uint16)
    if not premultiplied:
        colour = (colour * opacity + 127) // 255
    return np.asarray(np.minimum(colour + 255 - opacity, 255).astype(np.uint8))


def _turned_record(record: ImageRecord, header: Header) -> ImageRecord:
    """The record with its boxes where `_turned` takes what they show, if it declares the size of the stored pixels."""
    declared = (record.height, record.width)
    if declared == header.shown_size or declared != header.stored_size:
        return record
    height, width = header.shown_size
    left, top, right, bottom = record.boxes[:, [1, 0, 3, 2]].T  # the sides differ, so rows and columns change places
    if header.orientation in _FLIP_ROWS:
        top, bottom = height - bottom, height - top
    if header.orientation in _FLIP_COLUMNS:
        left, right = width - right, width - left
    boxes = np.stack([left, top, right, bottom], axis=1).astype(record.boxes.dtype)
    return replace(record, width=width, height=height, boxes=boxes)


def _turned(image: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "a b 3"]:
    """The image as its EXIF orientation wants it shown."""
    if orientation in {5, 6, 7, 8}:
        image = image.transpose(1, 0, 2)
    flip_rows, flip_columns = orientation in _FLIP_ROWS, orientation in _FLIP_COLUMNS
    return image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
