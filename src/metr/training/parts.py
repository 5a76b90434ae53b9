"""What goes into training and what comes out: parts, evaluations, the outcome."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from metr.checkpoint import Checkpoint
from metr.config import Calibration
from metr.data.loading import TrainLoader
from metr.losses.criterion import SetCriterion
from metr.training.config import TrainConfig
from metr.training.name_variation import NameVariation, OtherWords
from metr.training.step_targets import PseudoLabeler, StepTargets


@dataclass(frozen=True, kw_only=True)
class TrainingParts:
    """What is trained, on what, and all that goes into its checkpoints besides the weights.

    `loader` is called once with the keywords `seed`, `start` (samples already taken by all processes), `rank`, `world`,
    `device` and `batches` (of each process in the whole run); use `partial(build_train_loader, datasets, config)`.
    `checkpoint` lacks its weights; the network is trained with its text embeddings, and now and then with `words`.
    `teacher` adds pseudo-labels to the targets.
    """

    network: nn.Module
    criterion: SetCriterion
    loader: Callable[..., TrainLoader]
    checkpoint: Checkpoint
    teacher: PseudoLabeler | None = None
    words: OtherWords | None = None

    def step_targets(self, config: TrainConfig, device: torch.device, rank: int, world: int) -> StepTargets:
        """What makes the targets of the steps of process `rank` of `world`."""
        text = self.checkpoint.text_embeddings.to(device)
        variation = NameVariation(text, self.words, config.names, config.loop.seed)
        return StepTargets(text, config.loop, self.teacher, rank, world, variation)


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation gives: metrics by name, and for some names what makes their scores probabilities.

    `thresholds` are the scores, as probabilities, from which detections of these names are shown.
    """

    metrics: Mapping[str, float | None]
    calibration: Mapping[str, Calibration] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)


Evaluate = Callable[[nn.Module], Evaluated]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How training ended: after which step, whether it was interrupted, and the metrics of the evaluations.

    `stalled` says that it ended before the last step because evaluations had stopped improving (`loop.patience`);
    `signal` is the number of the signal that this process was stopped by.
    """

    step: int
    interrupted: bool
    metrics: Mapping[str, float]
    best: float | None
    best_step: int
    stalled: bool = False
    signal: int | None = None
