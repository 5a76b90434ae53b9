"""Images of every kind with one object each, and files that are none.

Every image shows a dark marker on a bright ground, near its top left corner and at one of some fifty places: where it
lies tells which way up an image was read, and whether boxes are still with their own image.
"""

import importlib.util
import io
import struct
import unicodedata
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

WIDTH, HEIGHT = 60, 40
GROUND, MARKER = (230, 220, 200), (20, 60, 30)

_T = Image.Transpose
# How pixels are stored so that a viewer who obeys the EXIF orientation shows them upright.
_STORED = {
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_90,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_270,
}


def box_of(name: str) -> tuple[int, int, int, int]:
    """Where an image has its marker, xyxy in pixels of the image as it is shown; places are 3 pixels apart."""
    number = zlib.crc32(unicodedata.normalize("NFC", name).encode())
    left, top = 2 + 3 * (number % 4), 1 + 3 * (number // 4 % 3)
    return left, top, left + 16 + 4 * (number // 12 % 2), top + 9 + 3 * (number // 24 % 2)


def shown(name: str) -> Image.Image:
    """The image as it should be seen."""
    pixels = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:] = GROUND
    left, top, right, bottom = box_of(name)
    pixels[top:bottom, left:right] = MARKER
    return Image.fromarray(pixels)


def shows_marker(pixels: np.ndarray, box: Sequence[float]) -> bool:
    """Whether the box (xyxy in pixels) is where the image (RGB of 0 to 255) has its marker, and nothing else is."""
    left, top, right, bottom = (round(float(side)) for side in box)
    grey = pixels.astype(float).mean(-1)
    inside = grey[top + 2 : bottom - 2, left + 2 : right - 2]
    around = grey.copy()
    around[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = 255
    return inside.size > 0 and inside.max() < 100 and around.min() > 150


def stored_pixels(path: Path) -> np.ndarray:
    """RGB as the file has it, before a viewer turns it."""
    with Image.open(path) as image:
        orientation = image.getexif().get(0x0112, 1)
        upright = ImageOps.exif_transpose(image)
    return np.asarray(upright.transpose(_STORED[orientation]) if orientation in _STORED else upright)


def _turned(orientation: int, suffix: str) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = shown(path.name)
        image = image.transpose(_STORED[orientation]) if orientation in _STORED else image
        image.save(path, exif=exif if suffix == ".tif" else exif.tobytes(), **_options(suffix))

    return save


def _options(suffix: str) -> dict[str, object]:
    return {".jpg": {"quality": 95}, ".webp": {"lossless": True}, ".avif": {"quality": 95}}.get(suffix, {})


def _as_mode(mode: str) -> Callable[[Path], None]:
    return lambda path: shown(path.name).convert(mode, dither=Image.Dither.NONE).save(path, **_options(path.suffix))


def _wide(path: Path) -> None:
    """Grey, 16 bits."""
    grey = np.asarray(shown(path.name).convert("L")).astype(np.uint16)
    Image.fromarray(grey * 257).save(path)


def _wide_colour_png(path: Path) -> None:
    """Colour, 16 bits a channel, which Pillow does not write."""
    rows = (np.asarray(shown(path.name)).astype(">u2") * 257).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    path.write_bytes(_png(WIDTH, HEIGHT, depth=16, data=zlib.compress(data)))


def _clear(path: Path) -> None:
    """The ground is transparent, and black where that is forgotten."""
    image = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    left, top, right, bottom = box_of(path.name)
    image[top:bottom, left:right] = (*MARKER, 255)
    Image.fromarray(image).save(path, **_options(path.suffix))


def _clear_colour(path: Path) -> None:
    """A palette of which one colour is transparent."""
    image = shown(path.name).quantize(4)
    image.save(path, transparency=image.getpixel((WIDTH - 1, HEIGHT - 1)))


def _cmyk(path: Path) -> None:
    shown(path.name).convert("CMYK").save(path, **_options(path.suffix))


def _floats(scale: float) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        grey = np.asarray(shown(path.name).convert("L")).astype(np.float32)
        Image.fromarray(grey * np.float32(scale)).save(path)

    return save


def _heic(orientation: int) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = shown(path.name)
        image = image.transpose(_STORED[orientation]) if orientation in _STORED else image
        pillow_heif.from_pillow(image).save(path, quality=95, exif=exif.tobytes())

    return save


def _plain(path: Path) -> None:
    shown(path.name).save(path, **_options(path.suffix))


def _linked_image(path: Path) -> None:
    """A link to an image beside the dataset, as the user made it."""
    target = path.parent.parent.parent / "elsewhere.png"
    shown(path.name).save(target)
    path.symlink_to(target)


_HEIC: dict[str, Callable[[Path], None]] = {}
if importlib.util.find_spec("pillow_heif"):
    import pillow_heif

    pillow_heif.register_heif_opener()  # as someone does who gives METR such images as PIL opens them

    _HEIC = {**{f"turned {n}.heic": _heic(n) for n in range(1, 9)}, "phone.HEIC": _heic(1), "phone.heif": _heic(6)}

READABLE: dict[str, Callable[[Path], None]] = {
    **{f"turned {n}{suffix}": _turned(n, suffix) for n in range(1, 9) for suffix in (".jpg", ".png", ".webp", ".tif")},
    "grey.jpg": _as_mode("L"),
    "grey.png": _as_mode("L"),
    "one bit.png": _as_mode("1"),
    "one bit.tif": _as_mode("1"),
    "grey alpha.png": _as_mode("LA"),
    "palette.png": _as_mode("P"),
    "palette.gif": _as_mode("P"),
    "palette.bmp": _as_mode("P"),
    "opaque.png": _as_mode("RGBA"),
    **_HEIC,
    **{f"turned {n}.avif": _turned(n, ".avif") for n in range(1, 9)},
    **{f"plain{suffix}": _plain for suffix in (".avif", ".jp2", ".j2k", ".ppm")},
    "grey.pgm": _as_mode("L"),
    "one bit.pbm": _as_mode("1"),
    "from 0 to 1.tif": _floats(1 / 255),
    "from 0 to 255.tif": _floats(1),
    "clear.avif": _clear,
    "clear.png": _clear,
    "clear.webp": _clear,
    "clear.tif": _clear,
    "clear colour.png": _clear_colour,
    "clear colour.gif": _clear_colour,
    "sixteen bits.png": _wide,
    "sixteen bits.tif": _wide,
    "sixteen bits colour.png": _wide_colour_png,
    "cmyk.jpg": _cmyk,
    "cmyk.tif": _cmyk,
    "upper case.JPG": _plain,
    "снимок с пробелами.png": _plain,
    "図 1 (копия).jpg": _plain,
    "it's 100% [a]{b} #1 & more,.png": _plain,
    unicodedata.normalize("NFC", "Café über.png"): _plain,
    unicodedata.normalize("NFD", "naïve señor.png"): _plain,
    "link.png": _linked_image,
}


def _cut(suffix: str, share: float = 0.6) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(noise).save(
            data, {".jpg": "JPEG", ".tif": "TIFF", ".jp2": "JPEG2000", ".ppm": "PPM"}.get(suffix, suffix[1:].upper())
        )
        path.write_bytes(data.getvalue()[: int(len(data.getvalue()) * share)])

    return save


def _png(width: int, height: int, depth: int = 8, data: bytes = b"") -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _jpeg_bomb(path: Path) -> None:
    """An image whose frame header says 30,000 x 30,000."""
    data = io.BytesIO()
    shown(path.name).save(data, "JPEG")
    whole = bytearray(data.getvalue())
    frame = whole.index(b"\xff\xc0")
    whole[frame + 5 : frame + 9] = struct.pack(">HH", 30_000, 30_000)
    path.write_bytes(whole)


def _tiff_bomb(path: Path) -> None:
    # width, height, bits, compression, photometric interpretation, offset, samples, rows in a strip, bytes of a strip
    tags = {256: 30_000, 257: 30_000, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 30_000, 279: 900_000_000}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4))


