"""Reads one image at a time, transforms it, and maps its labels to rows of the vocabulary."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from metr.boxes import xyxy_to_cxcywh
from metr.data.config import Unannotated
from metr.data.images import read_annotated
from metr.data.records import Annotations, DataIssue, ImageRecord, PartlyRead
from metr.data.sampling import SampleKey
from metr.data.transforms import MOSAIC_PARTS, Sample, Transforms
from metr.errors import ConfigError, DataError, StoreError
from metr.structures import Targets
from metr.text.vocabulary import Vocabulary

# After this many unreadable images in a row, drawn at random, a dataset is given up.
ATTEMPTS = 20
# The kind of issue that ends training: a store that does not answer is no fault of one image.
UNREACHABLE = "unreachable shard"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image as the network sees it, RGB in 0..255, and its targets: a batch of one, without padding.

    `original_size` is (height, width) in pixels as annotated, in the orientation of the image. `position` is the
    image's index in the dataset. `issues` are the images that could not be read before this one took their place. Of a
    mosaic, `image_id` has the ids of all its images, and the other fields are those of the first.
    """

    image: UInt8[Tensor, "3 h w"]
    targets: Targets
    image_id: int | str
    original_size: tuple[int, int]
    dataset: str
    position: int
    issues: tuple[DataIssue, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Missing:
    """An image that could not be read, and was not replaced."""

    dataset: str
    position: int
    issues: tuple[DataIssue, ...]


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """An image as stored, its index, the record that fits it, and (height, width) as its annotations declare it."""

    index: int
    image: UInt8[np.ndarray, "h w 3"]
    record: ImageRecord
    declared_size: tuple[int, int]

    @property
    def sample(self) -> Sample:
        """The image with its boxes."""
        record = self.record
        return Sample(image=self.image, boxes=record.boxes, labels=record.labels, ignore=record.ignore)


class DetectionDataset(Dataset[Example | Missing]):
    """One split of one dataset, with its labels as rows of the vocabulary.

    `dataset[i]` is image i, or a `Missing` if it cannot be read: evaluation counts those, and evaluates no other image
    in their place. Training calls `dataset.sample(key)`, which replaces an unreadable image.

    Args:
        annotations: Where records come from; the worker processes share it.
        vocabulary: Lists this dataset under `annotations.name`.
        transforms: Resize and augment.
        unannotated: How to treat a category that the dataset does not annotate: "negative" assumes that it is absent,
            unless the user dropped or ignores it; otherwise nothing is known of it.
        covered_names: True at the names that at least one dataset of the run annotates; "negative" assumes only these
            to be absent. By default all names.
        absent: True at names of other datasets that none of its images shows, which is as good as annotated.
    """

    def __init__(
        self,
        annotations: Annotations,
        vocabulary: Vocabulary,
        transforms: Transforms,
        unannotated: Unannotated = "ignore",
        covered_names: Bool[Tensor, "v"] | None = None,
        absent: Bool[Tensor, "v"] | None = None,
    ) -> None:
        self.annotations, self.transforms = annotations, transforms
        self.rows = vocabulary.rows(annotations.name)
        own = vocabulary.annotated(annotations.name)
        self.absent = torch.zeros_like(own) if absent is None else absent
        self.annotated = own | self.absent
        self.assumed_negative = ~self.annotated & (unannotated == "negative")
        if covered_names is not None:
            self.assumed_negative &= covered_names
        names = annotations.unknown_names if isinstance(annotations, PartlyRead) else ()
        unknown = [row for row, name in enumerate(vocabulary.names) if name in names]
        self.assumed_negative[unknown] = False

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.annotations.name

    def __len__(self) -> int:
        """The number of images."""
        return len(self.annotations)

    def __getitem__(self, index: int) -> Example | Missing:
        """Image `index`, without random changes."""
        try:
            stored = self._read(index)
            return self._example(self.transforms(stored.sample), [stored])
        except StoreError as error:
            return self._unreachable(index, error)
        except DataError as error:
            return Missing(dataset=self.name, position=index, issues=(self._issue(index, error),))

    def sample(self, key: SampleKey, *, mosaics: bool = True) -> Example | Missing:
        """The image of that key, or another of this dataset, chosen by the key, if it cannot be read.

        With `mosaics`, some samples are four images: that of the key and three others that the key chooses. An image in
        a store that does not answer is not replaced.
        """
        rng, issues = key.generator(), list[DataIssue]()
        probability = self.transforms.config.mosaic.probability if mosaics else 0.0
        indices = [key.index]
        if probability and rng.random() < probability:
            indices += rng.integers(len(self), size=MOSAIC_PARTS - 1).tolist()
        try:
            parts = [self._readable(index, rng, issues) for index in indices]
        except StoreError as error:
            return self._unreachable(key.index, error)
        except DataError:
            return Missing(dataset=self.name, position=key.index, issues=tuple(issues))
        if len(parts) == 1:
            sample = self.transforms(parts[0].sample, rng, key.size)
        else:
            sample = self.transforms.mosaic([part.sample for part in parts], rng, key.size)
        return replace(self._example(sample, parts), issues=tuple(issues))

    def _readable(self, index: int, rng: np.random.Generator, issues: list[DataIssue]) -> "_Stored":
        """Image `index`, or another one in its place; `issues` get those that cannot be read.

        Raises:
            DataError: so many in a row cannot be read that the dataset is given up.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._read(index)
            except StoreError:
                raise
            except DataError as error:
                issues.append(self._issue(index, error))
                index = int(rng.integers(len(self)))
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError

    def _read(self, index: int) -> "_Stored":
        stored = self.annotations[index]
        # Where file and annotations disagree about the size, `record` has boxes that fit the file.
        image, record, issue = read_annotated(stored)
        declared = record if issue is not None and issue.kind == "orientation" else stored
        return _Stored(index=index, image=image, record=record, declared_size=(declared.height, declared.width))

    def _example(self, sample: Sample, parts: Sequence["_Stored"]) -> Example:
        """What the network sees of one image, or of several that are one now."""
        # Channels stay last in memory: this avoids a copy and makes convolutions faster.
        pixels = torch.from_numpy(np.ascontiguousarray(sample.image)).permute(2, 0, 1)
        # In all of it a category is annotated only if it is in every part.
        annotated = torch.stack([self._annotated(part.record) for part in parts]).all(0)
        ids = [part.record.image_id for part in parts]
        return Example(
            image=pixels,
            targets=self._targets(sample, annotated),
            image_id=ids[0] if len(ids) == 1 else " + ".join(map(str, ids)),
            original_size=parts[0].declared_size,
            dataset=self.name,
            position=parts[0].index,
        )

    def _targets(self, sample: Sample, annotated: Bool[Tensor, "v"]) -> Targets:
        sides = np.array([sample.width, sample.height, sample.width, sample.height])
        boxes = xyxy_to_cxcywh(torch.from_numpy(np.clip(sample.boxes / sides, 0, 1).astype(np.float32)))
        labels = self.rows[torch.from_numpy(sample.labels.astype(np.int64))]
        ignore = torch.from_numpy(sample.ignore)
        return Targets(
            boxes=boxes[~ignore].unsqueeze(0),
            labels=labels[~ignore].unsqueeze(0),
            ignore_boxes=boxes[ignore].unsqueeze(0),
            ignore_labels=labels[ignore].unsqueeze(0),
            annotated=annotated.unsqueeze(0),
            assumed_negative=self.assumed_negative.unsqueeze(0),
        )

    def _annotated(self, record: ImageRecord) -> Bool[Tensor, "v"]:
        if record.annotated is None:
            return self.annotated
        here = torch.zeros_like(self.annotated)
        here[self.rows[list(record.annotated)]] = True
        return (here & self.annotated) | self.absent

    def _unreachable(self, index: int, error: StoreError) -> Missing:
        issue = DataIssue(kind=UNREACHABLE, where=str(error.where), detail=error.what)
        return Missing(dataset=self.name, position=index, issues=(issue,))

    def _issue(self, index: int, error: DataError) -> DataIssue:
        return DataIssue(kind="unreadable image", where=str(self.annotations[index].path), detail=error.what)


class MixedDataset(Dataset[Example | Missing]):
    """Several datasets as one; a `SampleKey` says which image of which dataset is wanted.

    Args:
        datasets: What to mix.
        samples: The number of samples of the run: mosaics end after a fraction of them (`MosaicConfig.until`). None:
            they never end.

    Raises:
        ConfigError: two datasets have the same name.
    """

    def __init__(self, datasets: Sequence[DetectionDataset], samples: int | None = None) -> None:
        self.datasets, self.samples = tuple(datasets), samples
        self.lengths = {dataset.name: len(dataset) for dataset in datasets}
        if len(self.lengths) < len(self.datasets):
            names = [dataset.name for dataset in datasets]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"two datasets are called {twice!r}", hint="name them apart: first=PATH second=PATH")

    def __getitem__(self, key: SampleKey) -> Example | Missing:
        """The image of that key, or a replacement from the same dataset."""
        dataset = self.datasets[key.dataset]
        last = math.inf if self.samples is None else dataset.transforms.config.mosaic.until * self.samples
        return dataset.sample(key, mosaics=key.number < last)
