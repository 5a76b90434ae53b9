"""Small parts of a training split, chosen by a seed: a fraction of its images, or k objects of each category.

All choices go by one order of the images, which depends on the seed and the images' names alone. So they nest (a
larger fraction or k holds all that a smaller one does), and adding images to a dataset hardly changes them.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from metr.config import Config
from metr.data.index.annotation_index import AnnotationIndex
from metr.data.records import Annotations, DataIssue, ImageRecord
from metr.data.sampling import objects_of
from metr.data.splits import seeded_order
from metr.errors import DataError

_TOLD = 6  # categories in a message


class SubsetConfig(Config):
    """Which part of the training images is used; of every dataset the same."""

    shots: Annotated[int, Field(ge=1)] | None = None
    """Train on so few images that each category has this many objects, or all that it has. None: on all images."""
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Train on this fraction of the images. None: on all images."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides which images are chosen."""

    @model_validator(mode="after")
    def _one_of_them(self) -> "SubsetConfig":
        if self.shots is not None and self.fraction is not None:
            raise ValueError("shots and fraction exclude each other: give one of them")
        return self

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.shots is None and self.fraction in {None, 1.0}


class Subset:
    """Some images of a split, in the order of their numbers; a sequence of records like the split itself.

    Args:
        annotations: The whole split.
        images: The numbers of those that are in.
    """

    def __init__(self, annotations: Annotations, images: Int[np.ndarray, "n"]) -> None:
        self.whole, self.images = annotations, images

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.whole.name

    @property
    def split(self) -> str:
        """The split that it is a part of."""
        return self.whole.split

    @property
    def format(self) -> str:
        """What the files are written in."""
        return self.whole.format

    @property
    def categories(self) -> tuple[str, ...]:
        """All names of the dataset, also those that no chosen image shows."""
        return self.whole.categories

    @property
    def issues(self) -> Sequence[DataIssue]:
        """What reading the whole split went past."""
        return self.whole.issues

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageRecord:
        """The annotations of the chosen image `index`."""
        return self.whole[int(self.images[index])]


def subset_of(annotations: Annotations, config: SubsetConfig) -> Annotations:
    """The part of a split that the configuration asks for; the split itself where that is everything.

    Raises:
        DataError: shots are asked for, and no image has an object.
    """
    if config.whole:
        return annotations
    order = seeded_order(_keys(annotations), seed=config.seed)
    if config.shots is None:
        chosen = order[: max(1, round((config.fraction or 1.0) * len(order)))]
    else:
        chosen = _with_shots(annotations, order, config.shots)
    return Subset(annotations, np.sort(chosen))


def _with_shots(annotations: Annotations, order: Int[np.ndarray, "n"], shots: int) -> Int[np.ndarray, "m"]:
    """In the given order, every image that shows an object of a category of which fewer than `shots` came before.

    So each category has `shots` objects, or all it has, as in the few-shot protocol of ODinW (Li et al., 2022).
    Images keep all their boxes, hence common categories may have more: to drop boxes, as in TFA (Wang et al., 2020),
    would make objects that stand there count as background.
    """
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    pieces = list(objects_of(annotations))
    places = place[np.concatenate([images for images, _ in pieces])] if pieces else np.zeros(0, dtype=np.int64)
    if not len(places):
        raise DataError("no object in the training split, so no shots", where=annotations.name, hint="use --fraction")
    labels = np.concatenate([categories for _, categories in pieces])
    taken = np.zeros(len(order), dtype=bool)
    for label in np.unique(labels):
        taken[np.sort(places[labels == label])[:shots]] = True
    return order[taken]


def shortage(annotations: Annotations, shots: int) -> str:
    """Which categories have fewer objects than `shots`, in words; empty where all have enough."""
    counts = np.zeros(len(annotations.categories), dtype=np.int64)
    for _, categories in objects_of(annotations):
        counts += np.bincount(categories, minlength=len(counts))
    few = [f"{name} ({count})" for name, count in zip(annotations.categories, counts, strict=True) if count < shots]
    return ", ".join(few[:_TOLD]) + (f" and {len(few) - _TOLD} more" if len(few) > _TOLD else "")


def _keys(annotations: Annotations) -> list[str]:
    """What names each image wherever the dataset lies."""
    if isinstance(annotations, AnnotationIndex):
        return annotations.relative_paths()
    return [str(annotations[index].image_id) for index in range(len(annotations))]
