"""What a person may want to write into a listing: renames and prompts, from what was found."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from metr.inspection.facts import DatasetFacts
from metr.inspection.homonyms import Homonym
from metr.inspection.similar_names import SimilarNames
from metr.inspection.string_similarity import is_abbreviation, words

# What has a vowel, or is as short as tv.
_SPEAKABLE = re.compile(r"[aeiouy]|^[a-z]{1,2}$")


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A rename or a prompt of one name of a dataset, and why."""

    kind: Literal["rename", "prompt"]
    dataset: str
    name: str
    value: str
    why: str


def suggestions_of(
    facts: Sequence[DatasetFacts], near: Sequence[SimilarNames], homonyms: Sequence[Homonym]
) -> tuple[Suggestion, ...]:
    """One suggestion a name at most: to join it with a near one, to keep it apart, or to say what it stands for.

    Of two near names the one with more boxes stays (the written-out one, of an abbreviation and its meaning).
    """
    found: dict[tuple[str, str], Suggestion] = {}
    boxes: dict[str, int] = {}
    for one in facts:
        for name, category in one.names.items():
            boxes[name] = boxes.get(name, 0) + category.count
    for suggestion in (*_kept_apart(homonyms), *_joined(near, boxes), *_written_out(facts)):
        found.setdefault((suggestion.dataset, suggestion.name), suggestion)
    return tuple(found.values())


def is_cryptic(name: str) -> bool:
    """Whether a language model can hardly know what a name stands for: capitals, numbers, consonants alone."""
    letters = "".join(words(name))
    return is_abbreviation(name) or letters.isdigit() or (letters.isascii() and not _SPEAKABLE.search(letters))


def _kept_apart(homonyms: Sequence[Homonym]) -> list[Suggestion]:
    """Equal names need other names to be two categories; for unequal ones a prompt can say what is meant."""
    found = []
    for homonym in homonyms:
        why = f"not the same as {', '.join(homonym.others)} of {homonym.other}? say what it is"
        kind: Literal["rename", "prompt"] = "rename" if homonym.equal else "prompt"
        value = f"{homonym.name} ({' '.join(words(homonym.dataset)) or homonym.dataset})"
        found.append(Suggestion(kind=kind, dataset=homonym.dataset, name=homonym.name, value=value, why=why))
    return found


def _joined(near: Sequence[SimilarNames], boxes: dict[str, int]) -> list[Suggestion]:
    found = []
    for pair in near:
        goes = _that_goes(pair, boxes)
        old, new = pair.names[goes], pair.names[1 - goes]
        why = f"{pair.why}: one category?"
        found += [
            Suggestion(kind="rename", dataset=dataset, name=old, value=new, why=why) for dataset in pair.owners[goes]
        ]
    return found


def _that_goes(pair: SimilarNames, boxes: dict[str, int]) -> int:
    """Which of two near names is to be renamed to the other, 0 or 1."""
    one, two = pair.names
    if pair.kind == "abbreviation":
        return 0 if is_abbreviation(one) else 1
    return 0 if pair.kind == "sight" or boxes[one] < boxes[two] else 1


def _written_out(facts: Sequence[DatasetFacts]) -> list[Suggestion]:
    why = "write out what it stands for"
    return [
        Suggestion(kind="prompt", dataset=one.name, name=name, value=name, why=why)
        for one in facts
        for name in one.names
        if is_cryptic(name)
    ]
