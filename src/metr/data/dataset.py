"""Pictures and targets, one at a time: annotations, a vocabulary and transforms put together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from metr.boxes import xyxy_to_cxcywh
from metr.data.draws import Draw
from metr.data.images import read_annotated
from metr.data.records import Annotations, Fault, ImageRecord
from metr.data.transforms.pipeline import Transforms
from metr.data.transforms.sample import Sample
from metr.errors import ConfigError, DataError
from metr.structures import Targets
from metr.text.vocabulary import Vocabulary

Foreign = Literal["ignore", "assume_absent", "teacher"]

# A dataset of which this many pictures, drawn at random, are unreadable in a row is not worth going on with.
ATTEMPTS = 20


@dataclass(frozen=True, kw_only=True)
class Example:
    """One picture as the network is to see it, RGB of 0 to 255, and what is known of it.

    `original_size` is (height, width) in pixels as annotated, turned as the picture is; `position` counts within the
    dataset; `faults` are the pictures that could not be read in its place.
    """

    image: UInt8[Tensor, "3 h w"]
    targets: Targets
    image_id: int | str
    original_size: tuple[int, int]
    dataset: str
    position: int
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A picture that could not be read, and had no replacement."""

    dataset: str
    position: int
    faults: tuple[Fault, ...]


class DetectionDataset(Dataset[Example | Missing]):
    """One split of one dataset, with its labels as rows of the vocabulary.

    `dataset[i]` is picture i, or a `Missing` where it cannot be read: evaluation counts those, and never evaluates
    another picture in their stead. `dataset.draw(draw)` is for training: an unreadable picture is replaced.

    Args:
        annotations: Where records come from; the worker processes share it.
        vocabulary: Knows this dataset by `annotations.name`.
        transforms: Resize and augment.
        foreign: What a category means that the dataset does not annotate: "assume_absent" takes it that none is there;
            otherwise nothing is known of it.
        told_of: The names that some dataset beside it annotates; of all others, which nothing shows, nothing is known.
            By default every name.
    """

    def __init__(
        self,
        annotations: Annotations,
        vocabulary: Vocabulary,
        transforms: Transforms,
        foreign: Foreign = "ignore",
        told_of: Bool[Tensor, "v"] | None = None,
    ) -> None:
        self.annotations, self.transforms = annotations, transforms
        self.rows = vocabulary.rows(annotations.name)
        self.annotated = vocabulary.annotated(annotations.name)
        self.presumed_absent = ~self.annotated & (foreign == "assume_absent")
        if told_of is not None:
            self.presumed_absent &= told_of

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.annotations.name

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.annotations)

    def __getitem__(self, index: int) -> Example | Missing:
        """Picture `index`, without random changes."""
        try:
            return self._load(index)
        except DataError as error:
            return Missing(dataset=self.name, position=index, faults=(self._fault(index, error),))

    def draw(self, draw: Draw) -> Example | Missing:
        """The picture that is drawn, or another of this dataset where it cannot be read; the draw decides which."""
        rng, index = draw.generator(), draw.index
        faults: list[Fault] = []
        for _ in range(ATTEMPTS):
            try:
                return replace(self._load(index, rng, draw.size), faults=tuple(faults))
            except DataError as error:
                faults.append(self._fault(index, error))
                index = int(rng.integers(len(self)))
        return Missing(dataset=self.name, position=draw.index, faults=tuple(faults))

    def _load(self, index: int, rng: np.random.Generator | None = None, size: int | None = None) -> Example:
        stored = self.annotations[index]
        # Where the picture disagrees with its annotations, boxes fitted to the picture; `metr inspect` tells.
        image, record, fault = read_annotated(stored)
        declared = record if fault is not None and fault.kind == "orientation" else stored
        sample = Sample(image=image, boxes=record.boxes, labels=record.labels, ignore=record.ignore)
        sample = self.transforms(sample, rng, size)
        # Channels stay last in memory: no work here, and the faster order for convolutions.
        pixels = torch.from_numpy(np.ascontiguousarray(sample.image)).permute(2, 0, 1)
        return Example(
            image=pixels,
            targets=self._targets(sample, record),
            image_id=stored.image_id,
            original_size=(declared.height, declared.width),
            dataset=self.name,
            position=index,
        )

    def _targets(self, sample: Sample, record: ImageRecord) -> Targets:
        sides = np.array([sample.width, sample.height, sample.width, sample.height])
        boxes = xyxy_to_cxcywh(torch.from_numpy(np.clip(sample.boxes / sides, 0, 1).astype(np.float32)))
        labels = self.rows[torch.from_numpy(sample.labels.astype(np.int64))]
        ignore = torch.from_numpy(sample.ignore)
        return Targets(
            boxes=boxes[~ignore],
            labels=labels[~ignore],
            annotated=self._annotated(record),
            ignore_boxes=boxes[ignore],
            ignore_labels=labels[ignore],
            presumed_absent=self.presumed_absent,
        )

    def _annotated(self, record: ImageRecord) -> Bool[Tensor, "v"]:
        if record.annotated is None:
            return self.annotated
        here = torch.zeros_like(self.annotated)
        here[self.rows[list(record.annotated)]] = True
        return here & self.annotated

    def _fault(self, index: int, error: DataError) -> Fault:
        return Fault(kind="unreadable picture", where=str(self.annotations[index].path), detail=error.what)


class MixedDataset(Dataset[Example | Missing]):
    """Several datasets as one, whose items are draws.

    Raises:
        ConfigError: two datasets have the same name.
    """

    def __init__(self, datasets: Sequence[DetectionDataset]) -> None:
        self.datasets = tuple(datasets)
        self.lengths = {dataset.name: len(dataset) for dataset in datasets}
        if len(self.lengths) < len(self.datasets):
            names = [dataset.name for dataset in datasets]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"two datasets are called {twice!r}", hint="name them apart: first=PATH second=PATH")

    def __getitem__(self, draw: Draw) -> Example | Missing:
        """The picture that is drawn."""
        return self.datasets[draw.dataset].draw(draw)
