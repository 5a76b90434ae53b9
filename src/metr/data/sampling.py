"""Which image comes next: an endless, reproducible sequence of samples over all datasets.

Sample n is a function of the seed and n alone: not of the process, the worker, or where a run was interrupted. So a run
that resumes at sample n continues exactly as it would have gone on, and process r of R takes every R-th sample.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Float, Int
from torch.utils.data import Sampler

from metr.data.config import Mixture
from metr.data.records import Annotations, ColumnarAnnotations
from metr.errors import ConfigError, DataError, did_you_mean

# Datasets are chosen for this many samples at a time.
BLOCK = 4096


class RandomStream(IntEnum):
    """The purposes of random numbers; each has a stream of its own."""

    EXAMPLE = 0
    DATASET = 1
    ORDER = 2
    SIZE = 3
    REPEATS = 4
    NOISE = 5
    NAMES = 6
    WORDS = 7
    ABSENT = 8


def generator(seed: int, stream: RandomStream, *key: int) -> np.random.Generator:
    """The random numbers of one purpose and one key, for example one sample."""
    return np.random.default_rng([seed, int(stream), *key])


@dataclass(frozen=True, kw_only=True)
class SampleKey:
    """One image to load: image `index` of dataset number `dataset`, the sample's `number`, and the batch's `size`."""

    number: int
    dataset: int
    index: int
    seed: int
    size: int | None = None

    def generator(self) -> np.random.Generator:
        """The random numbers of this sample."""
        return generator(self.seed, RandomStream.EXAMPLE, self.number)


@dataclass(frozen=True, kw_only=True)
class EpochImages:
    """What an epoch shows of a dataset in shards, a few shards at a time.

    `images` are how many there are, or how often each is shown; `shards` the number of each image's shard, and
    `shards_at_once` how many shards are shuffled together.
    """

    images: int | Float[np.ndarray, "n"]
    shards: Int[np.ndarray, "n"]
    shards_at_once: int


class MixedSampler(Sampler[list[SampleKey]]):
    """Endless batches of samples that mix datasets by weight; inside a dataset, a new shuffle every epoch.

    Args:
        images: Images of each dataset, by name, in the order in which samples number the datasets: how many there
            are, how often an epoch shows each of them (see `repeat_factors`), or `EpochImages`.
        weights: The fraction of samples of each dataset, by name (see `mixture_weights`).
        batch_size: Samples per batch and process.
        seed: Decides the whole sequence.
        rank: This process's number; it takes the samples whose number is `rank` modulo `world`.
        world: The number of processes.
        sizes: Sizes in pixels to choose from, one for each batch, the same in all processes. Empty: none is set.
        start: The number of samples that all processes took before, together: where a resumed run goes on.
    """

    def __init__(
        self,
        images: Mapping[str, int | Float[np.ndarray, "_"] | EpochImages],
        weights: Mapping[str, float],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        sizes: tuple[int, ...] = (),
        start: int = 0,
    ) -> None:
        self.weights = dict(weights)
        self.batch_size, self.seed, self.sizes, self.start = batch_size, seed, sizes, start
        self.rank, self.world = rank, world
        self._epochs = {name: Epochs(each, seed, number) for number, (name, each) in enumerate(images.items())}
        self._counted = 0, np.zeros(len(self._epochs), dtype=np.int64)  # blocks, and the samples in them

    @property
    def lengths(self) -> dict[str, int]:
        """Images of each dataset, by name."""
        return {name: epochs.length for name, epochs in self._epochs.items()}

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """The batches of this process, from sample `start` on, without end."""
        samples = self._samples(self.start)
        while True:
            step = [next(samples) for _ in range(self.batch_size * self.world)]
            size = self._size(step[0][0])
            yield [
                SampleKey(number=number, dataset=dataset, index=index, seed=self.seed, size=size)
                for number, dataset, index in step[self.rank :: self.world]
            ]

    def samples_after(self, steps: int) -> int:
        """How many samples all processes have taken when `steps` steps follow `start`: the state to resume from."""
        return self.start + steps * self.batch_size * self.world

    def epochs(self, samples: int) -> dict[str, float]:
        """The number of epochs of each dataset in the first `samples` samples of all processes."""
        counts = self._counts(samples).tolist()
        return {name: epochs.seen(count) for (name, epochs), count in zip(self._epochs.items(), counts, strict=True)}

    def _size(self, first: int) -> int | None:
        """The size of the batch that begins with sample `first`."""
        return int(generator(self.seed, RandomStream.SIZE, first).choice(self.sizes)) if self.sizes else None

    def _samples(self, start: int) -> Iterator[tuple[int, int, int]]:
        """(number, dataset, index) of every sample from `start` on."""
        seen, epochs = self._counts(start).tolist(), list(self._epochs.values())
        number, block, chosen = start, -1, list[int]()
        while True:
            if block != number // BLOCK:
                block = number // BLOCK
                chosen = self._block(block).tolist()
            dataset = chosen[number % BLOCK]
            index = epochs[dataset].image(seen[dataset])
            seen[dataset] += 1
            number += 1
            yield number - 1, dataset, index

    def _block(self, block: int) -> Int[np.ndarray, "n"]:
        """The datasets of `BLOCK` consecutive samples."""
        chance = generator(self.seed, RandomStream.DATASET, block).random(BLOCK)
        sums = np.cumsum([self.weights[name] for name in self._epochs])
        return np.searchsorted(sums / sums[-1], chance, side="right")

    def _counts(self, samples: int) -> Int[np.ndarray, "d"]:
        """How many of the first `samples` samples fell to each dataset."""
        blocks, counts = self._counted
        if blocks > samples // BLOCK:
            blocks, counts = 0, np.zeros_like(counts)
        for block in range(blocks, samples // BLOCK):
            counts = counts + np.bincount(self._block(block), minlength=len(counts))
        self._counted = samples // BLOCK, counts
        return counts + np.bincount(self._block(samples // BLOCK)[: samples % BLOCK], minlength=len(counts))


def mixture_weights(lengths: Mapping[str, int], mixture: Mixture) -> dict[str, float]:
    """The fraction of samples that goes to each dataset; fractions sum to 1.

    Args:
        lengths: Images of each dataset, by name.
        mixture: "proportional" to the images, to their "sqrt", "equal", or a weight for each name.

    Raises:
        DataError: a dataset has no image.
        ConfigError: an explicit mixture leaves a dataset out, names an unknown one, is all zero or not finite.
    """
    if empty := [name for name, length in lengths.items() if length == 0]:
        raise DataError("no images in this split", where=", ".join(empty), hint="check the path and the split")
    if not lengths:
        raise DataError("no dataset to take images from", hint="name at least one dataset")
    if isinstance(mixture, dict):
        if unknown := sorted(mixture.keys() - lengths.keys()):
            hint = did_you_mean(unknown[0], lengths)
            raise ConfigError(f"unknown dataset {unknown[0]!r}", where="mixture", hint=hint)
        if missing := [name for name in lengths if name not in mixture]:
            what = f"no weight for {', '.join(missing)}"
            raise ConfigError(what, where="mixture", hint="give every dataset a weight")
        weights = {name: mixture[name] for name in lengths}
    else:
        power = {"proportional": 1.0, "sqrt": 0.5, "equal": 0.0}[mixture]
        weights = {name: float(length**power) for name, length in lengths.items()}
    total = sum(weights.values())
    if total <= 0:
        what = "every dataset has a weight of zero"
        raise ConfigError(what, where="mixture", hint="give one of them a weight above 0")
    if not math.isfinite(total):
        raise ConfigError("the weights have no finite sum", where="mixture", hint="write numbers such as 1 and 2")
    return {name: weight / total for name, weight in weights.items()}


class Epochs:
    """An endless sequence of one dataset's images; every epoch is a new shuffle of all of them.

    Which image comes as number n is a function of seed, key and n alone. An epoch shows each image once. With repeats,
    an image with repeat factor r comes floor(r) times, and once more with probability r - floor(r), drawn anew for
    each epoch.

    Args:
        images: How many there are, or how often an epoch shows each on average (at least once); of a dataset in
            shards also which lie in which.
        seed: Decides the whole sequence.
        key: The dataset's number: another has another sequence.
    """

    def __init__(self, images: int | Float[np.ndarray, "n"] | EpochImages, seed: int, key: int) -> None:
        self._in_shards = images if isinstance(images, EpochImages) else None
        images = images.images if isinstance(images, EpochImages) else images
        self.length = images if isinstance(images, int) else len(images)
        self.repeats = None if isinstance(images, int) or (images == 1).all() else images
        self.seed, self.key = seed, key
        self._starts = [0]  # where epochs begin, as far as counted
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def image(self, number: int) -> int:
        """The image that comes as number `number`."""
        epoch, position = self._place(number)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return int(self._order[position])

    def seen(self, count: int) -> float:
        """How many epochs the first `count` images are."""
        if self.repeats is None:
            return count / self.length
        epoch, position = self._place(count)
        return epoch + position / (self._starts[epoch + 1] - self._starts[epoch])

    def _place(self, number: int) -> tuple[int, int]:
        """The epoch in which number `number` falls, and its position there."""
        if self.repeats is None:
            return divmod(number, self.length)
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + int(self._times(len(self._starts) - 1).sum()))
        epoch = bisect_right(self._starts, number) - 1
        return epoch, number - self._starts[epoch]

    def _times(self, epoch: int) -> Int[np.ndarray, "n"]:
        """How often an epoch shows each image."""
        if self.repeats is None:
            return np.ones(self.length, dtype=np.int64)
        chance = generator(self.seed, RandomStream.REPEATS, self.key, epoch).random(self.length)
        whole = np.floor(self.repeats)
        times: Int[np.ndarray, "n"] = (whole + (chance < self.repeats - whole)).astype(np.int64)
        return times

    def _shuffled(self, epoch: int) -> Int[np.ndarray, "m"]:
        images = np.repeat(np.arange(self.length), self._times(epoch))
        rng = generator(self.seed, RandomStream.ORDER, self.key, epoch)
        order = rng.permutation(images)
        if self._in_shards is None:
            return order
        # The images are shuffled; now those of the first shards come first, of each few together.
        shards = self._in_shards.shards
        places = rng.permutation(int(shards.max()) + 1) // self._in_shards.shards_at_once
        return order[np.argsort(places[shards[order]], kind="stable")]


def repeat_factors(annotations: Annotations, threshold: float) -> Float[np.ndarray, "n"]:
    """How often an epoch shows each image, so that rare categories come more often (Gupta et al., 2019: LVIS).

    A category that is in a fraction f of the images has the factor max(1, sqrt(threshold / f)); an image has the
    greatest factor of the categories that have an object in it, and at least 1. Ignored boxes are no objects.

    Args:
        annotations: One split. Of an index only the columns are read.
        threshold: The fraction of images below which a category counts as rare, 0..1.
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


def objects_of(annotations: Annotations) -> Iterator[tuple[Int[np.ndarray, "p"], Int[np.ndarray, "p"]]]:
    """Image and category of every object, in pieces, in the order of the images; ignored boxes are no objects."""
    if isinstance(annotations, ColumnarAnnotations):
        yield from annotations.objects()
        return
    for index in range(len(annotations)):
        record = annotations[index]
        labels = record.labels[~record.ignore].astype(np.int64)
        yield np.full(len(labels), index, dtype=np.int64), labels
