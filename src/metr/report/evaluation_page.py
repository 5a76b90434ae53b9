"""The page of an evaluation: what a detector finds in datasets, what it gets wrong, and where to look."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metr.errors import DataError
from metr.evaluation.answers import Observation
from metr.evaluation.diagnosis import Calibration, Confusion, Diagnosis, ErrorName, Judged, precision_curves
from metr.evaluation.report import TITLES, UNANNOTATED
from metr.evaluation.results import DatasetReport, EvaluationReport, Mode, ModeReport, from_dict
from metr.evaluation.runner import Detailed
from metr.evaluation.seen import MEANING
from metr.report.arms import Arm, Gift, arms_of, gifts_of
from metr.report.charts import Chart, HeatMap, heat_map, precision_recall, reliability
from metr.report.page import said, write_page
from metr.report.worst import WorstImage, by_id, worst_images
from metr.serialization import read_json

PAGE = "evaluation.html"
"""The file of the page."""
ERRORS: dict[ErrorName, tuple[str, str]] = {
    "name": ("wrong name", "at an object's place, with the name of another"),
    "place": ("wrong place", "the right name, IoU with the object between 0.1 and 0.5"),
    "both": ("both wrong", "near an object of another name, IoU between 0.1 and 0.5"),
    "duplicate": ("duplicate", "an object that a better detection has found"),
    "background": ("background", "near no annotated object"),
    "missed": ("missed", "an object that nothing accounts for"),
}
"""What each kind of error is called, and what it is."""
_MOST_NAMES = 24  # rows of a table of confusion
_MOST_PAIRS = 12  # confusions in a list
_HEAT_IMAGES, _HEAT_NAMES, _HEAT_OTHERS = 18, 30, 8


@dataclass(frozen=True, kw_only=True)
class NameRow:
    """One name of one dataset in the table of names; `point` is where its F1 is best."""

    dataset: str
    name: str
    objects: int
    ap: tuple[float | None, ...]
    ap50: float | None
    threshold: float | None
    precision: float | None
    recall: float | None


@dataclass(frozen=True, kw_only=True)
class ConfusionTable:
    """Objects of a name (rows) by the name that is shown at their place (columns), in numbers.

    The last column are objects at whose place nothing is shown. `left_out` names have no row, the fewest confused ones.
    """

    names: tuple[str, ...]
    shown: tuple[tuple[str, bool], ...]
    counts: tuple[tuple[int, ...], ...]
    unseen: tuple[int, ...]
    left_out: int
    pairs: tuple[tuple[str, str, int, bool], ...]


@dataclass(frozen=True, kw_only=True)
class DatasetView:
    """One dataset on the page. What needs the detector's answers is None where only its report is at hand."""

    report: DatasetReport
    asked: ModeReport
    mode: str
    diagnosis: Diagnosis | None
    confusion: ConfusionTable | None
    calibration: Chart | None
    curves: Chart | None = None
    presence: HeatMap | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationView:
    """All that the page says of an evaluation."""

    report: EvaluationReport
    modes: tuple[Mode, ...]
    titles: Mapping[Mode, str]
    datasets: tuple[DatasetView, ...]
    names: tuple[NameRow, ...]
    errors: Mapping[ErrorName, tuple[str, str]]
    most_lost: float
    unannotated: str | None
    seen: Mapping[str, str]
    worst: tuple[WorstImage, ...]
    arms: tuple[Arm, ...]
    gifts: tuple[Gift, ...]


def write_evaluation_page(
    found: Detailed | EvaluationReport, path: Path, title: str, arms: Mapping[str, EvaluationReport] | None = None
) -> Path:
    """Writes the page of an evaluation and gives its path; in the main process.

    Args:
        found: What `evaluate_in_detail` gave; or a report alone, whose page has no images and curves.
        path: The HTML file.
        title: Of the page.
        arms: Other evaluations to compare with, by what they are called.

    Raises:
        CheckpointError: the disk refuses.
        MetrError: the page would be too large.
    """
    if isinstance(found, EvaluationReport):
        view = evaluation_view(found, arms=arms)
    else:
        view = evaluation_view(found.report, found.observations, found.judged, arms)
    return write_page(path, title, {"evaluation": view})


def read_report(path: Path) -> EvaluationReport:
    """The report in an evaluation.json, or in a folder that holds one or a folder `evaluation` with one.

    Raises:
        DataError: there is none.
    """
    places = (path, path / "evaluation.json", path / "evaluation" / "evaluation.json")
    for place in places:
        if place.is_file():
            return from_dict(read_json(place), where=place)
    hint = "metr evaluate writes one into its folder"
    raise DataError("expected an evaluation.json, or a folder that holds one", where=path, hint=hint)


