"""Geometry of the charts: what the template draws as SVG. Colours and fonts are the style sheet's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

WIDTH, HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 10, 36
COLOURS = 8
"""Colours of lines that the style sheet has; further lines get them again, dashed."""
_MOST_POINTS = 240  # of a line: more than a screen can tell apart

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark of an axis, in units of the drawing."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line: `points` as SVG has them, `style` counts its colour and dashes, `marks` are points to be dotted."""

    name: str
    points: str
    style: int
    marks: tuple[Point, ...] = ()
    kind: str = "line"

    @property
    def classes(self) -> str:
        """The classes of the style sheet."""
        dashes = f" dash{self.style // COLOURS % 3}" if self.style >= COLOURS else ""
        return f"{self.kind} c{self.style % COLOURS}{dashes}"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of a bar chart, in units of the drawing."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart. `label` says in a sentence what it shows, for those who cannot see it."""

    title: str
    label: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()
    legend: bool = True
    choose: bool = False
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Numbers from `low` to `high` on a stretch of the drawing; `log`: by their logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a number lies, to a tenth of a unit."""
        low, high, here = self.low, self.high, value
        if self.log:
            low, high, here = (math.log10(max(number, self.low)) for number in (low, high, value))
        part = (here - low) / (high - low) if high > low else 0.5
        return round(self.start + (self.end - self.start) * part, 1)

    def ticks(self, most: int = 6) -> tuple[Tick, ...]:
        """Round numbers along the axis."""
        inside = self._inside(LogLocator(subs=(1.0, 2.0, 5.0), numticks=most)) if self.log else []
        if len(inside) > 2 * most:  # many decades
            inside = self._inside(LogLocator(numticks=most))
        if len(inside) < 2:
            inside = [
                value for value in self._inside(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])) if value or not self.log
            ]
        return tuple(Tick(at=self.at(value), label=short(value)) for value in inside)

    def _inside(self, locator: Locator) -> list[float]:
        """The numbers of a locator that lie on the axis."""
        values = [float(value) for value in locator.tick_values(self.low, self.high)]
        return [value for value in values if self.low - 1e-12 <= value <= self.high * (1 + 1e-9) + 1e-12]


def across(low: float, high: float) -> Axis:
    """The horizontal axis of a chart."""
    return Axis(low=low, high=high, start=float(_LEFT), end=float(WIDTH - _RIGHT))


def upwards(low: float, high: float, log: bool = False) -> Axis:
    """The vertical axis of a chart."""
    return Axis(low=low, high=high, start=float(HEIGHT - _BOTTOM), end=float(_TOP), log=log)


def short(value: float) -> str:
    """A number in few characters: 1,500 as 1.5k."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:g}"


