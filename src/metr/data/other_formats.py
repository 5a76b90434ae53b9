"""What else a dataset's folder could be read as, whether that would be other data, and how a user chooses."""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec

from metr.data.formats.base import Reader, ReadOptions
from metr.data.formats.registry import other_formats, recognise
from metr.data.index.annotation_index import LabelMap
from metr.data.index.cache import StoredDataset, stored
from metr.data.records import VAL, plan_splits
from metr.errors import DataError, counted
from metr.serialization import write_json

_logger = logging.getLogger(__name__)

# Beside a dataset's index: the other formats that its folder fits. To find them, all folders are looked into.
_NOTED = "other_formats.json"
# Of more images the second reading may take as long as the first: it is not made only to compare.
_COMPARED = 20_000


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What a format makes of a folder: images by split, boxes in all, and the names that have boxes."""

    images: dict[str, int]
    boxes: int
    names: frozenset[str]

    def __str__(self) -> str:
        images = ", ".join(f"{split} {count:,}" for split, count in self.images.items())
        names = counted(len(self.names), "name")
        return f"images: {images}; {counted(self.boxes, 'box', 'boxes')} of {names}"


def tell_other_formats(reader: Reader, path: Path | str, dataset: StoredDataset, cache: Path) -> None:
    """Logs which other formats a dataset fits, whether they read other data, and how to choose one.

    Whenever the dataset is opened this is one line for each format; a warning where its data is other.

    Args:
        reader: The reader that was recognised.
        path: The dataset, as the user names it.
        dataset: What it read.
        cache: The folder of indices.
    """
    for name in _noted(reader, path, dataset.folder):
        level, found = _compared(name, path, dataset, cache)
        way = f"to choose, list it in a datasets file: `datasets: [{{path: {path}, format: {name}}}]`"
        _logger.log(level, "%s: read as %s; it also fits %s%s; %s", path, reader.format, name, found, way)


def _noted(reader: Reader, path: Path | str, folder: Path) -> list[str]:
    """The other formats, looked for when the index is new."""
    file = folder / _NOTED
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(file.read_bytes(), type=dict[str, list[str]]).get("formats", [])
    found = other_formats(reader, path)
    with contextlib.suppress(OSError):
        write_json(file, {"formats": found})
    return found


def _compared(name: str, path: Path | str, dataset: StoredDataset, cache: Path) -> tuple[int, str]:
    """The level of a message about a format, and how its reading differs from `dataset`."""
    own = _reading_of(dataset)
    if sum(own.images.values()) > _COMPARED:
        return logging.WARNING, f" (not compared, as it has more than {_COMPARED:,} images)"
    try:
        reader = recognise(path, name)
        reader.options = ReadOptions()
        other = _reading_of(stored(reader, plan_splits(list(reader.splits), None, path), cache))
    except DataError as error:
        return logging.INFO, f", which cannot be read ({error.what})"
    if own == other:
        return logging.INFO, ", which reads the same"
    return logging.WARNING, f", which reads other data ({other}, not {own})"


def _reading_of(dataset: StoredDataset) -> _Reading:
    """Splits as the files have them: val that was held out of train is train."""
    manifest, labels = dataset.manifest, LabelMap.identity(dataset.manifest.names)
    lengths = {split: len(dataset.open(split, name="", format_name="", labels=labels)) for split in manifest.splits}
    if manifest.held_out:
        lengths["train"] = lengths.get("train", 0) + lengths.pop(VAL, 0)
    boxes = zip(manifest.names, manifest.counts, strict=True)
    return _Reading(images=lengths, boxes=sum(manifest.counts), names=frozenset(name for name, n in boxes if n))
