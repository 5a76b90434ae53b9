"""Catalogues: what each shard of a dataset holds, kept in the cache, so that a shard is read through once.

A shard's catalogue are its rows as JSON lines, and beside them a note with the state of the shard that they were made
from. The note is written last: where the work was stopped, it goes on with the shards that have none. A shard that has
changed has a note that does not fit, and is read again alone.
"""

import hashlib
import io
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from metr.data.containers.huggingface import DamagedShardError
from metr.data.index.cache import locked
from metr.data.shards.packs import cache_folder, is_compressed, pack_of, rows_of
from metr.data.shards.ranges import Shard
from metr.data.shards.samples import rows_of_tar
from metr.data.shards.stores import StoredFile, open_file
from metr.data.shards.tables import TABLES, Row
from metr.errors import DataError, StoreError, counted
from metr.text.cache import cache_root

logger = logging.getLogger(__name__)

# Raised whenever the rows of the same shard would be others.
VERSION = 1
# Seconds between two lines that tell how far the work is.
_TOLD_EVERY = 10.0
_encode = msgspec.json.Encoder().encode


class Note(msgspec.Struct, frozen=True):
    """Says that the catalogue of a shard is complete: the shard, its rows, and what is wrong with it."""

    version: int
    shard: Shard
    rows: int
    damage: str = ""


def catalogue_folder(base: str) -> Path:
    """The folder of the catalogues of a dataset whose shards lie below `base`."""
    digest = hashlib.sha256(ascii(base).encode()).hexdigest()[:24]
    return cache_folder(cache_root(), "shards") / digest / "data"


def catalogue(files: Mapping[Path, StoredFile], called: str) -> dict[Path, Note]:
    """The notes of all shards; a shard that has none, or another state, is read through.

    Args:
        files: The shards by the places of their rows.
        called: What messages call the dataset.

    Raises:
        StoreError: a store does not answer. The shards before are done, and are not read again.
        DataError: the cache cannot be written.
    """
    notes = {rows: note for rows, file in files.items() if (note := _note(rows, file)) is not None}
    left = [rows for rows in files if rows not in notes]
    if not left:
        return notes
    folder = min(files).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(_above(left[0])):
            return notes | _catalogued({rows: files[rows] for rows in left}, len(files), called)
    except OSError as error:
        hint = "free some disk space, or name another folder in METR_CACHE"
        raise DataError(f"the shards' catalogue cannot be written: {error}", where=folder, hint=hint) from None


def first_rows(file: StoredFile, most: int) -> tuple[Row, ...]:
    """The first rows of a tar, a cheap look; none of a tar that is compressed or damaged."""
    found: list[Row] = []
    try:
        with open_file(file) as stream:
            if not is_compressed(_start(stream)):
                for row in rows_of_tar(stream, file.address):
                    found.append(row)
                    if len(found) == most:
                        break
    except DamagedShardError:
        pass
    return tuple(found)


def _catalogued(files: Mapping[Path, StoredFile], total: int, called: str) -> dict[Path, Note]:
    """Reads shards through, one after the other."""
    notes: dict[Path, Note] = {}
    done, told, images = total - len(files), time.monotonic(), 0
    logger.info("%s: reading through %d of %s, once", called, len(files), counted(total, "shard"))
    for rows, file in files.items():
        try:
            note = _note(rows, file) or _read_through(rows, file)  # another process may have read it
        except StoreError as error:
            what = f"{error.what} ({done} of {total} shards are done)"
            raise StoreError(what, where=error.where, hint=error.hint) from None
        if note.damage:
            read = counted(note.rows, "image of it is", "images of it are")
            logger.warning("%s: %s; %s read", file.address, note.damage, read)
        notes[rows], done, images = note, done + 1, images + note.rows
        if time.monotonic() - told > _TOLD_EVERY:
            told = time.monotonic()
            logger.info("%s: %d of %s read, %s", called, done, counted(total, "shard"), counted(images, "image"))
    return notes


def _read_through(target: Path, file: StoredFile) -> Note:
    """Writes the catalogue of a shard."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _note_of(target).unlink(missing_ok=True)
    building = target.with_name(f".{secrets.token_hex(8)}.new")
    shard, count, damage = Shard(file), 0, ""
    try:
        with building.open("wb") as lines:
            try:
                shard, rows = _rows(file)
                for row in rows:
                    lines.write(_encode(row) + b"\n")
                    count += 1
            except DamagedShardError as error:
                damage = error.what
        building.replace(target)
        note = Note(VERSION, shard, count, damage)
        building.write_bytes(msgspec.json.encode(note))
        building.replace(_note_of(target))
    finally:
        building.unlink(missing_ok=True)
    return note


def _rows(file: StoredFile) -> tuple[Shard, Iterator[Row]]:
    """A shard, and its rows; it is unpacked where ranges of it are of no use."""
    if file.address.lower().endswith(TABLES):
        decoder = msgspec.json.Decoder(Row)
        return Shard(file, packed=True), _closing(rows_of(file).open("rb"), lambda lines: map(decoder.decode, lines))
    stream = open_file(file)
    if not is_compressed(_start(stream)):
        return Shard(file), _closing(stream, lambda opened: rows_of_tar(opened, file.address))
    stream.close()
    pack = pack_of(file).open("rb")
    return Shard(file, packed=True), _closing(pack, lambda opened: rows_of_tar(opened, file.address))


def _closing(stream: io.BufferedReader, rows: Callable[[io.BufferedReader], Iterator[Row]]) -> Iterator[Row]:
    with stream:
        yield from rows(stream)


def _start(stream: io.BufferedReader) -> bytes:
    start = stream.read(6)
    stream.seek(0, io.SEEK_SET)
    return start


def _note(rows: Path, file: StoredFile) -> Note | None:
    """The note beside the rows of a shard, if it fits the shard as it is now."""
    try:
        note = msgspec.json.decode(_note_of(rows).read_bytes(), type=Note)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        return None
    return note if note.version == VERSION and note.shard.file == file and rows.is_file() else None


def _note_of(rows: Path) -> Path:
    return rows.with_suffix(".note.json")


def _above(rows: Path) -> Path:
    """The folder of the lock: making it must not change the folders that the index watches."""
    return next(folder.parent for folder in rows.parents if folder.name == "data")
