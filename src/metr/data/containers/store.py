"""Containers are unpacked once, into `unpacked` in the cache.

A container has a folder there, which is called after its path. In it lies one copy, which is called after the sizes and
times of change of the container's files, and beside the copy a note that it is complete. A copy is written under
another name and renamed when it is whole. The note has the time of change of every folder in the copy: where files were
removed from it, the container is unpacked anew.
"""

import atexit
import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from metr.data.formats.files import signature
from metr.data.index.cache import locked
from metr.data.index.manifest import packed_name, unpacked_name
from metr.errors import DataError
from metr.text.cache import cache_root

logger = logging.getLogger(__name__)

# Raised whenever the copy of the same container would be another one.
VERSION = 1

# Unpacking stops before the disk has less than this left, in bytes; it is asked whenever so many bytes are written.
_RESERVE = 1 << 28
_ASKED_EVERY = 1 << 26
# Bytes of a container from which it is said before that it is unpacked.
_TOLD_BEFORE = 1 << 28
# A container may unfold to this many times its size, and to this many bytes in any case. Images hardly shrink in one.
_RATIO, _ALWAYS_ALLOWED = 100, 1 << 30
# It may have a file for each so many of its bytes, and so many files in any case.
_BYTES_A_FILE, _FILES_ALWAYS_ALLOWED = 16, 100_000

# Copies of this process that go when it ends, because the cache cannot be written.
_temporary: dict[tuple[str, str], Path] = {}


class _Note(msgspec.Struct):
    """Says that a copy is complete: the container, and the time of change of each folder of the copy."""

    source: str
    folders: dict[str, int]


class Budget:
    """Counts what is written while a container is unpacked, and stops it where that is too much.

    Args:
        source: The container, for messages.
        size: Its bytes.
        folder: Where it is unpacked to.
    """

    def __init__(self, source: Path | str, size: int, folder: Path) -> None:
        self.source, self.size, self.folder = source, size, folder
        self._most_bytes = max(_ALWAYS_ALLOWED, _RATIO * size)
        self._most_files = max(_FILES_ALWAYS_ALLOWED, size // _BYTES_A_FILE)
        self._bytes = self._entries = self._asked_at = 0

    def expect(self, size: int) -> None:
        """Tells how many bytes will be written, as far as that is known before.

        Raises:
            DataError: that is more than is allowed, or than the disk has left.
        """
        self._refuse_bomb(size)
        free = shutil.disk_usage(self.folder).free
        if size + _RESERVE > free:
            what = f"unpacked it takes {shown_size(size)}, and {shown_size(free)} are free in {self.folder.parent}"
            hint = "free some disk space, or name a folder on another disk in METR_CACHE"
            raise DataError(what, where=self.source, hint=hint)

    def add_entry(self) -> None:
        """Counts a file or folder.

        Raises:
            DataError: there are too many.
        """
        self._entries += 1
        if self._entries > self._most_files:
            what = f"more than {self._most_files:,} files for a container of this size: it may be made to fill a disk"
            raise DataError(what, where=self.source, hint=_BY_HAND)

    def add_bytes(self, count: int) -> None:
        """Counts bytes before they are written.

        Raises:
            DataError: they are too many, or the disk is nearly full.
        """
        self._bytes += count
        self._refuse_bomb(self._bytes)
        if self._bytes - self._asked_at >= _ASKED_EVERY:
            self._asked_at = self._bytes
            self.expect(count)

    def _refuse_bomb(self, size: int) -> None:
        if size > self._most_bytes:
            times = f"more than {shown_size(self._most_bytes)}, from {shown_size(self.size)}"
            raise DataError(f"unfolds to {times}: it may be made to fill a disk", where=self.source, hint=_BY_HAND)


_BY_HAND = "where you trust it, unpack it by hand and name the folder"

Unpack = Callable[[Path], None]


def unpacked(source: Path, files: Sequence[Path], unpack: Unpack, *, kind: str) -> Path:
    """The folder with a copy of a container's contents, unpacked unless that has been done.

    Args:
        source: The container as the user names it: a file, or a folder of files.
        files: The files that the copy is made of.
        unpack: Writes the copy into the folder that it gets, an empty one.
        kind: The kind of container. One folder may be several of them.

    Raises:
        DataError: the container is damaged or not safe, or the disk is too small.
    """
    signatures = [(str(path), signature(path)) for path in files]
    state, size = _digest([VERSION, signatures]), sum(max(0, one[0]) for _, one in signatures)
    plain = re.sub(r"[^\w.-]", "_", source.name)[:40]
    place = cache_root() / "unpacked" / f"{plain}-{_digest([str(source), kind])[:12]}"
    found = _complete(place, state) or _temporary.get((str(place), state))
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            place.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(place))
        except OSError as error:
            temporary = Path(tempfile.mkdtemp(prefix="metr-unpacked-"))
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)
            logger.warning("%s cannot be written (%s): %s is unpacked for this run only", place, error, source)
            _temporary[str(place), state] = copy = _unpack(source, unpack, temporary, state, size)
            return copy
        return _complete(place, state) or _unpack(source, unpack, place, state, size)


