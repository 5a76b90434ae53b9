"""New names that seem to mean a trained one, and the trained names that are nearest to a new one."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metr.errors import ConfigError
from metr.text.similar_names import EmbeddingSimilarity, spelling_matches, squeezed, words
from metr.text.vocabulary import Vocabulary, listed_names

# From this similarity on, names of the bundled language model are offered as one. Among the names of 32 datasets and of
# common synonyms all pairs above it mean the same (bike, bicycle: 0.92); below come Monday, Tuesday (0.88) and nine,
# ten (0.84). Names that share a word are never offered by meaning: left shoe and right shoe have 0.93.
SAME_MEANING = 0.91
_SAME_LETTERS, _PLURAL, _ABBREVIATION, _SLIP, _MEANING = range(5)
# A letter or a digit alone says too little: `a` of handwriting is not `A` of a sign language.
_LEAST_LETTERS = 2
# A word that may hold a slip: cylinder A and cylinder B are not one.
_LEAST_FOR_SLIPS = 6
_NEAREST = 2
# Below this similarity the nearest trained name is something else.
_FAR = 0.6
_TOLD = 5

PromptChoice = Literal["trained", "given"]
"""What becomes of a dataset's prompt for a name that was trained without it: it is left out, or used."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SameName:
    """A name that seems to mean a trained one, and why. `by_spelling`: they differ in case, spaces or the plural."""

    name: str
    trained: str
    why: str
    by_spelling: bool

    def __str__(self) -> str:
        """A short description."""
        return f"{self.name!r} as {self.trained!r} ({self.why})"


def same_names(
    names: Sequence[str], trained: Sequence[str], embeddings: EmbeddingSimilarity | None = None
) -> tuple[SameName, ...]:
    """The names of one dataset that seem to mean a trained name, at most one for each trained name, surest first.

    A trained name that the dataset has itself is left out: the dataset tells it from its other names.

    Args:
        names: The dataset's names.
        trained: The trained names.
        embeddings: Embeddings of both by the bundled language model, for `SAME_MEANING`; None leaves spelling alone.
    """
    known, own = set(trained), set(names)
    new = [name for name in dict.fromkeys(names) if name not in known]
    free = [name for name in trained if name not in own]
    found: list[SameName] = []
    taken: set[str] = set()
    for _, one in sorted(_candidates(new, free, embeddings), key=lambda ranked: ranked[0]):
        if one.name not in taken and one.trained not in taken:
            taken |= {one.name, one.trained}
            found.append(one)
    return tuple(found)


def _candidates(
    new: Sequence[str], trained: Sequence[str], embeddings: EmbeddingSimilarity | None
) -> Iterator[tuple[tuple[int, float], SameName]]:
    """Pairs of a new and a trained name, with a rank by which they are sorted."""
    fresh = set(new)
    for pair in spelling_matches((*new, *trained)):
        if (pair.first in fresh) == (pair.second in fresh) or not _tells_enough(pair.first, pair.second):
            continue
        rank = _rank(pair.why, pair.abbreviation)
        if rank == _SLIP and not _in_one_long_word(pair.first, pair.second):
            continue
        # new names come first
        by_spelling = rank in {_SAME_LETTERS, _PLURAL}
        yield (rank, 0.0), SameName(name=pair.first, trained=pair.second, why=pair.why, by_spelling=by_spelling)
    if embeddings is None or not new or not trained:
        return
    similarity = embeddings.between(new, trained)
    for row, name in enumerate(new):
        for column in (similarity[row] >= SAME_MEANING).nonzero()[0].tolist():
            other, strength = trained[column], float(similarity[row, column])
            if _tells_enough(name, other) and not _share_a_word(name, other):
                why = f"near in meaning, {strength:.2f}"
                yield (_MEANING, -strength), SameName(name=name, trained=other, why=why, by_spelling=False)


