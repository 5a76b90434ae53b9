"""The pixels of images of any kind as RGB bytes: 16 and 32 bits, floating point, transparency, palettes, CMYK."""

from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import UInt8
from PIL import Image

# Pixels that are converted at once.
_STRIP = 1 << 22
_TRANSPARENT = frozenset({"LA", "PA", "RGBA", "RGBa"})


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
