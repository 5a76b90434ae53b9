"""Where training reports: metrics.jsonl, the trackers of accelerate, progress in the terminal, the log."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from rich.console import Console

from metr.config import Config, as_yaml, leaves
from metr.errors import ConfigError, MetrError, counted, did_you_mean
from metr.run_directory import RunDirectory, explained_disk_errors, replaced_file
from metr.training.config import LoopConfig
from metr.training.progress import Progress, Snapshot, duration
from metr.training.run_log import tell
from metr.training.state import Counters, Window
from metr.training.step_report import StepCost, StepReport

MATCHING = "matching/"
"""Figures with this prefix are matching statistics, not loss terms."""
PROJECT = "metr"
"""The project, or experiment, under which trackers keep runs."""
Record = dict[str, Any]
Kind = Literal["train", "evaluation"]
_TRACKERS = "train.loop.trackers"
_logger = logging.getLogger(__name__)
_MOST_NAMED = 6  # terms or images in a message
_MOST_TOLD = 8  # metrics in a line of the log
_TIMED = 20  # steps after which the whole run's time is estimated
_KEPT = 0.95  # fraction of the old average that the time of a step keeps


@dataclass(frozen=True, kw_only=True)
class RuntimeStats:
    """Peak memory in GiB, epochs seen of each dataset, and how many images cannot be read."""

    memory: float
    epochs: Mapping[str, float]
    unreadable: int


class RunLogger:
    """Writes and shows what happens, in the main process; in the others it is silent.

    Args:
        folder: The run folder.
        loop: How often to log, and to which trackers.
        console: Where progress is shown; None shows none.
        accelerator: Owns the trackers, and knows which process is the main one.
    """

    def __init__(
        self, folder: RunDirectory, loop: LoopConfig, console: Console | None, accelerator: Accelerator
    ) -> None:
        self.folder, self.loop, self.accelerator = folder, loop, accelerator
        self.silent = not accelerator.is_main_process
        self._console = None if self.silent else console
        self._progress = Progress(self._console, loop.progress_seconds)
        self._file: MetricsFile | None = None
        self._step_seconds = self._evaluation_seconds = 0.0
        self._timed: list[float] = []
        self._stats: RuntimeStats | None = None

    def __enter__(self) -> "RunLogger":
        if not self.silent:
            self.folder.settle()
            self._file = MetricsFile(self.folder.metrics)
        self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.__exit__()
        # not end_training, which would end the processes' group as well
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def begin(self, resolved: Config, counters: Counters) -> None:
        """Saves the configuration, logs its path, starts the trackers, and drops records newer than `counters`."""
        self._progress.go_on(counters.smoothed)
        if self.loop.trackers:
            # trackers take flat values only
            settings = leaves(resolved.model_dump(mode="json"))
            flat = {
                key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()
            }
            name = self.folder.path.name
            self.accelerator.init_trackers(PROJECT, flat, {"wandb": {"name": name}, "mlflow": {"run_name": name}})
        if self._file is None:
            return
        with replaced_file(self.folder.config, flush=True) as fresh:
            fresh.write_text(as_yaml(resolved), encoding="utf-8")
        places = f"configuration: {self.folder.config}"
        places += f"; log: {self.folder.log}" if self.folder.log.is_file() else ""
        if self._console is None:
            _logger.info("%s", places)
        else:
            tell(self._console, places)
        self._file.rewind(counters.step, counters.evaluated_step)

    def step(
        self, cost: StepCost, learning_rate: Mapping[str, float], counters: Counters, look: Callable[[], RuntimeStats]
    ) -> None:
        """Shows a step; if a record is due, writes it and empties the window. Calls `look` then, and at first."""
        logged = counters.step % self.loop.log_every == 0
        if logged or self._stats is None:
            self._stats = look()
        if logged:
            self._write("train", counters.step, _train_record(learning_rate, counters, self._stats))
        if cost.seconds:
            kept = _KEPT if self._step_seconds else 0.0
            self._step_seconds = kept * self._step_seconds + (1 - kept) * cost.seconds
        self._estimate(cost, counters)
        self._progress.update(self._snapshot(cost, learning_rate, counters, self._stats))
        if logged:
            counters.window = Window()

    def _estimate(self, cost: StepCost, counters: Counters) -> None:
        """Says once how long the run will take: after some steps, of which the first ones are no measure."""
        self._timed.append(cost.seconds)
        left = self.loop.steps - counters.step
        if len(self._timed) != _TIMED or self.silent or left < _TIMED:
            return
        measured = self._timed[_TIMED // 4 :]
        seconds = left * sum(measured) / len(measured)
        message = "about %s for the %s that are left, measured on %d; evaluations come on top"
        _logger.info(message, duration(seconds), counted(left, "step"), len(measured))

    def read(self, report: StepReport, counters: Counters) -> None:
        """Takes the numbers of a step that `counters` has counted. Warns if it changed nothing: why, on which images.

        Raises:
            MetrError: too many steps in a row were skipped.
        """
        self._progress.smooth({name: value for name, value in report.figures.items() if not name.startswith(MATCHING)})
        if not report.faulty:
            return
        names = ", ".join(report.faulty[:_MOST_NAMED]) + (", ..." if len(report.faulty) > _MOST_NAMED else "")
        if not self.silent:
            message = "step %d is skipped: %s not finite; images: %s"
            _logger.warning(message, report.step, names, ", ".join(report.images[:_MOST_NAMED]))
        if counters.skipped_in_a_row >= self.loop.max_skipped:
            steps = counted(self.loop.max_skipped, "step")
            what = f"{steps} in a row had numbers that are not finite, at last in: {names}"
            hint = "lower optimizer.learning_rate, lengthen schedule.warmup_steps, or set loop.precision=fp32"
            raise MetrError(what, where=f"step {report.step}", hint=hint)

    @contextmanager
    def evaluation(self, step: int) -> Iterator[None]:
        """Says that an evaluation is running, and measures how long it takes."""
        started = time.perf_counter()
        with self._progress.activity(f"evaluating at step {step}"):
            yield
        self._evaluation_seconds = time.perf_counter() - started

    def evaluated(self, counters: Counters, epochs: Mapping[str, float]) -> None:
        """Writes the newest evaluation, with the epochs seen of each dataset."""
        if self.silent:
            return
        values = {"metrics": counters.metrics, "epochs": dict(epochs), "evaluation_seconds": self._evaluation_seconds}
        self._write("evaluation", counters.evaluated_step, values)
        self._progress.evaluated(counters.metrics, counters.evaluated_step)
        metrics = ", ".join(f"{name} {value:.2f}" for name, value in list(counters.metrics.items())[:_MOST_TOLD])
        _logger.info("evaluation at step %d: %s", counters.evaluated_step, metrics)
        self.seen(epochs)

    def seen(self, epochs: Mapping[str, float]) -> None:
        """Says how many times each dataset has been seen."""
        if epochs and not self.silent:
            _logger.info(
                "seen: %s", ", ".join(f"{name} {counted(round(times, 1), 'time')}" for name, times in epochs.items())
            )

    def stopped(self, counters: Counters, stalled: bool) -> None:
        """Says that training ends before its last step, and why if it has `stalled`. The verb says how to go on."""
        if self.silent:
            return
        if stalled:
            message = "stopped early after step %d of %d: no better evaluation since step %d"
            _logger.info(message, counters.step, self.loop.steps, counters.rose_step)
            return
        message = "stopped after step %d of %d; everything is saved in %s"
        _logger.warning(message, counters.step, self.loop.steps, self.folder.path)

    def _write(self, kind: Kind, step: int, values: Record) -> None:
        """Appends a record to metrics.jsonl, and gives its numbers to the trackers."""
        if self._file is not None:
            self._file.write(kind, step, values)
        if self.loop.trackers:
            self.accelerator.log(dict(_numbers(values, kind)), step=step)

    def _snapshot(
        self, cost: StepCost, learning_rate: Mapping[str, float], counters: Counters, stats: RuntimeStats
    ) -> Snapshot:
        steps, every = self.loop.steps, self.loop.evaluate_every
        evaluations = 1 if not every else math.ceil(steps / every) - counters.step // every
        left = (steps - counters.step) * self._step_seconds + evaluations * self._evaluation_seconds
        return Snapshot(
            step=counters.step,
            steps=steps,
            images_per_second=cost.images / self._step_seconds if self._step_seconds else 0.0,
            seconds_left=left,
            memory=stats.memory,
            learning_rate=learning_rate,
            epochs=stats.epochs,
            metrics=counters.metrics,
            evaluated_step=counters.evaluated_step,
            skipped=counters.skipped,
        )


def _train_record(learning_rate: Mapping[str, float], counters: Counters, stats: RuntimeStats) -> Record:
    """A record of metrics.jsonl: averages since the last one."""
    window = counters.window
    means = {name: value / max(window.steps, 1) for name, value in window.sums.items()}
    losses = {name: value for name, value in means.items() if not name.startswith(MATCHING)}
    return {
        "images": counters.images,
        "seconds": counters.seconds,
        "total": sum(losses.values()) if losses else None,
        "losses": losses,
        "matching": {name.removeprefix(MATCHING): value for name, value in means.items() if name.startswith(MATCHING)},
        "gradient_norm": window.gradient_norm / max(window.steps, 1),
        "learning_rate": dict(learning_rate),
        "images_per_second": window.images / window.seconds if window.seconds else None,
        "waiting_fraction": window.waiting / window.seconds if window.seconds else None,
        "memory_gib": stats.memory,
        "skipped": counters.skipped,
        "unreadable": stats.unreadable,
        "epochs": dict(stats.epochs),
    }


class MetricsFile:
    """metrics.jsonl: one JSON object for each logged step or evaluation.

    Args:
        path: The file; its folder is made.

    Raises:
        CheckpointError: the folder cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with explained_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int, evaluated_step: int) -> None:
        """Drops steps after `step`, evaluations after `evaluated_step`, and a line that a crash cut short."""
        newest = {"train": step, "evaluation": evaluated_step}
        kept = [record for record in read_metrics(self.path) if record["step"] <= newest.get(record["kind"], step)]
        with replaced_file(self.path, flush=True) as fresh:
            fresh.write_text("".join(map(_line, kept)), encoding="utf-8")

    def write(self, kind: Kind, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record; numbers that are not finite become null."""
        with explained_disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line({"kind": kind, "step": step, **values}))


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, or of the run folder that holds one, in the order they were written.

    A last line that was cut short is left out. A missing file has no records.

    Raises:
        MetrError: a line before the last is no record.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({**record, "kind": str(record["kind"]), "step": int(record["step"])})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                _logger.warning("%s: the last line was cut short and is left out", path)
                break
            hint = "remove the line"
            raise MetrError(f"line {number} is no record: {error}", where=path, hint=hint) from None
    return records


def check_trackers(names: Sequence[str]) -> None:
    """Checks that accelerate knows these trackers, and that their packages are installed.

    Raises:
        ConfigError: a tracker is unknown, or its package is not installed.
    """
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            hint = did_you_mean(name, LOGGER_TYPE_TO_CLASS)
            raise ConfigError(f"unknown tracker {name!r}", where=_TRACKERS, hint=hint)
        if name not in map(str, get_available_trackers()):
            what = f"the tracker {name!r} is not installed"
            raise ConfigError(what, where=_TRACKERS, hint=f"pip install {name}, or leave it out of {_TRACKERS}")


def _line(record: Record) -> str:
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, float]]:
    """Every number of a nested mapping, with its path."""
    for name, value in values.items():
        path = f"{prefix}/{name}"
        if isinstance(value, Mapping):
            yield from _numbers(value, path)
        elif isinstance(value, int | float):
            yield path, float(value)
