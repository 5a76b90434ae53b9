"""A draw: one image to load, and the random numbers that are its own."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are for; each purpose has a stream of its own."""

    EXAMPLE = 0
    DATASET = 1
    ORDER = 2
    SIZE = 3
    REPEATS = 4


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """The random numbers of one purpose and one key, for example one draw."""
    return np.random.default_rng([seed, int(stream), *key])


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One image to load: image `index` of dataset number `dataset`, the draw's `number`, and the batch's `size`."""

    number: int
    dataset: int
    index: int
    seed: int
    size: int | None = None

    def generator(self) -> np.random.Generator:
        """The random numbers of this draw."""
        return generator(self.seed, Stream.EXAMPLE, self.number)
