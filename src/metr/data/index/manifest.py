"""What an index folder keeps beside its Arrow files: names, issues, and the files that it was built from.

Names of files need not be UTF-8, so they are packed to be stored, and made legible to be shown.
"""

import os
import zlib
from itertools import islice
from pathlib import Path

import msgspec

from metr.data.formats.files import Signature, signature

# A character that no file's name has: it marks packed names. Annotation files may name files that have it.
_MARK = "\0"

# Most images whose size was measured that an index watches for changes. Opening it asks the disk for each of them.
FINGERPRINTS = 20_000

# Bytes of a file that are read at once.
_BLOCK = 1 << 22


class IssueSummary(msgspec.Struct, frozen=True):
    """The issues of one split: how many of each kind, and (kind, where, detail) of the first of each."""

    counts: dict[str, int]
    first: list[tuple[str, str, str]]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of an index folder, as `manifest.json` stores it.

    `names` are the labels of the Arrow files in their order, `counts` the numbers of their boxes in all splits.
    `touched` are the paths that the reader depended on, relative to the dataset's folder (see `packed_name`), with
    their signatures. `checksums` are those of the Arrow files, `checksum` is that of the manifest itself.
    The issues of "" concern the dataset as a whole. `held_out` says that "val" is a seeded part of the dataset's own
    train split. `mentioned` are the names of points and lines alone: they are no categories.
    """

    names: list[str]
    parents: dict[str, str]
    counts: list[int]
    splits: list[str]
    issues: dict[str, IssueSummary]
    touched: dict[str, Signature]
    checksums: dict[str, int]
    held_out: bool = False
    mentioned: list[str] = []
    checksum: int = 0

    def sealed(self) -> "Manifest":
        """The same with its checksum."""
        bare = msgspec.structs.replace(self, checksum=0)
        return msgspec.structs.replace(bare, checksum=zlib.crc32(msgspec.json.encode(bare)))


class Fingerprints:
    """Size and time of change of images whose size was measured because no annotation file states it.

    A folder's time of change does not show that an image was changed in place, so images are watched themselves. Of
    many images only evenly spaced ones are: if all are changed, for example scaled, this is noticed without asking for
    millions of files whenever the index is opened. If a single changed image is missed, its boxes are fitted to it when
    it is read.
    """

    def __init__(self) -> None:
        self.signatures: dict[str, Signature] = {}
        self._seen, self._step = 0, 1

    def add(self, path: str, root: Path) -> None:
        """Watches an image, unless enough images near it are watched; `path` is relative to `root`."""
        if self._seen % self._step == 0:
            self.signatures[path] = signature(root / path)
            if len(self.signatures) > FINGERPRINTS:
                self.signatures = dict(islice(self.signatures.items(), 0, None, 2))
                self._step *= 2
        self._seen += 1


def encodable(text: str) -> bool:
    """Whether a text can be stored as it is."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown_name(text: str) -> str:
    r"""A text with the bytes that are not UTF-8 as numbers, `\xe9`."""
    if text.isascii() or encodable(text):
        return text
    try:
        return os.fsencode(text).decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half a character that no file's name has
        return text.encode(errors="backslashreplace").decode()


def checksum_of(path: Path) -> int:
    """The CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found = zlib.crc32(block, found)
    return found


def packed_name(text: str) -> str:
    """A path as it can be stored; `unpacked_name` gives it back."""
    if not text.startswith(_MARK) and (text.isascii() or encodable(text)):
        return text
    return _MARK + text.encode(errors="surrogatepass").hex()


def unpacked_name(text: str) -> str:
    """The path that `packed_name` made storable."""
    return bytes.fromhex(text[1:]).decode(errors="surrogatepass") if text.startswith(_MARK) else text
