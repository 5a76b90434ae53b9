"""Names that are spelt alike or mean nearly the same."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, islice

import numpy as np
from jaxtyping import Float
from torch import Tensor

from metr.text.config import TextEncoderConfig
from metr.text.encoder import TextEncoder
from metr.text.vocabulary import Vocabulary

# Where a new word begins without a space: redBlood, TVMonitor.
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_GAP = re.compile(r"[\W_]+")
_DIGITS = re.compile(r"\d+")
# An abbreviation: a few capitals, perhaps with the s of a plural.
_CAPITALS = re.compile(r"([A-Z]{2,6})s?")
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_VALUES = {word: str(value) for value, word in enumerate(_NUMBERS.split())}
# Shorter names become other words by one letter too easily (car, cat; horse, house).
_LEAST_FOR_SLIPS = 6
# In longer names, one letter is not looked for: a name of a thousand letters has as many spellings that lack one.
_MOST_FOR_SLIPS = 64
# The most pairs of names that are found by spelling, and by meaning (the nearest ones): nobody reads more.
MOST_PAIRS = 20_000


@dataclass(frozen=True, kw_only=True)
class SpellingMatch:
    """Two names with similar spelling; `why` says how they differ."""

    first: str
    second: str
    abbreviation: bool
    why: str


@lru_cache(maxsize=1 << 16)
def words(name: str) -> tuple[str, ...]:
    """The words of a name, without case and accents: `White_King` and `whiteKing` are (white, king)."""
    plain = unicodedata.normalize("NFKD", _HUMP.sub(" ", name))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return tuple(_GAP.sub(" ", plain).casefold().split())


def squeezed(name: str) -> str:
    """A name's words in one: `dining table`, `Dining-Table` and `diningtable` are the same."""
    return "".join(words(name)) or name


def has_head(name: str, bare: str) -> bool:
    """Whether a name of several words ends in the one word of `bare`, plurals included: `white-king` and `king`."""
    inner, alone = words(name), words(bare)
    return len(inner) > 1 and len(alone) == 1 and not _numbers(inner[-1]).isdisjoint(_numbers(alone[0]))


