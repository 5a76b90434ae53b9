"""Where weights come from: the data, the machine and the settings of a checkpoint's training."""

import logging
import platform
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

import metr
from metr.config import Tree
from metr.data.datasets_file import DatasetSource
from metr.data.joint import JointData
from metr.data.licences import Licence, licences_of, origin_of
from metr.devices import resolved_device
from metr.errors import counted
from metr.processes import process_count
from metr.training.config import RunConfig

_logger = logging.getLogger(__name__)


class DataFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One dataset: images by split, images trained on (fewer where a part was chosen), names, licences as given.

    `held_out` says whether val was a seeded part of train; older checkpoints do not say it. `renames` holds names in
    its files that have another name in the vocabulary, `synonyms` other words for its names.
    """

    format: str
    splits: dict[str, int]
    trained_on: int
    names: int
    licences: tuple[Licence, ...] = ()
    held_out: bool | None = None
    origin: str | None = None
    renames: dict[str, str] = {}
    synonyms: dict[str, tuple[str, ...]] = {}


class TrainingFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The facts in a checkpoint's `training`.

    Training saw `images` images in `step` steps, and each dataset `epochs` times; `metrics` are those of the evaluation
    at that step. `finetuned_from` holds the facts of the checkpoint that fine-tuning began with.
    """

    data: dict[str, DataFacts] = {}
    seed: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    software: dict[str, str] = {}
    hardware: str | None = None
    unannotated: str | None = None
    step: int | None = None
    images: int | None = None
    epochs: dict[str, float] = {}
    metrics: dict[str, float] = {}
    started_from: str | None = msgspec.field(default=None, name="started from")
    finetuned_from: "TrainingFacts | None" = None

    @staticmethod
    def of(training: Mapping[str, Any]) -> "TrainingFacts":
        """The facts in a checkpoint's `training`; none, with a warning, if it cannot be parsed."""
        try:
            return msgspec.convert(training, TrainingFacts)
        except msgspec.ValidationError as error:
            _logger.warning("what the checkpoint says of its training is not understood and left out: %s", error)
            return TrainingFacts()

    def stages(self) -> tuple["TrainingFacts", ...]:
        """Pretraining first, then one fine-tuning after the other."""
        earlier = self.finetuned_from.stages() if self.finetuned_from is not None else ()
        return (*earlier, self)


def provenance(joint: JointData, recipe: RunConfig) -> Tree:
    """The facts about a training run that are known when it begins, as plain values for `Checkpoint.training`.

    They hold no path of this machine, because checkpoints are shared.
    """
    loop = recipe.train.loop
    facts = TrainingFacts(
        data={source.name: _data(source, joint, recipe) for source in joint.sources},
        seed=loop.seed,
        batch=recipe.loader.batch_size * loop.accumulation * process_count(),
        learning_rate=recipe.train.optimizer.learning_rate,
        software={"metr": metr.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
        hardware=hardware(loop.device),
    )
    values: Tree = msgspec.to_builtins(facts)
    return values


def _data(source: DatasetSource, joint: JointData, recipe: RunConfig) -> DataFacts:
    used = joint.train_split(source)
    return DataFacts(
        format=source.format,
        splits={name: len(split) for name, split in source.splits.items()},
        trained_on=len(used),
        names=len(source.categories),
        licences=licences_of(source, used),
        held_out=source.held_out,
        origin=origin_of(source),
        renames={old: new for old, new in source.config.renames.items() if old != new and new in source.categories},
        synonyms=source.config.synonyms if recipe.train.names.synonyms else {},
    )


def hardware(wanted: str) -> str:
    """The kind of device, and how many."""
    device, number = resolved_device(wanted), process_count()
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    if device.type == "cpu" or name is None:
        threads = counted(torch.get_num_threads(), "thread")
        kind = f"{device.type} ({platform.machine()}, {threads})"
    else:
        kind = str(name(device))
    return kind if number == 1 else f"{number} x {kind}"
