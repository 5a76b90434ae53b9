"""An image with its boxes, as the transforms see it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8


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
