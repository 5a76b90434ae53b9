"""Readers of sharded datasets: the rows of the catalogues as images, each a range of bytes of its shard."""

import logging
import posixpath
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np

from metr.data.containers.shards import ShardedReader, files_below, missing_shards
from metr.data.formats.base import RawImage, Reader, Reading, whole_size, without_repeats
from metr.data.formats.box_kinds import Written, judged
from metr.data.formats.files import Files, there
from metr.data.formats.imagefolder import ImageFolderReader, as_objects, as_written, declared_names, raw_image
from metr.data.formats.json_lines import json_lines, numbers
from metr.data.formats.locating import grouped
from metr.data.records import canonical_split
from metr.data.shards.addresses import base_of, find_files, read_small
from metr.data.shards.catalogue import Note, catalogue, catalogue_folder, first_rows
from metr.data.shards.ranges import ShardImage
from metr.data.shards.stores import StoredFile, is_url
from metr.data.shards.tables import TABLES, Row
from metr.errors import DataError, counted

logger = logging.getLogger(__name__)

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_TAR_FILES = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz|tbz2|txz)$", re.IGNORECASE)
# Files beside the shards that tell of the dataset: names of numbered categories, its card.
_ABOUT = ("classes.txt", "labels.txt", "names.txt", "id2label.json", "README.md", "dataset_info.json", "LICENSE")
_LARGEST_ABOUT = 1 << 22
_ROWS = ".rows"
# Samples that recognising a tar looks at; and images whose boxes show how all are written.
_SNIFFED, _JUDGED = 20, 100_000


