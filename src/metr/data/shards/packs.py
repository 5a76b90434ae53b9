"""Packs: shards that are fetched and unpacked on this disk, because their images cannot be read where they are.

That is so of tables, of tars that are compressed, and in stores that send whole files only. Such a shard is fetched
once and unpacked into a *pack*, one file in which each image is a range again: the unpacked tar, or the bytes of the
images of a table one after the other. Packs lie in `packs` in the cache. All together they take at most
METR_SHARD_CACHE gigabytes: the one that was used longest ago goes first.
"""

import atexit
import bz2
import contextlib
import gzip
import hashlib
import io
import logging
import lzma
import os
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from metr.data.containers.store import Budget
from metr.data.index.cache import locked
from metr.data.shards.stores import StoredFile, fetch, is_url
from metr.data.shards.tables import TABLES, unpack_table
from metr.errors import ConfigError, DataError
from metr.text.cache import cache_root

logger = logging.getLogger(__name__)

# Raised whenever the pack of the same shard would be another one.
VERSION = 1
DEFAULT_GIGABYTES = 50.0
_PACK, _ROWS = "pack", "rows.jsonl"
_PIECE = 1 << 20
# Seconds after which the use of a pack is noted again.
_NOTED_EVERY = 60
_COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)


_TOO_SMALL = "let METR_SHARD_CACHE, in gigabytes, be larger"


def is_compressed(start: bytes) -> bool:
    """Whether a tar that begins so is compressed."""
    return start.startswith((*_COMPRESSED, _ZSTANDARD))


def pack_of(file: StoredFile) -> Path:
    """The pack of a shard, which is fetched and unpacked unless that has been done.

    Raises:
        DataError: the shard is damaged, or the disk is too small.
        StoreError: it cannot be reached.
    """
    place = _place_of(file)
    pack = place / _PACK
    with contextlib.suppress(OSError):
        if time.time() - pack.stat().st_mtime > _NOTED_EVERY:
            os.utime(pack)
        return pack
    try:
        place.mkdir(parents=True, exist_ok=True)
        with locked(place):
            if not pack.exists():
                _make(file, place)
    except OSError as error:
        hint = "free some disk space, or name a folder on another disk in METR_CACHE"
        raise DataError(f"cannot be unpacked: {error}", where=file.address, hint=hint) from None
    return pack


def rows_of(file: StoredFile) -> Path:
    """The rows of a table that has been unpacked, as JSON lines."""
    return pack_of(file).with_name(_ROWS)


def limit() -> int:
    """The bytes that all packs may take.

    Raises:
        ConfigError: METR_SHARD_CACHE is no number.
    """
    text = os.environ.get("METR_SHARD_CACHE") or str(DEFAULT_GIGABYTES)
    try:
        return max(0, int(float(text) * (1 << 30)))
    except (ValueError, OverflowError):
        hint = f"write gigabytes, such as {DEFAULT_GIGABYTES:g}"
        raise ConfigError(f"expected a number, found {text!r}", where="METR_SHARD_CACHE", hint=hint) from None


def _make(file: StoredFile, place: Path) -> None:
    """Fetches and unpacks a shard into the folder of its pack."""
    with _fetched(file, place) as source:
        building, rows = (place / f".{name}-{secrets.token_hex(8)}" for name in (_PACK, _ROWS))
        budget = Budget(file.address, file.size, place)
        budget.expect(file.size)
        try:
            with building.open("wb") as pack:
                if file.address.lower().endswith(TABLES):
                    with rows.open("wb") as lines:
                        unpack_table(source, pack, lines, place.parent, budget)
                    rows.replace(place / _ROWS)
                else:
                    _unpack_tar(file, source, pack, budget)
            _make_room(place.parent, building.stat().st_size, place)
            building.replace(place / _PACK)
        finally:
            building.unlink(missing_ok=True)
            rows.unlink(missing_ok=True)


@contextlib.contextmanager
def _fetched(file: StoredFile, place: Path) -> Iterator[Path]:
    """The shard on this disk: itself, or a copy that goes when it is unpacked."""
    if not is_url(file.address):
        yield Path(file.address)
        return
    for left in place.glob(".*-*"):  # of a process that was killed: whoever unpacks holds the lock
        left.unlink(missing_ok=True)
    copy = place / f".fetched-{secrets.token_hex(8)}{Path(file.address).suffix}"
    try:
        fetch(file, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _unpack_tar(file: StoredFile, source: Path, pack: io.BufferedWriter, budget: Budget) -> None:
    with source.open("rb") as start:
        magic = start.read(6)
    if magic.startswith(_ZSTANDARD):
        what = "compressed by Zstandard, which is not read here"
        raise DataError(what, where=file.address, hint="write the shards as plain tar: images hardly shrink")
    opened = next((one for mark, one in _COMPRESSED.items() if magic.startswith(mark)), None)
    try:
        with opened(source) if opened else source.open("rb") as unpacked:
            while piece := unpacked.read(_PIECE):
                budget.add_bytes(len(piece))
                pack.write(piece)
    except _DAMAGED as error:
        # what came before the damage is read; that the tar ends early is found when it is indexed
        logger.warning("%s: damaged or cut off (%s)", file.address, error)


def _make_room(packs: Path, size: int, own: Path) -> None:
    """Removes the packs that were used longest ago, until one of this size fits in."""
    others = []
    for pack in packs.glob(f"*/{_PACK}"):
        with contextlib.suppress(OSError):  # another process may remove it too
            status = pack.stat()
            if pack.parent != own:
                others.append((status.st_mtime, status.st_size, pack))
    left = sum(one for _, one, _ in others) + size - limit()
    for used, freed, pack in sorted(others):
        if left <= 0:
            return
        pack.unlink(missing_ok=True)
        left -= freed
        if time.time() - used < 3600:
            _tell_too_small()


@cache
def _tell_too_small() -> None:
    message = "shards that were in use an hour ago make room for others, and may be fetched many times: %s, or set %s"
    logger.warning(message, _TOO_SMALL, "loader.shards_at_once")


def _place_of(file: StoredFile) -> Path:
    digest = hashlib.sha256(ascii([VERSION, file.address, file.mark, file.size]).encode()).hexdigest()[:24]
    return cache_folder(cache_root(), "packs") / digest


@lru_cache(maxsize=16)
def cache_folder(root: Path, name: str) -> Path:
    """A folder of a cache, which is made; one for this process alone where the cache cannot be written."""
    folder = root / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{secrets.token_hex(8)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        temporary = Path(tempfile.mkdtemp(prefix=f"metr-{name}-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        logger.warning("%s cannot be written (%s): it is %s until the end", folder, error, temporary)
        return temporary
    return folder
