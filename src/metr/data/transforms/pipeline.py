"""The transforms of an image and its boxes, in their order: window and resize, flip, colour jitter.

Colour jitter is one matrix: brightness, contrast, saturation and hue are all linear in RGB.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Float

from metr.data.config import AugmentationConfig
from metr.data.transforms.geometry import Sample, Window, draw_crop, draw_zoom_out, flip, output_shape, view, whole

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
        sample = self._look(sample, self._draw_window(sample, rng), size)
        if rng.random() < self.config.flip:
            sample = flip(sample)
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
        shape = output_shape(window.height, window.width, self.config.resize, size)
        return view(sample, window, shape, fill=self.config.fill, min_visible=self.config.min_visible)


def build_transforms(config: AugmentationConfig, training: bool) -> Transforms:
    """The transforms of training (resize and augment) or of evaluation (resize)."""
    return Transforms(config, training)
