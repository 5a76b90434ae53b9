"""The training loop: steps, evaluations, checkpoints, and exact resumption."""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from metr.checkpoint import Checkpoint, save_checkpoint
from metr.config import Config
from metr.data.loading import TrainLoader, explained_loss_of_workers
from metr.devices import autocast, peak_memory, resolved_precision
from metr.layers.batch_norm import synchronize_batch_norms
from metr.losses.criterion import LossCounts
from metr.losses.matcher import match_statistics
from metr.models.detector import Detector, compile_parts, lay_out_for_gpu
from metr.process_group import explained_loss_of_processes
from metr.run_directory import RunDirectory
from metr.structures import Batch, Losses
from metr.training.batch_statistics import estimated_statistics, learned_batch_norms, take_statistics
from metr.training.config import TrainConfig
from metr.training.curves import redraw_curves
from metr.training.distribution import build_accelerator
from metr.training.engine import build_engine
from metr.training.images import draw_train_batch
from metr.training.logger import MATCHING, RunLogger, RuntimeStats
from metr.training.optimization import (
    Ema,
    KeptBuffers,
    build_optimizer,
    freeze,
    freeze_without_rate,
    learning_rate_factor,
    set_learning_rates,
    step_if,
)
from metr.training.parts import Evaluate, Outcome, TrainingParts
from metr.training.signals import Abandoned, StopSignals
from metr.training.state import (
    Counters,
    Trained,
    check_place,
    check_steps,
    gathered_random_state,
    gathered_tensors,
    has_state,
    load_state,
    restore_random_state,
    save_state,
    seed_everything,
    undisturbed_random_state,
)
from metr.training.step_report import StepCost, StepReport, UnreadReport, read_reports
from metr.training.step_targets import Asked, shared_counts

_logger = logging.getLogger(__name__)


