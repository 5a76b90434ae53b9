"""Annotations in a memory-mapped Arrow file: written once, opened without reading, shared by all worker processes.

A file holds one split, one row for each image with a list of its boxes. Processes that open it map the same pages. A
record is made from slices of the columns when it is asked for.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, UInt8

from metr.data.index.label_map import LabelMap
from metr.data.records import DataIssue, ImageRecord
from metr.data.shards.ranges import (
    SOURCE_COLUMNS,
    Shard,
    ShardImage,
    numbers_of_shards,
    shards_in,
    shards_metadata,
    shards_of,
    source_at,
    source_columns,
)
from metr.errors import DataError

__all__ = ["VERSION", "AnnotationIndex", "LabelMap", "SplitCounts", "divide_index", "write_index"]

# Raised whenever the columns change: indices of other versions are built again.
VERSION = 4

# Images that are in memory at once while an index is written, and the rows of one piece of its file. Opening a file
# reads a page of each piece from the disk, so millions of images should be a few hundred pieces.
_PIECE = 16_384

_BOX = pa.struct(
    [
        ("box", pa.list_(pa.float32(), 4)),
        ("label", pa.int32()),
        ("area", pa.float32()),
        ("ignore", pa.uint8()),
    ]
)
_SCHEMA = pa.schema(
    [
        ("image_id", pa.utf8()),
        ("id_is_number", pa.uint8()),
        ("path", pa.utf8()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("boxes", pa.list_(_BOX)),
        ("annotated", pa.list_(pa.int32())),
        ("unknown", pa.list_(pa.int32())),
        *SOURCE_COLUMNS,
    ]
)


@dataclass(frozen=True)
class _Piece:
    """Views of one record batch: a row's boxes are `starts[row]` to `starts[row + 1]`.

    `annotated` and `unknown` are the columns of labels, None if they are empty. `shards` are those that images lie in.
    """

    batch: pa.RecordBatch
    starts: Int[np.ndarray, "n"]
    boxes: Float[np.ndarray, "m 4"]
    labels: Int[np.ndarray, "m"]
    areas: Float[np.ndarray, "m"]
    ignore: UInt8[np.ndarray, "m"]
    annotated: pa.Array | None
    unknown: pa.Array | None
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Counts of a split: images, images without an object, and objects and ignored boxes of each category.

    Of the ignored boxes, `regions` are of every category.
    """

    images: int
    empty: int
    boxes: Int[np.ndarray, "c"]
    ignored: Int[np.ndarray, "c"]
    regions: int = 0

    @property
    def ignored_boxes(self) -> int:
        """How many boxes of the files are ignored, those of every category counted once."""
        return int((self.ignored - self.regions).sum()) + self.regions


