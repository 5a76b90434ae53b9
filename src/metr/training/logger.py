"""What training tells the world: metrics.jsonl, the screen of progress, the log."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.syntax import Syntax

from metr.config import Config, as_yaml
from metr.run_directory import RunDirectory, explained_disk_errors
from metr.structures import Batch
from metr.training.config import LoopConfig
from metr.training.loss_weighted_sampling import HARDNESS, by_dataset, mean_losses
from metr.training.metrics import MetricsWriter, Record
from metr.training.progress import Progress, Snapshot
from metr.training.state import Counters, StepReport, Window

MATCHING = "matching/"
"""Figures of this prefix are no loss terms: they say how matching went."""
_logger = logging.getLogger(__name__)
_MOST_NAMED = 6  # terms or images in a message
_MOST_TOLD = 8  # metrics in a line of the log
_KEPT = 0.95  # share of the old average that the time of a step keeps


@dataclass(frozen=True, kw_only=True)
class RuntimeStats:
    """Peak memory in GiB, how many times over each dataset has been seen, and how many images cannot be read.

    `shares` are those of the datasets in the next draw, where they follow the losses.
    """

    memory: float
    epochs: Mapping[str, float]
    unreadable: int
    shares: Mapping[str, float] = field(default_factory=dict)


class RunLogger:
    """Writes and shows what happens, in the main process; elsewhere it is silent.

    Args:
        folder: The run folder.
        loop: How often, and where to.
        console: Where progress is shown; None shows none.
        silent: In all processes but the main one.
    """

    def __init__(self, folder: RunDirectory, loop: LoopConfig, console: Console | None, silent: bool) -> None:
        self.folder, self.loop, self.silent = folder, loop, silent
        self._console = None if silent else console
        self._progress = Progress(self._console, loop.progress_seconds)
        self._metrics: MetricsWriter | None = None
        self._step_seconds = self._evaluation_seconds = 0.0
        self._around: RuntimeStats | None = None

    def __enter__(self) -> "RunLogger":
        if not self.silent:
            self._metrics = MetricsWriter(
                self.folder.metrics, self.folder.tensorboard if self.loop.tensorboard else None
            )
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, traceback)
        if self._metrics is not None:
            self._metrics.close()

    def begin(self, resolved: Config | str, counters: Counters) -> None:
        """Shows and saves the configuration; forgets what was written later than `counters` know."""
        if self._metrics is None:
            return
        text = resolved if isinstance(resolved, str) else as_yaml(resolved)
        with explained_disk_errors(self.folder.config):
            self.folder.config.write_text(text, encoding="utf-8")
        if self._console is None:
            _logger.info("configuration:\n%s", text)
        else:
            self._console.print(Syntax(text, "yaml", background_color="default"))
        self._metrics.rewind(counters.step, counters.evaluated_step)

    def step(self, report: StepReport, counters: Counters, look: Callable[[], RuntimeStats]) -> None:
        """Shows a step; writes a line where one is due, and empties the window of sums; only then calls `look`."""
        logged = counters.step % self.loop.log_every == 0
        if logged or self._around is None:
            self._around = look()
        if logged and self._metrics is not None:
            self._metrics.write("train", counters.step, _line(report, counters, self._around))
        if report.seconds:
            kept = _KEPT if self._step_seconds else 0.0
            self._step_seconds = kept * self._step_seconds + (1 - kept) * report.seconds
        self._progress.update(self._snapshot(report, counters, self._around))
        if logged:
            counters.window = Window()

    def skipped(self, report: StepReport, counters: Counters, batches: Sequence[Batch]) -> str:
        """Says which step changed nothing, why, and on which images; gives the names of what was not finite."""
        names = ", ".join(report.faulty[:_MOST_NAMED]) + (", ..." if len(report.faulty) > _MOST_NAMED else "")
        images = [
            f"{name} {image}" for batch in batches for name, image in zip(batch.datasets, batch.image_ids, strict=True)
        ]
        told = "step %d is skipped: %s not finite; images: %s"
        if not self.silent:
            _logger.warning(told, counters.step, names, ", ".join(images[:_MOST_NAMED]))
        return names

    @contextmanager
    def evaluation(self, step: int) -> Iterator[None]:
        """Says that an evaluation goes on, and remembers how long it took."""
        started = time.perf_counter()
        with self._progress.activity(f"evaluating at step {step}"):
            yield
        self._evaluation_seconds = time.perf_counter() - started

    def evaluated(self, counters: Counters, epochs: Mapping[str, float]) -> None:
        """Writes the newest evaluation, and how many times over each dataset had been seen."""
        if self._metrics is not None:
            epochs = dict(epochs)
            values = {"metrics": counters.metrics, "epochs": epochs, "evaluation_seconds": self._evaluation_seconds}
            self._metrics.write("evaluation", counters.evaluated_step, values)
            told = ", ".join(f"{name} {value:.2f}" for name, value in list(counters.metrics.items())[:_MOST_TOLD])
            _logger.info("evaluation at step %d: %s", counters.evaluated_step, told)
            self.seen(epochs)

    def seen(self, epochs: Mapping[str, float]) -> None:
        """Says how many times over each dataset has been seen."""
        if epochs and not self.silent:
            _logger.info("seen: %s", ", ".join(f"{name} {times:.1f} times" for name, times in epochs.items()))

    def stopped(self, counters: Counters, stalled: bool) -> None:
        """Says that training ends before its last step, and how to go on unless it has `stalled`."""
        if self.silent:
            return
        if stalled:
            told = "stopped early after step %d of %d: no better evaluation since step %d"
            _logger.info(told, counters.step, self.loop.steps, counters.best_step)
            return
        told = "stopped after step %d of %d; everything is saved in %s: resume this run to go on"
        _logger.warning(told, counters.step, self.loop.steps, self.folder.path)

    def _snapshot(self, report: StepReport, counters: Counters, around: RuntimeStats) -> Snapshot:
        steps, every = self.loop.steps, self.loop.evaluate_every
        evaluations = 1 if not every else math.ceil(steps / every) - counters.step // every
        left = (steps - counters.step) * self._step_seconds + evaluations * self._evaluation_seconds
        return Snapshot(
            step=counters.step,
            steps=steps,
            terms={name: value for name, value in report.figures.items() if _is_term(name)},
            images_per_second=report.images / self._step_seconds if self._step_seconds else 0.0,
            seconds_left=left,
            memory=around.memory,
            learning_rate=report.learning_rate,
            epochs=around.epochs,
            metrics=counters.metrics,
            evaluated_step=counters.evaluated_step,
            skipped=counters.skipped,
        )


def _line(report: StepReport, counters: Counters, around: RuntimeStats) -> Record:
    """A line of metrics.jsonl: averages since the last one."""
    window = counters.window
    means = {name: value / max(window.steps, 1) for name, value in window.sums.items()}
    losses = {name: value for name, value in means.items() if _is_term(name)}
    hardness = {"box_loss": mean_losses(by_dataset(means)), "shares": dict(around.shares)} if around.shares else {}
    return {
        "images": counters.images,
        "seconds": counters.seconds,
        "total": sum(losses.values()) if losses else None,
        "losses": losses,
        "matching": {name.removeprefix(MATCHING): value for name, value in means.items() if name.startswith(MATCHING)},
        "gradient_norm": window.gradient_norm / max(window.steps, 1),
        "learning_rate": dict(report.learning_rate),
        "images_per_second": window.images / window.seconds if window.seconds else None,
        "waiting_share": window.waiting / window.seconds if window.seconds else None,
        "memory_gib": around.memory,
        "skipped": counters.skipped,
        "unreadable": around.unreadable,
        "epochs": dict(around.epochs),
        **hardness,
    }


def _is_term(name: str) -> bool:
    """Whether a figure is a loss term."""
    return not name.startswith((MATCHING, HARDNESS))
