"""What the arms of MultiField found, side by side: a table, a bar chart, and what it comes to."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metr.evaluation.results import EvaluationReport, Mode
from multifield_arms import UNANNOTATED, ArmResult

TITLES = {
    "separate": "a METR for each",
    "closed_set": "closed head, concatenated labels",
    "ignore": "joint METR, unannotated ignored",
    "negative": "joint METR, unannotated absent",
    "teacher": "joint METR, teacher",
}
_COLOURS = {
    "separate": "#9a9a9a",
    "closed_set": "#e08a2e",
    "ignore": "#9dbfe3",
    "negative": "#5c93cf",
    "teacher": "#1f5a9e",
}
_RECALL_AT = 10


def best_joint(results: Sequence[ArmResult]) -> ArmResult | None:
    """Of the joint arms the one with the highest mean AP, all names asked for."""
    joint = [result for result in results if result.arm in UNANNOTATED]
    return max(joint, key=lambda result: result.report.mean("joint") or 0.0, default=None)


def as_markdown(results: Sequence[ArmResult]) -> str:
    """The tables: AP with own names, with all names, and what CEM and fields say."""
    names = [one.name for one in results[0].report.datasets]
    parts = ["AP, each dataset's own names:", _table(names, results, "own")]
    unified = [result for result in results if result.report.mean("joint") is not None]
    if unified:
        parts += ["AP, all names at once:", _table(names, unified, "joint"), _confusion(names, unified)]
    parts += [line for line in _verdicts(results) if line]
    return "\n\n".join(parts) + "\n"


def draw_bars(results: Sequence[ArmResult], path: Path) -> None:
    """A chart of AP with own and with all names: a group of bars for each dataset and for their mean."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    modes: tuple[Mode, Mode] = ("own", "joint")
    for axes, mode in zip(figure.subplots(2, 1, sharex=True), modes, strict=True):
        names = [one.name for one in results[0].report.datasets]
        shown = [result for result in results if result.report.mean(mode) is not None]
        width = 0.84 / len(results)
        for result in shown:
            offset = (results.index(result) - (len(results) - 1) / 2) * width
            heights = [_ap(result.report, name, mode) or 0.0 for name in names] + [result.report.mean(mode) or 0.0]
            places = [index + offset for index in range(len(heights))]
            bars = axes.bar(places, heights, width * 0.94, color=_COLOURS[result.arm], label=TITLES[result.arm])
            axes.bar_label(bars, [f"{height:.0f}" for height in heights], fontsize=7, padding=1)
        axes.set_xticks(range(len(names) + 1), [*names, "mean"])
        axes.set_ylabel(f"AP, {'own' if mode == 'own' else 'all'} names")
        axes.margins(y=0.14)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def _table(names: Sequence[str], results: Sequence[ArmResult], mode: Mode) -> str:
    head = ["", *names, "mean", "images seen", "minutes"]
    rows = [
        [
            TITLES[result.arm],
            *(_number(_ap(result.report, name, mode)) for name in names),
            _number(result.report.mean(mode)),
            f"{result.images_seen:,}",
            f"{result.training_seconds / 60:.0f}",
        ]
        for result in results
    ]
    return _lines(head, rows)


def _confusion(names: Sequence[str], results: Sequence[ArmResult]) -> str:
    head = ["", f"recall at {_RECALL_AT}: {', '.join(names)}", "cross-dataset confusion, %"]
    rows = []
    for result in results:
        recalls = [one.joint.recall.get(_RECALL_AT) for one in result.report.datasets if one.joint is not None]
        confusion = result.report.confusion
        told = ", ".join(map(_number, recalls)) if result.arm != "closed_set" else "-"
        rows.append([TITLES[result.arm], told, _number(None if confusion is None else confusion.pooled)])
    return _lines(head, rows)


def _verdicts(results: Sequence[ArmResult]) -> list[str]:
    """The best joint arm against the others, in words."""
    best, by_arm = best_joint(results), {result.arm: result.report for result in results}
    if best is None:
        return []
    own, unified = best.report.mean("own") or 0.0, best.report.mean("joint") or 0.0
    lines = [f"Best joint arm: {TITLES[best.arm]}; all names / own names: {unified / own if own else 0:.2f}."]
    if "separate" in by_arm:
        alone = by_arm["separate"]
        losses = [
            (one.ap("own") or 0.0) - (_ap(alone, one.name, "own") or 0.0) for one in best.report.datasets if one.in_mean
        ]
        gain = own - (alone.mean("own") or 0.0)
        lines.append(f"Against a METR for each, own names: {gain:+.1f} in the mean, {min(losses):+.1f} at worst.")
    if "closed_set" in by_arm:
        closed = by_arm["closed_set"].mean("joint") or 0.0
        lines.append(f"Against the closed head, all names: {unified - closed:+.1f} in the mean.")
    return lines


def _ap(report: EvaluationReport, name: str, mode: Mode) -> float | None:
    return next((one.ap(mode) for one in report.datasets if one.name == name), None)


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruled = [list(head), ["---"] + ["---:"] * (len(head) - 1), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in ruled)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
