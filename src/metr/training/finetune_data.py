"""The datasets of a fine-tuning run: new ones, rehearsed old ones, old ones that are only evaluated."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from metr.data.config import Mixture
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset, parse_data_arguments
from metr.data.guard import check_usable, log_issues
from metr.data.hub_datasets.address import same_dataset
from metr.data.joint import JointData, chosen_parts, vocabulary_of
from metr.data.records import TRAIN, Annotations
from metr.data.sampling import mixture_weights
from metr.errors import DataError
from metr.text.same_names import PromptChoice, with_trained_prompts
from metr.text.vocabulary import Vocabulary
from metr.training.config import TrainOptions
from metr.training.resumption import DATASETS, EVALUATED, REHEARSED
from metr.training.taken_names import NameChoice, Renames, aliases_of

Role = Literal["new", "rehearsed", "evaluated"]
_NEW = "as new"
_logger = logging.getLogger(__name__)


class FinetuneOptions(TrainOptions):
    """What fine-tuning changes of its defaults. `epochs` counts passes over the new images."""

    config: Path | None = None
    """A YAML file laid over the defaults."""
    overrides: tuple[str, ...] = ()
    """Laid over `config`: `section.key=value`."""
    rehearse: tuple[str, ...] = ()
    """Old datasets, as arguments of a command: mixed into training, and evaluated before and after."""
    rehearse_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Fraction of the samples that goes to rehearsed datasets, all together."""
    rehearse_evaluate: tuple[str, ...] = ()
    """Old datasets that are evaluated before and after, and not trained on."""
    compare: bool = True
    """Whether new and old datasets are evaluated before and after, and compared."""
    same_names: NameChoice = "ask"
    """Whether new names that seem to mean a trained one, as `RBC` and `rbc`, are taken as that name."""
    prompts: PromptChoice = "trained"
    """What becomes of a prompt for a name that was trained without it: `trained` leaves it out; `given` uses it."""
    decorrelate_names: bool = False
    """Whether the projections of new names that mean nearly the same are first moved away from each other. Those of
    old names stay as they are."""


@dataclass(frozen=True, kw_only=True)
class FinetuneData:
    """What is trained on and evaluated.

    Attributes:
        joint: What is trained on: the new datasets, then the rehearsed ones. Its vocabulary is the checkpoint's, then
            their new names.
        evaluated: Datasets that are only evaluated.
        splits: The annotations that each dataset is evaluated on, by dataset name.
        new: How many of `joint.sources` are new.
        rehearse_fraction: Fraction of the samples that goes to rehearsed datasets.
        taken: By dataset, names that were taken as a trained one.
        given: All datasets in this order as they were given, before names were taken as others.
    """

    joint: JointData
    evaluated: tuple[DatasetSource, ...]
    splits: Mapping[str, Annotations]
    new: int
    rehearse_fraction: float
    taken: Renames = field(default_factory=dict)
    given: tuple[DatasetSource, ...] = ()

    @property
    def sources(self) -> tuple[DatasetSource, ...]:
        """All datasets: new, rehearsed and evaluated ones."""
        return (*self.joint.sources, *self.evaluated)

    @property
    def default_names(self) -> tuple[str, ...]:
        """What the fine-tuned detector looks for by default: the names that it is trained on, those of new datasets
        first.
        """
        return tuple(dict.fromkeys(name for source in self.joint.sources for name in source.categories))

    def aliases(self, earlier: Mapping[str, str]) -> dict[str, str]:
        """The names that were taken as a trained one, now and earlier, but for those that are names of their own."""
        return aliases_of(self.taken, earlier, self.joint.vocabulary)

    @property
    def images(self) -> int:
        """Number of training images of the new datasets."""
        return sum(self.lengths("new").values())

    @property
    def new_fraction(self) -> float:
        """Fraction of the samples that goes to new datasets, but for weights that a configuration gives."""
        return 1 - self.rehearse_fraction if self.lengths("rehearsed") else 1.0

    @property
    def roles(self) -> dict[str, Role]:
        """The role of each dataset, by name."""
        names = [source.name for source in self.joint.sources]
        roles: dict[str, Role] = {name: "new" if row < self.new else "rehearsed" for row, name in enumerate(names)}
        return roles | {source.name: "evaluated" for source in self.evaluated}

    def listings(self) -> dict[str, tuple[DatasetSource, ...]]:
        """The datasets as they were given, by the file of the run folder that lists them."""
        learnt, given = len(self.joint.sources), self.given
        return {DATASETS: given[: self.new], REHEARSED: given[self.new : learnt], EVALUATED: given[learnt:]}

    def lengths(self, role: Role) -> dict[str, int]:
        """Number of training images of each dataset with this role, by name."""
        return {name: length for name, length in self.joint.lengths.items() if self.roles[name] == role}

    @property
    def new_splits(self) -> dict[str, Annotations]:
        """The annotations that the new datasets are evaluated on, by dataset name."""
        return {name: split for name, split in self.splits.items() if self.roles[name] == "new"}

    def evaluated_vocabulary(self) -> Vocabulary:
        """The vocabulary of training, then names that only evaluated datasets have."""
        known = self.joint.vocabulary
        # a known name keeps its prompt, or has none
        return known.extended(vocabulary_of(self.evaluated).without_prompts(known.names)) if self.evaluated else known

    def mixture(self, base: Mixture) -> Mixture:
        """The weights of the datasets: `rehearse_fraction` for rehearsed ones, the rest for new ones.

        Within each group, weights keep the proportions of `base`. Without rehearsed datasets, or if `base` gives
        weights by name, the weights are those of `base`.
        """
        rehearsed = self.lengths("rehearsed")
        if isinstance(base, dict) or not rehearsed:
            return self.joint.mixture(base)
        weights = mixture_weights(self.joint.lengths, self.joint.mixture(base))
        old = sum(weights[name] for name in rehearsed)
        rehearsed_scale, new_scale = self.rehearse_fraction / old, (1 - self.rehearse_fraction) / (1 - old)
        return {
            name: weight * (rehearsed_scale if name in rehearsed else new_scale) for name, weight in weights.items()
        }


