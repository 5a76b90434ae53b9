"""Images: one decoder for files, PIL images and arrays; sizes without decoding; records fitted to their images."""

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, features
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from metr.data.pixels import as_rgb, pixel_type
from metr.data.records import (
    Annotations,
    DataIssue,
    ImageBytes,
    ImageRecord,
    InMemoryAnnotations,
    PartlyRead,
    ReadableBytes,
)
from metr.data.regular_files import open_regular
from metr.errors import DataError

ImageSource = str | Path | np.ndarray | Image.Image

COMMON_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".gif", ".tif", ".tiff"}
)
# Every file beside annotations with one of these is taken for an image; one that cannot be read becomes an issue.
SUFFIXES = COMMON_SUFFIXES | frozenset(
    {".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".j2c", ".jpf", ".jpx"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jxl"}
)

# A file of a few kilobytes may unfold to gigabytes: 2^27 pixels take 400 MB as RGB.
MAX_PIXELS = 1 << 27

# Pillow's readers by how a file starts. `Image.open` would refuse large images before it tells their size.
_READERS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\xff\xd8", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"BM", BmpImageFile),
    (b"GIF8", GifImageFile),
    (b"RIFF", WebPImageFile),
    (b"II*\0", TiffImageFile),
    (b"MM\0*", TiffImageFile),
    (b"\0\0\0\x0cjP  \r\n\x87\n", Jpeg2KImageFile),
    (b"\xff\x4f\xff\x51", Jpeg2KImageFile),
    *((b"P%d" % kind + blank, PpmImageFile) for kind in range(1, 7) for blank in (b"\n", b" ", b"\r", b"\t")),
)
# Kinds of the container that AVIF and HEIC share ("ftyp" at its start), by the brands that a file names.
_AVIF = frozenset({b"avif", b"avis"})
_HEIC = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_START_BYTES = 32
# What Pillow raises about a damaged file, beside OSError.
_DAMAGED = (
    *(SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, RuntimeError),
    *(struct.error, zlib.error),
)

_WIDTH, _HEIGHT, _ORIENTATION = 256, 257, 274  # tags of TIFF, the last one of EXIF too
_SIDEWAYS = frozenset({5, 6, 7, 8})  # orientations that swap width and height
# The EXIF orientations that flip rows or columns, after a sideways image has been transposed.
FLIP_ROWS, FLIP_COLUMNS = frozenset({3, 4, 7, 8}), frozenset({2, 3, 6, 7})


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about its image: (height, width) in pixels as stored, and the EXIF orientation (1 to 8)."""

    stored_size: tuple[int, int]
    orientation: int = 1

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) as viewers show the image: they obey the EXIF orientation."""
        height, width = self.stored_size
        return (width, height) if self.orientation in _SIDEWAYS else (height, width)


def image_bytes(path: Path, source: ImageBytes | None) -> ReadableBytes:
    """The bytes of an image, from its file or from where a record says (`ImageRecord.source`).

    Raises:
        OSError: the file cannot be opened.
        StoreError: it is in a store that cannot be reached.
    """
    return open_regular(path) if source is None else source.open()


def probe_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image in pixels as viewers show it (EXIF orientation applied), without decoding it.

    Raises:
        DataError: the file is missing, empty, cut off or not an image of a known format.
    """
    return read_header(path).shown_size


def read_header(path: Path, source: ImageBytes | None = None) -> Header:
    """Size and orientation of an image, without decoding it.

    Raises:
        DataError: the file is missing, empty, cut off or not an image of a known format.
    """
    with _opened(path, source) as (_, header):
        return header


def header_of(data: bytes, where: object) -> tuple[str, Header]:
    """The format of an image by its bytes, as Pillow names it, and its header.

    Raises:
        DataError: they are no image of a known format, or cut off.
    """
    image = _recognised(io.BytesIO(data), where)
    return str(image.format), _header(image)


def read_image(path: Path, source: ImageBytes | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """An image file as 8-bit RGB, as viewers show it; `rgb_pixels` says how other kinds of pixels are converted.

    Of an animation, the first frame is read.

    Args:
        path: A JPEG, PNG, BMP, GIF, WebP, TIFF, AVIF, HEIC (extra `heif`), JPEG 2000 or PPM file of at most
            `MAX_PIXELS` pixels.
        source: Where its bytes are, if the path is a name alone.

    Raises:
        DataError: the file is missing, empty, cut off, not an image, or has too many pixels.
    """
    return _read(path, source)[0]


def load_image(image: object, where: object) -> UInt8[np.ndarray, "h w 3"]:
    """An image as 8-bit RGB, whether it comes as a path, a PIL image or an RGB array [h w 3] of bytes.

    Args:
        image: The image.
        where: What error messages call it, if it is no path.

    Raises:
        DataError: it cannot be read or decoded, or is none of the three.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return rgb_pixels(image, where)
    if not isinstance(image, np.ndarray):
        raise DataError(f"expected a path, an RGB array or a PIL image, found a {type(image).__name__}", where=where)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        what = f"expected RGB bytes [height, width, 3], found {image.dtype} {list(image.shape)}"
        raise DataError(what, where=where, hint="make a PIL image of it, or convert it to 8-bit RGB first")
    return np.ascontiguousarray(image)


