"""An image of how training went: losses and metrics over the steps."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metr.errors import CheckpointError, MetrError
from metr.run_directory import RunDirectory, replaced_file
from metr.training.logger import Record, read_metrics
from metr.training.progress import grouped_terms

_logger = logging.getLogger(__name__)
_SMOOTHING = 0.7  # fraction of the old average that a point keeps
_MOST_METRICS = 12  # lines that a legend can still be read with
_FEW = 10  # points of a line


def redraw_curves(run: Path) -> None:
    """Draws `curves.png` anew, once something is logged. What cannot be written becomes a warning."""
    if not read_metrics(run):
        return
    try:
        plot_curves(run)
    except CheckpointError as error:  # a run does not end for an image of it
        _logger.warning("%s", error)


def plot_curves(run: Path) -> Path:
    """Draws `curves.png` from the metrics.jsonl of a run folder, and returns its path.

    Raises:
        MetrError: nothing is logged there yet, or the disk refuses.
    """
    folder = RunDirectory(run)
    records = read_metrics(folder.metrics)
    if not records:
        what = "nothing is logged here, so there is nothing to plot"
        raise MetrError(what, where=folder.metrics, hint="train for a few more steps")
    training = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    total, terms, metrics, rate = figure.subplots(2, 2).flat
    _plot_total(total, training)
    _plot_terms(terms, training)
    _plot_metrics(metrics, evaluations)
    _plot_rate(rate, training)
    with replaced_file(folder.curves) as fresh:
        figure.savefig(fresh, dpi=100)
    return folder.curves


def _plot_total(axes: Any, records: Sequence[Record]) -> None:
    steps, values = _series(records, "total")
    axes.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=1)
    axes.plot(steps, _smoothed(values), color="tab:blue", linewidth=2, marker=_marker(steps))
    _finish(axes, "loss, total", bool(values))


def _plot_terms(axes: Any, records: Sequence[Record]) -> None:
    groups = [(record["step"], grouped_terms(_numbers(record.get("losses", {})))) for record in records]
    names = sorted({name for _, values in groups for name in values})
    for index, name in enumerate(names):
        points = [(step, values[name]) for step, values in groups if name in values]
        style = ["-", "--", ":"][index // 10 % 3]
        steps, values = [step for step, _ in points], _smoothed([value for _, value in points])
        axes.plot(steps, values, style, label=name, marker=_marker(steps), markersize=3)
    if any(value > 0 for _, values in groups for value in values.values()):
        axes.set_yscale("log")
    _finish(axes, "loss, by term (summed over layers, smoothed)", bool(names))


def _plot_metrics(axes: Any, records: Sequence[Record]) -> None:
    found = [(record["step"], _numbers(record.get("metrics", {}))) for record in records]
    names = list(dict.fromkeys(name for _, values in found for name in values))
    for name in names[:_MOST_METRICS]:
        points = [(step, values[name]) for step, values in found if name in values]
        axes.plot([step for step, _ in points], [value for _, value in points], marker="o", markersize=3, label=name)
    more = f" (the first {_MOST_METRICS} of {len(names)})" if len(names) > _MOST_METRICS else ""
    _finish(axes, f"evaluation{more}", bool(names))


def _plot_rate(axes: Any, records: Sequence[Record]) -> None:
    parts = list(dict.fromkeys(part for record in records for part in record.get("learning_rate", {})))
    for part in parts:
        points = [(record["step"], record["learning_rate"][part]) for record in records if "learning_rate" in record]
        steps = [step for step, _ in points]
        axes.plot(steps, [rate for _, rate in points], label=part, marker=_marker(steps), markersize=3)
    _finish(axes, "learning rate", bool(parts))


def _marker(steps: Sequence[int]) -> str:
    """A line of one point shows nothing, one of a few points little: they are marked."""
    return "o" if len(steps) < _FEW else ""


def _finish(axes: Any, title: str, filled: bool) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if not filled:
        axes.text(0.5, 0.5, "nothing yet", ha="center", va="center", transform=axes.transAxes, color="gray")
    elif axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _series(records: Iterable[Record], key: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _numbers(values: Record) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential moving average, corrected for its start at zero."""
    smooth, result = 0.0, []
    for count, value in enumerate(values, 1):
        smooth = _SMOOTHING * smooth + (1 - _SMOOTHING) * value
        result.append(smooth / (1 - _SMOOTHING**count))
    return result
