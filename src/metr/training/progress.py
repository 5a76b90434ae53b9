"""Progress of training: a live screen in a terminal, otherwise log lines at intervals."""

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from metr.errors import counted
from metr.fitting import Fitting, number_text
from metr.training.run_log import LOG_FILE

_logger = logging.getLogger(__name__)
_KEPT = 0.9  # fraction of the old average that a displayed loss keeps at each step
_MOST_METRICS = 8
_BARS = (40, 20, 10)  # columns of the bar, as there is room
_NAMES = (40, 20, 12)  # columns of the longest name, as there is room


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where training stands after a step.

    `epochs` are how many times each dataset has been seen, `memory` is the peak in GiB, `seconds_left` an estimate
    that includes evaluations. `metrics` are those of the evaluation at step `evaluated_step`, `skipped` counts steps
    that were skipped for numbers that are not finite.
    """

    step: int
    steps: int
    images_per_second: float
    seconds_left: float
    memory: float
    learning_rate: Mapping[str, float]
    epochs: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluated_step: int = 0
    skipped: int = 0


class Progress:
    """Shows snapshots: a live screen if the console is a terminal, otherwise log lines. Use it as a context manager.

    The log file of the run gets the lines in any case.

    Args:
        console: Where progress is shown; None shows nothing.
        seconds: Seconds between log lines.
    """

    def __init__(self, console: Console | None, seconds: float) -> None:
        self.console, self.seconds = console, seconds
        self._snapshot: Snapshot | None = None
        self._losses: dict[str, float] = {}
        self._activity = ""
        self._shown = time.monotonic()
        self._live: Live | None = None
        if console is not None and console.is_terminal:
            self._live = Live(console=console, get_renderable=self._screen, refresh_per_second=4)

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def go_on(self, losses: dict[str, float]) -> None:
        """Smooths the losses from these on, and keeps them up to date in the same mapping."""
        self._losses = losses

    def smooth(self, terms: Mapping[str, float]) -> None:
        """Smooths the loss terms of one more step."""
        for name, value in grouped_terms(terms).items():
            self._losses[name] = _KEPT * self._losses.get(name, value) + (1 - _KEPT) * value

    def update(self, snapshot: Snapshot) -> None:
        """Shows the newest state."""
        self._snapshot = snapshot
        if time.monotonic() - self._shown >= self.seconds:
            self._shown = time.monotonic()
            self._log.info("%s", one_line(snapshot, sum(self._losses.values())))

    def evaluated(self, metrics: Mapping[str, float], step: int) -> None:
        """Shows the newest evaluation. After the last step no time is left."""
        if self._snapshot is not None:
            newest = replace(self._snapshot, metrics=metrics, evaluated_step=step)
            self._snapshot = replace(newest, seconds_left=0.0) if newest.step >= newest.steps else newest

    @contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Shows what is running while no step is made, such as an evaluation."""
        self._activity = name
        self._log.info("%s", name)
        try:
            yield
        finally:
            self._activity = ""

    @property
    def _log(self) -> logging.Logger:
        """Where lines of progress go: nobody reads them under a live screen, or where nothing is to be shown."""
        return _logger if self._live is None and self.console is not None else LOG_FILE

    def _screen(self) -> RenderableType:
        if self._snapshot is None:
            return Text(self._activity or "loading the first images", style="dim")
        return screen(self._snapshot, self._losses, self._activity)


def grouped_terms(terms: Mapping[str, float]) -> dict[str, float]:
    """Loss terms summed over layers and blocks: `decoder.0/l1` and `decoder.1/l1` are `decoder/l1`."""
    groups: dict[str, float] = {}
    for name, value in terms.items():
        group = re.sub(r"/\d+$", "", re.sub(r"\.\d+(?=/|$)", "", name))
        groups[group] = groups.get(group, 0.0) + value
    return groups


def one_line(snapshot: Snapshot, loss: float) -> str:
    """The state in one line."""
    skipped = f", {snapshot.skipped} skipped" if snapshot.skipped else ""
    return (
        f"step {snapshot.step}/{snapshot.steps}, loss {loss:.3f}, {snapshot.images_per_second:.1f} images/s, "
        f"{duration(snapshot.seconds_left)} left, {snapshot.memory:.1f} GiB{skipped}"
    )


