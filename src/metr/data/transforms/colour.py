"""Colour jitter as one matrix: brightness, contrast, saturation and hue are all linear in RGB."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from jaxtyping import Float

from metr.data.config import AugmentationConfig
from metr.data.transforms.sample import Sample

# Luma and the two axes of colour (YIQ, NTSC 1953): turning the latter two changes the hue and keeps the luma.
LUMA = np.array([0.299, 0.587, 0.114])
RGB_TO_YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Factors of brightness, contrast and saturation (1 changes nothing), and a turn of the hue (1 is the circle)."""

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
    """The affine map of RGB that applies `jitter`; contrast turns about `mean_luma` (0 to 255)."""
    angle = 2 * np.pi * jitter.hue
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    saturate = np.diag([1.0, jitter.saturation, jitter.saturation])
    linear = jitter.brightness * jitter.contrast * (YIQ_TO_RGB @ saturate @ turn @ RGB_TO_YIQ)
    shift = np.full((3, 1), jitter.brightness * (1 - jitter.contrast) * mean_luma)
    return np.hstack([linear, shift])


def recolour(sample: Sample, jitter: Jitter) -> Sample:
    """The sample with other colours; values past 0 and 255 are cut."""
    mean_luma = float(np.dot(LUMA, cv2.mean(sample.image)[:3]))
    image = cv2.transform(sample.image, colour_matrix(jitter, mean_luma))
    return replace(sample, image=image)
