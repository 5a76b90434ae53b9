"""From a category's name to the sentences that are embedded."""

import re
from collections.abc import Sequence

# General on purpose: a name may come from photographs, microscopy, drawings or scanned pages.
TEMPLATES = (
    "{}",
    "a {}",
    "a photo of a {}",
    "a close-up image of a {}",
    "a {} among other things",
    "a scan or drawing of a {}",
)

_SEPARATORS = re.compile(r"(?<=\w)[_-]+(?=\w)|_")
_SLOT = re.compile(r"(\ban? )?\{\}")
_DETERMINERS = frozenset({"a", "an", "the", "some", "one", "my", "your", "his", "her", "its", "their", "our"})
# The letters whose names begin with a vowel: an RBC, but a WBC.
_SPOKEN_VOWELS = "AEFHILMNORSX"
_SPELT_OUT = re.compile(r"[A-Z]([B-DF-HJ-NP-TV-Z]{1,3})?$")
_SILENT_H = re.compile(r"hour|honest|honou?r|heir", re.IGNORECASE)
_SPOKEN_CONSONANT = re.compile(r"uni([^mn]|$)|us[eu]|uk|ut[ei]|ur[aio]|eu|ewe|one|once", re.IGNORECASE)


def phrases(name: str, prompt: str | None = None, templates: Sequence[str] = TEMPLATES) -> tuple[str, ...]:
    """The sentences for a category: its phrase put into each template.

    Args:
        name: The category's name.
        prompt: What to say instead of the name.
        templates: Each holds `{}`; in `a {}` the article is the one that the phrase needs, or none.
    """
    return filled(phrase_of(name, prompt), templates)


def phrase_of(name: str, prompt: str | None = None) -> str:
    """The words that stand for a category: its prompt as written, or its name with `_` and `-` read as spaces."""
    if prompt is not None:
        return prompt
    return " ".join(_SEPARATORS.sub(" ", name).split()) or name


def filled(phrase: str, templates: Sequence[str]) -> tuple[str, ...]:
    """The phrase put into each template."""
    determined = _with_article(phrase)
    return tuple(_SLOT.sub(lambda slot: determined if slot[1] else phrase, template) for template in templates)


def _with_article(phrase: str) -> str:
    first = phrase.split(maxsplit=1)[0]
    if first.lower() in _DETERMINERS:
        return phrase
    return f"{'an' if _begins_with_vowel_sound(first) else 'a'} {phrase}"


def _begins_with_vowel_sound(word: str) -> bool:
    if _SPELT_OUT.match(word):
        return word[0] in _SPOKEN_VOWELS
    if _SILENT_H.match(word):
        return True
    return word[0].lower() in "aeiou" and not _SPOKEN_CONSONANT.match(word)