def screen(snapshot: Snapshot, losses: Mapping[str, float], activity: str = "") -> RenderableType:
    """The state as one screen: bar, figures, losses, the last evaluation, epochs over the datasets.

    What does not fit the console is left out whole: first kinds of losses from the right, then the times that datasets
    were seen, then the evaluation. Long names are shortened before a table goes; no number is ever cut.
    """
    parts: list[RenderableType] = [Fitting(_bars(snapshot)), *_figures(snapshot), Fitting(_tables(snapshot, losses))]
    if activity:
        parts.append(Text(activity, style="bold yellow"))
    return Group(*parts)


def _bars(snapshot: Snapshot) -> Iterator[RenderableType]:
    """The number of the step and the time that is left, with a bar between them where there is room."""
    step = Text(f"step {snapshot.step:,} of {snapshot.steps:,}", style="bold")
    left = Text(f"{duration(snapshot.seconds_left)} left", style="cyan")
    for width in _BARS:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(step, ProgressBar(total=snapshot.steps, completed=snapshot.step, width=width), left)
        yield grid
    yield Text.assemble(step, "  ", left)


def _figures(snapshot: Snapshot) -> list[RenderableType]:
    """Speed, memory, learning rates and skipped steps, in one line or in two."""
    rates = ", ".join(f"{part} {rate:.1e}" for part, rate in sorted(snapshot.learning_rate.items()))
    speed = Text(f"{snapshot.images_per_second:.1f} images/s   {snapshot.memory:.1f} GiB", style="dim")
    if snapshot.skipped:
        speed.append(f"   {counted(snapshot.skipped, 'step')} skipped", style="yellow")
    learning = Text(f"learning rate {rates}", style="dim")
    return [Fitting([Text("   ").join([speed, learning]), Group(speed, learning)])]


def _tables(snapshot: Snapshot, losses: Mapping[str, float]) -> Iterator[RenderableType]:
    """The tables beside each other, from all there is to the least."""
    metrics = dict(list(snapshot.metrics.items())[:_MOST_METRICS])
    kinds = list(dict.fromkeys(kind for name in losses if (kind := name.partition("/")[2])))
    groups = [one for one in ("evaluation", "seen") if (metrics if one == "evaluation" else snapshot.epochs)]
    for shown in (groups[:number] for number in range(len(groups), -1, -1)):
        for longest in _NAMES:
            title = f"evaluation at step {snapshot.evaluated_step}"
            tables = {
                "evaluation": _columns(title, metrics, 2, longest),
                "seen": _columns("times seen", snapshot.epochs, 1, longest),
            }
            for most in range(len(kinds), -1, -1):
                grid = Table.grid(padding=(0, 4))
                grid.add_row(_losses(losses, kinds[:most]), *(tables[one] for one in shown))
                yield grid
    yield Text(f"total {number_text(sum(losses.values(), 0.0))}")


def _losses(losses: Mapping[str, float], kinds: Sequence[str]) -> Table:
    """A row a part of the network, a column a kind of loss: `decoder/l1` stands in row `decoder`, column `l1`."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in losses.items():
        part, _, kind = name.partition("/")
        rows.setdefault(part, {})[kind] = value
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for _ in ("sum", *kinds):
        table.add_column(justify="right", no_wrap=True)
    table.add_row(*(Text(word, style="bold") for word in ("loss", "sum", *kinds)))
    for part, row in rows.items():
        numbers = [number_text(row[kind]) if kind in row else "" for kind in kinds]
        table.add_row(Text(part), number_text(sum(row.values(), 0.0)), *numbers)
    table.add_row(Text("total"), Text(number_text(sum(losses.values(), 0.0)), style="bold"))
    return table


def _columns(title: str, values: Mapping[str, float], digits: int, longest: int) -> Table:
    """Names, of at most so many columns, and their numbers."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    grid = Table.grid()
    for name, value in values.items():
        text = Text(name)
        text.truncate(longest, overflow="ellipsis")
        table.add_row(text, number_text(value, digits))
    grid.add_row(Text(title, style="bold"))
    grid.add_row(table)
    return grid


def duration(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    return str(timedelta(seconds=round(seconds)))
