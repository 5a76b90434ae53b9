"""Hugging Face datasets as tables: Parquet of a repository, Arrow of the library's `save_to_disk` and of its cache.

A row has an image, as bytes or as a path, and objects with boxes as in imagefolder. Such a dataset is unpacked once, as
an imagefolder: the bytes of the images as they are, and a `metadata.jsonl` whose lines are the rows.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from metr.data.containers.features import Columns, class_labels, columns_of, data_files
from metr.data.containers.shards import (
    ShardedReader,
    copied_splits,
    copy_about,
    every_shard,
    files_below,
    link_image,
    missing_shards,
    shards_by_split,
    write_image,
)
from metr.data.containers.store import Budget, unpacked
from metr.data.formats.base import RawImage, Reader, Reading
from metr.data.formats.files import ends_of, start_of, there
from metr.data.formats.imagefolder import ImageFolderReader
from metr.data.formats.locating import grouped
from metr.errors import DataError

logger = logging.getLogger(__name__)

_TABLES = re.compile(r"^(?!cache-|metadata\.|\.).*\.(parquet|arrow)$", re.IGNORECASE)
_ROWS_A_BATCH = 16
# Tables that recognising looks at.
_SNIFFED = 5
_DAMAGED = (OSError, ValueError, KeyError, pa.ArrowException)


def is_table_name(name: str) -> bool:
    """Whether a file is called like a table of a dataset: Parquet or Arrow, and no metadata of an imagefolder."""
    return _TABLES.search(name) is not None


class DamagedShardError(DataError):
    """A shard that is cut off, damaged or of another kind. The other shards of its dataset are read all the same."""


class HuggingFaceReader(ShardedReader, ImageFolderReader):
    """Hugging Face's tables with images inside. A split is made of tables, and once unpacked of their folders."""

    format = "huggingface"
    looks_like = (
        "Hugging Face: .parquet or .arrow files (also of save_to_disk) with images and objects (bbox, category)"
    )

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with such tables, a few folders deep, or of one such table."""
        if path.is_file():
            return cls(path.parent, {"all": (path,)}) if _TABLES.search(path.name) and _fits(path) else None
        found = files_below(path, _TABLES)
        files = [file for file in found if file in _saved(found)]
        if not any(map(_fits, files[:_SNIFFED])):
            return None
        splits, config = data_files(path, files)
        if config:
            logger.info("%s: its card describes several datasets; read is %r", path, config)
        missing = missing_shards(files, path)
        if not splits and (named := _json(path / "dataset_dict.json").get("splits")):
            splits = grouped((file.relative_to(path).parts[0], file) for file in files if file.parent != path)
            lost = (name for name in named if name not in splits)
            missing += [("dataset_dict.json", f"names the split {name!r}, which has no folder here") for name in lost]
        return cls(path, splits or shards_by_split(files, path), missing)

    @classmethod
    def why_not(cls, path: Path) -> str | None:
        """None: only damage is told, in place of saying that there is nothing to read.

        Raises:
            DamagedShardError: the first tables are damaged or cut off.
        """
        for table in [path] if path.is_file() and is_table_name(path.name) else files_below(path, _TABLES)[:_SNIFFED]:
            with _reading(table):
                _schema(table)
        return None

    def prepared(self) -> "HuggingFaceReader":
        """A reader of the unpacked dataset.

        Raises:
            DataError: a table is damaged or has other columns, or the disk is too small.
        """
        tables = list(every_shard(self.splits))
        source = tables[0] if list(self.splits) == ["all"] and len(tables) == 1 else self.root
        about = [self.root / "README.md", *{file.parent / "dataset_info.json" for file in tables}]
        copy = unpacked(
            source, [*tables, *sorted(about)], lambda folder: self._unpack(tables, folder), kind=self.format
        )
        return HuggingFaceReader(copy, copied_splits(self.splits, self.root, copy), self.missing)

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of the rows."""
        self.note_missing(reading)
        yield from super().read(split, reading)

    def _place(self, line: str) -> str:
        """A row of the table, which has become a line of the metadata."""
        table, _, row = line.rpartition("/metadata.jsonl:")
        return f"{table}: row {row}" if table else line

    def _unpack(self, tables: Sequence[Path], folder: Path) -> None:
        size = sum(table.stat().st_size for table in tables)
        budget = Budget(self.root, size, folder)
        budget.expect(size)
        copy_about(self.root, folder)
        names: dict[str, None] = {}
        for table in tables:
            place = folder / table.relative_to(self.root)
            place.mkdir(parents=True)
            names |= dict.fromkeys(_unpack_table(table, self.root, place, budget))
        if names:
            numbered = {str(number): name for number, name in enumerate(names)}
            (folder / "id2label.json").write_text(json.dumps(numbered), encoding="utf-8")


def _unpack_table(table: Path, root: Path, folder: Path, budget: Budget) -> Sequence[str]:
    """Writes the rows of a table; returns the names that are declared for its categories."""
    schema, columns = annotated_columns(table)
    labels = class_labels(schema, root, table.parent, columns)
    with (folder / "metadata.jsonl").open("wb") as file:
        for number, row in enumerate(table_rows(table, columns), start=1):
            line = {
                "file_name": _write_row_image(row[columns.image], number, table, root, folder, budget),
                **{name: row[name] for name in columns.sizes},
                "objects": with_names(objects_of_row(row, columns), labels),
            }
            text = msgspec.json.encode(line, enc_hook=str) + b"\n"
            budget.add_bytes(len(text))
            file.write(text)
    return next(iter(labels.values())) if len(labels) == 1 else ()


