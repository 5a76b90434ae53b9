"""Which image comes next: one endless, reproducible sequence of draws over all datasets.

Draw n is a function of the seed and n alone (and of the shares that were announced for it): not of the process, the
worker, or where a run was interrupted. So a run that resumes at draw n continues exactly as it would have gone on, and
process r of R simply takes every R-th draw.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int
from torch.utils.data import Sampler

from metr.data.epochs import Epochs
from metr.data.sample_keys import Draw, Stream, generator
from metr.errors import ConfigError

# Datasets are chosen for this many draws at a time.
BLOCK = 4096


class MixedSampler(Sampler[list[Draw]]):
    """Endless batches of draws that mix datasets by weight; inside a dataset, a new shuffle every pass.

    Args:
        images: Images of each dataset, by name, in the order in which draws number the datasets: how many there
            are, or how often a pass shows each of them (see `repeat_factors`).
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
        images: Mapping[str, int | Float[np.ndarray, "_"]],
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
        self._begins = [0]  # the draws from which on the shares in `_shares` hold
        self._shares = [dict(weights)]
        self._made = 0  # the draw after the last one made
        self._counted = 0, np.zeros(len(self._epochs), dtype=np.int64)  # blocks, and the draws in them

    @property
    def lengths(self) -> dict[str, int]:
        """Images of each dataset, by name."""
        return {name: epochs.length for name, epochs in self._epochs.items()}

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

    def change(self, at: int, weights: Mapping[str, float]) -> None:
        """Chooses datasets by other shares from draw `at` on, in an iteration that goes on too.

        Raises:
            ConfigError: that draw is made already, or comes before an earlier change.
        """
        if at < max(self._made, self._begins[-1]):
            what = f"shares are to change at draw {at}, and draws up to {max(self._made, self._begins[-1])} are settled"
            raise ConfigError(what, where="loader.hardness.every", hint="let more steps pass between changes")
        self._begins.append(at)
        self._shares.append(dict(weights))
        self._counted = 0, np.zeros_like(self._counted[1])

    def shares(self, draw: int) -> dict[str, float]:
        """The shares of the datasets by which a draw is made."""
        return self._shares[bisect_right(self._begins, draw) - 1]

    def draws_after(self, steps: int) -> int:
        """How many draws all processes have made when `steps` steps follow `start`: the state to resume from."""
        return self.start + steps * self.batch_size * self.world

    def epochs(self, draws: int) -> dict[str, float]:
        """How many times over each dataset has been seen after `draws` draws of all processes."""
        counts = self._counts(draws).tolist()
        return {name: epochs.seen(count) for (name, epochs), count in zip(self._epochs.items(), counts, strict=True)}

    def _size(self, first: int) -> int | None:
        """The size of the batch that begins with draw `first`."""
        return int(generator(self.seed, Stream.SIZE, first).choice(self.sizes)) if self.sizes else None

    def _draws(self, start: int) -> Iterator[tuple[int, int, int]]:
        """(number, dataset, index) of every draw from `start` on."""
        seen, epochs = self._counts(start).tolist(), list(self._epochs.values())
        number, known = start, (-1, 0)
        chosen: list[int] = []
        while True:
            if known != (number // BLOCK, len(self._begins)):  # another block, or other shares in this one
                known = number // BLOCK, len(self._begins)
                chosen = self._block(number // BLOCK).tolist()
            dataset = chosen[number % BLOCK]
            index = epochs[dataset].image(seen[dataset])
            seen[dataset] += 1
            number += 1
            self._made = number
            yield number - 1, dataset, index

    def _block(self, block: int) -> Int[np.ndarray, "n"]:
        """The datasets of `BLOCK` consecutive draws."""
        first, chance = block * BLOCK, generator(self.seed, Stream.DATASET, block).random(BLOCK)
        chosen = np.zeros(BLOCK, dtype=np.int64)
        for period in range(bisect_right(self._begins, first) - 1, bisect_right(self._begins, first + BLOCK - 1)):
            inside = max(0, self._begins[period] - first)
            sums = np.cumsum([self._shares[period][name] for name in self._epochs])
            chosen[inside:] = np.searchsorted(sums / sums[-1], chance[inside:], side="right")
        return chosen

    def _counts(self, draws: int) -> Int[np.ndarray, "d"]:
        """How many of the first `draws` draws fell to each dataset."""
        blocks, counts = self._counted
        if blocks > draws // BLOCK:
            blocks, counts = 0, np.zeros_like(counts)
        for block in range(blocks, draws // BLOCK):
            counts = counts + np.bincount(self._block(block), minlength=len(counts))
        self._counted = draws // BLOCK, counts
        return counts + np.bincount(self._block(draws // BLOCK)[: draws % BLOCK], minlength=len(counts))
