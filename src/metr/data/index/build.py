"""Builds an index: reads a dataset into one Arrow file for each split, and merges splits if asked to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from jaxtyping import Int

from metr.data.formats.base import IssueLog, Names, Reader, Reading, was_cut
from metr.data.formats.checks import records
from metr.data.formats.files import Files
from metr.data.index.annotation_index import AnnotationIndex, LabelMap, divide_index, write_index
from metr.data.index.manifest import (
    Fingerprints,
    IssueSummary,
    Manifest,
    checksum_of,
    packed_name,
    shown_name,
)
from metr.data.records import TRAIN, VAL, ImageRecord, SplitPlan, hold_out
from metr.errors import DataError

MANIFEST = "manifest.json"


def build_index(reader: Reader, plan: SplitPlan, folder: Path) -> Manifest:
    """Writes an Arrow file for each split, and the manifest.

    Raises:
        DataError: an annotation file cannot be read, or there is no image at all.
    """
    files, names, notes, fingerprints = Files(reader.root), Names(), IssueLog(), Fingerprints()
    counts, issues = np.zeros(0, dtype=np.int64), {}
    for split, parts in plan.parts.items():
        reading = Reading(files=files, names=names, notes=notes, issues=IssueLog(), fingerprints=fingerprints)
        found = _write_split(reader, parts, reading, folder / f"{split}.arrow")
        counts = np.pad(counts, (0, max(0, len(names) - len(counts))))
        counts[: len(found)] += found
        issues[split] = _summary(reading.issues)
    splits = _without_empty(folder, list(plan.parts), issues, notes)
    # a val split without images is as good as none
    wanted = (plan.seeded or VAL in plan.parts) and TRAIN in splits and VAL not in splits
    held_out = wanted and _hold_out(folder)
    if held_out:
        splits.insert(splits.index(TRAIN) + 1, VAL)
    if not splits:
        raise _no_images(reader, issues)
    for name in filter(was_cut, names):
        notes.add("long name", name[:40], f"a category's name has more than {len(name)} characters: it is cut")
    manifest = Manifest(
        names=list(names),
        parents=names.parents,
        counts=counts.tolist(),
        splits=splits,
        issues={**issues, "": _summary(notes)},
        touched={packed_name(path): state for path, state in {**fingerprints.signatures, **files.touched}.items()},
        checksums={split: checksum_of(folder / f"{split}.arrow") for split in splits},
        held_out=held_out,
        mentioned=sorted(names.mentioned),
    ).sealed()
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return manifest


def _write_split(reader: Reader, parts: Sequence[str], reading: Reading, path: Path) -> Int[np.ndarray, "c"]:
    """Writes a split, one of the dataset's own or several merged; returns the number of boxes of each label."""
    own = [path.with_name(f"{path.stem}.part-{number}") for number in range(len(parts))]
    counts = [
        write_index(target, records(reader, part, reading), root=reader.root)
        for target, part in zip(own, parts, strict=True)
    ]
    indices = [AnnotationIndex(target, LabelMap.identity(())) for target in own]
    if len(own) == 1 and not indices[0].repeated_ids():
        own[0].rename(path)
        return counts[0]
    total = write_index(path, merged(dict(zip(parts, indices, strict=True)), reading.issues), root=reader.root)
    for target in own:
        target.unlink()
    return total


def _hold_out(folder: Path) -> bool:
    """Moves a seeded part of train into val; False, and nothing is changed, where train is a single image."""
    whole, train, val = folder / "whole.arrow", folder / f"{TRAIN}.arrow", folder / f"{VAL}.arrow"
    held = hold_out(AnnotationIndex(train, LabelMap.identity(())).relative_paths())
    if not held.any():
        return False
    train.rename(whole)
    divide_index(whole, held, into=(train, val))
    whole.unlink()
    return True


def _without_empty(folder: Path, splits: list[str], issues: Mapping[str, IssueSummary], notes: IssueLog) -> list[str]:
    """The splits that have an image; the others become issues."""
    kept = []
    for split in splits:
        if len(AnnotationIndex(folder / f"{split}.arrow", LabelMap.identity(()))):
            kept.append(split)
        else:
            counts = issues[split].counts if split in issues else {}
            found = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
            notes.add("empty split", split, f"no image is left in it ({found or 'none is listed'})")
    return kept


