"""The vocabulary: every category of every dataset by its name. Equal names are one entry, others stay apart."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from metr.config import Config
from metr.errors import CheckpointError, ConfigError, DataError, did_you_mean

Prompts = Mapping[str, str]
_SHOWN = 60  # characters of something that is no name


def listed_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names that are given, which are texts.

    Raises:
        ConfigError: they are a single text, whose letters would be taken for names; or no list, or not all are texts.
    """
    if isinstance(names, str):
        raise ConfigError(f"expected a list of names, found the text {names!r}", where="names", hint=f"[{names!r}]")
    if not isinstance(names, Iterable):
        raise _other("a list of names", names, '["penguin", "shark"]')
    listed = tuple(names)
    for name in listed:
        if not isinstance(name, str):
            raise _other("texts", name, 'write each name as a text, such as "penguin" or "3"')
    return listed


def _other(expected: str, found: object, hint: str) -> ConfigError:
    what = f"expected {expected}, found {repr(found)[:_SHOWN]} ({type(found).__name__})"
    return ConfigError(what, where="names", hint=hint)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Names of categories, and which dataset annotates which.

    Attributes:
        names: Unique; a name's position is its row in the text embeddings, and the label of its objects.
        prompts: For some names, the phrase that is embedded instead of the name.
        datasets: For each dataset, the names of its categories in the order of its own labels.
    """

    names: tuple[str, ...]
    prompts: Prompts = field(default_factory=dict)
    datasets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @staticmethod
    def of(names: Sequence[str], prompts: Prompts | None = None) -> "Vocabulary":
        """A vocabulary of names alone, for detection.

        Raises:
            ConfigError: there is no name, one is no text, empty or given twice, or a prompt is for none of them.
        """
        stripped = tuple(name.strip() for name in listed_names(names))
        where = "categories"
        if not stripped or not all(stripped):
            what = "a name is empty" if stripped else "expected at least one name"
            raise ConfigError(what, where=where, hint='write names between commas, such as "penguin, shark"')
        if twice := _repeated(stripped):
            raise ConfigError(f"given twice: {', '.join(map(repr, twice))}", where=where, hint="give each name once")
        return Vocabulary(names=stripped, prompts=_checked_prompts(prompts or {}, stripped, where))

    @staticmethod
    def union(datasets: Mapping[str, Sequence[str]], prompts: Mapping[str, Prompts] | None = None) -> "Vocabulary":
        """The vocabulary of several datasets: datasets in the order given, names as first seen.

        Args:
            datasets: For each dataset, the names of its categories in the order of its labels. Space around a name
                does not count; case does. A dataset may hold a name twice: both labels are then one row.
            prompts: For each dataset that has some, phrases to embed instead of names.

        Raises:
            DataError: a name is empty, or two datasets give one name different prompts.
            ConfigError: prompts for an unknown dataset or name.
        """
        stripped = {dataset: tuple(name.strip() for name in names) for dataset, names in datasets.items()}
        for dataset, names in stripped.items():
            if not all(names):
                what = f"the category with label {names.index('')} has an empty name"
                raise DataError(what, where=dataset, hint="name it in the annotation file")
        merged = dict.fromkeys(name for names in stripped.values() for name in names)
        return Vocabulary(names=tuple(merged), prompts=_merged_prompts(prompts or {}, stripped), datasets=stripped)

    def extended(self, more: "Vocabulary") -> "Vocabulary":
        """These names, then the new ones of another vocabulary; the datasets of both.

        If both have a dataset, or a prompt for a name, that of the other vocabulary is taken.
        """
        return Vocabulary(
            names=tuple(dict.fromkeys((*self.names, *more.names))),
            prompts={**self.prompts, **more.prompts},
            datasets={**self.datasets, **more.datasets},
        )

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def without_prompts(self, names: Iterable[str]) -> "Vocabulary":
        """The same without the prompts of some names."""
        left_out = set(names)
        return replace(self, prompts={name: said for name, said in self.prompts.items() if name not in left_out})

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def index_of(self, name: str) -> int:
        """The row of a name.

        Raises:
            DataError: the vocabulary has no such name.
        """
        row = self._rows.get(name.strip())
        if row is None:
            raise DataError(f"no category {name!r}", where="vocabulary", hint=did_you_mean(name.strip(), self.names))
        return row

    def names_of(self, dataset: str) -> tuple[str, ...]:
        """The names of a dataset's categories, in the order of its labels.

        Raises:
            DataError: the vocabulary has no such dataset.
        """
        if dataset not in self.datasets:
            hint = did_you_mean(dataset, self.datasets) if self.datasets else "it was made of names, not of datasets"
            raise DataError(f"no dataset {dataset!r}", where="vocabulary", hint=hint)
        return self.datasets[dataset]

    def rows(self, dataset: str) -> Int[Tensor, "c"]:
        """The row of each of a dataset's categories, in the order of its labels."""
        return torch.tensor([self._rows[name] for name in self.names_of(dataset)], dtype=torch.int64)

    def annotated(self, dataset: str) -> Bool[Tensor, "v"]:
        """True at the names that a dataset annotates."""
        known = torch.zeros(len(self), dtype=torch.bool)
        known[self.rows(dataset)] = True
        return known

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `vocabulary.json` holds them."""
        datasets = {dataset: list(names) for dataset, names in self.datasets.items()}
        return {"names": list(self.names), "prompts": dict(self.prompts), "datasets": datasets}

    @staticmethod
    def from_dict(values: Mapping[str, Any], *, where: object = "vocabulary.json") -> "Vocabulary":
        """The vocabulary that `to_dict` wrote.

        Raises:
            CheckpointError: something is missing or contradicts itself.
        """
        try:
            stored = _Stored.checked(values, where=where)
        except ConfigError as error:
            raise CheckpointError(error.what, where=error.where, hint=error.hint) from None
        listed = {*stored.prompts, *(name for names in stored.datasets.values() for name in names)}
        issue = ""
        if twice := _repeated(stored.names):
            issue = f"these names are there twice: {twice}"
        elif strangers := sorted(listed.difference(stored.names)):
            issue = f"prompts or datasets have names that 'names' lacks: {strangers}"
        if issue:
            raise CheckpointError(issue, where=where, hint="copy the checkpoint again, or take another one")
        return Vocabulary(names=stored.names, prompts=stored.prompts, datasets=stored.datasets)


class _Stored(Config):
    """The layout of `vocabulary.json`."""

    names: tuple[str, ...]
    prompts: dict[str, str]
    datasets: dict[str, tuple[str, ...]]


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _checked_prompts(prompts: Prompts, names: Sequence[str], where: str) -> dict[str, str]:
    """Prompts without space around them, each for a name that exists."""
    checked = {name.strip(): phrase.strip() for name, phrase in prompts.items()}
    for name, phrase in checked.items():
        if name not in names:
            what = f"a prompt for {name!r}, which is no category here"
            raise ConfigError(what, where=where, hint=did_you_mean(name, names))
        if not phrase:
            raise ConfigError(f"the prompt for {name!r} is empty", where=where, hint="write a phrase, or leave it out")
    return checked


def _merged_prompts(prompts: Mapping[str, Prompts], datasets: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """One prompt a name, from all datasets."""
    merged: dict[str, str] = {}
    giver: dict[str, str] = {}
    for dataset, own in prompts.items():
        if dataset not in datasets:
            what = f"prompts for {dataset!r}, which is no dataset here"
            raise ConfigError(what, where="prompts", hint=did_you_mean(dataset, datasets))
        for name, phrase in _checked_prompts(own, datasets[dataset], dataset).items():
            if merged.setdefault(name, phrase) != phrase:
                what = f"{name!r} is {merged[name]!r} in {giver[name]} but {phrase!r} in {dataset}"
                hint = "use one phrase for both, or rename the category in one of them"
                raise DataError(what, where="prompts", hint=hint)
            giver.setdefault(name, dataset)
    return merged