def open_finetune_data(
    data: Sequence[str],
    trained: Vocabulary,
    options: FinetuneOptions | None = None,
    take: Callable[[Sequence[DatasetSource], int], Renames] | None = None,
) -> FinetuneData:
    """Opens new and old datasets, chooses the part of the new ones that is trained on, and joins all names.

    The names of the checkpoint come first and stay. A dataset that is given here takes the place of one of the same
    name that the checkpoint was trained on.

    Args:
        data: New datasets, as arguments of a command.
        trained: The checkpoint's vocabulary.
        options: Which part of the new training images to use, and the old datasets.
        take: Says which names of the opened datasets, of which the first so many are new, are taken as a trained one.

    Raises:
        DataError: a dataset is missing, two have one name, or there is nothing to train on or to evaluate on; also if
            most of that was lost while reading, unless the options allow it.
        ConfigError: a list of datasets has an unknown key.
    """
    options = options or FinetuneOptions()
    parts = {_NEW: data, "with --rehearse": options.rehearse, "with --rehearse-evaluate": options.rehearse_evaluate}
    listed = {part: parse_data_arguments(each) if each else () for part, each in parts.items()}
    _check_one_part_each(listed)
    specs = parse_data_arguments([*data, *options.rehearse, *options.rehearse_evaluate])
    new, old, _ = map(len, listed.values())
    opened = tuple(open_dataset(spec) for spec in specs)
    taken = {} if take is None else take(opened, new)
    sources = tuple(source.renamed(taken.get(source.name, {})) for source in opened)
    learnt = sources[: new + old]
    chosen = chosen_parts(learnt[:new], options)
    if not options.allow_empty:
        for source in learnt:
            check_usable(source, TRAIN, chosen.get(source.name))
        for source in sources:
            check_usable(source, source.evaluation_split()[0])
    log_issues(sources)
    given = vocabulary_of(learnt)
    vocabulary = trained.extended(given if options.prompts == "given" else with_trained_prompts(given, trained))
    for name in trained.datasets.keys() & {source.name for source in learnt}:
        if set(trained.names_of(name)) != set(vocabulary.names_of(name)):
            message = "%s: the checkpoint knows a dataset of this name with other categories; this one replaces it"
            _logger.warning(message, name)
    return FinetuneData(
        joint=JointData(sources=learnt, vocabulary=vocabulary, chosen=chosen),
        evaluated=sources[new + old :],
        splits={source.name: source.evaluation_split()[1] for source in sources},
        new=new,
        rehearse_fraction=options.rehearse_fraction,
        taken=taken,
        given=opened,
    )


def _check_one_part_each(listed: Mapping[str, Sequence[DatasetConfig]]) -> None:
    """Checks that no dataset is given in two ways.

    Args:
        listed: The datasets by how they are given.

    Raises:
        DataError: one is.
    """
    for (one, first), (other, second) in combinations(listed.items(), 2):
        for config in first:
            if any(config.name == also.name and _same_place(config.path, also.path) for also in second):
                hint = "give it once: new datasets are learnt, rehearsed ones kept" if one == _NEW else "give it once"
                raise DataError(f"{config.name!r} is given both {one} and {other}", where=config.path, hint=hint)


def _same_place(one: Path | str, other: Path | str) -> bool:
    """Whether two paths are of one dataset."""
    if isinstance(one, Path) and isinstance(other, Path):
        return os.path.realpath(one) == os.path.realpath(other)
    return same_dataset(one, other) or same_dataset(other, one)
