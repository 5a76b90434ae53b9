"""The pixels of images of any kind as RGB bytes: 16 and 32 bits, floating point, transparency, palettes, CMYK."""

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT, SAMPLESPERPIXEL, ImageFileDirectory_v2

from metr.data.records import ReadableBytes

# Pixels that are converted at once.
_STRIP = 1 << 22
_TRANSPARENT = frozenset({"LA", "PA", "RGBA", "RGBa"})
# What TIFF calls the kinds of numbers that pixels are.
_NUMBERS = {1: "integers", 2: "integers with a sign", 3: "floating-point numbers"}
_TIFF_HEADER, _BIG_TIFF_HEADER = 8, 16


def pixel_type(file: ReadableBytes) -> str:
    """What the pixels of a TIFF file are, such as `3 channels of 32-bit floating-point numbers`, by its tags."""
    try:
        file.seek(0)
        start = file.read(_TIFF_HEADER)
        if 43 in start[2:4]:  # BigTIFF
            start += file.read(_BIG_TIFF_HEADER - _TIFF_HEADER)
        tags = ImageFileDirectory_v2(start)
        file.seek(tags.next)
        tags.load(file)
        bits, kinds = _as_tuple(tags.get(BITSPERSAMPLE, 1)), _as_tuple(tags.get(SAMPLEFORMAT, 1))
        channels, numbers = tags.get(SAMPLESPERPIXEL, len(bits)), _NUMBERS.get(kinds[0], "numbers of another kind")
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, struct.error):
        return "unknown channels"
    sizes = " and ".join(f"{size}-bit" for size in dict.fromkeys(bits))
    return f"{channels} channel{'s' if channels != 1 else ''} of {sizes} {numbers}"


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def as_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels that are loaded, converted."""
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel, all grey
        return _in_strips(image, partial(_from_grey, factor=_factor(image)))
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        return _in_strips(image, _on_white)
    return np.array(image.convert("RGB"))


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], np.ndarray]) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels converted a few rows at a time: the largest images would else take gigabytes in between."""
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image.crop((0, top, image.width, bottom))
        strip.info = image.info  # of a palette, which colour is transparent
        pixels[top:bottom] = convert(strip)
    return pixels


def _on_white(image: Image.Image) -> np.ndarray:
    rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
    colour, opacity = rgba[..., :3], rgba[..., 3:]
    return np.asarray(((colour * opacity + 127) // 255 + 255 - opacity).astype(np.uint8))


def _factor(image: Image.Image) -> float:
    """What makes floating-point pixels 0 to 255: 255 where none of the image is outside of 0 to 1, else 1."""
    if image.mode != "F":
        return 1.0
    rows = max(1, _STRIP // image.width)
    strips = (
        np.nan_to_num(np.asarray(image.crop((0, top, image.width, min(top + rows, image.height)))))
        for top in range(0, image.height, rows)
    )
    return 255.0 if all(strip.min() >= 0 and strip.max() <= 1 for strip in strips) else 1.0


def _from_grey(image: Image.Image, factor: float) -> np.ndarray:
    grey = np.asarray(image)
    grey = np.nan_to_num(grey) * factor if image.mode == "F" else grey >> 8
    return grey.clip(0, 255).astype(np.uint8)[..., None]
