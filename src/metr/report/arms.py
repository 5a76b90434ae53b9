"""Other evaluations beside one: what each dataset gave the others, where detectors were trained with and without it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from metr.evaluation.results import EvaluationReport

__all__ = ["Arm", "ArmRow", "Gift", "arms_of", "gifts_of"]


@dataclass(frozen=True, kw_only=True)
class ArmRow:
    """AP of one dataset, own names (0 to 100): of this detector, of the other, and the difference.

    `trained` says whether the other was trained on it; that holds too where nobody knows.
    """

    dataset: str
    mine: float | None
    other: float | None
    trained: bool

    @property
    def gain(self) -> float | None:
        """How much more this detector has; None where one has no number."""
        return None if self.mine is None or self.other is None else self.mine - self.other


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Another evaluation of the same splits.

    `gave` are the datasets that this detector was trained on and the other was not, where the other had nothing else;
    empty where that is not so, or not known. `apart` are datasets of which it measures another split.
    """

    name: str
    rows: tuple[ArmRow, ...]
    gave: tuple[str, ...]
    apart: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """The mean difference over the datasets that the other was trained on; None without one."""
        gains = [row.gain for row in self.rows if row.trained and row.gain is not None]
        return sum(gains) / len(gains) if gains else None


@dataclass(frozen=True, kw_only=True)
class Gift:
    """What datasets together gave: to each dataset of the evaluation that both detectors were trained on, in AP."""

    arm: str
    gave: tuple[str, ...]
    to: tuple[float | None, ...]


def arms_of(report: EvaluationReport, others: Mapping[str, EvaluationReport]) -> tuple[Arm, ...]:
    """Each of the other evaluations beside this one, on the splits that both have.

    Args:
        report: This evaluation.
        others: The others, by what they are called.
    """
    return tuple(_arm(name, report, other) for name, other in others.items())


def _arm(name: str, report: EvaluationReport, other: EvaluationReport) -> Arm:
    theirs = {one.name: one for one in other.datasets}
    mine, there = report.trained_on, other.trained_on
    known = bool(mine and there)
    lacking = tuple(dataset for dataset in mine if dataset not in there)
    within = known and set(there) < set(mine)
    shared = [one for one in report.datasets if one.name in theirs]
    return Arm(
        name=name,
        rows=tuple(
            ArmRow(
                dataset=one.name,
                mine=one.ap("own"),
                other=theirs[one.name].ap("own"),
                trained=not known or one.name in there,
            )
            for one in shared
            if one.split == theirs[one.name].split
        ),
        gave=lacking if within else (),
        apart=tuple(one.name for one in shared if one.split != theirs[one.name].split),
    )


def gifts_of(report: EvaluationReport, arms: tuple[Arm, ...]) -> tuple[Gift, ...]:
    """What the datasets that each other detector lacked gave to those that it had."""
    return tuple(_gifts(report, arms))


def _gifts(report: EvaluationReport, arms: tuple[Arm, ...]) -> Iterator[Gift]:
    for arm in arms:
        gains = {row.dataset: row.gain for row in arm.rows if row.trained}
        if arm.gave and gains:
            yield Gift(arm=arm.name, gave=arm.gave, to=tuple(gains.get(one.name) for one in report.datasets))
