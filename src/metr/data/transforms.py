"""Transforms of an image and its boxes, in this order: window and resize, flip, colour jitter; and mosaics of four.

Colour jitter is one matrix: brightness, contrast, saturation and hue are all linear in RGB.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image as PillowImage

from metr.data.config import AugmentationConfig, Colour, ResizeConfig


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One RGB image and its boxes: xyxy in pixels of `image`. Rows of `boxes`, `labels`, `ignore` belong together."""

    image: UInt8[np.ndarray, "h w 3"]
    boxes: Float[np.ndarray, "m 4"]
    labels: Int[np.ndarray, "m"]
    ignore: Bool[np.ndarray, "m"]

    @property
    def height(self) -> int:
        """Rows of the image."""
        return int(self.image.shape[0])

    @property
    def width(self) -> int:
        """Columns of the image."""
        return int(self.image.shape[1])


Image = UInt8[np.ndarray, "_ _ 3"]
Filter = Literal["area", "bilinear", "bicubic"]
_PILLOW = {"bilinear": PillowImage.Resampling.BILINEAR, "bicubic": PillowImage.Resampling.BICUBIC}

# Added to fractions that are compared with a threshold, so that rounding does not decide if they are equal.
TOLERANCE = 1e-6
# Images in a mosaic (Bochkovskiy et al., 2020: YOLOv4).
MOSAIC_PARTS = 4


@dataclass(frozen=True, kw_only=True)
class Window:
    """A rectangle in whole pixels of an image; what lies outside the image is filled with a colour."""

    left: int
    top: int
    width: int
    height: int

    @property
    def corners(self) -> Float[np.ndarray, "4"]:
        """The window as an xyxy box."""
        return np.array([self.left, self.top, self.left + self.width, self.top + self.height], dtype=np.float64)


def whole(sample: Sample) -> Window:
    """The window that is the whole image."""
    return Window(left=0, top=0, width=sample.width, height=sample.height)


def output_shape(height: int, width: int, config: ResizeConfig, size: int | None = None) -> tuple[int, int]:
    """Height and width, in pixels, to which an image or window of `height` x `width` is resized.

    With `fit` the longer side is cut to whole pixels, as DETR and its successors have it.

    Args:
        height: Rows of the image or window.
        width: Columns of the image or window.
        config: How images are resized.
        size: Replaces `config.size` when several sizes are trained.
    """
    size = size or config.size
    if config.mode == "stretch":
        return size, size
    short, long = min(height, width), max(height, width)
    exact: float = size
    if long / short * size > config.longest:
        exact = config.longest * short / long
    shorter, longer = max(1, round(exact)), max(1, int(exact * long / short))
    if short == shorter:
        return height, width
    return (shorter, longer) if height <= width else (longer, shorter)


def resize_image(image: Image, height: int, width: int, method: Filter = "area") -> Image:
    """The image at another size: with `area` averaged over areas if it shrinks, interpolated if it grows."""
    if image.shape[:2] == (height, width):
        return image
    if method != "area":
        return np.array(PillowImage.fromarray(image).resize((width, height), _PILLOW[method]))
    # OpenCV averages areas only if both sides shrink; otherwise that method copies pixels in blocks.
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized: Image = cv2.resize(image, (width, height), interpolation=interpolation)
    return resized


def flip(sample: Sample) -> Sample:
    """The mirror image, left for right."""
    boxes = sample.boxes.copy()
    boxes[:, [0, 2]] = sample.width - sample.boxes[:, [2, 0]]
    return replace(sample, image=cv2.flip(sample.image, 1), boxes=boxes)


def view(
    sample: Sample,
    window: Window,
    shape: tuple[int, int],
    *,
    fill: Colour,
    min_visible: float,
    method: Filter = "area",
) -> Sample:
    """The content of `window`, drawn at `shape` (height, width).

    Boxes are clipped to the window. A box that keeps less than `min_visible` of its area becomes an ignored box; a box
    of which nothing is left is dropped.
    """
    image, scale, offset = _draw(sample.image, window, shape, fill, method)
    corners = window.corners
    boxes = np.clip(sample.boxes, corners[[0, 1, 0, 1]], corners[[2, 3, 2, 3]])
    visible = _area(boxes) / np.maximum(_area(sample.boxes), np.finfo(np.float64).tiny)
    keep = visible > 0
    ignore = sample.ignore | (visible < min_visible - TOLERANCE)
    drawn = boxes * np.tile(scale, 2) + np.tile(offset, 2)
    return Sample(image=image, boxes=drawn[keep], labels=sample.labels[keep], ignore=ignore[keep])


def draw_zoom_out(sample: Sample, largest: float, rng: np.random.Generator) -> Window:
    """A random window that contains the whole image; its sides are up to `largest` times those of the image."""
    ratio = rng.uniform(1.0, largest)
    width, height = round(sample.width * ratio), round(sample.height * ratio)
    left = -int(rng.integers(0, width - sample.width + 1))
    top = -int(rng.integers(0, height - sample.height + 1))
    return Window(left=left, top=top, width=width, height=height)


