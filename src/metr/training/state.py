"""The state that resumes training exactly, on disk as safetensors and JSON; and random number generators."""

import logging
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn, optim

from metr.checkpoint import Checkpoint
from metr.config import Calibration, Config, leaves
from metr.data.records import DataIssue
from metr.errors import CheckpointError, ConfigError, MetrError, counted, did_you_mean
from metr.run_directory import COUNTERS, RunDirectory, existing_folder, replaced_folder
from metr.serialization import load_weights, read_json, read_tensors, write_json, write_tensors
from metr.training.config import LoopConfig
from metr.training.engine import Engine, parameters_of
from metr.training.parts import Evaluated, Outcome
from metr.training.resumed_recipe import SETTINGS
from metr.training.step_report import StepCost, StepReport

_NETWORK, _AVERAGE, _OPTIMIZER, _RANDOM = (
    f"{name}.safetensors" for name in ("network", "average", "optimizer", "random")
)
_PYTHON_VERSION = 3  # of the tuple that random.getstate gives
_NUMPY_KIND = "MT19937"
_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Window:
    """Sums since the last logged step. They are saved, so that a resumed run logs the same numbers.

    `sums` (figures by name), `gradient_norm` and `steps` leave skipped steps out; `images`, `seconds` and `waiting`
    (seconds spent waiting for batches) include them.
    """

    sums: dict[str, float] = field(default_factory=dict)
    gradient_norm: float = 0.0
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0


@dataclass(kw_only=True)
class Counters:
    """How far training is.

    `images` counts those of all processes together, which is the position of the sampler; `seconds` is the time
    spent in steps. `evaluated_step` is the step of the newest evaluation, whose result is `metrics`, `calibration` and
    `thresholds`; `best` is the highest value so far of the metric that chooses the best checkpoint, `best_step` the
    last step that had it and `rose_step` the first. `smoothed` are the losses that progress shows, `unreadable` says
    which images could not be read so far.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    best: float | None = None
    best_step: int = 0
    rose_step: int = 0
    calibration: dict[str, Calibration] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    window: Window = field(default_factory=Window)
    smoothed: dict[str, float] = field(default_factory=dict)
    unreadable: list[DataIssue] = field(default_factory=list)

    def advance(self, cost: StepCost) -> None:
        """Counts a step that was made, or queued; `add` counts its numbers when they have been read."""
        self.step += 1
        for counts in (self, self.window):
            counts.images += cost.images
            counts.seconds += cost.seconds
        self.window.waiting += cost.waiting

    def add(self, report: StepReport) -> None:
        """Counts the numbers of a step."""
        window = self.window
        if report.faulty:
            self.skipped += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        window.steps += 1
        window.gradient_norm += report.gradient_norm
        for name, value in report.figures.items():
            window.sums[name] = window.sums.get(name, 0.0) + value

    def is_best(self, name: str) -> bool:
        """Whether the newest evaluation has the highest value so far of a metric; warns if there is no such metric.

        Of equal ones the newest is the best: its weights have seen more.
        """
        if name not in self.metrics:
            message = "the evaluation gives no %r, by which loop.best_metric chooses the best checkpoint; %s"
            _logger.warning(message, name, did_you_mean(name, self.metrics))
            return False
        return math.isfinite(self.metrics[name]) and (self.best is None or self.metrics[name] >= self.best)

    def take_best(self, name: str) -> None:
        """Notes that the newest evaluation is the best."""
        if self.best is None or self.metrics[name] > self.best:
            self.rose_step = self.step
        self.best, self.best_step = self.metrics[name], self.step

    def evaluation_is_due(self, loop: LoopConfig) -> bool:
        """Whether this step is one to evaluate at, the last one included, and has not been evaluated yet."""
        at_turn = self.step == loop.steps or (loop.evaluate_every and self.step % loop.evaluate_every == 0)
        return bool(at_turn) and self.step > self.evaluated_step

    def take_evaluation(self, found: Evaluated) -> None:
        """Notes what the evaluation of this step gave."""
        self.evaluated_step = self.step
        self.metrics = {name: float(value) for name, value in found.metrics.items() if value is not None}
        self.calibration, self.thresholds = dict(found.calibration), dict(found.thresholds)

    def outcome(self, *, interrupted: bool, stalled: bool, signal: int | None) -> Outcome:
        """How training ended; see `Outcome`."""
        return Outcome(
            step=self.step,
            interrupted=interrupted,
            metrics=self.metrics,
            best=self.best,
            best_step=self.best_step,
            stalled=stalled,
            signal=signal,
        )

    def checkpoint(
        self, described: Checkpoint, weights: Mapping[str, Tensor], epochs: Mapping[str, float]
    ) -> Checkpoint:
        """`described` with these weights; it says how long they were trained, and what the last evaluation gave."""
        rounded = {name: round(times, 3) for name, times in epochs.items()}
        counted = {"step": self.step, "images": self.images, "epochs": rounded, "metrics": self.metrics}
        detection = described.detection.calibrated(self.calibration, self.thresholds)
        training = {**described.training, **counted}
        return replace(described, weights=weights, training=training, detection=detection)

    def has_stalled(self, loop: LoopConfig) -> bool:
        """Whether the last `loop.patience` evaluations brought no higher value.

        It follows from the counters alone, so a resumed run decides as an uninterrupted one. While the best value is
        0, as in the first evaluations of a run, training goes on.
        """
        if not loop.patience or not loop.evaluate_every or self.best is None or self.best <= 0:
            return False
        return self.evaluated_step - self.rose_step >= loop.patience * loop.evaluate_every

    @classmethod
    def of(cls, values: Mapping[str, Any], where: Path) -> "Counters":
        """Counters from plain values.

        Raises:
            CheckpointError: a key is missing or unknown.
        """
        names = {item.name for item in fields(cls)}
        optional, found = {"smoothed", "unreadable", "rose_step", "calibration", "thresholds"}, {**values}
        if "calibration" not in found:
            found.pop("thresholds", None)  # for scores of another kind
        if {*found} | optional != names or {*found["window"]} != {item.name for item in fields(Window)}:
            what = f"expected the keys {sorted(names)}, found {sorted(found)}"
            raise CheckpointError(what, where=where, hint="start a new run: this state is of another version")
        found.setdefault("rose_step", found["best_step"])  # of a version where the first of equal ones was the best
        found["unreadable"] = [DataIssue(**issue) for issue in found.get("unreadable", ())]
        found["calibration"] = {name: tuple(pair) for name, pair in found.get("calibration", {}).items()}
        return cls(**{**found, "window": Window(**found["window"])})


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The live objects whose state is saved; `average` is the EMA of `network`, or None."""

    network: nn.Module
    average: nn.Module | None
    optimizer: optim.Optimizer
    engine: Engine


