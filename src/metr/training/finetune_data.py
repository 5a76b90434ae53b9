"""The datasets of a fine-tuning run: new ones, old ones mixed in, old ones that are only judged."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from metr.config import Config
from metr.data.config import BaseMixture
from metr.data.datasets_file import DatasetSource, open_dataset, parse_data_arguments
from metr.data.few_shot import SubsetConfig, shortage, subset_of
from metr.data.joint import JointData, vocabulary_of
from metr.data.mixture import mixture_weights
from metr.data.records import Annotations
from metr.text.vocabulary import Vocabulary

Role = Literal["new", "rehearsed", "only judged"]
_logger = logging.getLogger(__name__)


class Rehearsal(Config):
    """Old datasets in fine-tuning, as arguments of a command."""

    data: tuple[str, ...] = ()
    """Mixed into training, and judged before and after."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the draws that goes to them, all together."""
    evaluate: tuple[str, ...] = ()
    """Judged before and after, and not trained on."""


@dataclass(frozen=True, kw_only=True)
class FinetuneData:
    """What is trained on and judged.

    Attributes:
        joint: What is trained on: the new datasets, then the rehearsed ones. Its vocabulary is the checkpoint's, then
            their new names.
        judged: Datasets that are only judged.
        splits: What each of all these is judged on, by name.
        new: How many of `joint.sources` are new.
        share: Share of the draws that goes to rehearsed datasets.
    """

    joint: JointData
    judged: tuple[DatasetSource, ...]
    splits: Mapping[str, Annotations]
    new: int
    share: float

    @property
    def images(self) -> int:
        """Training images of the new datasets."""
        return sum(self.lengths("new").values())

    @property
    def roles(self) -> dict[str, Role]:
        """What each dataset is there for, by name."""
        names = [source.name for source in self.joint.sources]
        roles: dict[str, Role] = {name: "new" if row < self.new else "rehearsed" for row, name in enumerate(names)}
        return roles | {source.name: "only judged" for source in self.judged}

    def lengths(self, role: Role) -> dict[str, int]:
        """Training images of the datasets that are trained on in a role, by name."""
        return {name: length for name, length in self.joint.lengths.items() if self.roles[name] == role}

    @property
    def new_splits(self) -> dict[str, Annotations]:
        """What the new datasets are judged on, by name."""
        return {name: split for name, split in self.splits.items() if self.roles[name] == "new"}

    def judged_vocabulary(self) -> Vocabulary:
        """The vocabulary of training, then names that only judged datasets have."""
        return self.joint.vocabulary.extended(vocabulary_of(self.judged)) if self.judged else self.joint.vocabulary

    def mixture(self, base: BaseMixture) -> BaseMixture:
        """The shares of the datasets: `share` for the rehearsed ones, the rest for the new; inside as `base` says.

        Shares that `base` gives by name stay as they are.
        """
        rehearsed = self.lengths("rehearsed")
        if isinstance(base, dict) or not rehearsed:
            return self.joint.mixture(base)
        shares = mixture_weights(self.joint.lengths, self.joint.mixture(base))
        old = sum(shares[name] for name in rehearsed)
        return {
            name: share * (self.share / old if name in rehearsed else (1 - self.share) / (1 - old))
            for name, share in shares.items()
        }


def open_finetune_data(
    data: Sequence[str], trained: Vocabulary, subset: SubsetConfig | None = None, rehearse: Rehearsal | None = None
) -> FinetuneData:
    """Opens new and old datasets, chooses the part of the new ones that is trained on, and joins all names.

    The names of the checkpoint come first and stay; a dataset that is given takes the place of one of the same name
    that the checkpoint was trained on.

    Args:
        data: New datasets as arguments of a command.
        trained: The checkpoint's vocabulary.
        subset: The part of the new datasets' training images.
        rehearse: Old datasets.

    Raises:
        DataError: a dataset is missing, two have one name, or there is nothing to train on or to judge on.
        ConfigError: a list of datasets has an unknown key.
    """
    subset, rehearse = subset or SubsetConfig(), rehearse or Rehearsal()
    specs = parse_data_arguments([*data, *rehearse.data, *rehearse.evaluate])
    new, old = (len(parse_data_arguments(each)) if each else 0 for each in (data, rehearse.data))
    sources = tuple(open_dataset(spec) for spec in specs)
    learnt = sources[: new + old]
    chosen = {source.name: subset_of(source.split("train"), subset) for source in learnt[:new]}
    for name, part in chosen.items():
        _tell(name, part, subset)
    vocabulary = trained.extended(vocabulary_of(learnt))
    for name in trained.datasets.keys() & {source.name for source in learnt}:
        if set(trained.names_of(name)) != set(vocabulary.names_of(name)):
            told = "%s: the checkpoint knows a dataset of this name with other categories; from now on it is this one"
            _logger.warning(told, name)
    return FinetuneData(
        joint=JointData(sources=learnt, vocabulary=vocabulary, chosen=chosen),
        judged=sources[new + old :],
        splits={source.name: source.evaluation_split()[1] for source in sources},
        new=new,
        share=rehearse.share,
    )


def _tell(name: str, part: Annotations, subset: SubsetConfig) -> None:
    """Says what was chosen."""
    if subset.whole:
        return
    wanted = f"{subset.shots} shots" if subset.shots is not None else f"a share of {subset.share:g}"
    _logger.info("%s: %s, seed %d: %d training images", name, wanted, subset.seed, len(part))
    if subset.shots is not None and (few := shortage(part, subset.shots)):
        _logger.warning("%s: categories with fewer than %d objects: %s", name, subset.shots, few)
