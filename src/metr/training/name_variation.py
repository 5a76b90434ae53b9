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
        DataError: a word is a name of the vocabulary, means two names, or is both a synonym and absent in one dataset.
    """
    meant: dict[str, str] = {}
    for source in sources:
        for name, words in source.config.synonyms.items():
            for word in map(str.strip, words):
                _check_word(word, "synonyms", source, vocabulary)
                if meant.setdefault(word, name) != name:
                    what = f"`synonyms` gives {word!r} for {name!r} and for {meant[word]!r}"
                    raise DataError(
                        what, where=source.name, hint="give a word for one name; for both, rename them alike"
                    )
    absent = {source.name: tuple(map(str.strip, source.config.absent)) for source in sources}
    for source in sources:
        for word in absent[source.name]:
            _check_word(word, "absent", source, vocabulary)
            if meant.get(word) in source.categories:
                what = f"{word!r} is in `absent`, and a synonym of {meant[word]!r}, which the dataset has"
                raise DataError(what, where=source.name, hint="take it out of one of the two")
    never = tuple(dict.fromkeys(word for words in absent.values() for word in words))
    if not meant and not never:
        return None
    text = embed(Vocabulary.of(tuple(dict.fromkeys((*meant, *never)))))
    rows = {word: row for row, word in enumerate(dict.fromkeys((*meant, *never)))}
    return OtherWords(
        synonyms=text[[rows[word] for word in meant]],
        meant=torch.tensor([vocabulary.index_of(name) for name in meant.values()], dtype=torch.int64),
        absent=text[[rows[word] for word in never]],
        absent_from={name: torch.tensor([word in words for word in never]) for name, words in absent.items()},
    )


def _check_word(word: str, key: str, source: DatasetSource, vocabulary: Vocabulary) -> None:
    if not word:
        raise DataError(f"`{key}` has an empty word", where=source.name, hint="write a word, or take it out")
    if word in vocabulary:
        what = f"`{key}` has {word!r}, which is a category"
        hint = "take it out; `renames` makes one category of two names"
        raise DataError(what, where=source.name, hint=hint)


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
        none = text[:0].cpu()
        self.words = words or OtherWords(
            synonyms=none, meant=torch.zeros(0, dtype=torch.int64), absent=none, absent_from={}
        )
        self.text, self.config, self.seed = text, config, seed
        self._choices = torch.cat([text, self.words.synonyms.to(text)])
        meant = self.words.meant
        self._count = torch.bincount(meant, minlength=len(text))
        order = torch.argsort(meant, stable=True)
        self._first = self._count.cumsum(0) - self._count  # where a name's synonyms begin in this order
        self._order = order + len(text)

    @property
    def changes_nothing(self) -> bool:
        """Whether all steps are asked for the names as they are."""
        varied = self.config.synonyms > 0 and len(self.words.synonyms) > 0
        return not (varied or self.config.noise > 0 or (self.config.absent > 0 and len(self.words.absent) > 0))

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
        number = min(self.config.absent, len(self.words.absent))
        if not number:
            return text, targets
        random = generator(self.seed, RandomStream.ABSENT, first)
        chosen = torch.from_numpy(random.choice(len(self.words.absent), number, replace=False))
        known = torch.stack([self.words.absent_from[dataset][chosen] for dataset in datasets])
        annotated = torch.cat([targets.annotated, known.to(targets.annotated)], dim=1)
        assumed = torch.cat([targets.assumed_negative, torch.zeros_like(known).to(targets.annotated)], dim=1)
        wider = replace(targets, annotated=annotated, assumed_negative=assumed)
        return torch.cat([text, self.words.absent[chosen].to(text)]), wider