@dataclass(frozen=True, kw_only=True)
class TrainedTensors:
    """The whole tensors of `Trained`, by name; in other processes than the main one they may be missing."""

    network: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Tensor]

    @property
    def inference(self) -> Mapping[str, Tensor]:
        """The weights for detection: the average, if there is one."""
        return self.network if self.average is None else self.average


def gathered_tensors(trained: Trained) -> TrainedTensors:
    """What is to be saved. All processes must call this together."""
    gathered = trained.engine.gathered
    return TrainedTensors(
        network=gathered(trained.network.state_dict()),
        average=None if trained.average is None else gathered(trained.average.state_dict()),
        optimizer=gathered(optimizer_tensors(trained.network, trained.optimizer)),
    )


def save_state(
    folder: Path, trained: TrainedTensors, counters: Counters, random_states: Mapping[str, Tensor], settings: Config
) -> None:
    """Writes the state: whole, or not at all.

    Args:
        folder: Where to; what it held is replaced.
        trained: Networks and optimizer.
        counters: How far training is.
        random_states: States of the random number generators, one row per process.
        settings: The configuration that the steps so far were made with.

    Raises:
        CheckpointError: a file cannot be written.
    """
    with replaced_folder(folder, COUNTERS) as fresh:
        write_tensors(fresh / _NETWORK, trained.network)
        if trained.average is not None:
            write_tensors(fresh / _AVERAGE, trained.average)
        write_tensors(fresh / _OPTIMIZER, trained.optimizer)
        write_tensors(fresh / _RANDOM, random_states)
        write_json(fresh / SETTINGS, leaves(settings.model_dump(mode="json")))
        write_json(fresh / COUNTERS, asdict(counters))


def load_state(folder: Path, trained: Trained) -> tuple[Counters, dict[str, Tensor]]:
    """Puts the saved state into networks and optimizer.

    Returns:
        The counters, and the states of the random number generators, one row per process.

    Raises:
        CheckpointError: something is missing, damaged, or of another network.
    """
    folder = existing_folder(folder)
    counters = Counters.of(read_json(folder / COUNTERS), folder / COUNTERS)
    random_states = read_tensors(folder / _RANDOM)
    hint = "resume with the model's configuration that training began with (config.yaml of the run), or start a new run"
    _load(trained.network, folder / _NETWORK, trained.engine, hint)
    if trained.average is not None:
        if not (folder / _AVERAGE).exists():
            what = "the run was begun without an average of its weights, which a resumed run cannot begin to keep"
            raise CheckpointError(what, where=folder, hint="train.ema.enabled=false, or start a new run")
        _load(trained.average, folder / _AVERAGE, trained.engine, hint)
    restore_optimizer(trained, read_tensors(folder / _OPTIMIZER), where=folder / _OPTIMIZER)
    return counters, random_states


def _load(network: nn.Module, path: Path, engine: Engine, hint: str) -> None:
    """Loads whole weights, of which each process keeps its part."""
    own, whole = network.state_dict(), read_tensors(path)
    weights = {name: engine.own_part(own[name], value) if name in own else value for name, value in whole.items()}
    load_weights(network, weights, where=path, hint=hint)


