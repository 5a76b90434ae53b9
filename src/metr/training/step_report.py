"""What a training step reports. Its numbers stay on the device until they are read, those of several steps at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step. `figures` are loss terms and matching statistics, averaged over its batches and over all processes.

    `faulty` names the figures (or the gradient) that were not finite; if there are any, the step changed nothing.
    `images` names the images that this process showed.
    """

    step: int = 0
    learning_rate: Mapping[str, float]
    figures: Mapping[str, float] = field(default_factory=dict)
    gradient_norm: float = math.nan
    faulty: tuple[str, ...] = ()
    images: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one step took: images of all processes, seconds, and how many of these were spent waiting for the batches.

    Steps are queued on a device, so only the seconds of many steps together say how long one takes.
    """

    images: int
    seconds: float
    waiting: float


@dataclass(frozen=True, kw_only=True)
class UnreadReport:
    """A `StepReport` whose numbers are still on the device.

    `names` are those of the figures of each batch. `values` are the figures of all batches, and then the norm of the
    gradient.
    """

    names: tuple[tuple[str, ...], ...]
    values: Float[Tensor, "n"]
    learning_rate: Mapping[str, float]
    step: int = 0
    images: tuple[str, ...] = ()

    @property
    def finite(self) -> Bool[Tensor, ""]:
        """Whether every number is finite, on the device."""
        return self.values.isfinite().all()

    def read(self) -> StepReport:
        """The report. The host waits until the device has made the step."""
        return read_reports([self])[0]


def read_reports(unread: Sequence[UnreadReport]) -> list[StepReport]:
    """Reads the numbers of several steps in one transfer, for which the host waits."""
    if not unread:
        return []
    values: list[float] = torch.cat([report.values for report in unread]).tolist()
    reports, start = [], 0
    for report in unread:
        end = start + len(report.values)
        reports.append(_read(report, values[start:end]))
        start = end
    return reports


def _read(report: UnreadReport, values: Sequence[float]) -> StepReport:
    """The report with these values. Of several batches with faults the first one is blamed, and none of its losses."""
    *figures, norm = values
    means: dict[str, float] = {}
    numbers = iter(figures)
    faulty: tuple[str, ...] = ()
    for names in report.names:
        batch = dict(zip(names, numbers, strict=False))
        faulty = faulty or tuple(name for name, value in batch.items() if not math.isfinite(value))
        means |= {name: means.get(name, 0.0) + value / len(report.names) for name, value in batch.items()}
    if not faulty and not math.isfinite(norm):
        faulty = ("the gradient",)
    measured = StepReport(step=report.step, learning_rate=report.learning_rate, images=report.images, faulty=faulty)
    return measured if faulty else replace(measured, figures=means, gradient_norm=norm)