def rgb_pixels(image: Image.Image, where: object) -> UInt8[np.ndarray, "h w 3"]:
    """A PIL image as 8-bit RGB, turned as its EXIF orientation says.

    Grey, palette and CMYK images are converted; of 16 bits the high 8 are kept; floating-point numbers from 0 to 1
    are multiplied by 255, others clipped to 0..255; transparent images are laid on white.

    Raises:
        DataError: the image comes from a file that turns out to be damaged, or its pixels are of an unusual type.
    """
    orientation = _orientation(image)
    try:
        image.load()
        pixels = as_rgb(image)
    except (OSError, *_DAMAGED) as error:
        kind = f"a {image.format} image" if image.format else "an image"
        what = f"{kind} that cannot be decoded: cut off, damaged or of an unusual pixel type ({error})"
        raise DataError(what, where=where, hint="open it in a viewer and save it again, or remove it") from None
    # Pillow has turned a TIFF image while it loaded it, and taken the orientation away.
    turned = _orientation(image) != orientation
    return pixels if turned else np.ascontiguousarray(_turned(pixels, orientation))


def read_annotated(record: ImageRecord) -> tuple[UInt8[np.ndarray, "h w 3"], ImageRecord, DataIssue | None]:
    """The image of a record, the record fitted to it, and what did not agree, if anything.

    Boxes are meant in an image of the size that the annotations declare. Where that is the size of the stored pixels
    and not of the image as viewers turn it, the boxes are turned with it (a DataIssue "orientation"). Where it is
    neither, they are scaled to the image (a DataIssue "size differs").

    Raises:
        DataError: as `read_image`.
    """
    image, header = _read(record.path, record.source)
    issue = _disagreement(record, header)
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
        return _turned_record(record, read_header(record.path, record.source))
    except DataError:
        return record


def exif_oriented(annotations: Annotations) -> InMemoryAnnotations:
    """A split whose boxes are turned with their images, which is what detections are compared with.

    The header of each image is read once, now.
    """
    return InMemoryAnnotations(
        name=annotations.name,
        split=annotations.split,
        format=annotations.format,
        categories=annotations.categories,
        issues=tuple(annotations.issues),
        records=tuple(exif_oriented_record(annotations[index]) for index in range(len(annotations))),
        unknown_names=annotations.unknown_names if isinstance(annotations, PartlyRead) else (),
    )


def check_image(record: ImageRecord, *, decode: bool = False) -> DataIssue | None:
    """What is wrong with a record's image as far as its header tells; None where nothing is.

    With `decode` the whole image is read, which alone finds one that is cut off or damaged further on.
    """
    try:
        header = _read(record.path, record.source)[1] if decode else read_header(record.path, record.source)
        _refuse_too_large(record.path, header)
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


def _read(path: Path, source: ImageBytes | None = None) -> tuple[UInt8[np.ndarray, "h w 3"], Header]:
    """An image with its header; the file is opened once."""
    with _opened(path, source) as (image, header):
        _refuse_too_large(path, header)
        return rgb_pixels(image, path), header


@contextlib.contextmanager
def _opened(path: Path, source: ImageBytes | None = None) -> Iterator[tuple[ImageFile, Header]]:
    """An image file that is open, not decoded yet."""
    try:
        with image_bytes(path, source) as file:
            image = _recognised(file, path)
            yield image, _header(image)
    except FileNotFoundError:
        raise DataError("no such image", where=path, hint="check the path") from None
    except OSError as error:
        raise DataError(f"an image that cannot be read: {error.strerror}", where=path) from None