def spelt_alike(datasets: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Names of different datasets that differ in case, spaces or the plural alone, and that no dataset tells apart."""
    owners: dict[str, set[str]] = {}
    for dataset, names in datasets.items():
        for name in names:
            owners.setdefault(name, set()).add(dataset)
    return [
        (pair.first, pair.second)
        for pair in spelling_matches(tuple(owners))
        if _rank(pair.why, pair.abbreviation) in {_SAME_LETTERS, _PLURAL}
        and _tells_enough(pair.first, pair.second)
        and owners[pair.first].isdisjoint(owners[pair.second])
    ]


def _rank(why: str, abbreviation: bool) -> int:
    if abbreviation:
        return _ABBREVIATION
    return _SLIP if "one letter" in why else _PLURAL if "plural" in why else _SAME_LETTERS


def _tells_enough(one: str, two: str) -> bool:
    return all(len(squeezed(name)) >= _LEAST_LETTERS and not any(map(str.isdigit, name)) for name in (one, two))


def _in_one_long_word(one: str, two: str) -> bool:
    """Whether two names differ in one word, and that word is long."""
    first, second = words(one), words(two)
    if len(first) != len(second):
        return False
    differing = [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]
    return len(differing) == 1 and min(map(len, differing[0])) >= _LEAST_FOR_SLIPS


def _share_a_word(one: str, two: str) -> bool:
    return not set(words(one)).isdisjoint(words(two))


class TrainedWords(NamedTuple):
    """What the datasets of training called their categories beside names.

    Attributes:
        renames: Names in their files, each with those that they were renamed to.
        synonyms: Words by which training called names now and then.
    """

    renames: Mapping[str, Sequence[str]] = {}
    synonyms: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """A name that was not trained, the phrase it was embedded by if that is another, and the nearest trained names.

    `alike`: one of these differs in spelling alone, or is nearer in meaning than unrelated names are. `renamed`: the
    trained names that a category of this name got in the datasets files of training.
    """

    name: str
    prompt: str | None
    nearest: tuple[tuple[str, float], ...]
    alike: bool
    renamed: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A short description, such as `"toad" (nearest: "frog" 0.71)`."""
        return (
            f"{self.called} (renamed in training: {self.now})"
            if self.renamed
            else f"{self.called} (nearest: {self.near})"
        )

    @property
    def now(self) -> str:
        """The names that its categories have in training."""
        return " or ".join(f'"{name}"' for name in self.renamed)

    @property
    def advice(self) -> str:
        """What a user should know who asks for it."""
        if self.renamed:
            return f"{self.called} was renamed to {self.now} in the datasets file of training: use {self.now}"
        if self.alike:
            best = f'ask for "{self.nearest[0][0]}" for better results'
            return f"{self.called} was not trained; nearest: {self.near}: {best}"
        return f"{self.called} was not trained, and no trained name is near it (nearest: {self.near})"

    @property
    def called(self) -> str:
        """The name, with its prompt where it has one."""
        return f'"{self.name}"' + (f' as "{self.prompt}"' if self.prompt is not None else "")

    @property
    def near(self) -> str:
        """The nearest trained names with their similarity."""
        return ", ".join(f'"{name}" {similarity:.2f}' for name, similarity in self.nearest)


def untrained(
    asked: Vocabulary,
    text: Float[Tensor, "n t"],
    trained: Sequence[str],
    trained_text: Float[Tensor, "v t"],
    taught: TrainedWords | None = None,
) -> tuple[Untrained, ...]:
    """Each of some names that were not trained, with the trained ones that are nearest.

    A trained name of another spelling comes before the others, whatever its similarity.

    Args:
        asked: The names, with their prompts.
        text: Their embeddings.
        trained: The trained names.
        trained_text: Theirs.
        taught: What else categories of training were called. Their synonyms were trained.
    """
    if not len(asked) or not trained:
        return ()
    known, (renames, synonyms) = set(trained), taught or TrainedWords()
    spelt = {(pair.first, pair.second) for pair in spelling_matches(tuple(dict.fromkeys((*asked.names, *trained))))}
    found = []
    for name, row in zip(asked.names, text @ trained_text.T.to(text), strict=True):
        if asked.prompts.get(name, name) in synonyms:
            continue
        near = torch.topk(row, min(_NEAREST, len(trained))).indices.tolist()
        alike = [column for column, other in enumerate(trained) if (name, other) in spelt]
        same = [trained.index(name)] if name in known else []
        columns = list(dict.fromkeys((*same, *alike, *near)))[:_NEAREST]
        kept = {*same, *alike, columns[0]}
        nearest = tuple((trained[c], float(row[c])) for c in columns if c in kept or float(row[c]) >= _FAR)
        close = bool(same or alike) or nearest[0][1] >= _FAR
        now = () if name in known else tuple(one for one in renames.get(name, ()) if one in known)
        found.append(Untrained(name=name, prompt=asked.prompts.get(name), nearest=nearest, alike=close, renamed=now))
    return tuple(found)


def told(found: Sequence[Untrained]) -> str:
    """What a user should know who asks for names that were not trained: a line for each of the first few."""
    lines = [one.advice for one in found[:_TOLD]]
    if len(found) > _TOLD:
        lines.append(f"and {len(found) - _TOLD} more names were not trained")
    return "\n".join(lines)


def listed(items: Sequence[object]) -> str:
    """The first few of some things, and how many more there are."""
    more = f" and {len(items) - _TOLD} more" if len(items) > _TOLD else ""
    return ", ".join(map(str, items[:_TOLD])) + more


def known_aliases(names: Sequence[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Those aliases of trained names that a dataset has among its names, and not the trained name itself."""
    targets = [aliases[name] for name in names if name in aliases]
    return {
        name: aliases[name]
        for name in names
        if name in aliases and aliases[name] not in names and targets.count(aliases[name]) == 1
    }


def in_another_case(names: Sequence[str], trained: Sequence[str]) -> dict[str, str]:
    """The trained name of each name that is one but for capital letters, where no other is meant, asked or spelt so."""
    spelt: dict[str, list[str]] = {}
    for name in trained:
        spelt.setdefault(name.casefold(), []).append(name)
    candidates = {name: spelt.get(name.casefold(), []) for name in set(names).difference(trained)}
    return known_aliases(names, {name: found[0] for name, found in candidates.items() if len(found) == 1})


def asked_names(names: Sequence[str] | Mapping[str, object], trained: Sequence[str]) -> Vocabulary:
    """The names that a person asks for. Capital letters make no other name, unless both spellings were trained.

    Raises:
        ConfigError: there is no name, one is no text, or empty; or two are the same.
    """
    wanted, known = Vocabulary.of(listed_names(names)), set(trained)
    spelt: dict[str, list[str]] = {}
    for name in wanted.names:
        spelt.setdefault(name.lower(), []).append(name)
    for same in spelt.values():
        if len(same) > 1 and not known.issuperset(same):
            what = f"given twice: {', '.join(map(repr, same))}; capital letters make no other name"
            raise ConfigError(what, where="categories", hint="give each name once")
    return wanted


def with_trained_prompts(given: Vocabulary, trained: Vocabulary) -> Vocabulary:
    """A vocabulary without those prompts for trained names that were not trained; a warning names them.

    The network knows a trained name by the embedding of its training: by another one it finds less.
    """
    prompts = given.prompts.items()
    others = {name: phrase for name, phrase in prompts if name in trained and trained.prompts.get(name) != phrase}
    if others:
        named = listed([f'"{phrase}" for "{name}"' for name, phrase in others.items()])
        message = "prompts that are not used, as the names were trained without them: %s; --prompts given uses them"
        _logger.warning(message, named)
    return given.without_prompts(others)


def told_aliases(dataset: str, names: Sequence[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """As `known_aliases`; logs them."""
    found = known_aliases(names, aliases)
    for name, trained in found.items():
        _logger.info('%s: "%s" is taken as "%s"', dataset, name, trained)
    return found


def with_training(given: Vocabulary, trained: Vocabulary, prompts: PromptChoice) -> Vocabulary:
    """The names of the given datasets, then those of training that are not among them.

    A name keeps the prompt of training unless it is new, or the given prompts are chosen.
    """
    given = given if prompts == "given" else with_trained_prompts(given, trained)
    return Vocabulary(
        names=tuple(dict.fromkeys((*given.names, *trained.names))),
        prompts={**trained.prompts, **given.prompts},
        datasets={**trained.datasets, **given.datasets},
    )
