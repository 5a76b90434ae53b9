"""Rare categories more often: how often a pass over a dataset shows each image (Gupta et al., 2019: LVIS)."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from metr.data.index.annotation_index import AnnotationIndex
from metr.data.records import Annotations

_Objects = tuple[Int[np.ndarray, "p"], Int[np.ndarray, "p"]]


def repeat_factors(annotations: Annotations, threshold: float) -> Float[np.ndarray, "n"]:
    """How often a pass shows each image, on average: at least once, more often where a rare category is in it.

    A category that is in a share f of the images has the factor max(1, sqrt(threshold / f)); an image has the
    greatest factor of the categories that have an object in it. Ignored boxes are no objects.

    Args:
        annotations: One split. Of an index only the columns are read.
        threshold: The share of images below which a category counts as rare, 0..1.
    """
    with_category = np.zeros(len(annotations.categories), dtype=np.int64)
    for images, categories in objects_of(annotations):
        shown = np.zeros((np.ptp(images) + 1 if len(images) else 0, len(with_category)), dtype=bool)
        shown[images - images.min(initial=len(annotations)), categories] = True
        with_category += shown.sum(axis=0)
    frequency = np.maximum(with_category, 1) / max(1, len(annotations))
    of_category = np.maximum(1.0, np.sqrt(threshold / frequency))
    factors = np.ones(len(annotations))
    for images, categories in objects_of(annotations):
        np.maximum.at(factors, images, of_category[categories])
    return factors


def objects_of(annotations: Annotations) -> Iterator[_Objects]:
    """Image and category of every object, in pieces, in the order of the images; ignored boxes are no objects."""
    if isinstance(annotations, AnnotationIndex):
        yield from annotations.objects()
        return
    for index in range(len(annotations)):
        record = annotations[index]
        labels = record.labels[~record.ignore].astype(np.int64)
        yield np.full(len(labels), index, dtype=np.int64), labels
