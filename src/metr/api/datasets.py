"""From the arguments of a command to datasets with one vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metr.data.config import AugmentationConfig, BaseMixture
from metr.data.dataset import DetectionDataset, Foreign
from metr.data.mixture import mixture_weights
from metr.data.records import Annotations
from metr.data.sources import DetectionSource, open_dataset, parse_data_arguments
from metr.data.transforms.pipeline import build_transforms
from metr.text.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class JointData:
    """Several datasets, and the vocabulary that holds every name of each."""

    sources: tuple[DetectionSource, ...]
    vocabulary: Vocabulary

    def training(self, augmentation: AugmentationConfig, foreign: Foreign) -> list[DetectionDataset]:
        """The training splits, augmented."""
        transforms = build_transforms(augmentation, training=True)
        return [
            DetectionDataset(source.split("train"), self.vocabulary, transforms, foreign) for source in self.sources
        ]

    def mixture(self, base: BaseMixture) -> BaseMixture:
        """The mixture with the weights that the datasets were given; as it is where none was."""
        weights = {source.name: source.spec.weight for source in self.sources}
        if all(weight == 1 for weight in weights.values()):
            return base
        lengths = {source.name: len(source.split("train")) for source in self.sources}
        shares = mixture_weights(lengths, base)
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
        DataError: a dataset is missing, of unknown format, or without pictures.
        ConfigError: a list of datasets has an unknown key, or names two datasets alike.
    """
    sources = tuple(open_dataset(spec) for spec in parse_data_arguments(data))
    prompts: Mapping[str, Mapping[str, str]] = {
        source.name: source.spec.prompts for source in sources if source.spec.prompts
    }
    vocabulary = Vocabulary.union({source.name: source.categories for source in sources}, prompts)
    return JointData(sources=sources, vocabulary=vocabulary)