def _write_row_image(image: Any, row: int, table: Path, root: Path, folder: Path, budget: Budget) -> str | None:
    """Writes or links the image of a row; returns its name, None where the row has none."""
    data, named = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if isinstance(data, str):
        data, named = None, data
    named = named if isinstance(named, str) else ""
    if data:
        return write_image(data, row, named, folder, budget)
    return link_image(named, row, [table.parent, root], root, folder) if named else None


def objects_of_row(row: Mapping[str, Any], columns: Columns) -> Any:
    """The objects of a row, as lists side by side or as a list of objects."""
    if len(columns.objects) > 1:
        return {name: row[name] for name in columns.objects}
    value = row[columns.objects[0]]
    if isinstance(value, list):
        return [_chosen(item, columns) for item in value if item is not None]
    return _chosen(value, columns) if isinstance(value, dict) else value


def _chosen(value: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key in columns.inner}


def with_names(objects: Any, labels: Mapping[str, Sequence[str]]) -> Any:
    """The objects of a row with names in place of the numbers of categories; a number that has none stays."""
    if isinstance(objects, list):
        return [with_names(item, labels) for item in objects]
    if not isinstance(objects, dict):
        return objects
    return {key: _name(value, labels[key]) if key in labels else value for key, value in objects.items()}


def _name(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_name(item, names) for item in value]
    if isinstance(value, int) and value == -1:
        return None  # the library's number for "not known"
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _saved(files: Sequence[Path]) -> set[Path]:
    """The files without those in a folder of `save_to_disk` that do not belong to the data.

    Raises:
        DataError: the data needs a file that is missing.
    """
    kept = set(files)
    for folder in {file.parent for file in files if file.suffix.lower() == ".arrow"}:
        state = folder / "state.json"
        values = _json(state)
        names = [one.get("filename") for one in values.get("_data_files") or () if isinstance(one, dict)]
        if not names:
            continue
        own = {file.name: file for file in files if file.parent == folder}
        if lost := [name for name in names if name not in own]:
            what = f"names {lost[0]!r}, which is missing"
            raise DataError(what, where=state, hint="copy the whole folder that save_to_disk wrote")
        if values.get("_indices_data_files"):
            what = "only some of the rows belong to the dataset, which a file of indices says"
            raise DataError(what, where=state, hint="save it anew: dataset.flatten_indices().save_to_disk(...)")
        kept -= {file for name, file in own.items() if name not in names}
    return kept


def _json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; an empty one where there is none."""
    try:
        value = json.loads(path.read_bytes()) if there(path, Path.is_file) else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _fits(table: Path) -> bool:
    try:
        return columns_of(_schema(table)) is not None
    except _DAMAGED:
        return False


def _is_parquet(table: Path) -> bool:
    return table.suffix.lower() == ".parquet"


def _schema(table: Path) -> pa.Schema:
    """The columns of a Parquet or Arrow file."""
    if _is_parquet(table):
        return pq.read_schema(table)
    with _arrow(table) as reader:
        return reader.schema


def annotated_columns(table: Path) -> tuple[pa.Schema, Columns]:
    """The schema of a table, and those of its columns that are read.

    Raises:
        DamagedShardError: it is damaged or cut off, or has no images with boxes.
    """
    with _reading(table):
        schema = _schema(table)
        columns = columns_of(schema)
    if columns is None:
        what = f"no images with boxes in this table (columns: {', '.join(schema.names[:12])})"
        raise DamagedShardError(what, where=table, hint="leave it out of the dataset, or name the others in its card")
    return schema, columns


def names_files(table: Path) -> bool:
    """Whether the images of a table are names of files beside it, and not inside.

    Raises:
        DamagedShardError: it is damaged, or has no images with boxes.
    """
    schema, columns = annotated_columns(table)
    return bool(pt.is_string(kind := schema.field(columns.image).type) or pt.is_large_string(kind))


def table_rows(table: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    """The rows of a table, with those of its columns that are read; a few in memory at a time.

    Raises:
        DamagedShardError: it is damaged or cut off.
    """
    rows = _rows(table, columns)
    while True:
        with _reading(table):  # while a row is read, not while it is used
            row = next(rows, None)
        if row is None:
            return
        yield row


def _rows(table: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    if _is_parquet(table):
        with pq.ParquetFile(table, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_ROWS_A_BATCH, columns=columns.names):
                batch.validate(full=True)
                yield from batch.to_pylist()
        return
    with _arrow(table) as reader:
        file_format = isinstance(reader, pa.ipc.RecordBatchFileReader)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if file_format else reader
        for batch in batches:
            chosen = batch.select(columns.names)
            chosen.validate(full=True)  # offsets of a damaged file would lead anywhere in memory
            for start in range(0, chosen.num_rows, _ROWS_A_BATCH):
                yield from chosen.slice(start, _ROWS_A_BATCH).to_pylist()
    if not file_format and not ends_of(table, 8).endswith(bytes(4)):
        raise ValueError("the mark of its end is missing")


@contextlib.contextmanager
def _arrow(table: Path) -> Iterator[Any]:
    """A reader of an Arrow file, or of an Arrow stream, which the library writes."""
    with pa.OSFile(str(table)) as source:  # of a file that is cut off, a memory map would end the process
        opened = pa.ipc.open_file if start_of(table, 6) == b"ARROW1" else pa.ipc.open_stream
        with opened(source) as reader:
            yield reader


@contextlib.contextmanager
def _reading(table: Path) -> Iterator[None]:
    """Turns what the library raises about a damaged table into a `DamagedShardError`."""
    try:
        yield
    except _DAMAGED as error:
        what = f"a table that is damaged or cut off: {error}"
        raise DamagedShardError(what, where=table, hint="download or copy it again") from None
