"""The evaluation report as files (JSON, Markdown, a bar chart) and as a table on the console."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metr.errors import DataError, counted, markdown
from metr.evaluation.results import (
    EVERY_MODE,
    CrossDatasetConfusion,
    DatasetReport,
    EvaluationReport,
    Mode,
    ModeReport,
    as_dict,
)
from metr.evaluation.seen import MEANING
from metr.fitting import Fitting
from metr.inference.draw import font_file, legible
from metr.processes import in_main_process
from metr.run_directory import explained_disk_errors, replaced_file

FILES = ("evaluation.json", "evaluation.md", "evaluation.png")
"""What `write_report` writes."""
TITLES: dict[Mode, str] = {"own": "own names", "joint": "joint vocabulary", "default": "default names"}
UNANNOTATED = {
    "ignore": "Categories that an image's dataset does not annotate gave no loss in training (`unannotated = ignore`).",
    "negative": "Categories that an image's dataset does not annotate counted as absent in training "
    "(`unannotated = negative`).",
    "pseudo_label": "Of categories that an image's dataset does not annotate, training believed the clear answers "
    "of the average of the weights (`unannotated = pseudo_label`).",
}

_SCORES = (
    "What `metr detect` shows, at IoU 0.5, all objects alike. Scores are probabilities of being right as far as names "
    "are calibrated, on average over all detections but for the *calibration error* (0 to 1). *Best F1*: of one score "
    "for all names, chosen on these images."
)

# Colours that readers with any colour vision tell apart.
_COLOURS = {"own": "#3b6fb6", "default": "#7a9a4d", "joint": "#e08a2e"}
# Columns of a dataset's name on a console where not all columns have room.
_FOLDED = 24
_METRICS: tuple[Literal["ap"], Literal["ap50"]] = ("ap", "ap50")


def main_console(console: Console | None) -> Console:
    """The console in the main process; a silent one in the other processes, or where none is given."""
    return console if console is not None and in_main_process() else Console(quiet=True)


def write_report(report: EvaluationReport, folder: Path) -> tuple[Path, Path, Path]:
    """Writes evaluation.json, evaluation.md and evaluation.png into `folder` and gives their paths.

    Raises:
        CheckpointError: the disk refuses.
    """
    with explained_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    table, text, chart = (folder / name for name in FILES)
    with replaced_file(table) as fresh:
        fresh.write_text(json.dumps(as_dict(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with replaced_file(text) as fresh:
        fresh.write_text(as_markdown(report), encoding="utf-8")
    draw_chart(report, chart)
    return table, text, chart


def as_markdown(report: EvaluationReport) -> str:
    """The report in Markdown: a row per dataset, cross-dataset confusion, a table of categories per dataset."""
    parts = ["# Evaluation", _preface(report), dataset_table(report)]
    if report.confusion is not None:
        parts += ["## Cross-dataset confusion", _confusion_note(report), _confusion_table(report.confusion)]
    if any(one.diagnosis for one in report.datasets):
        parts += ["## Scores", _SCORES, scores_table(report)]
    parts.append("## Categories")
    parts += [part for one in report.datasets for part in (f"### {_cell(one.name)}", category_table(one))]
    return "\n\n".join(parts) + "\n"


def dataset_table(report: EvaluationReport) -> str:
    """One row per dataset and one for the mean, in Markdown: AP with each vocabulary, recall, confusion."""
    modes = report.modes
    kept = sorted({k for one in report.datasets for mode in modes for k in _part(one, mode).recall})
    # With two vocabularies, presence recall is shown for the larger, where it is harder.
    hardest = modes[-1]
    head = ["dataset", "images", "objects", "names"]
    head += [f"{metric} ({TITLES[mode]})" for mode in modes for metric in ("AP", "AP50")]
    head += [f"recall at {k}" for k in kept] + (["cross-dataset confusion"] if report.confusion else [])
    rows = []
    for one in report.datasets:
        coco = _part(one, modes[0]).coco
        row = [_cell(one.name) + ("" if one.in_mean else " (not in the mean)"), one.images, coco.objects]
        row += [len(coco.categories)]
        row += [number for mode in modes for number in (_part(one, mode).coco.ap, _part(one, mode).coco.ap50)]
        row += [_part(one, hardest).recall.get(k) for k in kept]
        row += [report.confusion.shares.get(one.name)] if report.confusion else []
        rows.append(row)
    means = [report.mean(mode, metric) for mode in modes for metric in _METRICS]
    confused = [report.mean_confusion] if report.confusion else []
    blank = [""] * (len(head) - 4 - len(means) - len(confused))
    rows.append([f"**mean of {sum(one.in_mean for one in report.datasets)}**", "", "", "", *means, *blank, *confused])
    return _table(head, rows)


def category_table(dataset: DatasetReport) -> str:
    """One row per category of a dataset, in Markdown."""
    parts = [(mode, part) for mode in EVERY_MODE if (part := dataset.part(mode)) is not None]
    asked = dataset.asked
    head = ["category", "objects", *(f"{metric} ({TITLES[mode]})" for mode, _ in parts for metric in ("AP", "AP50"))]
    head += ["threshold", "precision there", "recall there"]
    rows = []
    points = [category.best for category in asked.coco.categories] if asked is not None else []
    for best, *same in zip(points, *(part.coco.categories for _, part in parts), strict=True):
        scores = [score for category in same for score in (category.ap, category.ap50)]
        point = ["–"] * 3 if best is None else [f"{best.threshold:.2f}", best.precision, best.recall]
        rows.append([_cell(same[0].name), same[0].objects, *scores, *point])
    return _table(head, rows)


def scores_table(report: EvaluationReport) -> str:
    """One row per dataset, in Markdown: what is shown, the best that one score for all names could show, the error."""
    head = ["dataset", "shown from", "precision", "recall", "F1", "best F1", "from", "calibration error"]
    rows = []
    for one in report.datasets:
        found = one.diagnosis.calibration if one.diagnosis is not None else None
        if found is not None and found.shown is not None and found.best is not None:
            shown, best = found.shown, found.best
            row = [f"{shown.threshold:.2f}", shown.precision, shown.recall, shown.f1, best.f1, f"{best.threshold:.2f}"]
            rows.append([_cell(one.name), *row, f"{found.error:.3f}"])
    return _table(head, rows)


def draw_chart(report: EvaluationReport, path: Path) -> None:
    """Writes an image (PNG, SVG, PDF) of each dataset's AP with each vocabulary."""
    modes = report.modes
    names = [legible(one.name) for one in report.datasets]
    figure = Figure(figsize=(max(5.0, 1.6 + 1.1 * len(names)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(modes)
    for number, mode in enumerate(modes):
        places = [index + (number - (len(modes) - 1) / 2) * width for index in range(len(names))]
        heights = [_part(one, mode).coco.ap or 0.0 for one in report.datasets]
        mean = report.mean(mode)
        label = TITLES[mode] + ("" if mean is None else f" (mean {mean:.1f})")
        bars = axes.bar(places, heights, width * 0.92, color=_COLOURS[mode], label=label)
        axes.bar_label(bars, [_number(_part(one, mode).coco.ap) for one in report.datasets], fontsize=8, padding=1)
    crowded = len(names) > 4
    axes.set_xticks(range(len(names)), names, rotation=20 if crowded else 0, ha="right" if crowded else "center")
    for tick in axes.get_xticklabels():
        tick.set_fontproperties(FontProperties(fname=font_file(tick.get_text()), size=9))
        tick.set_parse_math(False)
    axes.set_ylabel("AP (0.50:0.95)")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    with replaced_file(path) as fresh:
        figure.savefig(fresh, dpi=130)


def show(report: EvaluationReport, console: Console) -> None:
    """The report as a table on the console; columns that have no room there are left out, AP last."""
    modes = [mode for mode in EVERY_MODE if any(one.part(mode) for one in report.datasets)]
    console.print("average precision, COCO protocol, 0 to 100", style="italic", highlight=False)
    console.print(Fitting(_tables(report, modes)))
    for line in _legend(report, modes):
        console.print(line, highlight=False, markup=False)


def _tables(report: EvaluationReport, modes: Sequence[Mode]) -> Iterator[Table]:
    """The table with all columns, then with ever fewer; at last names of datasets are folded."""
    metrics = _METRICS if len(modes) < len(EVERY_MODE) else _METRICS[:1]  # so that it stays 80 columns wide
    for some, numbered, longest in (
        (metrics, True, None),
        (metrics, True, _FOLDED),
        (metrics[:1], True, _FOLDED),
        (metrics[:1], False, _FOLDED),
    ):
        yield _console_table(report, modes, some, report.confusion, numbered, longest)
    yield _console_table(report, modes, metrics[:1], None, False, _FOLDED)
    yield _console_table(report, modes[:1], metrics[:1], None, False, _FOLDED)


def _console_table(
    report: EvaluationReport,
    modes: Sequence[Mode],
    metrics: Sequence[Literal["ap", "ap50"]],
    confusion: CrossDatasetConfusion | None,
    numbered: bool,
    longest: int | None,
) -> Table:
    """The report as a table. `numbered`: with splits and numbers of images; `longest`: columns of a dataset's name."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    table.add_column("dataset", overflow="fold", max_width=longest)
    if numbered:
        table.add_column("split", no_wrap=True)
        table.add_column("images", justify="right", no_wrap=True)
    numbers = [f"{mode} {metric.upper()}" for mode in modes for metric in metrics]
    for title in (*numbers, *(["confused"] if confusion else [])):
        table.add_column(title, justify="right", no_wrap=True)
    for one in report.datasets:
        parts = [one.part(mode) for mode in modes]
        values: list[float | None] = [
            None if part is None else getattr(part.coco, metric) for part in parts for metric in metrics
        ]
        values += [confusion.shares.get(one.name)] if confusion else []
        name = one.name if one.in_mean else f"({one.name})"
        counts = [one.split, str(one.images)] if numbered else []
        table.add_row(escape(name), *counts, *map(_number, values))
    means = [report.mean(mode, metric) for mode in modes for metric in metrics]
    means += [report.mean_confusion] if confusion else []
    table.add_section()
    blank = ["", ""] if numbered else []
    table.add_row(f"mean of {sum(one.in_mean for one in report.datasets)}", *blank, *map(_number, means))
    return table


def _legend(report: EvaluationReport, modes: Sequence[Mode]) -> Iterator[str]:
    if "default" in modes:
        yield "default: the names that metr detect looks for with this checkpoint"
    if "joint" in modes:
        yield f"own: the dataset's own names; joint: the joint vocabulary of {counted(report.names, 'name')}"
    if report.confusion is not None:
        yield "confused: % of the best detections that name something of another dataset, joint vocabulary"
    if outside := [one.name for one in report.datasets if not one.in_mean]:
        yield f"not in the mean: {', '.join(outside)}"


def _preface(report: EvaluationReport) -> str:
    lines = [
        "COCO average precision over IoU 0.50:0.95 on the scale 0 to 100, at most 100 detections an image. "
        "*Own names*: the detector is asked for the dataset's names alone; *joint vocabulary*: for all "
        f"{counted(report.names, 'name')} at once, and scored on the dataset's own. *Recall at K*: the share of the "
        "categories present that are among the K most likely of the image, with the larger vocabulary."
    ]
    if report.unannotated is not None:
        lines.append(
            UNANNOTATED.get(
                report.unannotated,
                f"Categories that an image's dataset does not annotate: {report.unannotated}.",
            )
        )
    splits = [f"{one.split} of {_cell(one.name)}" for one in report.datasets]
    lines.append(f"Splits: {', '.join(splits)}.")
    lines += seen_notes(report)
    missing = [f"{one.missing} of {_cell(one.name)}" for one in report.datasets if one.missing]
    if missing:
        lines.append(f"Images that could not be read, and are in no number: {', '.join(missing)}.")
    return "\n\n".join(lines)


def seen_notes(report: EvaluationReport) -> list[str]:
    """What is known of evaluated images that training had, a paragraph of Markdown for each such dataset."""
    return [f"**{_cell(one.name)}**: {markdown(one.seen)}; {MEANING}." for one in report.datasets if one.seen]


def _confusion_note(report: EvaluationReport) -> str:
    return (
        "Of the best detections with the joint vocabulary, as many an image as it has objects, "
        f"{_number(report.mean_confusion)} % name a category of another domain, in the mean over datasets. A domain is "
        "a dataset, or several of one field. Rows: the domain of the image; columns: the domain named, in per cent of "
        "the row."
    )


def _confusion_table(confusion: CrossDatasetConfusion) -> str:
    rows = []
    for name, counts in zip(confusion.domains, confusion.counts, strict=True):
        total = sum(counts)
        if total:
            rows.append([_cell(name), round(total), *(100 * count / total for count in counts)])
    return _table(["", "detections", *map(_cell, confusion.domains)], rows)


def _part(dataset: DatasetReport, mode: Mode) -> ModeReport:
    part = dataset.part(mode)
    if part is None:
        raise DataError(f"{dataset.name} was not evaluated with {TITLES[mode]}", where="evaluation report")
    return part


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    lines += [[_number(cell) if isinstance(cell, float) or cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _cell(text: str) -> str:
    """A name, escaped for a Markdown table."""
    return markdown(text)