def evaluation_view(
    report: EvaluationReport,
    observations: Sequence[Observation] = (),
    judged: Mapping[str, Judged] | None = None,
    arms: Mapping[str, EvaluationReport] | None = None,
) -> EvaluationView:
    """What the page says of a report, and of the answers behind it where they are at hand."""
    judged, by_name = judged or {}, {one.dataset: one for one in observations}
    datasets = tuple(_dataset(one, by_name.get(one.name), judged.get(one.name)) for one in report.datasets)
    beside = arms_of(report, arms or {})
    lost = [error.lost for one in datasets if one.diagnosis for error in one.diagnosis.errors]
    return EvaluationView(
        report=report,
        modes=tuple(report.modes),
        titles=TITLES,
        datasets=datasets,
        names=tuple(row for one in report.datasets for row in _name_rows(one, report.modes)),
        errors=ERRORS,
        most_lost=max(lost, default=0.0),
        unannotated=None if report.unannotated is None else UNANNOTATED.get(report.unannotated, report.unannotated),
        seen={one.name: f"{one.seen}; {MEANING}" for one in report.datasets if one.seen},
        worst=tuple(worst_images(observations, judged)),
        arms=beside,
        gifts=gifts_of(report, beside),
    )


def _dataset(report: DatasetReport, seen: Observation | None, judged: Judged | None) -> DatasetView:
    if report.asked is None:
        raise DataError("was evaluated with no vocabulary", where=report.name)
    mode: Mode = "default" if report.default else "joint" if report.joint else "own"
    diagnosis, called = report.diagnosis, said(report.name)
    categories = tuple(category.name for category in report.asked.coco.categories)
    return DatasetView(
        report=report,
        asked=report.asked,
        mode=TITLES[mode],
        diagnosis=diagnosis,
        confusion=None if diagnosis is None else _confusion(diagnosis.confusion, categories),
        calibration=None if diagnosis is None else _calibration(called, diagnosis.calibration),
        curves=None if judged is None else precision_recall(called, categories, precision_curves(judged)),
        presence=None if seen is None else _presence(seen, categories),
    )


def _name_rows(report: DatasetReport, modes: Sequence[Mode]) -> list[NameRow]:
    parts = [part for mode in modes if (part := report.part(mode)) is not None]
    asked = report.asked
    if asked is None:
        return []
    return [
        NameRow(
            dataset=report.name,
            name=one.name,
            objects=one.objects,
            ap=tuple(part.coco.categories[row].ap for part in parts),
            ap50=one.ap50,
            threshold=None if one.best is None else one.best.threshold,
            precision=None if one.best is None else one.best.precision,
            recall=None if one.best is None else one.best.recall,
        )
        for row, one in enumerate(asked.coco.categories)
    ]


def _confusion(confusion: Confusion, own: Sequence[str]) -> ConfusionTable | None:
    """The table of the names that are confused most, and the confusions in a list; None where there is no object."""
    counts = {(true, found): number for true, found, number in confusion.pairs}
    wrong = [(true, found, number) for true, found, number in confusion.pairs if true != found]
    wrong.sort(key=lambda pair: (-pair[2], pair[0], pair[1]))
    present = [name for name in own if name in confusion.unseen or any(true == name for true, _ in counts)]
    if not present:
        return None
    weight = dict.fromkeys(present, 0)
    for true, found, number in wrong:
        weight[true] += number
        if found in weight:
            weight[found] += number
    best = sorted(present, key=lambda name: (-weight[name], -confusion.unseen.get(name, 0)))[:_MOST_NAMES]
    rows = [name for name in present if name in set(best)]
    strange = dict.fromkeys(found for true, found, _ in wrong if found not in own and true in set(rows))
    columns = [*rows, *strange][: 2 * _MOST_NAMES]
    return ConfusionTable(
        names=tuple(rows),
        shown=tuple((name, name not in own) for name in columns),
        counts=tuple(tuple(counts.get((true, found), 0) for found in columns) for true in rows),
        unseen=tuple(confusion.unseen.get(name, 0) for name in rows),
        left_out=len(present) - len(rows),
        pairs=tuple((true, found, number, found not in own) for true, found, number in wrong[:_MOST_PAIRS]),
    )


def _calibration(name: str, calibration: Calibration) -> Chart | None:
    if calibration.error is None:
        return None
    return reliability(name, [(one.lower, one.upper, one.count, one.score, one.right) for one in calibration.bins])


def _presence(seen: Observation, own: Sequence[str]) -> HeatMap | None:
    """Presence in some images: the dataset's names, most frequent first, then the likeliest of other datasets."""
    if not seen.presence:
        return None
    records = by_id(seen)
    shown = [image_id for image_id in seen.presence if image_id in records][:_HEAT_IMAGES]
    values = np.stack([seen.presence[image_id].numpy() for image_id in shown], axis=1)
    column = {name: row for row, name in enumerate(seen.names)}
    spelling = [name.strip() for name in seen.annotations.categories]
    there = np.zeros(values.shape, dtype=bool)
    for place, image_id in enumerate(shown):
        record = records[image_id]
        there[[column[spelling[label]] for label in record.labels[~record.ignore].tolist()], place] = True
    mine = [column[name] for name in own]
    mine = sorted(mine, key=lambda row: (-there[row].sum(), -values[row].mean()))[:_HEAT_NAMES]
    others = [row for row in range(len(seen.names)) if seen.names[row] not in set(own)]
    others = sorted(others, key=lambda row: -values[row].mean())[:_HEAT_OTHERS]
    rows = [*mine, *others]
    names = [said(seen.names[row]) for row in mine] + [f"({said(seen.names[row])})" for row in others]
    files = [said(records[image_id].path.name or str(image_id)) for image_id in shown]
    return heat_map(names, files, values[rows], there[rows])