def write_file(path: Path, data: bytes, budget: Budget) -> None:
    """Writes a file of a copy, and counts it.

    Raises:
        DataError: the disk is nearly full.
        OSError: it cannot be written.
    """
    budget.add_entry()
    budget.add_bytes(len(data))
    path.write_bytes(data)


def shown_size(size: int) -> str:
    """A number of bytes for people."""
    for unit, name in ((1 << 40, "TB"), (1 << 30, "GB"), (1 << 20, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{max(1, round(size / 1024))} kB" if size else "0 bytes"


def _unpack(source: Path, unpack: Unpack, place: Path, state: str, size: int) -> Path:
    """Unpacks into a new folder in `place`, then moves it to its name. Copies of earlier states are removed."""
    if size > _TOLD_BEFORE:
        logger.info("%s: %s are being unpacked into %s, once; that takes a while", source, shown_size(size), place)
    _remove_others(place, source)
    copy, building = place / state, place / f".building-{secrets.token_hex(8)}"
    try:
        building.mkdir()
        unpack(building)
        unfolded = sum(path.lstat().st_size for path in _files_below(building))
        note = _Note(source=packed_name(str(source)), folders=_folders(building))
        building.rename(copy)
        written = place / f".note-{secrets.token_hex(8)}"
        written.write_bytes(msgspec.json.encode(note))
        written.replace(_note_of(copy))
    except OSError as error:
        hint = "look at that file"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            hint = "free some disk space, or name a folder on another disk in METR_CACHE"
        raise DataError(f"cannot be unpacked: {error}", where=source, hint=hint) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    logger.info("%s: unpacked once, %s in %s", source, shown_size(unfolded), copy)
    return copy


def _remove_others(place: Path, source: Path) -> None:
    """Removes copies of other states of a container, and what is left where unpacking was killed."""
    for entry in sorted(place.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
            if not entry.name.startswith("."):
                logger.info("%s has changed: the earlier copy of its contents is removed", source)
        elif entry.suffix == ".json" or entry.name.startswith(".note-"):
            entry.unlink(missing_ok=True)


def _complete(place: Path, state: str) -> Path | None:
    """The copy of this state, if it is there as it was written."""
    copy = place / state
    try:
        note = msgspec.json.decode(_note_of(copy).read_bytes(), type=_Note)
    except (OSError, msgspec.MsgspecError):
        return None
    unchanged = all(signature(copy / unpacked_name(name))[1] == then for name, then in note.folders.items())
    return copy if unchanged else None


def _note_of(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.json")


def _folders(root: Path) -> dict[str, int]:
    """The folders of a copy, "" for itself, with their times of change in nanoseconds."""
    below = (Path(folder) for folder, _, _ in os.walk(root))
    names = {folder: folder.relative_to(root).as_posix() for folder in below}
    return {packed_name("" if name == "." else name): signature(folder)[1] for folder, name in names.items()}


def _files_below(root: Path) -> Iterator[Path]:
    return (Path(folder, name) for folder, _, names in os.walk(root) for name in names)


def _digest(values: object) -> str:
    return hashlib.sha256(ascii(values).encode()).hexdigest()[:24]