class Trainer:
    """Trains a detector on one process or many (`accelerate launch`), and keeps a run folder.

    Args:
        parts: Network, criterion, data, and the rest of the checkpoint.
        config: Optimizer, schedule, average and loop.
        folder: The run folder; made if it is missing.
        evaluate: Called in all processes together with the network in evaluation mode; gives all of them the same.
        resolved: The whole configuration, saved as config.yaml; `config` by default.
        console: Where progress is shown; None leaves it to the log.
    """

    def __init__(
        self,
        parts: TrainingParts,
        config: TrainConfig,
        folder: Path,
        *,
        evaluate: Evaluate | None = None,
        resolved: Config | None = None,
        console: Console | None = None,
    ) -> None:
        self.parts, self.config, self.folder, self.evaluate = parts, config, RunDirectory(folder), evaluate
        self.accelerator = build_accelerator(config.loop, self.folder)
        # where several processes use the CPU, accelerate numbers it ("cpu:1"), and torch copies tensors "to" it
        self.device = torch.device("cpu") if self.accelerator.device.type == "cpu" else self.accelerator.device
        self.precision = resolved_precision(config.loop.precision, self.device)
        self.plain_network = parts.network.to(self.device)
        if self.device.type == "cuda" and isinstance(self.plain_network, Detector):
            lay_out_for_gpu(self.plain_network)
        self._frozen = freeze(self.plain_network, config.freeze)
        freeze_without_rate(self.plain_network, config.optimizer)
        if self.accelerator.num_processes > 1:
            synchronize_batch_norms(self.plain_network)
        self.engine = build_engine(config.parallel, self.accelerator, self.plain_network, config.ema.enabled)
        self.network, average = self.engine.network, self.engine.average
        self.optimizer = build_optimizer(self.plain_network, config.optimizer)
        self.ema = None if average is None else Ema(self.plain_network, config.ema, average)
        if config.loop.compile and isinstance(self.plain_network, Detector):
            compile_parts(self.plain_network)  # after the average was copied, which is used without gradients only
        self._buffers = KeptBuffers(self.plain_network)
        self.criterion = parts.criterion.to(self.device)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.step_targets = parts.step_targets(config, self.device, rank, world)
        self.counters = Counters()
        self._loader: TrainLoader | None = None
        self._resolved = config if resolved is None else resolved
        self._saved_step = -1
        self._unread: list[UnreadReport] = []
        self._reads_every_step = self.device.type == "cpu"  # there it costs nothing
        self._stop_signals = StopSignals()
        self._run_logger = RunLogger(self.folder, config.loop, console, self.accelerator)

    def train_step(self, batches: Sequence[Batch]) -> UnreadReport:
        """Updates the weights once, by the gradient that all images of `batches` have together.

        If a loss term or the gradient is not finite, nothing changes. The device sees to that by itself: the numbers
        of the step stay there until they are read, and the host goes on.
        """
        factor = learning_rate_factor(self.counters.step, self.config.loop.steps, self.config.schedule)
        rates = set_learning_rates(self.optimizer, factor)
        names, values = list[tuple[str, ...]](), list[Tensor]()
        batches = [batch.to(self.device, non_blocking=True) for batch in batches]
        asked = self._asked(batches)
        counts = shared_counts([targets for _, targets in asked], self.plain_network)
        for number, (batch, wanted) in enumerate(zip(batches, asked, strict=True), 1):
            with self.engine.exchanging_gradients(number == len(batches)):
                losses, figures = self._losses(batch, wanted, counts)
                self.accelerator.backward(losses.total / len(batches))
            names.append(tuple(figures))
            values.append(self._averaged(figures))
        norm = self.engine.clip_gradient(self.optimizer, self.config.optimizer.clip_norm)
        values.append(norm.reshape(1))
        report = UnreadReport(names=tuple(names), values=torch.cat(values), learning_rate=rates)

        finite = report.finite
        step_if(self.optimizer, finite)
        self.optimizer.zero_grad()
        self._buffers.keep_if(finite)
        if self.ema is not None:
            self.ema.update(self.counters.step + 1, finite)
        return report

    def fit(self, *, resume: bool = False) -> Outcome:
        """Trains to the last step, or until Ctrl-C, SIGTERM or SIGHUP.

        Args:
            resume: Go on from the state that the folder holds, if it holds one.

        Raises:
            MetrError: the folder holds a run and `resume` is off, or step after step has numbers that are not finite.
            CheckpointError: the saved state is damaged or of another network.
        """
        self._stop_signals = StopSignals(announced=self.accelerator.is_main_process)
        with self._stop_signals, self._run_logger, explained_loss_of_processes(), explained_loss_of_workers():
            batches = self._begin(resume)
            try:
                self._evaluate_if_due()  # the resumed run may have stopped just before an evaluation
                while self.counters.step < self.config.loop.steps and not self._shall_stop():
                    self._advance(batches)
                    self._evaluate_if_due()
                    self._save_if_due()
            except Abandoned:  # all was saved before the evaluation, and perhaps other processes are gone
                _logger.warning("the evaluation is broken off; a resumed run makes it again")
            return self._end()

    # the parts of a step

    def _asked(self, batches: Sequence[Batch]) -> list[Asked]:
        """The text embeddings of the names that each batch is asked for, and its targets."""
        with autocast(self.precision, self.device):
            average = None if self.ema is None else self.ema.network
            return self.step_targets.of_all(batches, average, self.counters.images)

    def _losses(self, batch: Batch, wanted: Asked, counts: LossCounts | None) -> tuple[Losses, dict[str, Tensor]]:
        """The losses of a batch; and its loss terms and matching statistics."""
        text, targets = wanted
        with autocast(self.precision, self.device):
            output = self.network(batch.images, batch.padding_mask, text, targets)
        losses, matches = self.criterion(output, targets, counts)
        statistics = match_statistics(output, targets, matches)
        matching = {MATCHING + name: value for name, value in vars(statistics).items()}
        return losses, {**losses.terms, **matching}

    def _averaged(self, figures: Mapping[str, Tensor]) -> Tensor:
        """Scalars averaged over processes in one exchange; all processes have the same names."""
        flat = torch.stack([value.detach().float() for value in figures.values()])
        averages: Tensor = self.accelerator.reduce(flat, "mean")
        return averages

    def _begin(self, resume: bool) -> Iterator[Batch]:
        """Loads the saved state, or starts anew; returns the batches from there on."""
        accelerator, rank = self.accelerator, self.accelerator.process_index
        seed_everything(self.config.loop.seed + rank)
        check_place(self.folder, resume)
        accelerator.wait_for_everyone()  # the logger of the main process has settled the folder
        if has_state(self.folder.state):
            self._load(rank)
        elif resume and accelerator.is_main_process:
            _logger.info("nothing to resume in %s: training starts afresh", self.folder.path)
        self._loader = self._new_loader(self.counters.images)
        self._loader.restore_issues(self.counters.unreadable)
        self._run_logger.begin(self._resolved, self.counters)
        self._to_training_mode()
        return iter(self._loader)

    def _new_loader(self, start: int) -> TrainLoader:
        """The batches of this process from a sample on."""
        loop, rank, world = self.config.loop, self.accelerator.process_index, self.accelerator.num_processes
        place = {"seed": loop.seed, "start": start, "rank": rank, "world": world, "device": self.device}
        return self.parts.loader(**place, batches=loop.steps * loop.accumulation)

    def _to_training_mode(self) -> None:
        """Puts the network into training mode, but for frozen parts: they stay in evaluation mode."""
        self.network.train()
        for module in self._frozen:
            module.eval()

    def _advance(self, batch_iterator: Iterator[Batch]) -> None:
        """Takes batches, makes a step, and counts it."""
        started = time.perf_counter()
        batches = [next(batch_iterator) for _ in range(self.config.loop.accumulation)]
        waiting = time.perf_counter() - started
        if self.counters.step == 0 and self.config.loop.images and self.accelerator.is_main_process:
            draw_train_batch(batches[0], self.parts.checkpoint.vocabulary.names, self.folder.train_batch)
            started = time.perf_counter() - waiting
        unread = self.train_step(batches)
        names = [name for batch in batches for name in batch.image_names]
        self._unread.append(replace(unread, step=self.counters.step + 1, images=tuple(names)))
        reports = self._read_reports() if self._reading_is_due() else []
        images = len(names) * self.accelerator.num_processes
        cost = StepCost(images=images, seconds=time.perf_counter() - started, waiting=waiting)
        self.counters.advance(cost)
        self._count(reports)
        self._run_logger.step(cost, unread.learning_rate, self.counters, self._runtime_stats)

    def _reading_is_due(self) -> bool:
        """Whether the numbers of the newest steps are to be read. On a device the host would wait for them each time.

        They are read for each line of metrics.jsonl, and soon enough to give up after `max_skipped` steps.
        """
        loop, step = self.config.loop, self.counters.step + 1
        often = self._reads_every_step or step == 1 or step % loop.log_every == 0
        return often or len(self._unread) >= loop.max_skipped

    def _read_reports(self) -> list[StepReport]:
        """The reports of all steps since the last time, in one transfer."""
        unread, self._unread = self._unread, []
        return read_reports(unread)

    def _count(self, reports: Sequence[StepReport]) -> None:
        for report in reports:
            self.counters.add(report)
            self._run_logger.read(report, self.counters)

    @property
    def _epochs(self) -> dict[str, float]:
        """How many times each dataset has been seen."""
        return {} if self._loader is None else self._loader.sampler.epochs(self.counters.images)

    def _runtime_stats(self) -> RuntimeStats:
        lost = 0 if self._loader is None else len(self._loader.issues)
        return RuntimeStats(memory=peak_memory(self.device), epochs=self._epochs, unreadable=lost)

    def _shall_stop(self) -> bool:
        """Whether any process was asked to stop, or evaluations have stopped improving; all stop after the same step.

        Several processes look only where the host waits anyway: every `log_every` steps, and after evaluations.
        """
        step, loop = self.counters.step, self.config.loop
        at_turn = step % loop.log_every == 0 or (loop.evaluate_every and step % loop.evaluate_every == 0)
        if self.accelerator.num_processes > 1 and not (self._reads_every_step or at_turn):
            return False
        return self.counters.has_stalled(loop) or self._asked_to_stop()

    def _asked_to_stop(self) -> bool:
        """Whether any process was asked to stop."""
        requested = self._stop_signals.requested
        if self.accelerator.num_processes == 1:
            return requested
        return bool(self.accelerator.reduce(torch.tensor(float(requested), device=self.device), "sum") > 0)

    def _evaluate_if_due(self) -> None:
        if self.evaluate is None or not self.counters.evaluation_is_due(self.config.loop):
            return
        self._save()  # an evaluation is long, and may fail
        if not self._asked_to_stop():
            self._settle_average()
            self._evaluate(self.evaluate, self.engine.whole_network(self._inference_network))
            self._save(again=True)

    def _settle_average(self) -> bool:
        """Estimates the statistics of the average's batch norms, if that is wanted; whether it was.

        The images are those that would follow the last ones of the run. The next steps move them on, as ever.
        """
        network, images, loop = self.plain_network, self.config.ema.batch_norm_images, self.config.loop
        names = learned_batch_norms(network) if images and isinstance(network, Detector) else ()
        if self.ema is None or self._loader is None or not names:
            return False
        each = self._loader.sampler.batch_size * self._loader.sampler.world
        batches = islice(self._new_loader(loop.steps * loop.accumulation * each), math.ceil(images / each))
        average = self.engine.whole_network(self.ema.network)
        assert isinstance(average, Detector)
        with undisturbed_random_state(self.device), autocast(self.precision, self.device):
            found = estimated_statistics(average, names, batches, self.accelerator)
        take_statistics(self.ema.network, found)
        return True

    @torch.no_grad()
    def _evaluate(self, evaluate: Evaluate, network: nn.Module) -> None:
        """Evaluates the network for inference, and saves it if it is the best so far.

        Raises:
            Abandoned: a signal came. Then no process waits for another one any more.
        """
        counters, logger, signals = self.counters, self._run_logger, self._stop_signals
        try:
            with undisturbed_random_state(self.device), signals.leaving_at_once(), logger.evaluation(counters.step):
                found = evaluate(network.eval())
        finally:
            self._to_training_mode()
        counters.take_evaluation(found)
        logger.evaluated(counters, self._epochs)
        self._redraw_curves()
        if counters.is_best(best_metric := self.config.loop.best_metric):
            counters.take_best(best_metric)
            if self.accelerator.is_main_process:
                save_checkpoint(self.folder.best, self._checkpoint(network.state_dict()))

    def _redraw_curves(self) -> None:
        if self.accelerator.is_main_process and self.config.loop.curves:
            redraw_curves(self.folder.path)

    # checkpoints

    @property
    def _inference_network(self) -> nn.Module:
        """The network that is evaluated and saved: the average, if there is one."""
        return self.plain_network if self.ema is None else self.ema.network

    def _checkpoint(self, weights: Mapping[str, Tensor]) -> Checkpoint:
        return self.counters.checkpoint(self.parts.checkpoint, weights, self._epochs)

    def _trained(self) -> Trained:
        average = None if self.ema is None else self.ema.network
        return Trained(network=self.plain_network, average=average, optimizer=self.optimizer, engine=self.engine)

    def _save_if_due(self) -> None:
        every = self.config.loop.checkpoint_every
        if every and self.counters.step % every == 0:
            self._save()

    def _save(self, again: bool = False) -> None:
        """Writes the last checkpoint and the state. If this step's are written already, only `again` rewrites them."""
        self._count(self._read_reports())
        if self._saved_step == self.counters.step and not again:
            return
        random_states, tensors = gathered_random_state(self.accelerator), gathered_tensors(self._trained())
        self.counters.unreadable = [] if self._loader is None else [*self._loader.issues]
        if self.accelerator.is_main_process:
            save_checkpoint(self.folder.last, self._checkpoint(tensors.inference))
            save_state(self.folder.state, tensors, self.counters, random_states, self._resolved)
        self.accelerator.wait_for_everyone()
        self._saved_step = self.counters.step

    def _load(self, rank: int) -> None:
        self.counters, random_states = load_state(self.folder.state, self._trained())
        check_steps(self.counters, self.config.loop.steps)
        self._buffers.keep()
        self._saved_step = self.counters.step
        if all(rank < len(rows) for rows in random_states.values()):
            restore_random_state({name: rows[rank] for name, rows in random_states.items()}, self.device)
        else:
            _logger.warning("the run had fewer processes: the random numbers of this one begin anew")
            seed_everything(self.config.loop.seed + rank + self.counters.images)
        _logger.info("going on after step %d", self.counters.step)

    def _end(self) -> Outcome:
        """Saves, draws the curves, and logs it if this is not the last step."""
        counters, steps = self.counters, self.config.loop.steps
        # where there are evaluations, the last one has done so
        settled = self.evaluate is None and counters.step >= steps and self._settle_average()
        self._save(again=settled)
        stalled = counters.step < steps and counters.has_stalled(self.config.loop)
        # a run that was stopped before or in its last evaluation still has to make it
        unfinished = (counters.step < steps and not stalled) or (
            self.evaluate is not None and counters.evaluated_step < counters.step
        )
        self._redraw_curves()
        if counters.evaluated_step < counters.step:  # else the evaluation has logged it
            self._run_logger.seen(self._epochs)
        if unfinished or stalled:
            self._run_logger.stopped(counters, stalled)
        return counters.outcome(interrupted=unfinished, stalled=stalled, signal=self._stop_signals.number)
