"""Progress of training: a live screen in a terminal, otherwise log lines at intervals."""

import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from metr.training.run_log import LOG_FILE

_logger = logging.getLogger(__name__)
_KEPT = 0.9  # fraction of the old average that a displayed loss keeps at each step
_MOST_METRICS = 8


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
    """The state as one screen: bar, figures, losses, the last evaluation, epochs over the datasets."""
    parts: list[RenderableType] = [_bar(snapshot), _figures(snapshot)]
    tables = Table.grid(padding=(0, 4))
    columns = [_losses(losses)]
    if snapshot.metrics:
        shown = dict(list(snapshot.metrics.items())[:_MOST_METRICS])
        columns.append(_columns(f"evaluation at step {snapshot.evaluated_step}", shown, "{:.2f}"))
    if snapshot.epochs:
        columns.append(_columns("times seen", snapshot.epochs, "{:.1f}"))
    tables.add_row(*columns)
    parts.append(tables)
    if activity:
        parts.append(Text(activity, style="bold yellow"))
    return Group(*parts)


def _bar(snapshot: Snapshot) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=snapshot.steps, completed=snapshot.step, width=40)
    left = Text(f"{duration(snapshot.seconds_left)} left", style="cyan")
    grid.add_row(Text(f"step {snapshot.step:,} of {snapshot.steps:,}", style="bold"), bar, left)
    return grid


def _figures(snapshot: Snapshot) -> RenderableType:
    rates = ", ".join(f"{part} {rate:.1e}" for part, rate in sorted(snapshot.learning_rate.items()))
    figures = f"{snapshot.images_per_second:.1f} images/s   {snapshot.memory:.1f} GiB   learning rate {rates}"
    text = Text(figures, style="dim")
    if snapshot.skipped:
        text.append(f"   {snapshot.skipped} steps skipped", style="yellow")
    return text


def _losses(losses: Mapping[str, float]) -> Table:
    """A row a part of the network, a column a kind of loss: `decoder/l1` stands in row `decoder`, column `l1`."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in losses.items():
        part, _, kind = name.partition("/")
        rows.setdefault(part, {})[kind] = value
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row if kind))
    table = Table.grid(padding=(0, 2))
    table.add_column()
    for _ in ("sum", *kinds):
        table.add_column(justify="right")
    table.add_row(*(Text(word, style="bold") for word in ("loss", "sum", *kinds)))
    for part, row in rows.items():
        numbers = [f"{row[kind]:.3f}" if kind in row else "" for kind in kinds]
        table.add_row(Text(part), f"{sum(row.values()):.3f}", *numbers)
    table.add_row(Text("total"), Text(f"{sum(losses.values()):.3f}", style="bold"))
    return table


def _columns(title: str, values: Mapping[str, float], style: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_row(Text(title, style="bold"), "")
    for name, value in values.items():
        table.add_row(Text(name), style.format(value))
    return table


def duration(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    return str(timedelta(seconds=round(seconds)))