def draw_crop(
    sample: Sample, area: tuple[float, float], aspect: float, min_visible: float, rng: np.random.Generator
) -> Window:
    """A random window inside the image that keeps the centre and `min_visible` of the area of one random object.

    Args:
        sample: The image. Ignored boxes are not counted as objects.
        area: Smallest and largest fraction of the image's area.
        aspect: Largest ratio of width to height, both as fractions of the image's sides; its inverse is the smallest.
        min_visible: Smallest fraction of the object's area that is kept; the window grows if necessary.
        rng: Source of the random numbers.
    """
    share = rng.uniform(*area)
    ratio = math.exp(rng.uniform(-math.log(aspect), math.log(aspect)))
    width = min(sample.width, max(1, round(sample.width * math.sqrt(share * ratio))))
    height = min(sample.height, max(1, round(sample.height * math.sqrt(share / ratio))))
    objects = sample.boxes[~sample.ignore]
    if len(objects) == 0:
        left, top = (int(rng.integers(0, room + 1)) for room in (sample.width - width, sample.height - height))
        return Window(left=left, top=top, width=width, height=height)
    x0, y0, x1, y1 = objects[rng.integers(len(objects))].tolist()
    # Half of each side or more contains the centre too.
    least = max(0.5, math.sqrt(min_visible))
    left, width = _cover((x0, x1), least, width, sample.width, rng)
    top, height = _cover((y0, y1), least, height, sample.height, rng)
    return Window(left=left, top=top, width=width, height=height)


def _cover(
    kept: tuple[float, float], least: float, length: int, limit: int, rng: np.random.Generator
) -> tuple[int, int]:
    """Start and length of a random interval in 0..limit that covers the fraction `least` of the interval `kept`."""
    needed = least * (kept[1] - kept[0])
    # One pixel more than needed: then there is always an integer start.
    length = min(limit, max(length, math.ceil(needed) + 1))
    low = max(0, math.ceil(kept[0] + needed - length))
    high = min(limit - length, math.floor(kept[1] - needed))
    return int(rng.integers(low, max(low, high) + 1)), length


def _draw(
    image: Image, window: Window, shape: tuple[int, int], fill: Colour, method: Filter
) -> tuple[Image, Float[np.ndarray, "2"], Float[np.ndarray, "2"]]:
    """The window's content at `shape`, and the scale and offset (x, y) from image coordinates to it."""
    source = np.array([0, 0, image.shape[1], image.shape[0]], dtype=np.float64)
    inner = np.concatenate([np.maximum(source[:2], window.corners[:2]), np.minimum(source[2:], window.corners[2:])])
    to_output = np.array([shape[1] / window.width, shape[0] / window.height])
    start = np.tile(window.corners[:2], 2)
    target = np.round((inner - start) * np.tile(to_output, 2))
    # At least one pixel of the output, and inside it.
    target[:2] = np.minimum(target[:2], np.array([shape[1], shape[0]]) - 1)
    target[2:] = np.maximum(target[2:], target[:2] + 1)
    x0, y0, x1, y1 = target.astype(int).tolist()
    left, top, right, bottom = inner.astype(int).tolist()
    content = resize_image(image[top:bottom, left:right], y1 - y0, x1 - x0, method)
    # Boxes follow the integer rectangle that was really painted, not the exact window.
    scale = (target[2:] - target[:2]) / (inner[2:] - inner[:2])
    offset = target[:2] - inner[:2] * scale
    if (y1 - y0, x1 - x0) == shape:
        return content, scale, offset
    canvas = np.empty((*shape, 3), dtype=np.uint8)
    canvas[:] = fill
    canvas[y0:y1, x0:x1] = content
    return canvas, scale, offset


def _area(boxes: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "m"]:
    return np.asarray(np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(axis=1))


def side_by_side(parts: Sequence[Sample], fill: Colour) -> tuple[Sample, tuple[int, int]]:
    """Four samples as one: at the upper left, upper right, lower left and lower right of a point that all four touch.

    Args:
        parts: Four samples of one dataset, of any sizes.
        fill: RGB, 0 to 255, where none of them reaches.

    Returns:
        The image with all boxes; and the point, (x, y) in its pixels.
    """
    left, right = (max(parts[place].width for place in column) for column in ((0, 2), (1, 3)))
    above, below = (max(parts[place].height for place in row) for row in ((0, 1), (2, 3)))
    canvas = np.empty((above + below, left + right, 3), dtype=np.uint8)
    canvas[:] = fill
    boxes: list[Float[np.ndarray, "m 4"]] = []
    for place, part in enumerate(parts):
        x = left if place % 2 else left - part.width
        y = above if place >= MOSAIC_PARTS // 2 else above - part.height
        canvas[y : y + part.height, x : x + part.width] = part.image
        boxes.append(part.boxes + np.array([x, y, x, y]))
    joined = Sample(
        image=canvas,
        boxes=np.concatenate(boxes),
        labels=np.concatenate([part.labels for part in parts]),
        ignore=np.concatenate([part.ignore for part in parts]),
    )
    return joined, (left, above)


