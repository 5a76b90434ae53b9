"""Other words for names in training: synonyms in their place, noise on their embeddings, and words that are absent.

A language model calls words near that mean something else to a detector, and calls words apart that mean the same. A
detector that has only ever been asked by one word a name learns that one point. Called by several, and asked for
neighbours that are not there, it has to learn what lies between.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from metr.data.datasets_file import DatasetSource
from metr.data.sampling import RandomStream, generator
from metr.errors import DataError
from metr.structures import Targets
from metr.text.vocabulary import Vocabulary
from metr.training.config import NameVariationConfig

Embed = Callable[[Vocabulary], Float[Tensor, "n t"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class OtherWords:
    """Embeddings of words that are no names of the vocabulary.

    Attributes:
        synonyms: The text of each synonym.
        meant: The row of the vocabulary that each of them means.
        absent: The text of each word for what some dataset never shows.
        absent_from: For each dataset, which of these words.
    """

    synonyms: Float[Tensor, "s t"]
    meant: Int[Tensor, "s"]
    absent: Float[Tensor, "a t"]
    absent_from: Mapping[str, Bool[Tensor, "a"]]


def other_words(sources: Sequence[DatasetSource], vocabulary: Vocabulary, embed: Embed) -> OtherWords | None:
    """The words that the datasets' files give beside names; None where there are none.

    Args:
        sources: The datasets, with their `synonyms` and `absent`.
        vocabulary: The names of training.
        embed: The text encoder.

    Raises:
        DataError: a synonym is a name of the vocabulary, or means two names.
    """
    meant = _meant(sources, vocabulary)
    # what is a name of another dataset is known to be absent by the data itself
    absent = {source.name: set(source.config.absent).difference(vocabulary.names) for source in sources}
    never = tuple(
        dict.fromkeys(word for source in sources for word in source.config.absent if word in absent[source.name])
    )
    if not meant and not never:
        return None
    every = tuple(dict.fromkeys((*meant, *never)))
    rows, text = {word: row for row, word in enumerate(every)}, embed(Vocabulary.of(every))
    return OtherWords(
        synonyms=text[[rows[word] for word in meant]],
        meant=torch.tensor([vocabulary.index_of(name) for name in meant.values()], dtype=torch.int64),
        absent=text[[rows[word] for word in never]],
        absent_from={
            name: torch.tensor([word in words for word in never], dtype=torch.bool) for name, words in absent.items()
        },
    )


def _meant(sources: Sequence[DatasetSource], vocabulary: Vocabulary) -> dict[str, str]:
    """The name that each synonym means."""
    meant: dict[str, str] = {}
    hint = "take it out, or make one category of two names with `renames`"
    for source in sources:
        for name, words in source.config.synonyms.items():
            for word in words:
                if word in vocabulary:
                    what = f"`synonyms` has {word!r} for {name!r}, which is a category of another dataset or detector"
                    raise DataError(what, where=source.name, hint=hint)
                if meant.setdefault(word, name) != name:
                    what = f"`synonyms` has {word!r} for {name!r}, which means {meant[word]!r} in another dataset"
                    raise DataError(what, where=source.name, hint=hint)
    return meant


class NameVariation:
    """What the names of a step are called, and what else it is asked for.

    All of it follows from the seed and the number of the step's first sample, so all processes draw the same.

    Args:
        text: The embeddings of the whole vocabulary, on the device.
        words: Beside them.
        config: How often.
        seed: Of the run.
    """

    def __init__(
        self, text: Float[Tensor, "v t"], words: OtherWords | None, config: NameVariationConfig, seed: int
    ) -> None:
        none, self.words, self.text, self.config, self.seed = text[:0], words, text, config, seed
        meant = torch.zeros(0, dtype=torch.int64) if words is None else words.meant
        self.absent = none if words is None else words.absent.to(text)
        self._choices = text if words is None else torch.cat([text, words.synonyms.to(text)])
        self._count = torch.bincount(meant, minlength=len(text))
        order = torch.argsort(meant, stable=True)
        self._first = self._count.cumsum(0) - self._count  # where a name's synonyms begin in this order
        self._order = order + len(text)

    @property
    def changes_nothing(self) -> bool:
        """Whether all steps are asked for the names as they are."""
        return self.words is None and not self.config.noise

    def named(self, first: int) -> Float[Tensor, "v t"]:
        """The text of the whole vocabulary in the step whose samples begin with number `first`."""
        random = generator(self.seed, RandomStream.WORDS, first)
        by_synonym = torch.from_numpy(random.random(len(self.text))) < self.config.synonyms
        which = (torch.from_numpy(random.random(len(self.text))) * self._count).long()
        rows = torch.arange(len(self.text))
        if len(self._order):
            synonym = self._order[(self._first + which).clamp(max=len(self._order) - 1)]
            rows = synonym.where(by_synonym & (self._count > 0), rows)
        text = self._choices[rows.to(self._choices.device)]
        if not self.config.noise:
            return text
        noise = torch.from_numpy(random.standard_normal(tuple(text.shape))).to(text)
        return normalize(text + noise * (self.config.noise / text.shape[1] ** 0.5), dim=-1)

    def with_absent(
        self, text: Float[Tensor, "n t"], targets: Targets, datasets: Sequence[str], first: int
    ) -> tuple[Float[Tensor, "m t"], Targets]:
        """The same with some words, as categories that are annotated, and absent, where a dataset never shows them.

        Args:
            text: Of the names that the step is asked for.
            targets: Indexed by them.
            datasets: The dataset of each image.
            first: The number of the step's first sample.
        """
        number = min(self.config.absent, len(self.absent))
        if self.words is None or not number:
            return text, targets
        random = generator(self.seed, RandomStream.ABSENT, first)
        chosen = torch.from_numpy(random.choice(len(self.absent), number, replace=False))
        known = torch.stack([self.words.absent_from[dataset][chosen] for dataset in datasets]).to(targets.annotated)
        wider = replace(
            targets,
            annotated=torch.cat([targets.annotated, known], dim=1),
            assumed_negative=torch.cat([targets.assumed_negative, torch.zeros_like(known)], dim=1),
        )
        return torch.cat([text, self.absent[chosen.to(text.device)]]), wider