def log_changed_settings(folder: Path, now: Config) -> None:
    """Warns of each setting that differs from those of the steps in a saved state, however it was changed.

    A state of an older version says nothing of its settings.
    """
    path = existing_folder(folder) / SETTINGS
    if not path.is_file():
        return
    began, current = read_json(path), leaves(now.model_dump(mode="json"))
    for key in dict.fromkeys([*began, *current]):
        if began.get(key) != current.get(key):
            _logger.warning("resumed with another configuration: %s: %s -> %s", key, began.get(key), current.get(key))


def has_state(folder: Path) -> bool:
    """Whether there is a saved state to go on from."""
    return (existing_folder(folder) / COUNTERS).is_file()


def check_place(run: RunDirectory, resume: bool) -> None:
    """Checks that a run may be written here.

    Raises:
        MetrError: the folder holds a run that is not to be resumed, or it is a file.
    """
    if run.path.exists() and not run.path.is_dir():
        raise MetrError("expected a folder for the run, found a file", where=run.path, hint="name another folder")
    if has_state(run.state) and not resume:
        hint = "resume it with --resume, or name another folder"
        raise MetrError("a run is in this folder already", where=run.path, hint=hint)


def check_steps(counters: Counters, steps: int) -> None:
    """Checks that a resumed run has not made more steps already than are asked for.

    Raises:
        ConfigError: it has.
    """
    if counters.step > steps:
        what = f"{counted(counters.step, 'step is', 'steps are')} done already, more than {steps:,}"
        raise ConfigError(what, where="train.loop.steps", hint="--steps with a larger number, or start a new run")


def optimizer_tensors(network: nn.Module, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state tensors, named `parameter/key`; the configuration gives rates and the like."""
    return {
        f"{name}/{key}": value
        for name, parameter in _optimized(network, optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(trained: Trained, tensors: Mapping[str, Tensor], *, where: object = None) -> None:
    """Puts back what `optimizer_tensors` gave, whole.

    Raises:
        CheckpointError: a tensor belongs to no trainable parameter, or has another shape.
    """
    optimizer = trained.optimizer
    parameters = dict(_optimized(trained.network, optimizer))
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
            what = f"{full_name} {list(value.shape)} belongs to no trainable parameter of that shape"
            raise CheckpointError(what, where=where, hint="resume with the configuration that training began with")
        by_parameter.setdefault(name, {})[key] = trained.engine.own_part(parameters[name], value).clone()
    values = optimizer.state_dict()
    indices = {id(parameter): index for index, parameter in enumerate(parameters_of(optimizer))}
    values["state"] = {indices[id(parameters[name])]: state for name, state in by_parameter.items()}
    optimizer.load_state_dict(values)


def _optimized(network: nn.Module, optimizer: optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    members = {id(parameter) for parameter in parameters_of(optimizer)}
    yield from ((name, parameter) for name, parameter in network.named_parameters() if id(parameter) in members)


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators, those of all devices included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries underneath may draw from the global generator
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of all generators as tensors on the CPU; their shapes never change."""
    _, words, gauss = random.getstate()
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))  # noqa: NPY002
    words_of = numpy["state"]
    state = {
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy.words": torch.tensor([*words_of["key"].tolist(), words_of["pos"], numpy["has_gauss"]]),
        "numpy.gauss": torch.tensor(numpy["gauss"], dtype=torch.float64),
        "torch.cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["torch.device"] = torch.get_device_module(device).get_rng_state(device).cpu()
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts back what `random_state` gave; a state from the CPU leaves the device's generator alone."""
    has_gauss, gauss = state["python.gauss"].tolist()
    random.setstate((_PYTHON_VERSION, tuple(state["python.words"].tolist()), gauss if has_gauss else None))
    *keys, position, has_gauss = state["numpy.words"].tolist()
    words = np.array(keys, dtype=np.uint32)
    np.random.set_state((_NUMPY_KIND, words, position, has_gauss, state["numpy.gauss"].item()))  # noqa: NPY002
    torch.set_rng_state(state["torch.cpu"].clone())
    if device.type != "cpu" and "torch.device" in state:
        torch.get_device_module(device).set_rng_state(state["torch.device"].clone(), device)


@contextmanager
def undisturbed_random_state(device: torch.device) -> Iterator[None]:
    """Restores the random state after the block, so that the block uses up no random numbers of training."""
    state = random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)


def gathered_random_state(accelerator: Accelerator) -> dict[str, Tensor]:
    """The states of the generators, one row per process. All processes must call this together."""
    device = accelerator.device
    rows = {name: value.unsqueeze(0) for name, value in random_state(device).items()}
    if accelerator.num_processes == 1:
        return rows
    return {name: accelerator.gather(row.to(device)).cpu() for name, row in rows.items()}
