"""What is added to annotation files, and how the text of a file is edited."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metr.data.formats.base import Reader
from metr.data.formats.files import BYTE_ORDER_MARK, encoding_of
from metr.data.formats.written import WrittenBox


class CannotAppendError(ValueError):
    """The files are not written as those that boxes can be added to; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Boxes to add to an image: `path` is that of the image and `where` the place of its annotations, as readers say.

    The boxes are in pixels of `size` (height, width), which is that of the image's record.
    """

    path: str
    where: str
    size: tuple[int, int]
    boxes: tuple[WrittenBox, ...]


@dataclass(frozen=True, kw_only=True)
class Appending:
    """What an appender works with; see `append`."""

    reader: Reader
    root: Path
    additions: tuple[Addition, ...]
    images: Mapping[str, str]


Edits = list[tuple[int, str]]
"""Where in a text something is inserted, and what."""


def names_of(additions: Sequence[Addition]) -> list[str]:
    """The names of the boxes, each once, in their order."""
    return list(dict.fromkeys(box.name for one in additions for box in one.boxes))


def by_file(additions: Sequence[Addition], mark: str) -> Mapping[str, list[tuple[str, Addition]]]:
    """The additions by their annotation file, each with what its place says after `mark` ("image 7": "7")."""
    found: dict[str, list[tuple[str, Addition]]] = defaultdict(list)
    for one in additions:
        file, between, number = one.where.rpartition(mark)
        if not between:
            raise CannotAppendError(f"the place of its annotations is not known: {one.where}")
        found[file].append((number, one))
    return found


def read_text(path: Path) -> tuple[str, str]:
    """The text of a file with its line ends as they are, and its encoding, which ASCII is a part of."""
    data = path.read_bytes()
    encoding = encoding_of(data)
    if encoding.startswith("utf-16"):
        raise CannotAppendError(f"{path.name} is UTF-16")
    if encoding == "utf-8-sig" and not data.startswith(BYTE_ORDER_MARK):
        encoding = "utf-8"
    return data.decode(encoding), encoding


def write_text(
    path: Path, text: str, encoding: str, edits: Sequence[tuple[int, str]] = (), *, errors: str = "strict"
) -> None:
    """Writes a text with all edits, which are sorted here."""
    parts, start = [], 0
    for place, inserted in sorted(edits, key=lambda edit: edit[0]):
        parts += [text[start:place], inserted]
        start = place
    try:
        path.write_bytes("".join([*parts, text[start:]]).encode(encoding, errors))
    except UnicodeEncodeError:
        raise CannotAppendError(f"{path.name} is {encoding}, which cannot say all names") from None
