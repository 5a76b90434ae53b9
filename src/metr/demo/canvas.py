"""What the objects of the demo's images lie on: water, grass and table tops, and the light on them."""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Int32, UInt8

Colour = tuple[int, int, int]
Pair = tuple[float | int, float | int]
Shape = Sequence[Pair] | Float[np.ndarray, "n 2"]

_SUBPIXEL_BITS = 4
_REACH = 1.7  # the sheet's half side, in units of the object's plane: room for corners, bends and stretching


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """A drawn object, cut to the pixels that it covers."""

    name: str
    colour: UInt8[np.ndarray, "h w 3"]
    alpha: UInt8[np.ndarray, "h w"]

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.alpha.shape[0])

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.alpha.shape[1])


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How an object is turned into pixels: `scale` pixels a unit, `angle` in degrees, `aspect` stretches along x.

    `bend` curves the object's x axis: a point moves by bend * x * x along y.
    """

    scale: float
    angle: float = 0.0
    aspect: float = 1.0
    bend: float = 0.0
    mirrored: bool = False


def hsv(rng: np.random.Generator, hue: Pair, saturation: Pair, value: Pair) -> Colour:
    """A random colour: hue in degrees (beyond 360 it goes round), saturation and value in 0..1."""
    h, s, v = rng.uniform(*hue) / 360 % 1, rng.uniform(*saturation), rng.uniform(*value)
    red, green, blue = colorsys.hsv_to_rgb(h, s, v)
    return round(255 * red), round(255 * green), round(255 * blue)


def mixed(first: Colour, second: Colour, share: float) -> Colour:
    """`first` with `share` (0..1) of `second` in it."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def darker(colour: Colour, share: float) -> Colour:
    """The colour with `share` (0..1) of black."""
    return mixed(colour, (0, 0, 0), share)


def lighter(colour: Colour, share: float) -> Colour:
    """The colour with `share` (0..1) of white."""
    return mixed(colour, (255, 255, 255), share)


def smooth(points: Shape, closed: bool = True, steps: int = 6) -> Float[np.ndarray, "c 2"]:
    """A Catmull-Rom curve through the points."""
    knots = np.asarray(points, dtype=np.float64)
    if not closed:
        knots = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    before, after, beyond = (np.roll(knots, shift, axis=0) for shift in (1, -1, -2))
    t = (np.arange(steps) / steps)[None, :, None]
    p0, p1, p2, p3 = (part[:, None] for part in (before, knots, after, beyond))
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    open_end = [curve[1:-2].reshape(-1, 2), knots[-2:-1]]
    through: Float[np.ndarray, "c 2"] = curve.reshape(-1, 2) if closed else np.concatenate(open_end)
    return through


def oval(centre: Pair, radii: Pair, angle: float | int = 0) -> Float[np.ndarray, "n 2"]:
    """An ellipse as a polygon; `angle` in degrees."""
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    points = np.stack([radii[0] * np.cos(t), radii[1] * np.sin(t)], axis=1)
    moved: Float[np.ndarray, "n 2"] = turned(points, angle) + np.asarray(centre)
    return moved