class ShardReader(ShardedReader, ImageFolderReader):
    """Reads shards through their catalogues. A split is made of the catalogues of its shards.

    Args:
        files: The shards.
        base: The folder that they have in common.
        missing: Addresses that are spelt out where there is no shard.
    """

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, files: Sequence[StoredFile], base: str, missing: Sequence[str] = ()) -> None:
        root = catalogue_folder(base)
        self.base, self.files = base, {_rows_place(root, base, file.address): file for file in files}
        names = [Path(_relative(file.address, base)) for file in files]
        lost = [(_relative(address, base), "there is no such shard") for address in missing]
        lost += missing_shards(names, Path())
        splits = grouped((_split_of(file.address, base), rows) for rows, file in self.files.items())
        super().__init__(root, splits, lost)
        self.notes: Mapping[Path, Note] = {}

    def prepared(self) -> "ShardReader":
        """Itself, with a catalogue of every shard.

        Raises:
            StoreError: a shard cannot be reached.
            DataError: the cache cannot be written.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        for name in _ABOUT:
            _keep_about(self.root / name, read_small(self.base + name, _LARGEST_ABOUT))
        self.notes = catalogue(self.files, self.base)
        self.declares_categories = bool(declared_names("", Reading(files=Files(self.root))))
        return self

    @property
    def place(self) -> Path | str:
        """The folder or address that all shards have in common."""
        return self.base

    @property
    def options_used(self) -> tuple[str | None, ...]:
        """The options that the result depends on."""
        return (*super().options_used, *(where for where, _ in self.missing))

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split, shard by shard, in the order of the samples."""
        self.note_missing(reading)
        names = self._names(self.root, reading)
        written = Written.asked(self.options.boxes) or self._kind_of_boxes(reading)
        for rows in self.splits[split]:
            if (damage := self.notes[rows].damage) and (name := self._called(rows)):
                read = counted(self.notes[rows].rows, "image of it is", "images of it are")
                reading.issues.add("damaged shard", name, f"{damage}; {read} read")
            for raw in without_repeats(self._images(rows, names, reading), set(), reading):
                yield as_written(raw, written)

    def _images(self, rows: Path, names: Mapping[str, str], reading: Reading) -> Iterator[RawImage]:
        shard, name = self.notes[rows].shard, self._called(rows)
        for _, row in json_lines(self.within(rows), msgspec.json.Decoder(Row), reading):
            place = f"{name}, {row.file_name}"
            if row.trouble is not None:
                reading.issues.add(row.trouble[0], place, row.trouble[1])
                continue
            raw = raw_image(_values(row), posixpath.join(name, row.file_name), place, names, reading)
            if raw is not None:
                image_id = raw.image_id if row.image_id is None else row.image_id
                exhaustive = None
                if row.exhaustive is not None:
                    exhaustive = [reading.names.number(one) for one in row.exhaustive]
                source = ShardImage(shard=shard, offset=row.offset, size=row.size)
                yield replace(raw, image_id=image_id, annotated=exhaustive, source=source)

    def _kind_of_boxes(self, reading: Reading) -> Written:
        """How the boxes are written, as some images of every shard show: all of them need not fit into memory."""
        if self._boxes is None:
            share = max(_SNIFFED, _JUDGED // max(1, len(self.files)))
            image, boxes, sizes = array("i"), array("d"), array("f")
            quiet = Reading(files=reading.files)
            for rows in self.files:
                lines = json_lines(self.within(rows), msgspec.json.Decoder(Row), quiet)
                for _, (_, row) in zip(range(share), lines, strict=False):
                    found = [numbers(box, 4) for box, *_ in as_objects(row.objects) or ()]
                    known = [box for box in found if box is not None]
                    image.extend([len(sizes) // 2] * len(known))
                    boxes.extend(value for box in known for value in box)
                    height, width = whole_size(row.height, row.width) or (np.nan, np.nan)
                    sizes.extend((width, height))
            values = np.array(boxes, dtype=np.float64).reshape(-1, 4)
            table = np.array(sizes, dtype=np.float32).reshape(-1, 2)
            self._boxes = judged(values, np.array(image, dtype=np.int64), table, "xywh", self.base, reading)
        return self._boxes

    def _names(self, folder: Path, reading: Reading) -> Mapping[str, str]:
        """The names of numbered categories, from the files beside the shards."""
        names = declared_names(self.within(folder), reading)
        for name in names.values():
            reading.names.number(name)
        return names

    def _called(self, rows: Path) -> str:
        """The name of a shard below the folder of all."""
        return _relative(self.files[rows].address, self.base)


class WebDatasetReader(ShardReader):
    """Tars of WebDataset: `KEY.jpg` and `KEY.json` are a sample."""

    format = "webdataset"
    looks_like = "WebDataset: train-000000.tar, ... with KEY.jpg and KEY.json (objects with bbox and category)"
    suffixes = TARS

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with such tars, a few folders deep, or of one such tar."""
        files = [path] if path.is_file() else files_below(path, _TAR_FILES)
        if not files or not _TAR_FILES.search(files[0].name):
            return None
        stored = [one for file in files for one in find_files(file, cls.suffixes).files]
        reader = cls(stored, base_of([one.address for one in stored]))
        first = next(iter(reader.files.values()))
        return reader if any(map(_has_boxes, first_rows(first, _SNIFFED))) else None

    @classmethod
    def why_not(cls, path: Path) -> str | None:
        """Says of tars of samples that they have no boxes."""
        files = [path] if path.is_file() else files_below(path, _TAR_FILES)
        if not files or not there(files[0], Path.is_file):
            return None
        return _without_boxes(first_rows(find_files(files[0], cls.suffixes).files[0], _SNIFFED))

    def prepared(self) -> "ShardReader":
        """Itself, with a catalogue of every shard; before, the first one is looked at.

        Raises:
            StoreError: a shard cannot be reached.
            DataError: the samples have no boxes, or the cache cannot be written.
        """
        first = next(iter(self.files.values()))
        if (told := _without_boxes(first_rows(first, _SNIFFED))) is not None:
            hint = "METR needs boxes: KEY.json with objects, each with bbox and category (docs: formats)"
            raise DataError(told, where=first.address, hint=hint)
        return super().prepared()


class StoredTablesReader(ShardReader):
    """Hugging Face's tables in a store, or named by a pattern."""

    format = "huggingface"
    looks_like = "Hugging Face in a store: .parquet or .arrow files with images and objects (bbox, category)"
    suffixes = TABLES


def open_pattern(pattern: str | Path, format_name: str | None) -> ShardReader:
    """A reader of the shards that a URL or a pattern of paths means.

    Raises:
        DataError: there is none, or they are of a kind that is not read.
        DependencyError: the package for this kind of store is not installed.
        StoreError: the store does not answer.
    """
    found = find_files(pattern, (*TARS, *TABLES))
    for reader in (WebDatasetReader, StoredTablesReader):
        files = [file for file in found.files if file.address.lower().split("?")[0].endswith(reader.suffixes)]
        if files and format_name in {None, reader.format}:
            if len(files) < len(found.files):
                others = len(found.files) - len(files)
                logger.warning("%s: %d files that are no %s are left out", pattern, others, reader.suffixes[0])
            return reader(files, base_of([file.address for file in files]), found.missing)
    what = f"expected shards ({', '.join((*TARS, *TABLES))}), found {found.files[0].address}"
    if format_name is not None:
        what = f"not shards of the format {format_name}: {found.files[0].address}"
    raise DataError(what, where=pattern, hint="copy it to this disk and name the folder, or write it as shards")


def _has_boxes(row: Row) -> bool:
    """Whether a sample is an image with objects, or with a list of none."""
    return row.objects is not None and row.size > 0


def _without_boxes(rows: Sequence[Row]) -> str | None:
    """What samples have in place of boxes; None where one has boxes, or the files are no samples."""
    if any(map(_has_boxes, rows)):
        return None
    details = (row.trouble[1] for row in rows if row.trouble and row.size)
    detail = next((one for one in details if re.search(r": its JSON has|: it has .*\bcls\b", one)), None)
    return detail and f"WebDataset samples without boxes in a known form, as img2dataset writes them: {detail}"


def _values(row: Row) -> dict[str, Any]:
    return {"height": row.height, "width": row.width, "objects": row.objects}


def _relative(address: str, base: str) -> str:
    """The address of a shard below that of all, without what follows a question mark, as a path."""
    parts = re.split(
        r"[/\\]", address.removeprefix(base).partition("?")[0] if is_url(address) else address[len(base) :]
    )
    return "/".join(part for part in parts if part not in {"", ".", ".."})


def _rows_place(root: Path, base: str, address: str) -> Path:
    return root / _ROWS / f"{_relative(address, base)}.jsonl"


def _split_of(address: str, base: str) -> str:
    """The first word in the name of a shard, else the last folder on its way, that means a split; else "all".

    The folder that all shards lie in counts where its whole name is that of a split, such as `val` or `train2017`.
    """
    above = base.rstrip("/").rpartition("/")[2]
    parts = _relative(address, base).split("/")
    whole = [above] if re.fullmatch(r"[a-zA-Z]+\d*", above) else []
    for part in (parts[-1], *reversed(parts[:-1]), *whole):
        words = re.split(r"[^a-zA-Z0-9]+", part)
        if (found := next((word for word in words if canonical_split(word)), None)) is not None:
            return found
    return "all"


def _keep_about(path: Path, content: bytes) -> None:
    """Keeps a file beside the shards; a file that is unchanged stays as it is, for the index watches it."""
    known = path.read_bytes() if path.is_file() else b""
    if content and known != content:
        path.write_bytes(content)
    elif not content:
        path.unlink(missing_ok=True)