def _header(image: ImageFile) -> Header:
    tags = getattr(image, "tag_v2", {})  # of TIFF, where versions of Pillow differ in which size they tell
    stored = (tags.get(_HEIGHT, image.height), tags.get(_WIDTH, image.width))
    return Header(stored_size=stored, orientation=_orientation(image))


def _recognised(file: ReadableBytes, path: object) -> ImageFile:
    """The image of an open file, its header read."""
    start = file.read(_START_BYTES)
    file.seek(0)
    reader = next((reader for magic, reader in _READERS if start.startswith(magic)), None) or _branded(start, path)
    if reader is not None:
        try:
            return reader(file)
        except Image.DecompressionBombError:
            raise _too_large("more pixels", path) from None
        except (OSError, *_DAMAGED) as error:
            if "unknown pixel mode" in str(error):  # Pillow's words
                found = f"{pixel_type(file)}, a" if reader is TiffImageFile else "a"
                what = f"a {reader.format} image of {found} pixel type that cannot be read"
                hint = "convert it to 8-bit RGB, for example to PNG, with its values scaled to 0..255"
                raise DataError(what, where=path, hint=hint) from None
            what = f"a {reader.format} image whose header is cut off or broken"
            raise DataError(what, where=path, hint="copy it again or remove it") from None
    if not start:
        raise DataError("an empty file (0 bytes), not an image", where=path, hint="copy it again or remove it")
    kinds = "JPEG, PNG, BMP, GIF, WebP, TIFF, AVIF, HEIC, JPEG 2000 or PPM"
    raise DataError(f"not an image in a known format ({kinds})", where=path, hint="convert it, for example to PNG")


def _branded(start: bytes, path: object) -> type[ImageFile] | None:
    """The reader of an AVIF or HEIC image by how its file starts; None for others.

    Raises:
        DataError: the library that reads this kind is not installed.
    """
    brands = {start[place : place + 4] for place in range(8, len(start), 4)} if start[4:8] == b"ftyp" else set()
    if brands & _AVIF:
        if not features.check("avif"):
            what = "an AVIF image, which needs Pillow 11.3 or newer with AVIF"
            raise DataError(what, where=path, hint="pip install --upgrade pillow")
        from PIL.AvifImagePlugin import AvifImageFile

        return AvifImageFile
    if not brands & _HEIC:
        return None
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        what = "a HEIC image, which needs the extra `heif` (pip install 'metr[heif]')"
        raise DataError(what, where=path, hint="install it, or convert the image, for example to JPEG") from None
    heif: type[ImageFile] = HeifImageFile
    return heif


def _refuse_too_large(path: Path, header: Header) -> None:
    height, width = header.stored_size
    if height * width > MAX_PIXELS:
        raise _too_large(f"{width} x {height} pixels, more", path)


def _too_large(what: str, path: object) -> DataError:
    hint = "scale the image down or cut it into tiles, its boxes alike"
    return DataError(f"{what} than the limit of {MAX_PIXELS:,}", where=path, hint=hint)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) where the block is broken, as viewers take it."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        orientation = getattr(image, "tag_v2", exif).get(_ORIENTATION, 1)
    except (OSError, Warning, *_DAMAGED):
        return 1
    return orientation if orientation in range(1, 9) else 1


def _turned_record(record: ImageRecord, header: Header) -> ImageRecord:
    """The record with its boxes where `_turned` takes what they show, if it declares the size of the stored pixels."""
    declared = (record.height, record.width)
    if declared == header.shown_size or declared != header.stored_size:
        return record
    height, width = header.shown_size
    left, top, right, bottom = record.boxes[:, [1, 0, 3, 2]].T  # the sides differ, so rows and columns change places
    if header.orientation in FLIP_ROWS:
        top, bottom = height - bottom, height - top
    if header.orientation in FLIP_COLUMNS:
        left, right = width - right, width - left
    boxes = np.stack([left, top, right, bottom], axis=1).astype(record.boxes.dtype)
    return replace(record, width=width, height=height, boxes=boxes)


def _turned(image: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "a b 3"]:
    """The image as its EXIF orientation wants it shown."""
    if orientation in _SIDEWAYS:
        image = image.transpose(1, 0, 2)
    flip_rows, flip_columns = orientation in FLIP_ROWS, orientation in FLIP_COLUMNS
    return image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
