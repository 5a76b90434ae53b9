"""The images of one dataset, pass after pass."""

from bisect import bisect_right

import numpy as np
from jaxtyping import Float, Int

from metr.data.sample_keys import Stream, generator


class Epochs:
    """An endless sequence of one dataset's images; every pass is a new shuffle of all of them.

    What comes as number n is a function of seed, key and n alone. A pass shows each image once, or, with `repeats`,
    the whole part of its number of times and once more with the probability of the rest, drawn anew for each pass.

    Args:
        images: How many there are, or how often a pass shows each on average (at least once).
        seed: Decides the whole sequence.
        key: The dataset's number: another has another sequence.
    """

    def __init__(self, images: int | Float[np.ndarray, "n"], seed: int, key: int) -> None:
        self.length = images if isinstance(images, int) else len(images)
        self.repeats = None if isinstance(images, int) or (images == 1).all() else images
        self.seed, self.key = seed, key
        self._starts = [0]  # where epochs begin, as far as counted
        self._turn, self._order = -1, np.zeros(0, dtype=np.int64)

    def image(self, number: int) -> int:
        """The image that comes as number `number`."""
        turn, position = self._place(number)
        if turn != self._turn:
            self._turn, self._order = turn, self._shuffled(turn)
        return int(self._order[position])

    def seen(self, count: int) -> float:
        """How many epochs the first `count` images are."""
        if self.repeats is None:
            return count / self.length
        turn, position = self._place(count)
        return turn + position / (self._starts[turn + 1] - self._starts[turn])

    def _place(self, number: int) -> tuple[int, int]:
        """The pass in which number `number` falls, and its position there."""
        if self.repeats is None:
            return divmod(number, self.length)
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + int(self._times(len(self._starts) - 1).sum()))
        turn = bisect_right(self._starts, number) - 1
        return turn, number - self._starts[turn]

    def _times(self, turn: int) -> Int[np.ndarray, "n"]:
        """How often pass `turn` shows each image."""
        if self.repeats is None:
            return np.ones(self.length, dtype=np.int64)
        chance = generator(self.seed, Stream.REPEATS, self.key, turn).random(self.length)
        whole = np.floor(self.repeats)
        times: Int[np.ndarray, "n"] = (whole + (chance < self.repeats - whole)).astype(np.int64)
        return times

    def _shuffled(self, turn: int) -> Int[np.ndarray, "m"]:
        images = np.repeat(np.arange(self.length), self._times(turn))
        return generator(self.seed, Stream.ORDER, self.key, turn).permutation(images)
