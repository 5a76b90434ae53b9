"""The transforms in their order: one look through a window, a flip, other colours."""

from dataclasses import dataclass

import numpy as np

from metr.data.config import AugmentationConfig
from metr.data.transforms.colour import draw_jitter, recolour
from metr.data.transforms.geometry import Window, draw_crop, draw_zoom_out, flip, output_shape, view, whole
from metr.data.transforms.sample import Sample


@dataclass(frozen=True)
class Transforms:
    """Resizes a sample and, in training, augments it. The same generator state gives the same result."""

    config: AugmentationConfig
    training: bool

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None, size: int | None = None) -> Sample:
        """The sample as the network is to see it.

        Args:
            sample: The image as stored; boxes xyxy in its pixels.
            rng: Where the random numbers of training come from; evaluation needs none.
            size: Stands in for `config.resize.size` when several sizes are trained, in pixels.
        """
        if not self.training:
            return self._look(sample, whole(sample), size)
        if rng is None:
            raise ValueError("training transforms need a random generator")
        sample = self._look(sample, self._draw_window(sample, rng), size)
        if rng.random() < self.config.flip:
            sample = flip(sample)
        # On the resized image: fewer pixels.
        if rng.random() < self.config.colour:
            sample = recolour(sample, draw_jitter(self.config, rng))
        return sample

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels in which evaluation shows an image of `height` x `width`."""
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
