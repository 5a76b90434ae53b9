"""Before and after: what fine-tuning did to new datasets and to old ones."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metr.evaluation.results import EvaluationReport, Mode, as_dict, from_dict
from metr.evaluation.seen import MEANING
from metr.run_directory import explained_disk_errors, replaced_file
from metr.serialization import read_json, write_json
from metr.training.finetune_data import Role

BEFORE, COMPARISON = "before.json", "comparison.json"
COMPARED: tuple[Mode, ...] = ("own", "default", "joint")
"""The vocabularies that datasets are evaluated with: their own names, those that the new checkpoint looks for by
default, and all."""
_VOCABULARY = {"own": "own names", "default": "default names", "joint": "all names"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """AP (0 to 100) of one dataset before and after, by vocabulary.

    None where there are no objects to find, and for the default names where these lack some of the dataset's.
    """

    dataset: str
    role: Role
    before: Mapping[Mode, float | None]
    after: Mapping[Mode, float | None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What fine-tuning did to each dataset."""

    changes: tuple[Change, ...]
    before: EvaluationReport
    after: EvaluationReport

    @staticmethod
    def of(before: EvaluationReport, after: EvaluationReport, roles: Mapping[str, Role]) -> "Comparison":
        """The two reports side by side; both are on the same datasets."""
        by_name = {one.name: one for one in after.datasets}
        changes = tuple(
            Change(
                dataset=one.name,
                role=roles[one.name],
                before={mode: one.ap(mode) for mode in COMPARED},
                after={mode: by_name[one.name].ap(mode) for mode in COMPARED},
            )
            for one in before.datasets
        )
        return Comparison(changes=changes, before=before, after=after)

    def mean(self, old: bool) -> Change | None:
        """The mean over old datasets or over new ones; None where there are none."""
        some = [one for one in self.changes if (one.role != "new") == old]
        if not some:
            return None
        return Change(
            dataset=f"mean of {len(some)} {'old' if old else 'new'}",
            role=some[0].role,
            before={mode: _mean([one.before[mode] for one in some]) for mode in COMPARED},
            after={mode: _mean([one.after[mode] for one in some]) for mode in COMPARED},
        )

    def write(self, folder: Path) -> Path:
        """Writes comparison.json into a run folder and gives its path."""
        means = {"new": self.mean(old=False), "old": self.mean(old=True)}
        values = {
            "datasets": [asdict(change) for change in self.changes],
            "mean": {name: asdict(change) for name, change in means.items() if change is not None},
            "before": as_dict(self.before),
            "after": as_dict(self.after),
        }
        path = folder / COMPARISON
        with replaced_file(path) as fresh:
            fresh.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def keep_before(folder: Path, report: EvaluationReport) -> None:
    """Writes the checkpoint's report into a run folder, so that a resumed run need not evaluate again."""
    with explained_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with replaced_file(folder / BEFORE, flush=True) as fresh:
        write_json(fresh, as_dict(report))


def kept_before(folder: Path) -> EvaluationReport | None:
    """The report that `keep_before` wrote; None where there is none.

    Raises:
        CheckpointError: the file is not JSON.
        DataError: the file is not a report.
    """
    path = folder / BEFORE
    return from_dict(read_json(path), where=path) if path.is_file() else None


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Prints a row for each dataset: AP before and after, with its own names, the default ones and all."""
    console.print("AP before and after, 0 to 100", style="italic", highlight=False)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    table.add_column("dataset", overflow="fold")
    table.add_column("is")
    for mode in COMPARED:
        table.add_column(_VOCABULARY[mode], justify="right", no_wrap=True)
    for change in comparison.changes:
        table.add_row(escape(change.dataset), change.role, *_cells(change))
    table.add_section()
    for mean in (comparison.mean(old=False), comparison.mean(old=True)):
        if mean is not None:
            table.add_row(mean.dataset, "", *_cells(mean))
    console.print(table)
    # this choice favours the new datasets: readers of the numbers should know
    note = "After: the best checkpoint of the run, chosen by the new datasets' own numbers. Default names: those that\n"
    note += "metr detect looks for with it."
    console.print(note, highlight=False, soft_wrap=True)
    for one in comparison.before.datasets:
        if one.seen:
            line = f"{one.name}: {one.seen}; {MEANING}."
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for change in comparison.changes:
        before, after = (one["own"] for one in (change.before, change.after))
        if change.role == "new" and before is not None and after is not None and after < before:
            worse = f"{change.dataset} was found better before: AP {before:.1f}, now {after:.1f}. Train for longer, or "
            worse += "with a lower learning rate (train.optimizer.learning_rate)."
            console.print(worse, highlight=False, markup=False, soft_wrap=True)


def _cells(change: Change) -> list[str]:
    return [f"{_number(change.before[mode])} → {_number(change.after[mode])}" for mode in COMPARED]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