def by_head(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of several words, under the last of them and its plurals."""
    heads: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        inner = words(name)
        for key in _numbers(inner[-1]) if len(inner) > 1 else ():
            heads[key].append(name)
    return heads


def ending_in(bare: str, heads: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The names (see `by_head`) that end in the one word of `bare`."""
    alone = words(bare)
    if len(alone) != 1:
        return ()
    return tuple(dict.fromkeys(name for key in sorted(_numbers(alone[0])) for name in heads.get(key, ())))


def symbol_of(name: str) -> str | None:
    """The letter, sign or number that a name is, in digits where it is a number; None for any other name."""
    inner = words(name)
    if len(inner) != 1:
        return None if inner else name
    (word,) = inner
    # of a script without letters, such as the Chinese, one character is a word
    letter = len(word) == 1 and unicodedata.category(word) != "Lo"
    return word if letter or word.isdigit() else _VALUES.get(word)


def is_abbreviation(name: str) -> bool:
    """Whether a name is a few capitals."""
    return _CAPITALS.fullmatch(name) is not None


def spelling_matches(names: Sequence[str]) -> tuple[SpellingMatch, ...]:
    """Pairs of different names that are one but for spelling, or of which one abbreviates the other."""
    found: dict[tuple[str, str], SpellingMatch] = {}
    position = {name: number for number, name in enumerate(names)}
    for rule in (_same_letters, _plural, _initials, _slips):
        for one, two, why in islice(rule(names), MOST_PAIRS):
            pair = (one, two) if position[one] < position[two] else (two, one)
            by_spelling = SpellingMatch(first=pair[0], second=pair[1], abbreviation=rule is _initials, why=why)
            found.setdefault(pair, by_spelling)
    return tuple(found.values())


_Pair = tuple[str, str, str]


def _same_letters(names: Sequence[str]) -> Iterator[_Pair]:
    for key, group in _grouped(names).items():
        # c and C, x and x- may be different signs
        for one, two in combinations(group, 2) if len(key) > 1 else ():
            yield one, two, "the same but for case, hyphens or spaces"


def _plural(names: Sequence[str]) -> Iterator[_Pair]:
    groups = _grouped(names)
    for key, group in groups.items():
        for other in _plurals(key):
            for one in group:
                yield from ((one, two, "one is the plural") for two in groups.get(other, ()))


def _initials(names: Sequence[str]) -> Iterator[_Pair]:
    long: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        inner = words(name)
        if len(inner) > 1:
            long["".join(word[0] for word in inner)].append(name)
    for name in names:
        short = _CAPITALS.fullmatch(name)
        if short:
            yield from ((name, other, "an abbreviation of it") for other in long.get(short[1].casefold(), ()))


def _slips(names: Sequence[str]) -> Iterator[_Pair]:
    """Names at most one letter apart: a letter is wrong, missing, added or out of place."""
    reduced: defaultdict[str, list[str]] = defaultdict(list)
    for key in (key for key in _grouped(names) if _LEAST_FOR_SLIPS <= len(key) <= _MOST_FOR_SLIPS):
        for shorter in {key, *(key[:place] + key[place + 1 :] for place in range(len(key)))}:
            reduced[shorter].append(key)
    groups = _grouped(names)
    for keys in reduced.values():
        for one, two in combinations(keys, 2):
            if one[0] == two[0] and _DIGITS.findall(one) == _DIGITS.findall(two):
                for first in groups[one]:
                    yield from ((first, second, "one letter apart") for second in groups[two])


def _grouped(names: Sequence[str]) -> dict[str, list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[squeezed(name)].append(name)
    return groups


def _plurals(word: str) -> tuple[str, ...]:
    if word.endswith("y"):
        return f"{word[:-1]}ies", f"{word}s"
    return f"{word}s", f"{word}es"


def _numbers(word: str) -> set[str]:
    """A word and its plurals."""
    return {word, *_plurals(word)}


# Of texts that are the same to the language model; batches of other lengths round otherwise.
_SAME_TEXT = 1 - 1e-5
# Names whose similarities are computed at once.
_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class EmbeddingSimilarity:
    """Text embeddings of names, and the language model (`source`) that made them."""

    source: str
    names: tuple[str, ...]
    vectors: Float[Tensor, "v t"]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def between(self, first: Sequence[str], second: Sequence[str]) -> Float[np.ndarray, "a b"]:
        """The similarity of each name of `first` with each of `second`."""
        one, two = (self.vectors[[self._rows[name] for name in names]] for names in (first, second))
        return np.asarray((one @ two.T).numpy())

    def similarity(self, first: str, second: str) -> float:
        """The similarity of two names."""
        return float(self.vectors[self._rows[first]] @ self.vectors[self._rows[second]])

    def pairs(self, least: float) -> list[tuple[str, str, float]]:
        """Every two names of at least this similarity, in the order of `names`; of too many, the nearest."""
        rows, columns, strengths = (np.zeros(0, dtype=kind) for kind in (np.int64, np.int64, np.float32))
        for start in range(0, len(self.names), _ROWS):
            block = np.asarray((self.vectors[start : start + _ROWS] @ self.vectors[start:].T).numpy())
            new = np.nonzero(np.triu(block >= least, k=1))
            rows, columns = (
                np.concatenate([old, start + more]) for old, more in zip((rows, columns), new, strict=True)
            )
            strengths = np.concatenate([strengths, block[new]])
            if len(rows) > MOST_PAIRS:
                kept = np.sort(np.argpartition(strengths, -MOST_PAIRS)[-MOST_PAIRS:])
                rows, columns, strengths = rows[kept], columns[kept], strengths[kept]
                least = max(least, float(strengths.min()))
        found = zip(rows.tolist(), columns.tolist(), strengths.tolist(), strict=True)
        return [(self.names[row], self.names[column], strength) for row, column, strength in found]


def read_alike(names: Sequence[str], vectors: Float[Tensor, "v t"]) -> tuple[tuple[str, ...], ...]:
    """Groups of names with the same text embedding, which no detector can tell apart.

    The language model does not see case (`a` and `A`), or none of the characters (a script that it was not taught).
    """
    groups: defaultdict[int, list[str]] = defaultdict(list)
    for start in range(0, len(names), _ROWS):
        same = (vectors[start : start + _ROWS] @ vectors.T >= _SAME_TEXT).numpy()
        for name, first in zip(names[start : start + _ROWS], same.argmax(axis=1).tolist(), strict=True):
            groups[first].append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def embed_names(vocabulary: Vocabulary, config: TextEncoderConfig) -> EmbeddingSimilarity:
    """Embeds each name, or its prompt where it has one.

    Raises:
        ModelError: the language model cannot be found.
        DependencyError: the bundled one is not installed.
    """
    return EmbeddingSimilarity(
        source=config.source, names=vocabulary.names, vectors=TextEncoder(config).embed(vocabulary)
    )
