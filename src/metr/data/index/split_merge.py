"""Several of a dataset's own splits as one: each image once, with all its boxes, and with an id of its own."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from metr.data.formats.base import IssueLog
from metr.data.index.annotation_index import AnnotationIndex
from metr.data.records import ImageRecord


def joined(parts: Mapping[str, AnnotationIndex], issues: IssueLog) -> Iterator[ImageRecord]:
    """The records of all parts as they are stored, each image at the place where it comes up first.

    Boxes that a later part has of an image are joined to it where both parts declare the same size of it; else they
    are left out, which is an issue, and their categories are unknown in that image. What one part lists twice stays
    apart: captions of one image are.

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
    """The number of the part, and the row in it, where each path comes up first."""
    owners: dict[str, tuple[int, int]] = {}
    for number, part in enumerate(parts.values()):
        for row, path in enumerate(part.relative_paths()):
            owners.setdefault(path, (number, row))
    return owners


def _later(
    parts: Mapping[str, AnnotationIndex], owners: Mapping[str, tuple[int, int]]
) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """For an image's first place, its places in later parts."""
    later: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for number, part in enumerate(parts.values()):
        for row, path in enumerate(part.relative_paths()):
            if owners[path][0] != number:
                later.setdefault(owners[path], []).append((number, row))
    return later


def _with_boxes(record: ImageRecord, more: ImageRecord) -> ImageRecord:
    """A record with the boxes of another one of its image that it lacks. What either annotates is annotated."""
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
