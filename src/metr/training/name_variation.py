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
    """Embeddings of words that are no names of the vocabulary, and which words are absent where.

    Attributes:
        synonyms: The text of each synonym.
        meant: The row of the vocabulary that each of them means.
        absent: The text of each word for what some dataset never shows.
        absent_from: For each dataset, which of these words.
        absent_names: For each dataset, which names of the vocabulary are none of its own, and absent.
    """

    synonyms: Float[Tensor, "s t"]
    meant: Int[Tensor, "s"]
    absent: Float[Tensor, "a t"]
    absent_from: Mapping[str, Bool[Tensor, "a"]]
    absent_names: Mapping[str, Bool[Tensor, "v"]]


def other_words(sources: Sequence[DatasetSource], vocabulary: Vocabulary, embed: Embed) -> OtherWords | None:
    """The words that the datasets' files give beside names; None where there are none.

    Args:
        sources: The datasets, with their `synonyms` and `absent`.
        vocabulary: The names of training.
        embed: The text encoder.

    Raises:
        DataError: a synonym is a name of the vocabulary or means two names, or an absent word is one of its dataset's.
    """
    meant = _meant(sources, vocabulary)
    absent = {source.name: _absent(source, meant) for source in sources}
    never = tuple(dict.fromkeys(word for words in absent.values() for word in words if word not in vocabulary))
    if not meant and not any(absent.values()):
        return None
    every = tuple(dict.fromkeys((*meant, *never)))
    text = embed(Vocabulary.of(every)) if every else torch.zeros(0, 0)
    rows = {word: row for row, word in enumerate(every)}
    return OtherWords(
        synonyms=text[[rows[word] for word in meant]],
        meant=torch.tensor([vocabulary.index_of(name) for name in meant.values()], dtype=torch.int64),
        absent=text[[rows[word] for word in never]],
        absent_from={
            name: torch.tensor([word in words for word in never], dtype=torch.bool) for name, words in absent.items()
        },
        absent_names={name: torch.tensor([one in words for one in vocabulary.names]) for name, words in absent.items()},
    )


def _meant(sources: Sequence[DatasetSource], vocabulary: Vocabulary) -> dict[str, str]:
    """The name that each synonym means."""
    meant: dict[str, str] = {}
    for source in sources:
        for name, words in source.config.synonyms.items():
            for word in _words(words, "synonyms", source):
                if word in vocabulary:
                    what, hint = f"`synonyms` has {word!r}, which is a category", "`renames` makes one of two names"
                    raise DataError(what, where=source.name, hint=f"take it out; {hint}")
                if meant.setdefault(word, name) != name:
                    what = f"`synonyms` gives {word!r} for {name!r} and for {meant[word]!r}"
                    hint = "give a word for one name; `renames` makes one of two names"
                    raise DataError(what, where=source.name, hint=hint)
    return meant


def _absent(source: DatasetSource, meant: Mapping[str, str]) -> frozenset[str]:
    """What a dataset never shows."""
    words = frozenset(_words(source.config.absent, "absent", source))
    for word in sorted(words):
        name = meant.get(word, word)
        if name in source.categories:
            kind = "is its category" if name == word else f"is a synonym of its category {name!r}"
            raise DataError(f"`absent` has {word!r}, which {kind}", where=source.name, hint="take it out")
    return words


def _words(words: Sequence[str], key: str, source: DatasetSource) -> list[str]:
    stripped = [word.strip() for word in words]
    if not all(stripped):
        raise DataError(f"`{key}` has an empty word", where=source.name, hint="write a word, or take it out")
    return stripped


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
        self.absent = none if words is None else words.absent.reshape(-1, text.shape[1]).to(text)
        self._choices = text if words is None else torch.cat([text, words.synonyms.reshape(-1, text.shape[1]).to(text)])
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

    def with_absent_names(self, targets: Targets, datasets: Sequence[str]) -> Targets:
        """The targets of the whole vocabulary, with what each image's dataset says never to show.

        Args:
            targets: Indexed by the vocabulary.
            datasets: The dataset of each image.
        """
        if self.words is None:
            return targets
        known = torch.stack([self.words.absent_names[dataset] for dataset in datasets]).to(targets.annotated)
        return replace(targets, annotated=targets.annotated | known)

    def with_absent_words(
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
