"""From the arguments of a command to datasets with one vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from metr.data.config import AugmentationConfig, BaseMixture
from metr.data.dataset import DetectionDataset, Unannotated
from metr.data.datasets_file import DatasetSource, open_dataset, parse_data_arguments
from metr.data.mixture import mixture_weights
from metr.data.records import Annotations
from metr.data.transforms.pipeline import build_transforms
from metr.text.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class JointData:
    """Several datasets, and a vocabulary that holds every name of each.

    The vocabulary may hold more: names that none of these datasets annotates. `chosen` are parts of training splits, by
    dataset, that take the place of the whole.
    """

    sources: tuple[DatasetSource, ...]
    vocabulary: Vocabulary
    chosen: Mapping[str, Annotations] = field(default_factory=dict)

    def train_split(self, source: DatasetSource) -> Annotations:
        """What of a dataset is trained on.

        Raises:
            DataError: it has no such split.
        """
        return self.chosen[source.name] if source.name in self.chosen else source.split("train")

    @property
    def lengths(self) -> dict[str, int]:
        """Training images of each dataset, by name."""
        return {source.name: len(self.train_split(source)) for source in self.sources}

    def training(self, augmentation: AugmentationConfig, unannotated: Unannotated) -> list[DetectionDataset]:
        """The training splits, augmented."""
        transforms, words = build_transforms(augmentation, training=True), self.vocabulary
        covered_names = self.covered_names
        return [
            DetectionDataset(self.train_split(source), words, transforms, unannotated, covered_names)
            for source in self.sources
        ]

    @property
    def covered_names(self) -> Bool[Tensor, "v"]:
        """The names that some dataset here annotates.

        Another would only ever be absent, and what was known of it be lost.
        """
        return torch.stack([self.vocabulary.annotated(source.name) for source in self.sources]).any(0)

    def unannotated(self) -> dict[str, Bool[Tensor, "v"]]:
        """By dataset, the names that another one here annotates and it does not."""
        return {source.name: self.covered_names & ~self.vocabulary.annotated(source.name) for source in self.sources}

    def mixture(self, base: BaseMixture) -> BaseMixture:
        """The mixture with the weights that the datasets were given; as it is where none was."""
        weights = {source.name: source.config.weight for source in self.sources}
        if all(weight == 1 for weight in weights.values()):
            return base
        shares = mixture_weights(self.lengths, base)
        return {name: shares[name] * weight for name, weight in weights.items()}

    def evaluation(self, split: str | None = None) -> dict[str, Annotations]:
        """One split of each dataset, by name: the one named, else val, else test."""
        return {
            source.name: source.evaluation_split()[1] if split is None else source.split(split)
            for source in self.sources
        }


def open_joint(data: Sequence[str]) -> JointData:
    """Opens every dataset and joins their names.

    Raises:
        DataError: a dataset is missing, of unknown format, or without images.
        ConfigError: a list of datasets has an unknown key, or names two datasets alike.
    """
    sources = tuple(open_dataset(spec) for spec in parse_data_arguments(data))
    return JointData(sources=sources, vocabulary=vocabulary_of(sources))


def vocabulary_of(sources: Sequence[DatasetSource]) -> Vocabulary:
    """The names of several datasets, joined.

    Raises:
        DataError: two of them give one name different prompts.
    """
    prompts: Mapping[str, Mapping[str, str]] = {
        source.name: source.config.prompts for source in sources if source.config.prompts
    }
    return Vocabulary.union({source.name: source.categories for source in sources}, prompts)
