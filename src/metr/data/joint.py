"""The data of a run: several datasets with one vocabulary, and parts of training splits chosen by a seed."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from metr.data.config import AugmentationConfig, Mixture, SubsetConfig, Unannotated
from metr.data.dataset import DetectionDataset
from metr.data.datasets_file import DatasetSource, open_dataset, parse_data_arguments
from metr.data.guard import check_usable
from metr.data.index.annotation_index import AnnotationIndex
from metr.data.records import TRAIN, Annotations, DataIssue, ImageRecord, PartlyRead, seeded_order
from metr.data.sampling import mixture_weights, objects_of
from metr.data.transforms import build_transforms
from metr.errors import DataError, counted
from metr.text.vocabulary import Vocabulary

_TOLD = 6  # categories in a message
_logger = logging.getLogger(__name__)


class Subset:
    """Some images of a split, in the order of their numbers; a sequence of records like the split itself.

    Args:
        annotations: The whole split.
        images: The numbers of those that are in.
    """

    def __init__(self, annotations: Annotations, images: Int[np.ndarray, "n"]) -> None:
        self.whole, self.images = annotations, images

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.whole.name

    @property
    def split(self) -> str:
        """The split that it is a part of."""
        return self.whole.split

    @property
    def format(self) -> str:
        """The format of the files."""
        return self.whole.format

    @property
    def categories(self) -> tuple[str, ...]:
        """All names of the dataset, also those that no chosen image shows."""
        return self.whole.categories

    @property
    def issues(self) -> Sequence[DataIssue]:
        """The issues found while the whole split was read."""
        return self.whole.issues

    @property
    def unknown_names(self) -> tuple[str, ...]:
        """The names that a user dropped or ignores."""
        return self.whole.unknown_names if isinstance(self.whole, PartlyRead) else ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageRecord:
        """The annotations of the chosen image `index`."""
        return self.whole[int(self.images[index])]


def shards_of_images(annotations: Annotations) -> Int[np.ndarray, "n"] | None:
    """The number of the shard of each image; None where images are files of their own."""
    if isinstance(annotations, Subset):
        shards = shards_of_images(annotations.whole)
        return None if shards is None else shards[annotations.images]
    return annotations.shard_numbers() if isinstance(annotations, AnnotationIndex) else None


def subset_of(annotations: Annotations, config: SubsetConfig) -> Annotations:
    """The part of a split that the configuration asks for; the split itself where that is everything.

    Raises:
        DataError: shots are asked for, and no image has an object.
    """
    if config.whole:
        return annotations
    order = seeded_order(_keys(annotations), seed=config.seed)
    if config.shots is None:
        chosen = order[: max(1, round((config.fraction or 1.0) * len(order)))]
    else:
        chosen = _with_shots(annotations, order, config.shots)
    return Subset(annotations, np.sort(chosen))


def _with_shots(annotations: Annotations, order: Int[np.ndarray, "n"], shots: int) -> Int[np.ndarray, "m"]:
    """Takes images in the given order: each that has an object of a category with fewer than `shots` so far.

    So each category has `shots` objects, or all it has, as in the few-shot protocol of ODinW (Li et al., 2022).
    Images keep all their boxes, hence common categories may have more: to drop boxes, as in TFA (Wang et al., 2020),
    would make objects that stand there count as background.
    """
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    pieces = list(objects_of(annotations))
    places = place[np.concatenate([images for images, _ in pieces])] if pieces else np.zeros(0, dtype=np.int64)
    if not len(places):
        raise DataError("no object in the training split, so no shots", where=annotations.name, hint="use --fraction")
    labels = np.concatenate([categories for _, categories in pieces])
    taken = np.zeros(len(order), dtype=bool)
    for label in np.unique(labels):
        taken[np.sort(places[labels == label])[:shots]] = True
    return order[taken]


def shortage(annotations: Annotations, shots: int) -> str:
    """Which categories have fewer objects than `shots`, in words; empty where all have enough."""
    counts = np.zeros(len(annotations.categories), dtype=np.int64)
    for _, categories in objects_of(annotations):
        counts += np.bincount(categories, minlength=len(counts))
    few = [f"{name} ({count})" for name, count in zip(annotations.categories, counts, strict=True) if count < shots]
    return ", ".join(few[:_TOLD]) + (f" and {len(few) - _TOLD} more" if len(few) > _TOLD else "")


def _keys(annotations: Annotations) -> list[str]:
    """A key for each image that does not depend on where the dataset lies."""
    if isinstance(annotations, AnnotationIndex):
        return annotations.relative_paths()
    return [str(annotations[index].image_id) for index in range(len(annotations))]


@dataclass(frozen=True, kw_only=True)
class JointData:
    """Several datasets, and a vocabulary that holds all their names.

    The vocabulary may hold more names, which none of these datasets annotates. `chosen` holds parts of training splits,
    by dataset, that are used in place of the whole split.
    """

    sources: tuple[DatasetSource, ...]
    vocabulary: Vocabulary
    chosen: Mapping[str, Annotations] = field(default_factory=dict)

    def renamed(self, names: Mapping[str, Mapping[str, str]]) -> "JointData":
        """The same datasets whole, with other names for some categories of each."""
        sources = tuple(source.renamed(names.get(source.name, {})) for source in self.sources)
        return JointData(sources=sources, vocabulary=vocabulary_of(sources))

    def train_split(self, source: DatasetSource) -> Annotations:
        """The part of a dataset that is trained on.

        Raises:
            DataError: it has no such split.
        """
        return self.chosen[source.name] if source.name in self.chosen else source.split("train")

    @property
    def lengths(self) -> dict[str, int]:
        """Number of training images of each dataset, by name."""
        return {source.name: len(self.train_split(source)) for source in self.sources}

    def training(self, augmentation: AugmentationConfig, unannotated: Unannotated) -> list[DetectionDataset]:
        """The training splits, augmented."""
        transforms, covered_names = build_transforms(augmentation, training=True), self.covered_names
        return [
            DetectionDataset(
                self.train_split(source), self.vocabulary, transforms, unannotated, covered_names, self.absent(source)
            )
            for source in self.sources
        ]

    def absent(self, source: DatasetSource) -> Bool[Tensor, "v"]:
        """The names of other datasets here that a dataset says never to show."""
        words = frozenset(source.config.absent)
        return torch.tensor([name in words for name in self.vocabulary.names]) & self.covered_names

    @property
    def covered_names(self) -> Bool[Tensor, "v"]:
        """The names that some dataset here annotates.

        A name that none annotates would only ever be a negative: the network would forget what it knows of it.
        """
        return torch.stack([self.vocabulary.annotated(source.name) for source in self.sources]).any(0)

    def unannotated(self) -> dict[str, Bool[Tensor, "v"]]:
        """By dataset, the names that it does not annotate and another one does, and that may be there."""
        return {
            source.name: self.covered_names & ~self.vocabulary.annotated(source.name) & ~self.absent(source)
            for source in self.sources
        }

    def mixture(self, base: Mixture) -> Mixture:
        """The mixture, multiplied by the weights that the datasets file gives; unchanged where it gives none."""
        weights = {source.name: source.config.weight for source in self.sources}
        if all(weight == 1 for weight in weights.values()):
            return base
        fractions = mixture_weights(self.lengths, base)
        return {name: fractions[name] * weight for name, weight in weights.items()}

    def evaluation(self, split: str | None = None) -> dict[str, Annotations]:
        """One split of each dataset, by name: the one named, else val, or test where there is nothing to train on."""
        return {
            source.name: source.evaluation_split()[1] if split is None else source.split(split)
            for source in self.sources
        }

    def check_usable(self) -> None:
        """Checks that what is trained and evaluated on has boxes, and that not most of it was lost while reading.

        Raises:
            DataError: it is not so.
        """
        for source in self.sources:
            check_usable(source, TRAIN, self.chosen.get(source.name))
            check_usable(source, source.evaluation_split()[0])


def open_joint(data: Sequence[str], subset: SubsetConfig | None = None, *, together: bool = False) -> JointData:
    """Opens every dataset and joins their names.

    Args:
        data: Datasets, as arguments of a command.
        subset: Which part of each dataset's training images is used; None uses all.
        together: Whether all images of a dataset are one split, "all".

    Raises:
        DataError: a dataset is missing, of unknown format, or without images.
        ConfigError: a list of datasets has an unknown key, or names two datasets alike.
    """
    sources = tuple(open_dataset(spec, together=together) for spec in parse_data_arguments(data))
    chosen = {} if subset is None or subset.whole else chosen_parts(sources, subset)
    return JointData(sources=sources, vocabulary=vocabulary_of(sources), chosen=chosen)


def chosen_parts(sources: Sequence[DatasetSource], subset: SubsetConfig) -> dict[str, Annotations]:
    """The part of each dataset's training split that is trained on, by name; logs what was chosen.

    Raises:
        DataError: a dataset has no training split, or no object to choose by.
    """
    parts = {source.name: subset_of(source.split("train"), subset) for source in sources}
    for source in sources:
        _log_chosen(source, parts[source.name], subset)
    return parts


def _log_chosen(source: DatasetSource, part: Annotations, subset: SubsetConfig) -> None:
    """Logs which part of a dataset was chosen, and which categories have too few objects for it."""
    if subset.whole:
        return
    wanted = counted(subset.shots, "shot") if subset.shots is not None else f"a fraction of {subset.fraction:g}"
    name, whole, (split, evaluated) = source.name, len(source.split("train")), source.evaluation_split()
    chosen = f"{len(part):,} of {counted(whole, 'training image')}"
    kept = f"{split} stays whole ({counted(len(evaluated), 'image')})"
    _logger.info("%s: %s, seed %d: %s; %s", name, wanted, subset.seed, chosen, kept)
    if subset.shots is not None and (few := shortage(part, subset.shots)):
        _logger.warning("%s: categories with fewer than %d objects: %s", name, subset.shots, few)


def vocabulary_of(sources: Sequence[DatasetSource]) -> Vocabulary:
    """The names of several datasets, joined.

    Raises:
        DataError: two of them give one name different prompts.
    """
    prompts: Mapping[str, Mapping[str, str]] = {
        source.name: source.config.prompts for source in sources if source.config.prompts
    }
    return Vocabulary.union({source.name: source.categories for source in sources}, prompts)
