"""Writes completed datasets: a copy in the dataset's own format with boxes added, or COCO where that cannot be."""

import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from metr.data.appending import Addition, CannotAppendError, append
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.export import MemorySource, Placement, write_coco
from metr.data.formats.base import Reader, Reading, ReadOptions
from metr.data.formats.files import Files, is_image
from metr.data.formats.registry import recognise
from metr.data.formats.written import WrittenBox
from metr.data.index.annotation_index import AnnotationIndex
from metr.data.records import Annotations, ImageRecord, InMemoryAnnotations
from metr.errors import DataError, MetrError, quiet_log

_logger = logging.getLogger(__name__)
# How far, in pixels, a box may move by being written.
_ROUNDING = 0.51


@dataclass(frozen=True, kw_only=True)
class AddedBoxes:
    """The boxes to add to one image of a split: a record of these alone, with their scores, and their names."""

    split: str
    index: int
    record: ImageRecord
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class WrittenDataset:
    """A completed dataset: how it is opened, and why it is COCO where its own format could not be kept."""

    config: DatasetConfig
    format: str
    why_coco: str = ""


@dataclass(frozen=True, kw_only=True)
class Original:
    """The files of a dataset: their reader, where each image's annotations are by its path, and all their names."""

    reader: Reader
    places: Mapping[str, str]
    names: tuple[str, ...]


def original_of(source: DatasetSource) -> Original | None:
    """The files of a dataset, read once more; None where its images are in shards or containers."""
    if any(next(split.sources(), None) is not None for split in source.splits.values()) or not source.root.is_dir():
        return None
    reader = recognise(source.config.path, source.config.format)
    reader.options = ReadOptions(boxes=source.config.boxes, name=source.name)
    reading = Reading(files=Files(reader.root))
    places = {raw.path: raw.where for split in reader.splits for raw in reader.read(split, reading)}
    return Original(reader=reader, places=places, names=tuple(reading.names))


def check_outside(out: Path, roots: Iterable[Path]) -> None:
    """Checks that nothing would be written into a dataset, or a dataset lie in what is written.

    Raises:
        DataError: it would.
    """
    target = Path(os.path.realpath(out))
    for root in (Path(os.path.realpath(one)) for one in roots):
        if target.is_relative_to(root) or root.is_relative_to(target):
            raise DataError("would be written into the dataset's own folder", where=out, hint="name a folder outside")


