"""Images in shards: ranges of bytes of a shard, or of the copy of it that is unpacked on this disk; as columns, too.

A piece of an index lists its shards in its metadata. Its columns have the number of each image's shard there, and the
range of its bytes; they are null for an image that is a file of its own.
"""

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pyarrow as pa
from jaxtyping import Int

from metr.data.records import ImageBytes
from metr.data.shards.stores import NoRangesError, StoredFile, read_range
from metr.errors import StoreError

logger = logging.getLogger(__name__)

SOURCE_COLUMNS = (("shard", pa.int32()), ("offset", pa.int64()), ("size", pa.int64()))
_SHARDS = b"shards"

# Hosts, as this process found them, that send whole files where a range is asked for.
_without_ranges: set[str] = set()


class Shard(msgspec.Struct, frozen=True):
    """A shard of a dataset. `packed`: its images are ranges of its pack (`metr.data.shards.packs`), not of itself."""

    file: StoredFile
    packed: bool = False


@dataclass(frozen=True, kw_only=True)
class ShardImage:
    """Where an image is: a range of bytes of a shard, or of its pack."""

    shard: Shard
    offset: int
    size: int

    def open(self) -> io.BytesIO:
        """The bytes of the image: one request, unless the shard has to be fetched first.

        Raises:
            StoreError: the shard cannot be reached.
            DataError: the disk is too small to fetch it.
        """
        address = self.shard.file.address
        host = "/".join(address.split("/", 3)[:3])
        if not self.shard.packed and host not in _without_ranges:
            try:
                return io.BytesIO(read_range(address, self.offset, self.size))
            except NoRangesError:
                logger.warning("%s sends whole files only: its shards are fetched into the cache", host)
                _without_ranges.add(host)
        from metr.data.shards.packs import pack_of  # which imports the index, and that this module

        for _ in range(3):  # another process may remove a pack to make room
            try:
                with pack_of(self.shard.file).open("rb") as pack:
                    pack.seek(self.offset)
                    return io.BytesIO(pack.read(self.size))
            except FileNotFoundError:
                continue
        hint = "let METR_SHARD_CACHE, in gigabytes, be larger"
        raise StoreError("its unpacked copy is removed as soon as it is made", where=address, hint=hint)


def shards_of(sources: Iterable[ImageBytes | None]) -> dict[Shard, int]:
    """The shards that images lie in, numbered."""
    found = dict.fromkeys(source.shard for source in sources if isinstance(source, ShardImage))
    return {shard: number for number, shard in enumerate(found)}


def shards_metadata(shards: Iterable[Shard]) -> dict[bytes, bytes] | None:
    """The metadata of a piece that lists its shards."""
    listed = list(shards)
    return {_SHARDS: msgspec.json.encode(listed)} if listed else None


def shards_in(metadata: Mapping[bytes, bytes] | None) -> tuple[Shard, ...]:
    """The shards that the metadata of a piece lists."""
    return msgspec.json.decode((metadata or {}).get(_SHARDS, b"[]"), type=tuple[Shard, ...])


def source_columns(sources: Sequence[ImageBytes | None], shards: Mapping[Shard, int]) -> list[pa.Array]:
    """The columns `SOURCE_COLUMNS` of images."""
    found = [one if isinstance(one, ShardImage) else None for one in sources]
    rows = [(None,) * 3 if one is None else (shards[one.shard], one.offset, one.size) for one in found]
    return [pa.array([row[place] for row in rows], kind) for place, (_, kind) in enumerate(SOURCE_COLUMNS)]


def source_at(batch: pa.RecordBatch, shards: Sequence[Shard], row: int) -> ShardImage | None:
    """Where the image of a row is; None where it is a file of its own."""
    if not shards:
        return None
    shard, offset, size = (batch.column(name)[row].as_py() for name, _ in SOURCE_COLUMNS)
    return None if shard is None else ShardImage(shard=shards[shard], offset=offset, size=size)


def numbers_of_shards(pieces: Iterable[tuple[pa.RecordBatch, Sequence[Shard]]]) -> Int[np.ndarray, "n"] | None:
    """The number of each image's shard, counted in the order in which shards occur; None where an image has none."""
    known: dict[str, int] = {}
    found = []
    for batch, shards in pieces:
        if not shards or batch.column("shard").null_count:
            return None
        numbers = np.array([known.setdefault(shard.file.address, len(known)) for shard in shards])
        found.append(numbers[batch.column("shard").to_numpy()])
    return np.concatenate(found) if found else None