def _no_images(reader: Reader, issues: Mapping[str, IssueSummary]) -> DataError:
    first = [issue for summary in issues.values() for issue in summary.first]
    what = f"recognised as {reader.format}, but no image is left to read"
    if not first:
        return DataError(what, where=reader.place, hint="put the images into the dataset's folder")
    kind, where, detail = first[0]
    counts = sum(count for summary in issues.values() for count in summary.counts.values())
    hint = "correct the annotations"
    if kind in {"missing image", "path outside", "ambiguous image"}:
        hint = "put the images where the annotations say, or check the paths in the annotations"
    return DataError(f"{what}; {counts} issues, the first: {kind} ({where}: {detail})", where=reader.place, hint=hint)


def _summary(log: IssueLog) -> IssueSummary:
    first = [(issue.kind, shown_name(issue.where), shown_name(issue.detail)) for issue in log.kept]
    return IssueSummary(counts=dict(log.counts), first=first)


def merged(parts: Mapping[str, AnnotationIndex], issues: IssueLog) -> Iterator[ImageRecord]:
    """The stored records of all parts, each image once, in the order in which they first occur, with ids of their own.

    If a later part has boxes in an image of an earlier one, they are added to it, provided that both parts declare the
    same size of the image. Otherwise they are left out, which is an issue, and their categories are unknown in that
    image. Records that one part has of one image stay apart, as those of several captions.

    Args:
        parts: The indices by the names of the splits, all of one dataset folder.
        issues: Where left-out boxes are noted.
    """
    names, owners = list(parts), _owners(parts)
    later = _later(parts, owners)
    ids: set[int | str] = set()
    for number, (name, part) in enumerate(parts.items()):
        for row, path in enumerate(part.relative_paths()):
            if owners[path][0] != number:
                continue
            record = part.stored(row)
            for other, its_row in later.get((number, row), ()):
                more = parts[names[other]].stored(its_row)
                if (more.height, more.width) == (record.height, record.width):
                    record = _with_boxes(record, more)
                    continue
                record = replace(record, unknown=_union(record.unknown, more.unknown, more.labels.tolist()))
                sizes = f"as {record.width} x {record.height} in {name}, as {more.width} x {more.height}"
                detail = f"{sizes} in {names[other]}: the {len(more.boxes)} boxes there are left out"
                issues.add("duplicate image", path, detail)
            unique = _unique(record.image_id, name, ids)
            ids.add(unique)
            yield replace(record, image_id=unique)


def _owners(parts: Mapping[str, AnnotationIndex]) -> dict[str, tuple[int, int]]:
    """The part and its row in which each path first occurs."""
    owners: dict[str, tuple[int, int]] = {}
    for number, part in enumerate(parts.values()):
        for row, path in enumerate(part.relative_paths()):
            owners.setdefault(path, (number, row))
    return owners


def _later(
    parts: Mapping[str, AnnotationIndex], owners: Mapping[str, tuple[int, int]]
) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """The (part, row) of an image in later parts, by its first (part, row)."""
    later: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, part in enumerate(parts.values()):
        for row, path in enumerate(part.relative_paths()):
            if owners[path][0] != number:
                later.setdefault(owners[path], []).append((number, row))
    return later


def _with_boxes(record: ImageRecord, more: ImageRecord) -> ImageRecord:
    """A record with the boxes of another record of the same image added, each box once.

    A category that one of them annotates exhaustively counts as annotated.
    """
    known = set(_boxes(record))
    new = np.array([box not in known for box in _boxes(more)], dtype=bool)
    both = None not in (record.annotated, more.annotated)
    return replace(
        record,
        boxes=np.concatenate([record.boxes, more.boxes[new]]),
        labels=np.concatenate([record.labels, more.labels[new]]),
        areas=np.concatenate([record.areas, more.areas[new]]),
        ignore=np.concatenate([record.ignore, more.ignore[new]]),
        annotated=_union(record.annotated or (), more.annotated or ()) if both else None,
        unknown=_union(record.unknown, more.unknown),
    )


def _boxes(record: ImageRecord) -> list[tuple[int, float, float, float, float]]:
    """Label and corners of each box."""
    left, top, right, bottom = record.boxes.T.tolist()
    return list(zip(record.labels.tolist(), left, top, right, bottom, strict=True))


def _union(*labels: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    return tuple(sorted(set().union(*labels)))


def _unique(image_id: int | str, part: str, taken: set[int | str]) -> int | str:
    """An id that is not taken: `id`, `part/id`, `part/id-2`, ..."""
    unique, number = image_id, 1
    while unique in taken:
        unique = f"{part}/{image_id}" if number == 1 else f"{part}/{image_id}-{number}"
        number += 1
    return unique