def _float_colours(path: Path) -> None:
    pixels = np.ones((HEIGHT, WIDTH, 3), dtype=np.float32)
    path.write_bytes(cv2.imencode(".tif", pixels)[1].tobytes())


def _holding(data: bytes) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        path.write_bytes(data)

    return save


UNREADABLE: dict[str, Callable[[Path], None]] = {
    **{f"cut off{suffix}": _cut(suffix) for suffix in (".jpg", ".png", ".webp", ".tif", ".bmp", ".gif")},
    **{f"cut off{suffix}": _cut(suffix, 0.3) for suffix in (".jp2", ".ppm")},
    "cut in its header.avif": _cut(".avif", 0.3),
    "cut in its header.heic": _holding(b"\0\0\0\x24ftypheic\0\0\0\0mif1heicMiHBMiHE"),
    "colours of 32 bits.tif": _float_colours,
    "no library of ours.jxl": _holding(b"\xff\x0a" + bytes(40)),
    "cut in its header.jpg": _holding(b"\xff\xd8\xff\xe0\0\x10JF"),
    "empty.png": _holding(b""),
    "no image.jpg": _holding(b"not an image"),
    "zeros.png": _holding(bytes(2000)),
    "bomb.png": _holding(_png(30_000, 30_000, data=zlib.compress(bytes(90_001)))),
    "bomb.jpg": _jpeg_bomb,
    "bomb.tif": _tiff_bomb,
    "bomb.bmp": _holding(b"BM" + struct.pack("<IIIIiiHH", 0, 0, 54, 40, 30_000, -30_000, 1, 24) + bytes(24)),
    "bomb.gif": _holding(
        b"GIF89a" + struct.pack("<HHHBBHHHHB", 30_000, 30_000, 0, 0, 0x2C, 0, 0, 30_000, 30_000, 0) + bytes(20)
    ),
    "link to nothing.png": lambda path: path.symlink_to("nowhere.png"),
    "link to itself.png": lambda path: path.symlink_to(path.name),
}


def write_all(folder: Path, images: Mapping[str, Callable[[Path], None]]) -> None:
    """Writes images into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, save in images.items():
        save(folder / name)
