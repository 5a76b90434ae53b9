"""Datasets that are hard to learn are drawn more often: what their losses are, and when the sampler hears of it."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metr.data.config import HardnessConfig
from metr.data.mixture import hardness_weights
from metr.data.samplers import MixedSampler
from metr.training.state import Counters, HardnessState, StepReport

HARDNESS = "hardness/"
"""Figures of this prefix are no loss terms: they are box losses and numbers of matched objects by dataset."""


class HardnessFollower:
    """Lets the datasets' shares follow their box losses.

    Every `config.every` steps the losses of the steps since the last decision make new shares, and the sampler is told
    at which draw they begin: as many steps later, beyond anything that workers may be reading already. So it depends on
    no timing which draws they decide: period p has the shares of the losses up to the end of period p - 2, and the
    first two have those that the sampler began with.

    Args:
        sampler: Told of every change, those that `state` remembers first.
        config: How shares follow losses.
        state: Kept up to date, for the run to go on from.
    """

    def __init__(self, sampler: MixedSampler, config: HardnessConfig, state: HardnessState) -> None:
        self.sampler, self.config, self.state = sampler, config, state
        for draw, shares in state.changes:
            sampler.change(draw, shares)

    def figures(
        self, losses: Float[Tensor, "b"], objects: Int[Tensor, "b"], datasets: Sequence[str]
    ) -> dict[str, Tensor]:
        """Box loss and matched objects of each dataset, of those of each image: the same names in every batch."""
        numbers = torch.tensor([list(self.sampler.weights).index(name) for name in datasets], device=losses.device)
        found = {}
        for number, name in enumerate(self.sampler.weights):
            found[f"{HARDNESS}loss/{name}"] = losses.where(numbers == number, 0).sum()
            found[f"{HARDNESS}objects/{name}"] = objects.where(numbers == number, 0).sum()
        return found

    def after(self, report: StepReport, counters: Counters) -> None:
        """Takes note of a step that is counted already, and decides if its time has come."""
        for name, (loss, objects) in by_dataset(report.figures).items():
            loss_before, objects_before = self.state.sums.get(name, (0.0, 0.0))
            self.state.sums[name] = loss_before + loss, objects_before + objects
        if counters.step % self.config.every == 0:
            self._decide(counters.images, report.images)

    def _decide(self, images: int, images_a_step: int) -> None:
        self.state.losses |= mean_losses(self.state.sums)
        self.state.sums = {}
        shares = hardness_weights(self.sampler.weights, self.state.losses, self.config)
        before = self.state.changes[-1][0] if self.state.changes else 0
        draw = max(before, images + self.config.every * images_a_step)
        self.sampler.change(draw, shares)
        self.state.changes.append((draw, shares))


def by_dataset(figures: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Box loss and matched objects of each dataset among the figures of a step; none where none is followed."""
    prefix = f"{HARDNESS}loss/"
    names = [name.removeprefix(prefix) for name in figures if name.startswith(prefix)]
    return {name: (figures[prefix + name], figures[f"{HARDNESS}objects/{name}"]) for name in names}


def mean_losses(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The mean box loss of the datasets that had an object."""
    return {name: loss / objects for name, (loss, objects) in sums.items() if objects > 0}
