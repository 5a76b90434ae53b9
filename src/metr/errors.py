"""Errors for people: what was expected, what was found, where, and what to try."""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

# words that a hint lists when none is near
_LISTED = 20


# Control characters but for tabs and ends of lines, marks that turn the direction of text, and halves of characters
# (which stand for bytes of a file's name that are not UTF-8).
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# An underscore between letters is no markup.
_MARKDOWN = re.compile(r"[\\`*\[\]|<&]|(?<!\w)_|_(?!\w)|(?<=_)_")


def shown(text: str) -> str:
    r"""A text from elsewhere, such as a name or a path, as it may be printed and written: `\x1b` in place of an escape.

    Names could else clear a terminal, change its title or show words in another order than they have.
    """
    return _UNSHOWN.sub(_written_out, text)


def counted(number: int | float, one: str, many: str | None = None) -> str:
    """A number of things, as people write it: `1 image`, `2,000 images`, `0.5 epochs`.

    Args:
        number: How many.
        one: What a single one is called.
        many: What several are called; by default `one` with an s.
    """
    figure = f"{number:,}" if isinstance(number, int) else f"{number:,.1f}".removesuffix(".0")
    return f"{figure} {one if figure == '1' else many or one + 's'}"


def markdown(text: str) -> str:
    """A text from elsewhere as it stands in Markdown, in one line: nothing in it is markup, a link or HTML."""
    return _MARKDOWN.sub(_as_entity, " ".join(shown(text).split()))


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _as_entity(found: re.Match[str]) -> str:
    named = {"<": "&lt;", "&": "&amp;"}
    return named.get(found[0], f"\\{found[0]}")


class MetrError(Exception):
    """Base of every error that METR raises on purpose.

    Args:
        what: What was expected and what was found, in one sentence.
        where: The file, key or option that the message is about.
        hint: What to try next.
    """

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        """The whole message: `where: what` and, on a line of its own, the hint."""
        message = self.what if self.where is None else f"{self.where}: {self.what}"
        return message if self.hint is None else f"{message}\n  try: {self.hint}"


class DataError(MetrError):
    """A dataset, annotation file or image is missing, unreadable or contradicts itself."""


class StoreError(MetrError):
    """A file in a store cannot be reached, after several attempts. It is no fault of the data: nothing goes on."""


class ConfigError(MetrError):
    """A configuration names an unknown key or holds a value of the wrong kind."""


class CheckpointError(MetrError):
    """A checkpoint folder is incomplete or does not fit the network it is loaded into."""


class ModelError(MetrError):
    """The network was asked for something that its parts cannot do together."""


class DependencyError(MetrError):
    """An optional package or its files are missing."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: the nearest known ones, or the known words as far as they fit."""
    known = sorted(known)
    near = get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(name) for name in near) + "?"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return "one of " + ", ".join(repr(name) for name in known[:_LISTED]) + more


@contextmanager
def quiet_log(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Hides what a logger says below a level, where it was said before or is about to be."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