class AnnotationIndex:
    """One split of one dataset, read from an Arrow file (see `write_index`).

    Only the path is pickled: another process maps the file again.

    Args:
        path: The Arrow file.
        labels: The dataset's categories, and how the file's labels map to them.
        name: The dataset's name.
        split: "train", "val", "test", or another that the dataset has.
        format: The format that the annotations came from.
        issues: The first issues of each kind that were found while the dataset was read.

    Raises:
        DataError: the file is missing or is no such index.
    """

    def __init__(
        self,
        path: Path,
        labels: LabelMap,
        *,
        name: str = "",
        split: str = "",
        format: str = "index",  # noqa: A002  (the name that `Annotations` has)
        issues: Sequence[DataIssue] = (),
    ) -> None:
        self.path, self.labels = path, labels
        self.name, self.split, self.format, self.issues = name, split, format, issues
        self.categories = labels.categories
        self._map()

    def renamed(self, names: Mapping[str, str]) -> "AnnotationIndex":
        """The same split with other names for some categories."""
        labels = replace(self.labels, categories=tuple(names.get(name, name) for name in self.categories))
        return AnnotationIndex(
            self.path, labels, name=self.name, split=self.split, format=self.format, issues=self.issues
        )

    def _map(self) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        except (OSError, pa.ArrowException) as error:
            what, hint = f"not readable as an index of annotations: {error}", "remove the cache folder and run again"
            raise DataError(what, where=self.path, hint=hint) from None
        pieces = [reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches)]
        self._batches, self._metadata = [piece.batch for piece in pieces], [piece.custom_metadata for piece in pieces]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._root = Path(os.fsdecode(reader.schema.metadata[b"root"]))
        self._views: dict[int, _Piece] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _MAPPED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> ImageRecord:
        """The annotations of image `index`; negative ones count from the end.

        Raises:
            IndexError: there is no such image.
        """
        return self._everywhere(self._record(index, mapped=True))

    def stored(self, index: int) -> ImageRecord:
        """The same with the labels as the file has them, also in `annotated` and `unknown`.

        Raises:
            IndexError: there is no such image.
        """
        return self._record(index, mapped=False)

    def _record(self, index: int, *, mapped: bool) -> ImageRecord:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index = index % len(self)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        piece, row = self._piece(number), index - int(self._starts[number])
        its_boxes = slice(int(piece.starts[row]), int(piece.starts[row + 1]))
        text = piece.batch.column(0)[row].as_py()
        labels = piece.labels[its_boxes]
        annotated, unknown = (
            None if column is None else column[row].as_py() for column in (piece.annotated, piece.unknown)
        )
        return ImageRecord(
            image_id=int(text) if piece.batch.column(1)[row].as_py() else text,
            path=self._root / piece.batch.column(2)[row].as_py(),
            height=piece.batch.column(3)[row].as_py(),
            width=piece.batch.column(4)[row].as_py(),
            boxes=piece.boxes[its_boxes].copy(),
            labels=labels.astype(np.int64),
            areas=piece.areas[its_boxes].copy(),
            ignore=piece.ignore[its_boxes].astype(bool),
            annotated=self.labels.annotated_by(annotated, unknown or ()) if mapped else _tuple(annotated),
            unknown=() if mapped else tuple(unknown or ()),
            source=source_at(piece.batch, piece.shards, row),
        )

    @property
    def unknown_names(self) -> tuple[str, ...]:
        """Names of which nothing is known in any image, although other datasets may annotate them."""
        return self.labels.unknown_names

    def _everywhere(self, record: ImageRecord) -> ImageRecord:
        """The record without boxes of dropped names, and with regions as ignored boxes of what is annotated there."""
        labels, is_region = record.labels, self.labels.is_region[record.labels]
        record = replace(record, labels=self.labels.rows[labels])
        if (record.labels >= 0).all():
            return record
        rows = range(len(self.categories)) if record.annotated is None else record.annotated
        known, regions = np.flatnonzero(record.labels >= 0), np.flatnonzero(is_region)
        order = np.concatenate([known, np.repeat(regions, len(rows))])
        labels = np.concatenate([record.labels[known], np.tile(np.array(rows, dtype=np.int64), len(regions))])
        return replace(
            record,
            boxes=record.boxes[order],
            labels=labels,
            areas=record.areas[order],
            ignore=record.ignore[order] | (np.arange(len(order)) >= len(known)),
        )

    def __iter__(self) -> Iterator[ImageRecord]:
        return (self[index] for index in range(len(self)))

    def relative_paths(self) -> list[str]:
        """The paths of all images, relative to the dataset's folder, with slashes."""
        return [path for batch in self._batches for path in batch.column("path").to_pylist()]

    def sources(self) -> Iterator[ShardImage | None]:
        """Where the bytes of each image are; None for files."""
        for number, batch in enumerate(self._batches):
            yield from (source_at(batch, self._piece(number).shards, row) for row in range(batch.num_rows))

    @property
    def told_by_image(self) -> bool:
        """Whether the files say of each image which categories are annotated in it, for at least one image."""
        return any(batch.column("annotated").null_count < batch.num_rows for batch in self._batches)

    def repeated_ids(self) -> bool:
        """Whether two images have one id."""
        column = pa.chunked_array([batch.column("image_id") for batch in self._batches], pa.utf8())
        return len(column.unique()) < len(self)

    def counts(self) -> SplitCounts:
        """What the split holds, counted on the columns without making records."""
        boxes, ignored = (np.zeros(len(self.categories), dtype=np.int64) for _ in range(2))
        empty = regions = 0
        for number in range(len(self._batches)):
            piece = self._piece(number)
            rows = self.labels.rows[piece.labels]
            counted, named = (piece.ignore == 0) & (rows >= 0), rows >= 0
            regions += int(self.labels.is_region[piece.labels].sum())
            boxes += np.bincount(rows[counted], minlength=len(boxes))
            ignored += np.bincount(rows[~counted & named], minlength=len(boxes))
            before = np.concatenate([[0], np.cumsum(counted)])
            empty += int((before[piece.starts[1:]] == before[piece.starts[:-1]]).sum())
        return SplitCounts(images=len(self), empty=empty, boxes=boxes, ignored=ignored + regions, regions=regions)

    def objects(self) -> Iterator[tuple[Int[np.ndarray, "p"], Int[np.ndarray, "p"]]]:
        """Image and category of every object, a few thousand images at a time, without making records."""
        for number in range(len(self._batches)):
            piece = self._piece(number)
            categories = self.labels.rows[piece.labels].astype(np.int64)
            images = np.repeat(np.arange(piece.batch.num_rows), np.diff(piece.starts)) + self._starts[number]
            counted = (piece.ignore == 0) & (categories >= 0)
            yield images[counted], categories[counted]

    def _piece(self, number: int) -> _Piece:
        if number not in self._views:
            self._views[number] = _view(self._batches[number], self._metadata[number])
        return self._views[number]

    def shard_numbers(self) -> Int[np.ndarray, "n"] | None:
        """The number of the shard of each image; None where not all images lie in shards."""
        return numbers_of_shards([(batch, self._piece(number).shards) for number, batch in enumerate(self._batches)])


