"""What the benchmark of rehearsal found: AP of every dataset before and after, and whether the old names are kept."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kept_runs import told_range
from metr.evaluation.results import Mode
from rehearsal_runs import ARMS, Arm, ArmResult, Profile

MODES: dict[Mode, str] = {"own": "own names", "joint": "all names"}
KEPT = 0.9
"""The share of its AP before that a dataset is to have afterwards, whatever names it is asked for; else it is lost."""
FOUND = 1.0
"""The AP before under which there is nothing to lose."""
# the most that two judgements of the same weights may differ by, in AP
_ALIKE = 0.1


@dataclass(frozen=True, kw_only=True)
class Row:
    """AP (0 to 100) of one dataset, or of the mean of several, by the names asked for; None: nothing to find there."""

    dataset: str
    old: bool
    before: Mapping[Mode, float | None]
    after: Mapping[Arm, Mapping[Mode, float | None]]

    def change(self, arm: Arm, mode: Mode) -> float | None:
        """What fine-tuning did to it."""
        return _difference(self.after[arm][mode], self.before[mode])

    def gain(self, mode: Mode) -> float | None:
        """What rehearsal brings over fine-tuning without it."""
        return _difference(self.after["with"][mode], self.after["without"][mode])

    @property
    def judged(self) -> tuple[Mode, ...]:
        """The ways to ask in which it had something to lose."""
        return tuple(mode for mode in MODES if (self.before[mode] or 0.0) >= FOUND)

    def lost(self, arm: Arm) -> tuple[Mode, ...]:
        """The ways to ask in which it was lost."""
        return tuple(mode for mode in self.judged if (self.after[arm][mode] or 0.0) < KEPT * (self.before[mode] or 0.0))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both arms side by side.

    Attributes:
        rows: The old datasets, then the new one.
        steps: Those that the arms took, by arm.
        alike: Whether both arms began with the same detector, as its AP before says.
    """

    rows: tuple[Row, ...]
    steps: Mapping[Arm, int]
    alike: bool

    @staticmethod
    def of(results: Sequence[ArmResult], profile: Profile) -> "Comparison":
        """The arms' results by dataset; both are there."""
        arms = {one.arm: {change.dataset: change for change in one.changes} for one in results}
        first = arms[ARMS[0]]
        rows = tuple(
            Row(
                dataset=name,
                old=name != profile.new,
                before=first[name].before,
                after={arm: changes[name].after for arm, changes in arms.items()},
            )
            for name in (*profile.old, profile.new)
        )
        apart = [
            _difference(arms[arm][name].before[mode], change.before[mode]) or 0.0
            for arm in ARMS
            for name, change in first.items()
            for mode in MODES
        ]
        steps = {one.arm: one.steps for one in results}
        return Comparison(rows=rows, steps=steps, alike=max(map(abs, apart), default=0.0) <= _ALIKE)

    @property
    def old(self) -> tuple[Row, ...]:
        """The old datasets."""
        return tuple(row for row in self.rows if row.old)

    @property
    def mean_old(self) -> Row:
        """The mean over the old datasets."""
        old = self.old
        return Row(
            dataset=f"mean of {len(old)} old",
            old=True,
            before={mode: _mean(row.before[mode] for row in old) for mode in MODES},
            after={arm: {mode: _mean(row.after[arm][mode] for row in old) for mode in MODES} for arm in ARMS},
        )

    def lost(self, arm: Arm) -> tuple[Row, ...]:
        """The old datasets that are lost."""
        return tuple(row for row in self.old if row.lost(arm))

    @property
    def verdict(self) -> str:
        """Whether the old names are kept, in one sentence."""
        judged = [row for row in self.old if row.judged]
        if not judged:
            return "**Nothing can be said of the old names: the detector found nothing of them before.**"
        lost = {arm: "; ".join(_fall(row, arm) for row in self.lost(arm)) for arm in ARMS}
        if lost["with"]:
            beside = f"without it, lost are: {lost['without']}" if lost["without"] else "without it, none is lost"
            return f"**The old names are not all kept: with rehearsal, lost are: {lost['with']}; {beside}.**"
        kept = f"The old names are kept with rehearsal, in all {len(judged)} old datasets that were found before"
        beside = f"without it, lost are: {lost['without']}" if lost["without"] else "they are without it, too"
        return f"**{kept}; {beside}.**"


def as_dict(comparison: Comparison) -> dict[str, object]:
    """All of it as plain values."""
    rows = {row.dataset: row for row in (*comparison.rows, comparison.mean_old)}
    return {
        "datasets": {
            name: {
                "old": row.old,
                "before": dict(row.before),
                "after": {arm: dict(row.after[arm]) for arm in ARMS},
                "change": {arm: {mode: row.change(arm, mode) for mode in MODES} for arm in ARMS},
                "gain": {mode: row.gain(mode) for mode in MODES},
            }
            for name, row in rows.items()
        },
        "lost": {arm: {row.dataset: list(row.lost(arm)) for row in comparison.lost(arm)} for arm in ARMS},
        "alike": comparison.alike,
        "verdict": comparison.verdict.strip("*"),
    }


def as_markdown(comparison: Comparison, profile: Profile) -> str:
    """The verdict, a table for each way to ask, and how it was measured."""
    apart = "" if comparison.alike else "**The arms did not begin with one detector: AP before is that of the first.**"
    tables = [f"## {MODES[mode].capitalize()}\n\n{_table(comparison, mode)}" for mode in MODES]
    parts = (comparison.verdict, _preface(comparison, profile), apart, *tables)
    return "\n\n".join(part for part in parts if part) + "\n"


def _preface(comparison: Comparison, profile: Profile) -> str:
    steps = told_range(comparison.steps.values())
    uneven = len(set(comparison.steps.values())) > 1
    alike = "**not for the same number of them**" if uneven else "with the same seed"
    nothing = [row.dataset for row in comparison.old if not row.judged]
    besides = f" Not found before, so nothing to lose: {', '.join(nothing)}." if nothing else ""
    return (
        f"AP (0 to 100) on the val splits, last weights. A detector of {', '.join(profile.old)} learns {profile.new} "
        f"in {steps} steps, {alike}; with rehearsal, {profile.share:.0%} of the images are of the old datasets "
        f"instead. Lost is a dataset that has less than {KEPT:.0%} of its AP before, asked for its own names or for "
        f"all names of all datasets.{besides}"
    )


def _table(comparison: Comparison, mode: Mode) -> str:
    head = ["dataset", "is", "before", "after, without", "after, with", "change, without", "change, with", "gain"]
    new = [row for row in comparison.rows if not row.old]
    rows = [_line(row, mode) for row in (*comparison.old, comparison.mean_old, *new)]
    ruled = [head, ["---", "---"] + ["---:"] * (len(head) - 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in ruled)


def _line(row: Row, mode: Mode) -> list[str]:
    named = not row.dataset.startswith("mean of ")
    after = [
        f"{_number(row.after[arm][mode])}{' **lost**' if row.old and named and mode in row.lost(arm) else ''}"
        for arm in ARMS
    ]
    changes = [_signed(row.change(arm, mode)) for arm in ARMS]
    is_what = "old" if row.old else "new"
    return [row.dataset, is_what, _number(row.before[mode]), *after, *changes, _signed(row.gain(mode))]


def _fall(row: Row, arm: Arm) -> str:
    """How far a lost dataset fell."""
    falls = [
        f"{MODES[mode]} {_number(row.before[mode])} to {_number(row.after[arm][mode] or 0.0)}" for mode in row.lost(arm)
    ]
    return f"{row.dataset} ({', '.join(falls)})"


def _difference(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"
