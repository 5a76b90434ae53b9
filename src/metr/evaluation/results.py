"""What is evaluated, and the report that comes of it, as plain values too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, PositiveInt

from metr.config import Config
from metr.errors import DataError
from metr.evaluation.coco import CocoResult
from metr.evaluation.metrics import DEFAULT_KEPT, CrossDatasetConfusion
from metr.inference.config import PostprocessConfig, Precision

Mode = Literal["own", "joint"]
MODES: tuple[Mode, ...] = ("own", "joint")


class EvaluationConfig(Config):
    """What is evaluated, and how."""

    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = MODES
    """Vocabularies: `own` asks for a dataset's own names, `joint` for all names of all datasets at once."""
    recall_at: tuple[PositiveInt, ...] = DEFAULT_KEPT
    """Numbers of most likely categories for which the recall of present ones is told."""
    domains: dict[str, str] = Field(default_factory=dict)
    """The domain of each dataset, for the cross-dataset confusion; one that is not named is a domain of its own."""
    outside_mean: tuple[str, ...] = ()
    """Datasets that are told beside the mean over datasets, not in it."""
    precision: Precision = "fp32"
    """Arithmetic of the network (autocast)."""
    postprocess: PostprocessConfig = PostprocessConfig()
    """How answers become detections; the protocol wants its defaults."""


@dataclass(frozen=True, kw_only=True)
class ModeReport:
    """One dataset with one vocabulary of `names` names: detection, and recall of presence at each K (0 to 100)."""

    names: int
    coco: CocoResult
    recall: Mapping[int, float | None]


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What the detector did to one dataset. `missing` images could not be read, and are not in any number."""

    name: str
    split: str
    domain: str
    in_mean: bool
    images: int
    missing: int
    own: ModeReport | None = None
    joint: ModeReport | None = None

    def part(self, mode: Mode) -> ModeReport | None:
        """The report with one vocabulary; None where that was not evaluated."""
        return self.own if mode == "own" else self.joint

    def ap(self, mode: Mode) -> float | None:
        """COCO AP with one vocabulary; None where that was not evaluated or nothing is to be found."""
        part = self.part(mode)
        return None if part is None else part.coco.ap


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What the detector did to each dataset.

    `unannotated` says how training treated unannotated categories, `weights` is the type of those on disk ("float16").
    """

    datasets: tuple[DatasetReport, ...]
    names: int
    confusion: CrossDatasetConfusion | None = None
    unannotated: str | None = None
    weights: str | None = None

    @property
    def modes(self) -> list[Mode]:
        """The vocabularies with which every dataset was evaluated."""
        return [mode for mode in MODES if all(one.part(mode) is not None for one in self.datasets)]

    def mean(self, mode: Mode, metric: Literal["ap", "ap50", "ap75", "ar100"] = "ap") -> float | None:
        """The mean over the datasets that belong to it; None where none has a number."""
        parts = [one.part(mode) for one in self.datasets if one.in_mean]
        values: list[float | None] = [getattr(part.coco, metric) for part in parts if part is not None]
        scored = [value for value in values if value is not None]
        return sum(scored) / len(scored) if scored else None

    def metrics(self) -> dict[str, float]:
        """The report as flat numbers for curves: "AP" is the mean with own names, or else with the joint vocabulary."""
        own_run = any(one.own is not None for one in self.datasets)
        first: Mode = "own" if own_run else "joint"
        values = {"AP": self.mean(first), "AP50": self.mean(first, "ap50")}
        if own_run:
            values["AP joint vocabulary"] = self.mean("joint")
        for dataset in self.datasets:
            values[f"AP {dataset.name}"] = dataset.ap(first)
        if self.confusion is not None:
            values["cross-dataset confusion"] = self.confusion.pooled
        return {name: value for name, value in values.items() if value is not None}


def as_dict(report: EvaluationReport) -> dict[str, Any]:
    """The report as plain values, the means over datasets included; the inverse is `from_dict`."""
    values: dict[str, Any] = msgspec.to_builtins(report, str_keys=True)
    means = {mode: {metric: report.mean(mode, metric) for metric in ("ap", "ap50", "ap75", "ar100")} for mode in MODES}
    return {"mean": {mode: mean for mode, mean in means.items() if mean["ap"] is not None}, **values}


def from_dict(values: dict[str, Any], *, where: object = None) -> EvaluationReport:
    """The report that `as_dict` wrote.

    Raises:
        DataError: something is missing or of the wrong kind.
    """
    try:
        return msgspec.convert(values, EvaluationReport, str_keys=True)
    except msgspec.ValidationError as error:
        raise DataError(f"not an evaluation report: {error}", where=where) from None