def turned(points: Shape, angle: float | int, centre: Pair = (0, 0)) -> Float[np.ndarray, "n 2"]:
    """The points turned by `angle` degrees (clockwise as seen, y points down) about `centre`."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    middle = np.asarray(centre)
    away = np.asarray(points, dtype=np.float64) - middle
    moved: Float[np.ndarray, "n 2"] = away @ np.array([[c, s], [-s, c]]) + middle
    return moved


def flipped(points: Shape) -> Float[np.ndarray, "n 2"]:
    """The points mirrored at the x axis."""
    mirrored: Float[np.ndarray, "n 2"] = np.asarray(points, dtype=np.float64) * np.array([1.0, -1.0])
    return mirrored


class Canvas:
    """Draws one object on a transparent sheet of its own."""

    def __init__(self, pose: Pose) -> None:
        self.pose = pose
        side = int(np.ceil(2 * _REACH * pose.scale)) + 4
        self._sheet = np.zeros((side, side, 4), np.uint8)

    def _pixels(self, points: Shape) -> Float[np.ndarray, "n 2"]:
        plane = np.array(points, dtype=np.float64)
        plane[:, 1] += self.pose.bend * plane[:, 0] ** 2
        plane[:, 0] *= -self.pose.aspect if self.pose.mirrored else self.pose.aspect
        pixels: Float[np.ndarray, "n 2"] = turned(plane, self.pose.angle) * self.pose.scale + self._sheet.shape[0] / 2
        return pixels

    def fill(self, points: Shape, colour: Colour) -> None:
        """A filled polygon."""
        fixed = _fixed_point(self._pixels(points))
        cv2.fillPoly(self._sheet, [fixed], (*colour, 255), cv2.LINE_AA, _SUBPIXEL_BITS)

    def stroke(self, points: Shape, width: float, colour: Colour, closed: bool = False) -> None:
        """A line through the points, `width` in units of the object's plane."""
        thickness = max(1, round(width * self.pose.scale))
        fixed = _fixed_point(self._pixels(points))
        cv2.polylines(self._sheet, [fixed], closed, (*colour, 255), thickness, cv2.LINE_AA, _SUBPIXEL_BITS)

    def glaze(self, points: Shape, colour: Colour, opacity: float = 1.0) -> None:
        """A polygon of paint on what is already drawn, and only there: the silhouette stays."""
        pixels = self._pixels(points)
        low = np.clip(np.floor(pixels.min(axis=0)).astype(int) - 1, 0, self._sheet.shape[0])
        high = np.clip(np.ceil(pixels.max(axis=0)).astype(int) + 2, 0, self._sheet.shape[0])
        if (high <= low).any():
            return
        part = self._sheet[low[1] : high[1], low[0] : high[0]]
        mask = np.zeros(part.shape[:2], np.uint8)
        cv2.fillPoly(mask, [_fixed_point(pixels - low)], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        share = (mask.astype(np.float32) * (opacity / 255))[..., None]
        paint = np.asarray(colour, np.float32) * (part[..., 3:].astype(np.float32) / 255)
        part[..., :3] = part[..., :3] * (1 - share) + paint * share

    def finish(self, name: str, rng: np.random.Generator) -> Sprite:
        """The drawing, rounded by a light from a random side, slightly mottled, and cut to what it covers."""
        alpha = self._sheet[..., 3]
        rows, columns = np.flatnonzero((alpha > 127).any(axis=1)), np.flatnonzero((alpha > 127).any(axis=0))
        inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        alpha = np.ascontiguousarray(alpha[inside])
        body = softened(alpha, max(1.0, 0.09 * self.pose.scale), margin=0).astype(np.float32) / 255
        height, width = body.shape
        y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)
        side = rng.uniform(0, 2 * np.pi)
        mottle = rng.random((height, width), np.float32) * np.float32(0.08) - np.float32(0.04)
        light = 1 + mottle + np.float32(0.14 * np.cos(side)) * x + np.float32(0.14 * np.sin(side)) * y
        shade = light * (0.5 + 0.5 * np.minimum(1, 1.25 * body))
        lit = cv2.multiply(self._sheet[inside][..., :3], cv2.merge([shade] * 3), dtype=cv2.CV_8U)
        colour = cv2.min(lit, cv2.merge([alpha] * 3))
        return Sprite(name=name, colour=colour, alpha=alpha)


def softened(alpha: UInt8[np.ndarray, "h w"], sigma: float, margin: int) -> UInt8[np.ndarray, "..."]:
    """A blur as wide as `sigma` pixels of an alpha with `margin` pixels of nothing added around it.

    Nothing fine is left after a wide blur, so it is done on a smaller copy.
    """
    border = margin + int(3 * sigma)
    padded = cv2.copyMakeBorder(alpha, border, border, border, border, cv2.BORDER_CONSTANT)
    height, width = padded.shape
    shrink = max(1, int(sigma / 1.5))
    small = cv2.resize(padded, (max(1, width // shrink), max(1, height // shrink)), interpolation=cv2.INTER_AREA)
    blurred = cv2.resize(
        cv2.GaussianBlur(small, (0, 0), sigma / shrink), (width, height), interpolation=cv2.INTER_LINEAR
    )
    cut = border - margin
    return np.ascontiguousarray(blurred[cut : height - cut, cut : width - cut])


def _fixed_point(pixels: Float[np.ndarray, "n 2"]) -> Int32[np.ndarray, "n 2"]:
    fixed: Int32[np.ndarray, "n 2"] = np.round((pixels - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32)
    return fixed


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