def write_completed(
    source: DatasetSource,
    original: Original | None,
    added: Sequence[AddedBoxes],
    out: Path,
    placement: Placement = "link",
) -> WrittenDataset:
    """Writes a dataset with boxes added into `out`, which is complete or not there.

    The files are copied and images linked. Then boxes are added to the copies of the annotation files. The result is
    read again and compared: where the format has no way for boxes to be added, or a box of a person reads otherwise
    than before, the dataset is written as COCO.

    Raises:
        DataError: the folder cannot be written, or lies in the dataset's own.
    """
    check_outside(out, [source.root])
    building = out.with_name(f".{out.name}.writing-{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        config = _in_own_format(source, original, added, building, placement)
        if out.is_dir():
            out.rmdir()
        building.rename(out)
        config = config.model_copy(update={"path": out / Path(config.path).relative_to(building)})
        return WrittenDataset(config=config, format=source.format)
    except (CannotAppendError, MetrError) as error:
        why = error.what if isinstance(error, MetrError) else str(error)
        _logger.warning("%s: written as COCO, not as %s: %s", source.name, source.format, why)
        shutil.rmtree(building, ignore_errors=True)
        merged = merged_source(source, added)
        write_coco(merged, out, placement)
        keep = {"weight", "prompts"} & source.config.model_fields_set
        options = {key: getattr(source.config, key) for key in keep}
        config = DatasetConfig.checked({**options, "name": source.name, "path": out})
        return WrittenDataset(config=config, format="coco", why_coco=why)
    except OSError as error:
        hint = "free some disk space, or name another folder"
        raise DataError(f"cannot be written: {error}", where=out, hint=hint) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _in_own_format(
    source: DatasetSource,
    original: Original | None,
    added: Sequence[AddedBoxes],
    building: Path,
    placement: Placement,
) -> DatasetConfig:
    """Writes the dataset in its own format into `building`, and gives its description there.

    Raises:
        CannotAppendError, MetrError: the format has no way for it, or the result reads otherwise than it should.
    """
    if original is None:
        raise CannotAppendError("its images are in shards or containers")
    path = Path(source.config.path)
    copy_tree(source.root, building, placement)
    new = [_addition(source, one, original.places) for one in added if len(one.names)]
    append(original.reader, building, new, original.places)
    inside = path.is_file() and path.is_relative_to(source.root)
    names = dict.fromkeys(name for one in added for name in one.names)
    changes = {
        "only": source.config.only and (*source.config.only, *names),
        "path": building / (path.relative_to(source.root) if inside else ""),
        "format": source.format,
        "exhaustive": tuple(source.config.exhaustive or source.categories),
    }
    config = source.config.model_copy(update=changes)
    cache = building.with_name(f"{building.name}-cache")
    try:
        with quiet_log("metr.data"):  # it was said when the original was opened
            _check(source, added, open_dataset(config, cache))
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return config


def _addition(source: DatasetSource, one: AddedBoxes, places: Mapping[str, str]) -> Addition:
    inside = one.record.path.is_relative_to(source.root)
    path = one.record.path.relative_to(source.root).as_posix() if inside else str(one.record.path)
    if path not in places:
        raise CannotAppendError(f"{path} is in no annotation file of its folder")
    scores = one.record.scores
    assert scores is not None
    boxes = tuple(
        WrittenBox(name=name, box=(box[0], box[1], box[2], box[3]), score=score)
        for name, box, score in zip(one.names, one.record.boxes.tolist(), scores.tolist(), strict=True)
    )
    return Addition(path=path, where=places[path], size=(one.record.height, one.record.width), boxes=boxes)


def copy_tree(source: Path, target: Path, placement: Placement) -> None:
    """Copies a folder with all below it: images as hard links where `placement` says so, all else byte by byte.

    Raises:
        OSError: something cannot be read or written.
    """
    seen: set[str] = set()
    for folder, below, files in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            below.clear()
            continue
        seen.add(real)
        place = target / Path(folder).relative_to(source)
        place.mkdir(parents=True)
        for name in files:
            original = Path(folder, name)
            if not original.is_file():
                continue
            if placement == "link" and is_image(name):
                try:
                    (place / name).hardlink_to(original.resolve())
                    continue
                except OSError:  # another disk, too many links, no permission
                    pass
            shutil.copyfile(original, place / name)


def _check(source: DatasetSource, added: Sequence[AddedBoxes], now: DatasetSource) -> None:
    """Checks that a completed dataset reads as it should: all as before, and the new boxes behind.

    Raises:
        CannotAppendError: it does not.
    """
    new = {(one.split, one.index): one for one in added if len(one.names)}
    if list(now.splits) != list(source.splits):
        raise CannotAppendError("its splits would be read otherwise")
    for split, before in source.splits.items():
        after = now.split(split)
        if before.relative_paths() != after.relative_paths():
            raise CannotAppendError(f"the images of {split} would be read otherwise")
        for index in range(len(before)):
            if not _reads_alike(before, after, index, new.get((split, index))):
                raise CannotAppendError(f"the boxes of {before[index].path.name} would be read otherwise")


def _reads_alike(before: AnnotationIndex, after: AnnotationIndex, index: int, new: AddedBoxes | None) -> bool:
    one, two = before.stored(index), after.stored(index)
    count = len(one.boxes)
    names = () if new is None else new.names
    if len(two.boxes) != count + len(names) or not np.allclose(one.boxes, two.boxes[:count], atol=1e-3):
        return False
    if not np.array_equal(one.ignore, two.ignore[:count]) or two.ignore[count:].any():
        return False
    if _names(before, one) != _names(after, two)[:count] or tuple(_names(after, two)[count:]) != names:
        return False
    return new is None or np.allclose(two.boxes[count:], new.record.boxes, atol=_ROUNDING)


def _names(index: AnnotationIndex, record: ImageRecord) -> list[str]:
    rows = index.labels.rows[record.labels]
    return [index.categories[row] if row >= 0 else "" for row in rows.tolist()]


def merged_source(source: DatasetSource, added: Sequence[AddedBoxes]) -> MemorySource:
    """A dataset with boxes added, in memory; the names of these are not annotated exhaustively."""
    names = [name for one in added for name in one.names]
    # of names that are not read nothing is known, so they stay categories that no image annotates
    unread = [name for split in source.splits.values() for name in split.unknown_names]
    categories = tuple(dict.fromkeys([*source.categories, *names, *unread]))
    rows = {name: row for row, name in enumerate(categories)}
    new = {(one.split, one.index): one for one in added}

    def merged(split: str, annotations: Annotations) -> InMemoryAnnotations:
        pairs = ((annotations[index], new.get((split, index))) for index in range(len(annotations)))
        records = tuple(_merged(record, one, rows, len(source.categories)) for record, one in pairs)
        return InMemoryAnnotations(name=source.name, split=split, categories=categories, records=records)

    return MemorySource(
        name=source.name,
        root=source.root,
        config=source.config,
        categories=categories,
        splits={split: merged(split, annotations) for split, annotations in source.splits.items()},
    )


def _merged(record: ImageRecord, new: AddedBoxes | None, rows: Mapping[str, int], own: int) -> ImageRecord:
    annotated = tuple(range(own)) if record.annotated is None else record.annotated
    if new is None:
        return replace(record, annotated=annotated)
    more, scores = new.record, new.record.scores
    assert scores is not None
    return replace(
        record,
        boxes=np.concatenate([record.boxes, more.boxes]),
        labels=np.concatenate([record.labels, [rows[name] for name in new.names]]).astype(np.int64),
        areas=np.concatenate([record.areas, more.areas]),
        ignore=np.concatenate([record.ignore, more.ignore]),
        annotated=annotated,
        scores=np.concatenate([np.full(len(record.boxes), np.nan), scores]),
    )
