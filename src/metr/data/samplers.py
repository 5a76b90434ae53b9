"""Which picture comes next: one endless, reproducible sequence of draws over all datasets.

Draw n is a function of the seed and n alone: not of the process, the worker, or where a run was interrupted. So a run
that resumes at draw n continues exactly as it would have gone on, and process r of R simply takes every R-th draw.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Int
from torch.utils.data import Sampler

from metr.data.config import Mixture
from metr.errors import ConfigError, DataError, did_you_mean

# Datasets are chosen for this many draws at a time.
BLOCK = 4096


class Stream(IntEnum):
    """What random numbers are for; each purpose has a stream of its own."""

    EXAMPLE = 0
    DATASET = 1
    ORDER = 2
    SIZE = 3


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """The random numbers of one purpose and one key, for example one draw."""
    return np.random.default_rng([seed, int(stream), *key])


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One picture to load: picture `index` of dataset number `dataset`, the draw's `number`, and the batch's `size`."""

    number: int
    dataset: int
    index: int
    seed: int
    size: int | None = None

    def generator(self) -> np.random.Generator:
        """The random numbers of this draw."""
        return generator(self.seed, Stream.EXAMPLE, self.number)


def mixture_weights(lengths: Mapping[str, int], mixture: Mixture) -> dict[str, float]:
    """The share of draws that goes to each dataset; shares sum to 1.

    Args:
        lengths: Pictures of each dataset, by name.
        mixture: "proportional" to the pictures, to their "sqrt", "equal", or a share for each name.

    Raises:
        DataError: a dataset has no picture.
        ConfigError: an explicit mixture leaves a dataset out, names an unknown one, or is all zero.
    """
    if empty := [name for name, length in lengths.items() if length == 0]:
        raise DataError("no pictures in this split", where=", ".join(empty), hint="check the path and the split")
    if not lengths:
        raise DataError("no dataset to draw pictures from", hint="name at least one dataset")
    if isinstance(mixture, dict):
        if unknown := sorted(mixture.keys() - lengths.keys()):
            hint = did_you_mean(unknown[0], lengths)
            raise ConfigError(f"unknown dataset {unknown[0]!r}", where="mixture", hint=hint)
        if missing := [name for name in lengths if name not in mixture]:
            raise ConfigError(f"no share for {', '.join(missing)}", where="mixture", hint="give every dataset a share")
        shares = {name: mixture[name] for name in lengths}
    else:
        power = {"proportional": 1.0, "sqrt": 0.5, "equal": 0.0}[mixture]
        shares = {name: float(length**power) for name, length in lengths.items()}
    total = sum(shares.values())
    if total <= 0:
        raise ConfigError("every dataset has a share of zero", where="mixture", hint="give one of them a share above 0")
    return {name: share / total for name, share in shares.items()}


class MixedSampler(Sampler[list[Draw]]):
    """Endless batches of draws that mix datasets by weight; inside a dataset, a new shuffle every pass.

    Args:
        lengths: Pictures of each dataset, by name, in the order in which draws number the datasets.
        weights: The share of draws of each dataset, by name (see `mixture_weights`).
        batch_size: Draws a batch and process.
        seed: Decides the whole sequence.
        rank: This process's number; it takes the draws whose number is `rank` modulo `world`.
        world: The number of processes.
        sizes: Sizes in pixels to draw from, one for each batch, the same in all processes. Empty: none is set.
        start: The number of draws that all processes made before, together: where a resumed run goes on.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        weights: Mapping[str, float],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        sizes: tuple[int, ...] = (),
        start: int = 0,
    ) -> None:
        self.lengths, self.weights = dict(lengths), dict(weights)
        self.batch_size, self.seed, self.sizes, self.start = batch_size, seed, sizes, start
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[Draw]]:
        """The batches of this process, from draw `start` on, without end."""
        draws = self._draws(self.start)
        while True:
            step = [next(draws) for _ in range(self.batch_size * self.world)]
            size = self._size(step[0][0])
            yield [
                Draw(number=number, dataset=dataset, index=index, seed=self.seed, size=size)
                for number, dataset, index in step[self.rank :: self.world]
            ]

    def draws_after(self, steps: int) -> int:
        """How many draws all processes have made when `steps` steps follow `start`: the state to resume from."""
        return self.start + steps * self.batch_size * self.world

    def passes(self, draws: int) -> dict[str, float]:
        """How many times over each dataset has been seen after `draws` draws of all processes."""
        counts = self._counts(draws).tolist()
        return {name: count / length for (name, length), count in zip(self.lengths.items(), counts, strict=True)}

    def _size(self, first: int) -> int | None:
        """The size of the batch that begins with draw `first`."""
        return int(generator(self.seed, Stream.SIZE, first).choice(self.sizes)) if self.sizes else None

    def _draws(self, start: int) -> Iterator[tuple[int, int, int]]:
        """(number, dataset, index) of every draw from `start` on."""
        seen = self._counts(start).tolist()
        lengths = list(self.lengths.values())
        orders: dict[int, tuple[int, Int[np.ndarray, "n"]]] = {}
        number = start
        while True:
            for dataset in self._block(number // BLOCK)[number % BLOCK :].tolist():
                turn, position = divmod(seen[dataset], lengths[dataset])
                if orders.get(dataset, (-1,))[0] != turn:
                    shuffle = generator(self.seed, Stream.ORDER, dataset, turn)
                    orders[dataset] = turn, shuffle.permutation(lengths[dataset])
                yield number, dataset, int(orders[dataset][1][position])
                seen[dataset] += 1
                number += 1

    def _block(self, block: int) -> Int[np.ndarray, "n"]:
        """The datasets of `BLOCK` consecutive draws."""
        shares = [self.weights[name] for name in self.lengths]
        return generator(self.seed, Stream.DATASET, block).choice(len(shares), size=BLOCK, p=shares)

    def _counts(self, draws: int) -> Int[np.ndarray, "d"]:
        """How many of the first `draws` draws fell to each dataset."""
        counts = np.zeros(len(self.lengths), dtype=np.int64)
        for block in range(-(-draws // BLOCK)):
            counts += np.bincount(self._block(block)[: draws - block * BLOCK], minlength=len(counts))
        return counts
