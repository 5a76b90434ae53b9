"""What a detection dataset looks like in figures, from its annotations."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from metr.data.records import ImageRecord


@dataclass(frozen=True, kw_only=True)
class SceneStatistics:
    """Figures of some images.

    `median_side` is that of sqrt(box area / image area); `overlapping` the share of the boxes that have pixels in
    common with another box of their image; `counts` are the boxes of every name.
    """

    images: int
    objects: int
    fewest: int
    most: int
    median_side: float
    overlapping: float
    counts: dict[str, int]


def scene_statistics(records: Iterable[ImageRecord], categories: Sequence[str]) -> SceneStatistics:
    """Figures of the images that `records` describe; `categories` name their labels."""
    per_image: list[int] = []
    sides: list[float] = []
    overlapping: list[bool] = []
    counts = Counter(dict.fromkeys(categories, 0))
    for record in records:
        per_image.append(len(record.boxes))
        size = (record.boxes[:, 2:] - record.boxes[:, :2]).prod(axis=1)
        sides.extend(np.sqrt(size / (record.width * record.height)).tolist())
        overlapping.extend(_touched(record.boxes).tolist())
        counts.update(categories[label] for label in record.labels)
    return SceneStatistics(
        images=len(per_image),
        objects=len(sides),
        fewest=min(per_image, default=0),
        most=max(per_image, default=0),
        median_side=float(np.median(sides)) if sides else 0.0,
        overlapping=float(np.mean(overlapping)) if overlapping else 0.0,
        counts=dict(counts),
    )


def _touched(boxes: Float[np.ndarray, "m 4"]) -> Bool[np.ndarray, "m"]:
    """Which boxes have an area in common with another one."""
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    common = (high[..., 0] > low[..., 0]) & (high[..., 1] > low[..., 1])
    np.fill_diagonal(common, False)
    touched: Bool[np.ndarray, "m"] = common.any(axis=1)
    return touched