def draw_mosaic_window(
    canvas: Sample, point: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> Window:
    """A random window inside a canvas of four images that contains the point where they meet, so that it shows all.

    Args:
        canvas: What `side_by_side` gives.
        point: The point, (x, y) in pixels.
        scale: Smallest and largest size of an image's pixels in the window, relative to that image alone: at 0.5 the
            window is the whole canvas.
        rng: Source of the random numbers.
    """
    fraction = 0.5 / rng.uniform(*scale)
    sides = [max(2, round(side * fraction)) for side in (canvas.width, canvas.height)]
    starts = [
        # at least a pixel of what lies before the point, and one of what lies after it
        int(rng.integers(max(0, middle + 1 - side), min(whole - side, middle - 1) + 1))
        for middle, side, whole in zip(point, sides, (canvas.width, canvas.height), strict=True)
    ]
    return Window(left=starts[0], top=starts[1], width=sides[0], height=sides[1])


# Luma and the two axes of colour (YIQ, NTSC 1953). Rotating the two axes changes the hue and keeps the luma.
LUMA = np.array([0.299, 0.587, 0.114])
RGB_TO_YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Factors of brightness, contrast and saturation (1 changes nothing), and a rotation of the hue in full turns."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


def draw_jitter(config: AugmentationConfig, rng: np.random.Generator) -> Jitter:
    """A random change of colours within the configured strengths."""
    strengths = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    brightness, contrast, saturation, hue = (strengths * rng.uniform(-1.0, 1.0, size=4)).tolist()
    return Jitter(brightness=1 + brightness, contrast=1 + contrast, saturation=1 + saturation, hue=hue)


def colour_matrix(jitter: Jitter, mean_luma: float) -> Float[np.ndarray, "3 4"]:
    """The affine map of RGB that applies `jitter`; contrast is changed around `mean_luma` (0..255)."""
    angle = 2 * np.pi * jitter.hue
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    saturate = np.diag([1.0, jitter.saturation, jitter.saturation])
    linear = jitter.brightness * jitter.contrast * (YIQ_TO_RGB @ saturate @ turn @ RGB_TO_YIQ)
    shift = np.full((3, 1), jitter.brightness * (1 - jitter.contrast) * mean_luma)
    return np.hstack([linear, shift])


def recolour(sample: Sample, jitter: Jitter) -> Sample:
    """The sample with other colours, clipped to 0..255."""
    mean_luma = float(np.dot(LUMA, cv2.mean(sample.image)[:3]))
    image = cv2.transform(sample.image, colour_matrix(jitter, mean_luma))
    return replace(sample, image=image)


@dataclass(frozen=True)
class Transforms:
    """Resizes a sample and, in training, augments it. The same generator state gives the same result."""

    config: AugmentationConfig
    training: bool

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None, size: int | None = None) -> Sample:
        """The sample as the network sees it.

        Args:
            sample: The image as stored; boxes xyxy in its pixels.
            rng: Source of the random numbers of training; evaluation needs none.
            size: Replaces `config.resize.size`, in pixels, when several sizes are trained.
        """
        if not self.training:
            return self._look(sample, whole(sample), size)
        if rng is None:
            raise ValueError("training transforms need a random generator")
        sample = self._flipped(self._look(sample, self._draw_window(sample, rng), size), rng)
        return self._recoloured(sample, rng)

    def mosaic(self, parts: Sequence[Sample], rng: np.random.Generator, size: int | None = None) -> Sample:
        """Four samples of one dataset as one; other arguments are those of a call.

        What a box loses at the window's border counts as what it loses to a crop (`min_visible`).
        """
        seen = [self._flipped(self._look(part, whole(part), size), rng) for part in parts]
        canvas, point = side_by_side(seen, self.config.fill)
        window = draw_mosaic_window(canvas, point, self.config.mosaic.scale, rng)
        return self._recoloured(self._look(canvas, window, size), rng)

    def _flipped(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return flip(sample) if rng.random() < self.config.flip else sample

    def _recoloured(self, sample: Sample, rng: np.random.Generator) -> Sample:
        # After resizing, as there are fewer pixels.
        if rng.random() < self.config.colour:
            sample = recolour(sample, draw_jitter(self.config, rng))
        return sample

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, in pixels, to which evaluation resizes an image of `height` x `width`."""
        return output_shape(height, width, self.config.resize)

    def _draw_window(self, sample: Sample, rng: np.random.Generator) -> Window:
        choice = rng.random()
        if choice < self.config.crop:
            return draw_crop(sample, self.config.crop_area, self.config.crop_aspect, self.config.min_visible, rng)
        if choice < self.config.crop + self.config.zoom_out:
            return draw_zoom_out(sample, self.config.zoom_out_ratio, rng)
        return whole(sample)

    def _look(self, sample: Sample, window: Window, size: int | None) -> Sample:
        config, resize = self.config, self.config.resize
        shape = output_shape(window.height, window.width, resize, size)
        return view(sample, window, shape, fill=config.fill, min_visible=config.min_visible, method=resize.filter)


def build_transforms(config: AugmentationConfig, training: bool) -> Transforms:
    """The transforms of training (resize and augment) or of evaluation (resize)."""
    return Transforms(config, training)
