"""Whether a detector is evaluated on images that it was trained on, as far as its checkpoint tells.

A checkpoint names no images. It tells how many each split of each dataset had when it was trained. Where its training
images are as many as some splits of the dataset now have together, they are these. A dataset may have another name now:
with the same categories and as many images it is the same one.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from metr.data.datasets_file import DatasetSource
from metr.data.records import ALL, HELD_OUT, TEST, TRAIN, VAL
from metr.errors import counted
from metr.text.vocabulary import Vocabulary

# what numbers on such images mean
MEANING = "AP there says how well it knows these, not how well it finds what is in new images"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of a split of a dataset on which a detector was trained.

    Attributes:
        dataset: Its name now.
        fact: A sentence without its full stop.
        untouched: Number of images of its test split where training had none of it; 0 without one.
    """

    dataset: str
    fact: str
    untouched: int = 0


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """What a checkpoint recorded of a dataset: images by split, and how many of train were used.

    `held_out` says that val was a seeded part of train. Where that is not recorded, it follows from the numbers.
    """

    splits: Mapping[str, int]
    used: int
    held_out: bool

    @property
    def pool(self) -> int:
        """Images of the train split, of which `used` ones were trained on."""
        return max(self.splits[TRAIN], self.used)


def seen_in_training(
    training: Mapping[str, Any], source: DatasetSource, split: str, trained: Vocabulary
) -> Seen | None:
    """What is known of a split's images having been trained on; None where nothing is.

    Args:
        training: Facts about training (`Checkpoint.training`); those of earlier training lie within.
        source: The dataset, with the names of training where its own mean one.
        split: What it is evaluated on.
        trained: The names of training: a dataset of one name with other names is another one.
    """
    sizes = {name: len(one) for name, one in source.splits.items()}
    for called in _trained_as(source, trained):
        for facts in _recorded(training, called):
            fact = _fact(facts, called, source, split, sizes)
            if fact:
                untouched = 0 if _has(sizes, TEST, facts.pool) else sizes.get(TEST, 0)
                return Seen(dataset=source.name, fact=f"the checkpoint was trained on {fact}", untouched=untouched)
    return None


def known_seen(
    training: Mapping[str, Any], sources: Iterable[DatasetSource], splits: Mapping[str, str], trained: Vocabulary
) -> list[Seen]:
    """What is known of each dataset of which anything is; `splits` are evaluated on, by dataset."""
    found = [seen_in_training(training, one, splits[one.name], trained) for one in sources]
    return [one for one in found if one is not None]


def tell_seen(found: Sequence[Seen]) -> None:
    """Warns of numbers on images that were trained on, with what may be tried in place of it."""
    for one in found:
        tried = "evaluate on images that training has not seen"
        if one.untouched:
            tried = f"--split test ({counted(one.untouched, 'image')})"
        _logger.warning("%s: %s: %s. What to try: %s", one.dataset, one.fact, MEANING, tried)


def _trained_as(source: DatasetSource, trained: Vocabulary) -> list[str]:
    """What training may have called a dataset: its own name, or those of datasets with exactly its categories."""
    names = {name.strip() for name in source.categories}
    if names <= set(trained.datasets.get(source.name, ())):
        return [source.name]
    return [called for called, own in trained.datasets.items() if names and names == set(own)]


def _fact(facts: _Trained, called: str, source: DatasetSource, split: str, sizes: Mapping[str, int]) -> str:
    """On which images the checkpoint was trained, those of the split among them; empty where that is not known."""
    used, pool, number, name = facts.used, facts.pool, sizes[split], called
    grown = called == source.name and source.held_out and not facts.held_out and pool > sizes[TRAIN]
    images = f"{counted(used, 'image')} of {name}"
    if used < pool:
        images = f"{used:,} of {counted(pool, 'image')} of {name}"
    if split == ALL:
        return f"{images}, which are among these {number:,}" if sum(facts.splits.values()) == number else ""
    these = f"this image of {split}" if number == 1 else f"these {number:,} images of {split}"
    if _has(sizes, split, pool):
        few = "" if used == pool else "some of " if used > pool - number else "perhaps some of "
    elif split == VAL and grown:
        few = "perhaps some of "  # the dataset has other images now, of which another fifth is held out
    else:
        return ""
    few = few.removesuffix("some of ") if number == 1 else few
    return f"{images}, {few}{these} among them"


def _has(sizes: Mapping[str, int], split: str, pool: int) -> bool:
    """Whether so many training images are, by their number, those of train and other splits, of `split` among them."""
    others = [name for name in (VAL, TEST) if sizes.get(name)]
    groups = [{TRAIN, *some} for number in range(len(others) + 1) for some in combinations(others, number)]
    fitting = [group for group in groups if TRAIN in sizes and sum(sizes[name] for name in group) == pool]
    return bool(fitting) and all(split in group for group in fitting)


def _recorded(training: Mapping[str, Any], dataset: str) -> Iterator[_Trained]:
    """What a checkpoint recorded of a dataset at each of its trainings, the last one first; what makes no sense is
    left out.
    """
    stage: Any = training
    while isinstance(stage, Mapping):
        datasets = stage.get("data")
        facts = datasets.get(dataset) if isinstance(datasets, Mapping) else None
        splits, used = (facts.get("splits"), facts.get("trained_on")) if isinstance(facts, Mapping) else (None, None)
        if isinstance(facts, Mapping) and isinstance(splits, Mapping) and isinstance(used, int) and used > 0:
            sizes = {str(name): size for name, size in splits.items() if isinstance(size, int)}
            if TRAIN in sizes:
                yield _Trained(splits=sizes, used=used, held_out=_held_out(facts.get("held_out"), sizes))
        stage = stage.get("finetuned_from")


def _held_out(recorded: object, sizes: Mapping[str, int]) -> bool:
    """Whether val was held out of train: as it is recorded, or else where it is as large as such a part."""
    if isinstance(recorded, bool):
        return recorded
    val = sizes.get(VAL, 0)
    return val == max(1, round(HELD_OUT * (sizes[TRAIN] + val)))
