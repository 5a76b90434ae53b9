"""What the objects of the demo's images lie on: water, grass and table tops, and the light on them."""

from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from metr.demo.canvas import Colour, hsv, mixed

Ground = Callable[[np.random.Generator, int, int], UInt8[np.ndarray, "h w 3"]]


def ripples(
    rng: np.random.Generator, height: int, width: int, cells: float, octaves: int = 3
) -> Float[np.ndarray, "h w"]:
    """Smooth noise of mean 0 and about unit deviation; `cells` bumps along the width, each octave twice as many."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        columns = max(2, round(cells * 2**octave))
        rows = max(2, round(cells * 2**octave * height / width))
        coarse = rng.standard_normal((rows, columns)).astype(np.float32)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    scaled: Float[np.ndarray, "h w"] = total / max(float(total.std()), 1e-6)
    return scaled


def blended(colours: tuple[Colour, Colour], share: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 3"]:
    """From the first colour (share 0) to the second (share 1), pixel by pixel."""
    first, second = (np.asarray(colour, np.float32) for colour in colours)
    mixture: Float[np.ndarray, "h w 3"] = first + (second - first) * np.clip(share, 0, 1)[..., None]
    return mixture


def water(rng: np.random.Generator, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """A pond: murky depths and the bright net that waves throw on the bottom."""
    half = height // 2, width // 2
    deep, shallow = hsv(rng, (150, 215), (0.4, 0.75), (0.32, 0.52)), hsv(rng, (140, 200), (0.25, 0.55), (0.55, 0.8))
    image = blended((deep, shallow), 0.5 + 0.28 * ripples(rng, *half, rng.uniform(2, 4)))
    net = np.abs(ripples(rng, *half, rng.uniform(7, 12), octaves=2))
    image += (np.clip(1 - net / 0.16, 0, 1) * np.float32(rng.uniform(12, 34)))[..., None]
    return _enlarged(image, height, width)


def grass(rng: np.random.Generator, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """A meadow: soil and moss under many blades of grass."""
    soil, moss = hsv(rng, (25, 45), (0.3, 0.5), (0.4, 0.6)), hsv(rng, (70, 115), (0.4, 0.65), (0.42, 0.65))
    share = 0.75 + 0.4 * ripples(rng, height // 2, width // 2, rng.uniform(3, 6))
    image = _enlarged(blended((soil, moss), share), height, width)
    blade = hsv(rng, (70, 115), (0.4, 0.7), (0.5, 0.75))
    slant = rng.uniform(-0.5, 0.5)
    for _ in range(14):
        tone = mixed(blade, hsv(rng, (45, 130), (0.3, 0.7), (0.3, 0.85)), 0.6)
        lines = blades(rng, height, width, count=45, slant=slant)
        cv2.polylines(image, lines, False, tone, int(rng.integers(1, 4)), cv2.LINE_AA)
    return image


def blades(rng: np.random.Generator, height: int, width: int, *, count: int, slant: float) -> list[np.ndarray]:
    """Curved blades of grass as lines of four points, in pixels; they lean by `slant` (0 is upright)."""
    root = rng.uniform((0, 0), (width, height * 1.1), (count, 1, 2))
    long = rng.uniform(0.03, 0.1, (count, 1)) * width
    lean = slant + rng.normal(0, 0.35, (count, 1))
    t = np.linspace(0, 1, 4)[None]
    curve = np.stack([lean * long * t**2, -long * t], axis=2)
    return list(np.round(root + curve).astype(np.int32))


def wood(rng: np.random.Generator, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """A table top: boards with grain, or now and then a chequered cloth."""
    if rng.random() < 0.25:
        return _cloth(rng, height, width)
    half = height // 2, width // 2
    light, dark = hsv(rng, (20, 38), (0.25, 0.55), (0.65, 0.92)), hsv(rng, (16, 32), (0.35, 0.6), (0.42, 0.65))
    warp = ripples(rng, *half, 1.5, octaves=2)
    grain = np.convolve(rng.standard_normal(half[0] + 32), np.ones(4) / 2, mode="same").astype(np.float32)
    rows = np.arange(half[0])[:, None] + 16 + np.clip(warp * 3, -15, 15)
    image = blended((light, dark), 0.38 + 0.2 * (grain[rows.astype(int)] + 0.3 * warp))
    board = int(rng.integers(half[0] // 4, half[0] // 2))
    for seam in range(int(rng.integers(0, board)), half[0], board):
        image[seam : seam + 2] *= 0.6
        image[seam + 2 :] *= rng.uniform(0.93, 1.07)
    return _enlarged(image, height, width)


def _cloth(rng: np.random.Generator, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    base = hsv(rng, (0, 360), (0.08, 0.35), (0.6, 0.92))
    other = mixed(base, hsv(rng, (0, 360), (0.1, 0.5), (0.5, 0.95)), 0.45)
    half, step = (height // 2, width // 2), rng.uniform(18, 36)
    y, x = (np.sin(np.arange(size) * (2 * np.pi / step)) > 0 for size in half)
    image = blended((base, other), (y[:, None].astype(np.float32) + x) / 2)
    return _enlarged(image + 4 * ripples(rng, *half, 60.0, octaves=1)[..., None], height, width)


def _enlarged(image: Float[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[np.ndarray, "b c 3"]:
    """The image as bytes, at another size (grounds are soft: half the size is drawn in a quarter of the time)."""
    small = np.clip(image, 0, 255).astype(np.uint8)
    large: UInt8[np.ndarray, "b c 3"] = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    return large


def daylight(rng: np.random.Generator, height: int, width: int, dapple: float) -> Float[np.ndarray, "h w"]:
    """How bright each place is, about 1: a slope from a random side, and shade as strong as `dapple` (0..1)."""
    side, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.28)
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)
    light = rng.uniform(0.88, 1.12) * (1 + slope * (np.cos(side) * x + np.sin(side) * y) / 1.4)
    shade = np.clip(0.5 + 1.2 * ripples(rng, height, width, 3.0, octaves=2), 0, 1)
    brightness: Float[np.ndarray, "h w"] = (light * (1 - dapple * (1 - shade))).astype(np.float32)
    return brightness