def drawn_points(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Points as SVG has them, thinned to what can be seen."""
    step = max(1, math.ceil(len(points) / _MOST_POINTS))
    kept = [*points[:-1:step], *points[-1:]]
    return " ".join(f"{x.at(a):g},{y.at(b):g}" for a, b in kept)


def line_chart(
    title: str, series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, *, log: bool = False
) -> Chart | None:
    """Lines over steps; None where there is nothing to draw.

    Args:
        title: What it shows.
        series: Points (x, y) of each line; those that are not finite are left out.
        x_label: What x counts.
        y_label: What y counts.
        log: Whether y is logarithmic, where all numbers are above 0.
    """
    clean = {name: [point for point in points if all(map(math.isfinite, point))] for name, points in series.items()}
    clean = {name: points for name, points in clean.items() if points}
    if not clean:
        return None
    xs, ys = zip(*(point for points in clean.values() for point in points), strict=True)
    log = log and min(ys) > 0
    low = min(ys) / 1.1 if log else min(0.0, *ys)
    high = max(ys) if max(ys) > low else low + 1
    x, y = across(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1), upwards(low, high, log)
    lines = tuple(
        Line(
            name=name,
            points=drawn_points(points, x, y),
            style=row,
            marks=tuple((x.at(a), y.at(b)) for a, b in points) if len(points) < 30 else (),
        )
        for row, (name, points) in enumerate(clean.items())
    )
    last = ", ".join(f"{name} {points[-1][1]:.3g}" for name, points in list(clean.items())[:12])
    return Chart(
        title=title,
        label=f"{title}: {y_label} over {x_label}. At the end: {last}.",
        x_label=x_label,
        y_label=y_label,
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        lines=lines,
    )


def precision_recall(title: str, names: Sequence[str], curves: np.ndarray) -> Chart | None:
    """Precision over recall, a line a name, and their mean; None where no name has objects.

    Args:
        title: What it shows.
        names: The names.
        curves: [v 101] precision in 0..1, nan for a name without objects.
    """
    rows = [row for row in range(len(names)) if not np.isnan(curves[row]).any()]
    if not rows:
        return None
    x, y = across(0.0, 1.0), upwards(0.0, 1.0)
    recalls = np.linspace(0, 1, curves.shape[1])
    few = len(rows) <= COLOURS
    every = 1 if few else 4 if len(rows) > 60 else 2

    def points(row: np.ndarray) -> str:
        return " ".join(f"{x.at(a):.0f},{y.at(b):.0f}" for a, b in zip(recalls[::every], row[::every], strict=True))

    lines = [
        Line(name=names[row], points=points(curves[row]), style=number, kind="line" if few else "line faint")
        for number, row in enumerate(rows)
    ]
    mean = curves[rows].mean(0)
    lines.append(Line(name="mean of the names", points=points(mean), style=0, kind="line mean"))
    return Chart(
        title=title,
        label=f"{title}: precision over recall at IoU 0.5. The mean over the names is {100 * mean.mean():.1f} AP50.",
        x_label="recall",
        y_label="precision",
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        lines=tuple(lines),
        legend=few,
        choose=not few,
    )


def reliability(title: str, bins: Sequence[tuple[float, float, int, float | None, float | None]]) -> Chart:
    """A reliability diagram: the fraction of hits in each bin of scores as a bar, and the diagonal of a perfect one.

    Args:
        title: What it shows.
        bins: (lower, upper, count, mean score, fraction right) of each bin.
    """
    x, y = across(0.0, 1.0), upwards(0.0, 1.0)
    bars, marks = [], []
    for lower, upper, count, score, right in bins:
        if score is None or right is None:
            continue
        top, left = y.at(right), x.at(lower)
        told = f"scores {lower:g} to {upper:g}: {100 * right:.0f} % of {count:,} right, mean score {score:.2f}"
        width = max(x.at(upper) - left - 2, 1.0)
        bars.append(Bar(x=left + 1, y=top, width=round(width, 1), height=round(y.at(0.0) - top, 1), title=told))
        marks.append((x.at(score), top))
    diagonal = Line(name="perfect", points=drawn_points([(0.0, 0.0), (1.0, 1.0)], x, y), style=0, kind="line diagonal")
    dots = Line(name="mean score of a bin", points="", style=0, marks=tuple(marks), kind="dots")
    return Chart(
        title=title,
        label=f"{title}: fraction of detections that are right, by score. On the diagonal both agree.",
        x_label="score",
        y_label="fraction right",
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        lines=(diagonal, dots),
        bars=tuple(bars),
        legend=False,
    )


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Squares by probability. `levels` are (opacity, path) of the squares of a level, `dots` the path of what is there.

    `cells` are the probabilities in per cent, row by row, for the pointer.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    levels: tuple[tuple[float, str], ...]
    dots: tuple[Point, ...]
    cells: tuple[tuple[int, ...], ...]
    there: tuple[tuple[int, ...], ...]
    cell: int = 14
    left: int = 132

    @property
    def width(self) -> int:
        """Units of the drawing."""
        return self.left + self.cell * len(self.columns) + 2

    @property
    def height(self) -> int:
        """Units of the drawing."""
        return self.cell * len(self.rows) + 18


def heat_map(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, there: np.ndarray) -> HeatMap:
    """A heat map of probabilities.

    Args:
        rows: What each row is called.
        columns: What each column is called.
        values: [rows columns] in 0..1.
        there: [rows columns], true where it is there.
    """
    blank = HeatMap(rows=(), columns=(), levels=(), dots=(), cells=(), there=())
    side, left = blank.cell, blank.left
    level = np.clip((values * 10).round().astype(int), 0, 10)
    paths = []
    for number in range(1, 11):
        squares = [
            f"M{left + side * c} {side * r}h{side - 1}v{side - 1}h-{side - 1}z" for r, c in np.argwhere(level == number)
        ]
        if squares:
            paths.append((number / 10, "".join(squares)))
    centre = (side - 1) / 2
    dots = tuple((left + side * c + centre, side * r + centre) for r, c in np.argwhere(there).tolist())
    return HeatMap(
        rows=tuple(rows),
        columns=tuple(columns),
        levels=tuple(paths),
        dots=dots,
        cells=tuple(tuple(row) for row in (values * 100).round().astype(int).tolist()),
        there=tuple(tuple(row) for row in there.astype(int).tolist()),
    )
