"""Category names in other languages than English, which the bundled language model does not read."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

from metr.errors import DependencyError
from metr.hub import minilm_folder
from metr.text.similar_names import words

# A dataset's names are foreign if at least so many of their words, and this fraction of them, are no English ones.
# Fewer would accuse English datasets of rare words: species, diseases, dishes.
_FEWEST, _FOREIGN = 2, 0.5
# Shorter words are as often abbreviations (tg, ctg) as words.
_SHORTEST = 3
_CAPITALS = re.compile(r"[A-Z]{2,6}s?")


@dataclass(frozen=True, kw_only=True)
class ForeignNames:
    """The names of a dataset that do not seem to be English, in the order of its categories."""

    dataset: str
    names: tuple[str, ...]


def foreign_names(dataset: str, names: Sequence[str]) -> ForeignNames | None:
    """The names of a dataset that the bundled language model cannot read; None where there are none.

    Names in another script are told one by one. In Latin script a single word proves nothing (`dado`, `oxalis`), so
    the dataset is judged as a whole: it is foreign if half of its words are neither in an English word list, nor
    composed of two words of it, nor known to the bundled model. Without the packages of the extra `bundled` only the
    script is judged.
    """
    found = {name for name in names if _is_of_another_script(name)}
    unknown = {word for name in names for word in _latin_words(name) if not _is_english(word)}
    total = len({word for name in names for word in _latin_words(name)})
    if len(unknown) >= max(_FEWEST, _FOREIGN * total):
        found |= {name for name in names if not unknown.isdisjoint(_latin_words(name))}
    return ForeignNames(dataset=dataset, names=tuple(name for name in names if name in found)) if found else None


def _is_of_another_script(name: str) -> bool:
    """Whether a name has a word without Latin letters; one Greek letter is a sign, one Chinese character a word."""
    return any(
        word.isalpha() and not any(map(_is_latin, word)) and (len(word) > 1 or unicodedata.category(word) == "Lo")
        for word in words(name)
    )


def _is_latin(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith("LATIN")


def _latin_words(name: str) -> tuple[str, ...]:
    if _CAPITALS.fullmatch(name):
        return ()
    return tuple(word for word in words(name) if len(word) >= _SHORTEST and word.isalpha() and _is_latin(word[0]))


def _is_english(word: str) -> bool:
    vocabulary = _read_by_bundled()
    if not vocabulary or word in vocabulary or _is_listed(word):
        return True
    parts = ((word[:place], word[place:]) for place in range(_SHORTEST, len(word) - _SHORTEST + 1))
    return any(_is_listed(first) and _is_listed(second) for first, second in parts)


@lru_cache(maxsize=1 << 14)
def _is_listed(word: str) -> bool:
    from simplemma import is_known

    return bool(is_known(word, lang="en"))


@lru_cache(maxsize=1)
def _read_by_bundled() -> frozenset[str]:
    """The words that the bundled language model knows whole; none where it or the word list is not installed."""
    if find_spec("simplemma") is None:
        return frozenset()
    try:
        return frozenset((minilm_folder() / "vocab.txt").read_text(encoding="utf-8").split())
    except DependencyError:
        return frozenset()