_MAPPED = frozenset({"_batches", "_metadata", "_starts", "_root", "_views"})


def write_index(path: Path, images: Iterable[ImageRecord], *, root: Path) -> Int[np.ndarray, "c"]:
    """Writes records to an Arrow file, a few thousand at a time, and counts the boxes of each label.

    Args:
        path: The file to write.
        images: The records. Their images lie below `root`.
        root: The dataset's folder.

    Raises:
        OSError: the file cannot be written.
    """
    counts = np.zeros(0, dtype=np.int64)
    stream = iter(images)
    schema = _SCHEMA.with_metadata({"root": os.fsencode(root)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while piece := list(islice(stream, _PIECE)):
            shards = shards_of([image.source for image in piece])
            batch = _batch(piece, root, schema, shards)
            writer.write_batch(batch, shards_metadata(shards))
            found = np.bincount(batch.column("boxes").values.field("label").to_numpy())
            counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
            counts[: len(found)] += found
    return counts


def divide_index(path: Path, chosen: Bool[np.ndarray, "n"], *, into: tuple[Path, Path]) -> None:
    """Divides an index in two: the rows that are not `chosen`, and those that are."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    for target, mask in zip(into, (~chosen, chosen), strict=True):
        start = 0
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, reader.schema) as writer:
            for number in range(reader.num_record_batches):
                batch, metadata = reader.get_batch_with_custom_metadata(number)
                writer.write_batch(batch.filter(pa.array(mask[start : start + batch.num_rows])), metadata)
                start += batch.num_rows


def _batch(images: Sequence[ImageRecord], root: Path, schema: pa.Schema, shards: Mapping[Shard, int]) -> pa.RecordBatch:
    above = (root / "x").as_posix()[:-1]  # with the slash, also where the root is that of the file system
    offsets = np.cumsum([0, *(len(image.boxes) for image in images)], dtype=np.int32)
    boxes = np.concatenate([image.boxes for image in images]).astype(np.float32)
    values = pa.StructArray.from_arrays(
        [
            pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1)), 4),
            pa.array(np.concatenate([image.labels for image in images]).astype(np.int32)),
            pa.array(np.concatenate([image.areas for image in images]).astype(np.float32)),
            pa.array(np.concatenate([image.ignore for image in images]).astype(np.uint8)),
        ],
        fields=list(_BOX),
    )
    columns = [
        pa.array([str(image.image_id) for image in images], pa.utf8()),
        pa.array([isinstance(image.image_id, int) for image in images]).cast(pa.uint8()),
        pa.array([image.path.as_posix().removeprefix(above) for image in images], pa.utf8()),
        pa.array([image.height for image in images], pa.int32()),
        pa.array([image.width for image in images], pa.int32()),
        pa.ListArray.from_arrays(pa.array(offsets), values),
        pa.array([image.annotated for image in images], pa.list_(pa.int32())),
        pa.array([image.unknown or None for image in images], pa.list_(pa.int32())),
        *source_columns([image.source for image in images], shards),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _tuple(labels: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if labels is None else tuple(labels)


def _view(batch: pa.RecordBatch, metadata: Mapping[bytes, bytes] | None) -> _Piece:
    column = batch.column("boxes")
    values = column.values
    return _Piece(
        batch=batch,
        starts=column.offsets.to_numpy(),
        boxes=values.field("box").values.to_numpy().reshape(-1, 4),
        labels=values.field("label").to_numpy(),
        areas=values.field("area").to_numpy(),
        ignore=values.field("ignore").to_numpy(),
        annotated=_filled(batch.column("annotated")),
        unknown=_filled(batch.column("unknown")),
        shards=shards_in(metadata),
    )


def _filled(column: pa.Array) -> pa.Array | None:
    return None if column.null_count == len(column) else column
