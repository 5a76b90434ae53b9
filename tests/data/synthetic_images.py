"""Small datasets written to a folder: each image holds filled rectangles, and its records say where."""

from pathlib import Path

import cv2
import numpy as np

from metr.data.config import AugmentationConfig, ResizeConfig
from metr.data.dataset import DetectionDataset, Unannotated
from metr.data.records import Annotations, ImageRecord, InMemoryAnnotations
from metr.data.transforms import build_transforms
from metr.text.vocabulary import Vocabulary

NAMES = {"cells": ("red cell", "platelet"), "fish": ("shark", "puffin", "penguin"), "birds": ("puffin",)}
VOCABULARY = Vocabulary.union(NAMES)


def make_annotations(
    folder: Path, name: str = "cells", count: int = 6, shapes: tuple[tuple[int, int], ...] = ((48, 64),)
) -> InMemoryAnnotations:
    """`count` images of the given shapes (height, width), in turn, with 0 to 3 boxes each; some are ignored."""
    folder = folder / name
    folder.mkdir(parents=True)
    rng = np.random.default_rng([len(name), count])
    records = tuple(_make_record(folder / f"{i}.png", i, shapes[i % len(shapes)], name, rng) for i in range(count))
    return InMemoryAnnotations(name=name, split="train", categories=NAMES[name], records=records)


def _make_record(path: Path, number: int, shape: tuple[int, int], name: str, rng: np.random.Generator) -> ImageRecord:
    height, width = shape
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    count = number % 4
    low = rng.integers(0, (width // 2, height // 2), (count, 2))
    boxes = np.hstack([low, low + rng.integers(8, (width // 2, height // 2), (count, 2))]).astype(np.float32)
    for left, top, right, bottom in boxes.astype(int):
        image[top:bottom, left:right] = rng.integers(0, 256, 3)
    cv2.imwrite(str(path), image[..., ::-1])
    return ImageRecord(
        image_id=f"{name}-{number}",
        path=path,
        width=width,
        height=height,
        boxes=boxes,
        labels=rng.integers(0, len(NAMES[name]), count),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        ignore=np.arange(count) == 2,
    )


def make_dataset(
    annotations: Annotations, *, training: bool = True, unannotated: Unannotated = "ignore", **settings: object
) -> DetectionDataset:
    """A dataset over `annotations`, at 32 pixels unless `settings` of the augmentation say otherwise."""
    config = AugmentationConfig.checked({"resize": ResizeConfig(size=32)} | settings)
    return DetectionDataset(annotations, VOCABULARY, build_transforms(config, training), unannotated)
