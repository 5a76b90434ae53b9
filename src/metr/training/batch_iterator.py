"""The images of a run: a loader, how far it is, and what it tells of its datasets."""

import torch
from torch import Tensor

from metr.data.loading import TrainLoader
from metr.devices import peak_memory
from metr.losses.config import LossWeights
from metr.losses.matcher import box_losses_of_images
from metr.structures import Batch, DetectorOutput, Matches, Targets
from metr.training.logger import RuntimeStats
from metr.training.loss_weighted_sampling import HardnessFollower
from metr.training.state import Counters, StepReport


class Stream:
    """The batches of a run, from where its counters are; the shares of the datasets follow their losses if asked to.

    Args:
        loader: Starts at `counters.images`.
        counters: How far the run is; its part about hardness is kept up to date.
    """

    def __init__(self, loader: TrainLoader, counters: Counters) -> None:
        self.loader, self.counters = loader, counters
        self._hardness = None
        if loader.hardness is not None:
            self._hardness = HardnessFollower(loader.sampler, loader.hardness, counters.hardness)
        self._batches = iter(loader)

    def take(self, number: int) -> list[Batch]:
        """The next batches."""
        return [next(self._batches) for _ in range(number)]

    def figures(
        self, output: DetectorOutput, targets: Targets, matches: Matches, weights: LossWeights, batch: Batch
    ) -> dict[str, Tensor]:
        """Scalars that `after` wants to find among the figures of a step; none where shares stay as they are."""
        if self._hardness is None:
            return {}
        return self._hardness.figures(*box_losses_of_images(output, targets, matches, weights), batch.datasets)

    def after(self, report: StepReport) -> None:
        """Takes note of a step that the counters have counted."""
        if self._hardness is not None:
            self._hardness.after(report, self.counters)

    @property
    def epochs(self) -> dict[str, float]:
        """How many times over each dataset has been seen."""
        return self.loader.sampler.epochs(self.counters.images)

    def runtime_stats(self, device: torch.device) -> RuntimeStats:
        """What the journal wants to know besides a step."""
        return RuntimeStats(
            memory=peak_memory(device),
            epochs=self.epochs,
            unreadable=len(self.loader.issues),
            shares=self.loader.sampler.shares(self.counters.images) if self._hardness is not None else {},
        )
