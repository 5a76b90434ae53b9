"""What training needs to go on exactly where it stopped, on disk as safetensors and JSON."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn, optim

from metr.errors import CheckpointError, MetrError
from metr.run_directory import RunDirectory, existing_folder, replaced_folder
from metr.serialization import read_json, read_tensors, write_json, write_tensors
from metr.weights import load_weights

COUNTERS = "state.json"
_NETWORK, _AVERAGE, _OPTIMIZER, _RANDOM = (
    f"{name}.safetensors" for name in ("network", "average", "optimizer", "random")
)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step. `figures` are loss terms and matching statistics, averaged over its batches and over all processes.

    If `faulty` names any (or the gradient), they were not finite, and the step changed nothing. `images` counts those
    of all processes; of the `seconds`, `waiting` went by until the batches were there.
    """

    learning_rate: Mapping[str, float]
    figures: Mapping[str, float] = field(default_factory=dict)
    gradient_norm: float = math.nan
    faulty: tuple[str, ...] = ()
    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0


@dataclass(kw_only=True)
class Window:
    """Sums since the last logged step; a restart must find them, or its first log line would differ.

    `sums` (figures by name) and `gradient_norm` are over the `steps` that changed something; `images`, `seconds` and
    `waiting` (for images, in seconds) over all.
    """

    sums: dict[str, float] = field(default_factory=dict)
    gradient_norm: float = 0.0
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    waiting: float = 0.0


@dataclass(kw_only=True)
class HardnessState:
    """What the shares of the datasets rest on; a restart must find it, or it would draw other images.

    `sums` are box loss and matched objects of each dataset since the last decision, `losses` the mean box loss of each
    when it was last known, `changes` the draws from which on other shares hold, with these.
    """

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    changes: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "HardnessState":
        """The state from plain values."""
        return cls(
            sums={name: (loss, objects) for name, (loss, objects) in values["sums"].items()},
            losses=dict(values["losses"]),
            changes=[(draw, dict(shares)) for draw, shares in values["changes"]],
        )


@dataclass(kw_only=True)
class Counters:
    """How far training is.

    `images` counts those that all processes drew together, which is the position of the sampler; `seconds` are those
    spent in steps. `evaluated_step` is the step of the newest evaluation, whose result is `metrics`; `best` is the
    highest value so far of the metric that chooses the best checkpoint.
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
    window: Window = field(default_factory=Window)
    hardness: HardnessState = field(default_factory=HardnessState)

    def add(self, report: StepReport) -> None:
        """Counts one step."""
        window = self.window
        self.step += 1
        for counted in (self, window):
            counted.images += report.images
            counted.seconds += report.seconds
        window.waiting += report.waiting
        if report.faulty:
            self.skipped += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        window.steps += 1
        window.gradient_norm += report.gradient_norm
        for name, value in report.figures.items():
            window.sums[name] = window.sums.get(name, 0.0) + value

    @classmethod
    def of(cls, values: Mapping[str, Any], where: Path) -> "Counters":
        """Counters from plain values.

        Raises:
            CheckpointError: a value is missing.
        """
        names = {item.name for item in fields(cls)}
        older = {"hardness": asdict(HardnessState())}  # what states of older versions lack
        if {*older, *values} != names or set(values["window"]) != {item.name for item in fields(Window)}:
            what = f"expected the keys {sorted(names)}, found {sorted(values)}"
            raise CheckpointError(what, where=where, hint="start training afresh: this state is of another version")
        values = {**older, **values}
        nested = {"window": Window(**values["window"]), "hardness": HardnessState.of(values["hardness"])}
        return cls(**{**values, **nested})


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The live objects whose state is saved; `average` is the network that follows `network`, if one does."""

    network: nn.Module
    average: nn.Module | None
    optimizer: optim.Optimizer


def save_state(folder: Path, trained: Trained, counters: Counters, random: Mapping[str, Tensor]) -> None:
    """Writes the state: whole, or not at all.

    Args:
        folder: Replaced.
        trained: Networks and optimizer.
        counters: How far training is.
        random: States of the random number generators, a row a process.

    Raises:
        CheckpointError: the disk refuses.
    """
    with replaced_folder(folder, COUNTERS) as fresh:
        write_tensors(fresh / _NETWORK, trained.network.state_dict())
        if trained.average is not None:
            write_tensors(fresh / _AVERAGE, trained.average.state_dict())
        write_tensors(fresh / _OPTIMIZER, optimizer_tensors(trained.network, trained.optimizer))
        write_tensors(fresh / _RANDOM, random)
        write_json(fresh / COUNTERS, asdict(counters))


def load_state(folder: Path, trained: Trained) -> tuple[Counters, dict[str, Tensor]]:
    """Puts the saved state into networks and optimizer.

    Returns:
        The counters, and the states of the random number generators, a row a process.

    Raises:
        CheckpointError: something is missing, damaged, or of another network.
    """
    folder = existing_folder(folder)
    counters = Counters.of(read_json(folder / COUNTERS), folder / COUNTERS)
    random = read_tensors(folder / _RANDOM)
    hint = "resume with the model's configuration that training began with (config.yaml of the run), or start a new run"
    load_weights(trained.network, read_tensors(folder / _NETWORK), where=folder / _NETWORK, hint=hint)
    if trained.average is not None:
        load_weights(trained.average, read_tensors(folder / _AVERAGE), where=folder / _AVERAGE, hint=hint)
    tensors = read_tensors(folder / _OPTIMIZER)
    restore_optimizer(trained.network, trained.optimizer, tensors, where=folder / _OPTIMIZER)
    return counters, random


def has_state(folder: Path) -> bool:
    """Whether there is a saved state to go on from."""
    return (existing_folder(folder) / COUNTERS).is_file()


def check_place(run: RunDirectory, resume: bool) -> None:
    """Whether a run may be written here.

    Raises:
        MetrError: a run is there already, and is not to be resumed, or something is there that is no folder.
    """
    if run.path.exists() and not run.path.is_dir():
        raise MetrError("expected a folder for the run, found a file", where=run.path, hint="name another folder")
    if has_state(run.state) and not resume:
        hint = "resume it with --resume, or name another folder"
        raise MetrError("a run is in this folder already", where=run.path, hint=hint)


def optimizer_tensors(network: nn.Module, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's averages, called `parameter/average`; rates and the like come from the configuration."""
    return {
        f"{name}/{key}": value
        for name, parameter in _optimized(network, optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    network: nn.Module, optimizer: optim.Optimizer, tensors: Mapping[str, Tensor], *, where: object = None
) -> None:
    """Puts back what `optimizer_tensors` gave.

    Raises:
        CheckpointError: a tensor belongs to no trainable parameter, or has another shape.
    """
    parameters = dict(_optimized(network, optimizer))
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters or (value.ndim and value.shape != parameters[name].shape):
            what = f"{full_name} {list(value.shape)} belongs to no trainable parameter of that shape"
            raise CheckpointError(what, where=where, hint="resume with the configuration that training began with")
        by_parameter.setdefault(name, {})[key] = value.clone()
    values = optimizer.state_dict()
    order = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    indices = {key: index for index, key in enumerate(order)}
    values["state"] = {indices[id(parameters[name])]: state for name, state in by_parameter.items()}
    optimizer.load_state_dict(values)


def _optimized(network: nn.Module, optimizer: optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    members = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    yield from ((name, parameter) for name, parameter in network.named_parameters() if id(parameter) in members)
