"""A dataset's files: found by listings, never outside of the dataset's folder, and remembered for the index.

A path in an annotation file must not lead out of the dataset's folder. Symbolic links in that folder are followed,
wherever they lead: whoever put the dataset together made them.
"""

import contextlib
import io
import logging
import os
import posixpath
import stat
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

from metr.data.images import COMMON_SUFFIXES, SUFFIXES
from metr.data.regular_files import is_hidden, open_regular, read_regular
from metr.errors import DataError

logger = logging.getLogger(__name__)

# The mark that Windows writes before UTF-8.
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MARKS_OF_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# Recognising a format looks at this many entries of a folder at most: enough to find annotations among images.
_GLANCE = 20_000
# Images are looked for in this many folders of a dataset at most, and this deep.
_FOLDERS, _DEPTH = 10_000, 8


class OutsideError(ValueError):
    """A path leads out of the dataset's folder."""


class Files:
    """Looks into a dataset's folder. Every directory is listed once, instead of asking for single files.

    Paths are relative to `root`, with slashes. `touched` are the files and directories that were read, with their
    signatures: while those stay the same, reading again gives the same.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._roots = (root, Path(os.path.realpath(root)))
        self.touched: dict[str, Signature] = {}
        self._listings: dict[str, frozenset[str]] = {}
        self._loose: dict[str, dict[str, str]] = {}
        self._stems: dict[str, dict[str, str]] = {}
        self._everywhere: dict[str, list[str]] | None = None
        self._claims: dict[str, tuple[str, str]] = {}

    def read(self, path: str) -> bytes:
        """The bytes of an annotation file.

        Raises:
            DataError: it cannot be read.
        """
        self.touch(path)
        try:
            return read_regular(self.root / path)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=self.root / path) from None

    def peek(self, path: str) -> bytes:
        """The bytes of a file that is read later on; none where it cannot be read."""
        try:
            return read_regular(self.root / path)
        except OSError:
            return b""

    def touch(self, path: str) -> None:
        """Records that the result depends on a file or directory."""
        self.touched[path] = signature(self.root / path)

    def listing(self, folder: str) -> frozenset[str]:
        """The names in a directory but hidden ones; none where there is no such directory."""
        found = self._listings.get(folder)
        if found is None:
            self.touch(folder)
            try:
                with os.scandir(self.root / folder) as entries:
                    found = frozenset(entry.name for entry in entries if not is_hidden(entry.name))
            except (OSError, ValueError):
                found = frozenset()
            self._listings[folder] = found
        return found

    def find(self, name: str, folders: Sequence[str]) -> str | None:
        """The image `name`, relative to the first of `folders` that has it; None where none has it.

        Names that differ in case or in how accents are encoded are the same; a name without an image's suffix is
        looked for with any.

        Raises:
            OutsideError: the name leads out of the dataset's folder.
        """
        for option in [name, name.replace("\\", "/")] if "\\" in name else [name]:
            places = []
            for folder, base in self._places(option, folders):
                named = is_hidden(base) and there(self.root / folder / base, Path.is_file)  # only what is named itself
                if named or base in self.listing(folder):
                    return posixpath.join(folder, base)
                places.append((folder, base))
            for folder, base in places:
                near = self._loosely(folder).get(fold(base))
                if near is None and not is_image(base):
                    near = self._of_stem(base, folder)
                if near is not None:
                    return posixpath.join(folder, near)
            if len(places) < len(folders):
                raise OutsideError(name)
        return None

    def called(self, base: str) -> list[str]:
        """All images of the dataset with this name, in any case; with any suffix, where the name has no image's."""
        if self._everywhere is None:
            self._everywhere = {}
            for path in self._all_images():
                self._everywhere.setdefault(fold(_stem(path)), []).append(path)
        if not is_image(base):
            return self._everywhere.get(fold(base), [])
        found = self._everywhere.get(fold(_stem(base)), [])
        return [path for path in found if fold(posixpath.basename(path)) == fold(base)]

    def claim(self, path: str, name: str, where: str) -> bool:
        """Notes that a name in the file `where` was taken to mean an image; False if another name of another file was.

        Names of one file are compared there, when all of them are known.
        """
        first, place = self._claims.setdefault(path, (name, where))
        return first == name or place == where

    def _all_images(self) -> list[str]:
        """The images in all folders but hidden ones; none where there are too many folders to look into."""
        images, folders = [], [("", 0)]
        for number, (folder, depth) in enumerate(folders):  # grows on the way
            if number == _FOLDERS:
                return []
            images += self.images(folder)
            for entry in scan(self.root / folder) if depth < _DEPTH else ():
                skipped = is_hidden(entry.name) or entry.name.startswith("__") or is_image(entry.name)
                if not skipped and _can_be_asked(entry) and entry.is_dir() and not _leads_up(Path(entry.path)):
                    folders.append((posixpath.join(folder, entry.name), depth + 1))
        return sorted(images)

    def find_stem(self, stem: str, folders: Sequence[str], named: str = "") -> str | None:
        """The image of this name and any suffix in the first of `folders` that has it; None where none has it.

        Where images differ in their suffix alone, the one called `named` is taken.
        """
        base = posixpath.basename(named.replace("\\", "/"))
        if posixpath.splitext(base)[0] == stem and is_image(base):
            for folder in folders:
                if base in self.listing(folder):
                    return posixpath.join(folder, base)
        for folder, base in self._places(stem, folders):
            found = self._of_stem(base, folder)
            if found is not None:
                return posixpath.join(folder, found)
        return None

    def _places(self, name: str, folders: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Directory and base name of `name` in each of `folders`, but for those that it leads out of."""
        for folder in folders:
            with contextlib.suppress(OutsideError):
                yield posixpath.split(self.resolve(name, folder))

    def resolve(self, name: str, folder: str = "") -> str:
        """A path relative to the dataset's folder, for a name as an annotation file in `folder` gives it.

        Raises:
            OutsideError: it leads out of the dataset's folder.
        """
        if posixpath.isabs(name):
            root = next((root for root in self._roots if Path(name).is_relative_to(root)), None)
            if root is None:
                raise OutsideError(name)
            name, folder = Path(name).relative_to(root).as_posix(), ""
        path = posixpath.normpath(posixpath.join(folder, name))
        if path == ".." or path.startswith("../") or path[1:3] in {":\\", ":/"}:
            raise OutsideError(name)
        return "" if path == "." else path

    def images(self, folder: str) -> list[str]:
        """The images in a directory, sorted."""
        return sorted(posixpath.join(folder, name) for name in self.listing(folder) if is_image(name))

    def _loosely(self, folder: str) -> dict[str, str]:
        if folder not in self._loose:
            self._loose[folder] = {fold(name): name for name in sorted(self.listing(folder), reverse=True)}
        return self._loose[folder]

    def _of_stem(self, stem: str, folder: str) -> str | None:
        """The first image in a folder with this name and any suffix, else one whose name differs in case."""
        if folder not in self._stems:
            # The last of a stem counts: the common kind of a pair that a phone saved (.jpg, .heic), else the first.
            names = sorted(filter(is_image, self.listing(folder)), reverse=True)
            names.sort(key=lambda name: posixpath.splitext(name)[1].lower() in COMMON_SUFFIXES)
            stems = {fold(posixpath.splitext(name)[0]): name for name in names}
            self._stems[folder] = stems | {posixpath.splitext(name)[0]: name for name in names}
        found = self._stems[folder]
        return found.get(stem) or found.get(fold(stem))


def there(path: Path, kind: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether a path exists and is of a kind (`Path.is_file`, `Path.is_dir`); False where that cannot be found out."""
    try:
        return kind(path)
    except (OSError, ValueError):  # no permission, a name too long, a zero byte
        return False


def expanded(path: str | Path) -> Path:
    """A path with the home folder in place of `~`; unchanged where there is no such user (pathlib raises an error)."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


Signature = tuple[int, int, int]
"""Of a file: its size, and the times of its last change as its owner may set it (mtime) and may not (ctime)."""


def signature(path: Path) -> Signature:
    """What changes when a file or directory is changed; (-1, 0, 0) where there is nothing. A directory's size is 0."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return -1, 0, 0
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return size, status.st_mtime_ns, status.st_ctime_ns


def is_image(name: str) -> bool:
    """Whether a file's name ends like an image's."""
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """All entries of a directory; none where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def glance(folder: Path) -> list[os.DirEntry[str]]:
    """The first entries of a directory but hidden ones, sorted by name; none where it cannot be listed.

    Links whose target cannot be looked at are left out: asking what they are would be an error.
    """
    try:
        with os.scandir(folder) as entries:
            shown = (entry for entry in entries if not is_hidden(entry.name))
            return sorted(filter(_can_be_asked, islice(shown, _GLANCE)), key=lambda entry: entry.name)
    except OSError:
        return []


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """The files among the first entries of a directory whose names end so (in lower case), sorted by name."""
    return [Path(entry.path) for entry in glance(folder) if entry.name.lower().endswith(suffixes) and entry.is_file()]


def folders_in(folder: Path) -> list[Path]:
    """The directories among the first entries of a directory, sorted by name."""
    return [Path(entry.path) for entry in glance(folder) if entry.is_dir()]


def folders_within(root: Path, depth: int) -> Iterator[Path]:
    """`root` and the directories below it, at most `depth` deep, parents first.

    Hidden ones are left out, and links that lead back up.
    """
    yield root
    if depth > 0:
        for folder in folders_in(root):
            if not folder.name.startswith("__") and not _leads_up(folder):
                yield from folders_within(folder, depth - 1)


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _can_be_asked(entry: os.DirEntry[str]) -> bool:
    try:
        entry.is_dir()
    except OSError:  # a link to itself, or into a folder without permission
        return False
    return True


def _leads_up(folder: Path) -> bool:
    """Whether a directory is a link to one that it lies in."""
    return folder.is_symlink() and Path(os.path.realpath(folder.parent)).is_relative_to(os.path.realpath(folder))


def start_of(path: Path, count: int) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(count)
    except OSError as error:
        _tell_unread(path, str(error.strerror))
        return b""


def text_start_of(path: Path, count: int) -> bytes:
    """The first characters of a file of text as UTF-8, from so many bytes at most; none where it cannot be read."""
    return utf_8(start_of(path, count))


def ends_of(path: Path, count: int) -> bytes:
    """The first and the last bytes of a file, so many of each at most; none where it cannot be read."""
    try:
        with open_regular(path) as file:
            start = file.read(count)
            file.seek(max(len(start), path.stat().st_size - count))
            return start + file.read()
    except OSError as error:
        _tell_unread(path, str(error.strerror))
        return b""


@lru_cache(maxsize=1024)
def _tell_unread(path: Path, why: str) -> None:
    """Warns once of a file that is left out because it cannot be looked into; a missing one is none."""
    if there(path):
        logger.warning("%s is left out: %s", path, why)


def encoding_of(data: bytes) -> str:
    """The encoding of text: UTF-8 where the bytes are that, else Windows-1252, else Latin-1, which all bytes are.

    UTF-16 is told by its mark, or by the zero bytes of its first letters.
    """
    for encoding in (*_utf_16(data[:64]), "utf-8-sig", "cp1252"):
        try:
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return encoding
    return "latin-1"


def utf_8(data: bytes) -> bytes:
    """The bytes of a text as UTF-8 without a byte order mark. Those of UTF-16, as PowerShell writes it, are converted.

    Half a character at the end, where only the start of a file was read, is left out.
    """
    if encodings := _utf_16(data[:64]):
        return data.decode(encodings[0], errors="ignore").removeprefix("\ufeff").encode(errors="replace")
    return data.removeprefix(BYTE_ORDER_MARK)


def open_json(path: Path) -> io.BufferedIOBase:
    """Opens a JSON file as UTF-8; one in UTF-16 is converted in memory.

    Raises:
        OSError: as `open_regular`.
    """
    file = open_regular(path)
    converted = _utf_16(file.read(64))
    file.seek(0)
    if not converted:
        return file
    with file:
        return io.BytesIO(utf_8(file.read()))


def _utf_16(start: bytes) -> tuple[str, ...]:
    if start.startswith(_MARKS_OF_UTF_16):
        return ("utf-16",)
    even, odd = start[::2], start[1::2]
    if len(odd) < 2 or (any(even) and any(odd)):
        return ()
    return ("utf-16-le",) if all(even) else ("utf-16-be",) if all(odd) else ()


def decoded(data: bytes) -> str:
    """The text of some bytes. No two differing bytes become the same character, so that names stay apart."""
    return data.decode(encoding_of(data))


def fold(name: str) -> str:
    """A name without the differences that file systems ignore: case, and how accents are encoded."""
    return unicodedata.normalize("NFC", name).casefold()
