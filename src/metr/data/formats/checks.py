"""From what a reader yields to records: sizes are measured where files give none, and all boxes are checked."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from metr.data.formats.base import IssueLog, RawImage, Reader, Reading, place
from metr.data.images import probe_size
from metr.data.index.manifest import encodable, shown_name
from metr.data.records import UNNAMED, ImageRecord
from metr.errors import DataError

# A box thinner than this, in pixels, is no object; a hair below 1 keeps rounded boxes of one pixel.
_THINNEST = 0.999
# Boxes pass the border by rounding; further out than this, in pixels, is an issue.
_SLACK = 0.5

# Images that are checked at once: the boxes of hundreds take hardly longer than those of one.
_GROUP = 512


def records(reader: Reader, split: str, reading: Reading) -> Iterator[ImageRecord]:
    """The checked images of one split of a dataset; what is wrong is noted in `reading.issues`."""
    raws = iter(reader.read(split, reading))
    while group := list(islice(raws, _GROUP)):
        yield from _checked(group, reader.root, reading)


def _checked(group: Iterable[RawImage], root: Path, reading: Reading) -> Iterator[ImageRecord]:
    """Images with the boxes that can be used, all boxes checked at once."""
    sized = [(raw, size) for raw in group if (size := _size(raw, root, reading)) is not None]
    if not sized:
        return
    raws = [raw for raw, _ in sized]
    owner = np.repeat(np.arange(len(raws)), [len(raw.boxes) for raw in raws])
    limit = np.array([(width, height) * 2 for _, (height, width) in sized], dtype=np.float64)[owner]
    boxes = np.concatenate([raw.boxes for raw in raws]).astype(np.float64)
    relative = np.array([raw.relative for raw in raws])[owner]
    boxes[relative] *= limit[relative]
    _sort_corners(sized, owner, boxes, reading.issues)
    inside = np.minimum(np.maximum(boxes, 0), limit)
    labels = np.concatenate([raw.labels for raw in raws]).astype(np.int64)
    named = labels != UNNAMED  # what has no name was noted by the reader
    keep = _usable(sized, owner, boxes, inside, named, reading.issues)
    unknown: dict[int, set[int]] = {}
    for number, label in zip(owner[~keep].tolist(), labels[~keep].tolist(), strict=True):
        unknown.setdefault(number, set()).add(label)
    kept, labels = inside[keep].astype(np.float32), labels[keep]
    areas = _areas(np.concatenate([_filled(raw.areas, raw, np.nan) for raw in raws])[keep], kept)
    ignore = np.concatenate([_filled(raw.ignore, raw, 0.0) for raw in raws])[keep].astype(bool)
    ends = np.searchsorted(owner[keep], np.arange(len(raws) + 1)).tolist()
    for number, (raw, (height, width)) in enumerate(sized):
        mine = slice(ends[number], ends[number + 1])
        left_out = {*raw.unknown, *unknown.get(number, ())}
        if left_out and ends[number] == ends[number + 1]:
            left_out.add(UNNAMED)  # not an image without objects, although no box is left
        yield ImageRecord(
            image_id=raw.image_id if isinstance(raw.image_id, int) else shown_name(raw.image_id),
            path=root / raw.path,
            width=width,
            height=height,
            boxes=kept[mine],
            labels=labels[mine],
            areas=areas[mine],
            ignore=ignore[mine],
            annotated=None if raw.annotated is None else tuple(sorted(set(raw.annotated))),
            unknown=tuple(sorted(left_out)),
            source=raw.source,
        )


def _size(raw: RawImage, root: Path, reading: Reading) -> tuple[int, int] | None:
    """(height, width) as the file gives it, else as measured; None, and an issue, where the image is unreadable."""
    if not encodable(raw.path):
        detail = "not UTF-8: the image is left out; rename it"
        reading.issues.add("unreadable file name", shown_name(raw.path), detail)
        return None
    if raw.size is not None:
        return raw.size
    try:
        reading.fingerprints.add(raw.path, root)
        return probe_size(root / raw.path)
    except DataError as error:
        reading.files.touch(raw.path)
        reading.issues.add("unreadable image", raw.path, error.what)
        return None


def _filled(values: Shaped[np.ndarray, "m"] | None, raw: RawImage, value: float) -> Shaped[np.ndarray, "m"]:
    """One value a box; `value` where the file gives none."""
    return np.full(len(raw.boxes), value, dtype=np.float32) if values is None else values


def _sort_corners(
    sized: Sequence[tuple[RawImage, tuple[int, int]]],
    owner: Int[np.ndarray, "m"],
    boxes: Float[np.ndarray, "m 4"],
    issues: IssueLog,
) -> None:
    """Sorts swapped corners in place, where files write corners, and notes them."""
    written = np.array([raw.corners for raw, _ in sized])[owner]
    with np.errstate(invalid="ignore"):
        swapped = written & np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    for row in np.flatnonzero(swapped).tolist():
        detail = f"[{_listed(boxes[row])}]: the second corner is left of the first, or above it; sorted"
        issues.add("swapped corners", _place(sized[owner[row]][0], owner, row), detail)
    low, high = boxes[swapped, :2], boxes[swapped, 2:]
    boxes[swapped] = np.concatenate([np.minimum(low, high), np.maximum(low, high)], axis=1)


def _place(raw: RawImage, owner: Int[np.ndarray, "m"], row: int) -> str:
    """Where the box in `row` stands in its file."""
    position = row - int(np.searchsorted(owner, owner[row]))
    return place(raw.where, f"box {position + 1}" if raw.marks is None else raw.marks[position])


def _listed(box: Float[np.ndarray, "4"]) -> str:
    return ", ".join(f"{value:.6g}" for value in box)


def _usable(
    sized: Sequence[tuple[RawImage, tuple[int, int]]],
    owner: Int[np.ndarray, "m"],
    boxes: Float[np.ndarray, "m 4"],
    inside: Float[np.ndarray, "m 4"],
    named: Bool[np.ndarray, "m"],
    issues: IssueLog,
) -> Bool[np.ndarray, "m"]:
    """Which of the `named` boxes are kept. `inside` are `boxes` cut at the border; dropped and cut boxes are noted."""
    amodal = np.array([raw.amodal for raw, _ in sized])[owner]
    with np.errstate(invalid="ignore"):
        thick = (boxes[:, 2:] - boxes[:, :2] >= _THINNEST).all(axis=1) & np.isfinite(boxes).all(axis=1)
        visible = (inside[:, 2:] - inside[:, :2] >= _THINNEST).all(axis=1)
        fine = thick & visible & (amodal | (np.abs(boxes - inside) <= _SLACK).all(axis=1))
    keep: Bool[np.ndarray, "m"] = thick & visible & named
    for row in np.flatnonzero(~fine & named).tolist():
        raw, (height, width) = sized[owner[row]]
        kind = _kind(boxes[row], thick=bool(thick[row]), visible=bool(visible[row]))
        found = "no four numbers" if np.isnan(boxes[row]).all() else f"[{_listed(boxes[row])}]"
        issues.add(kind, _place(raw, owner, row), f"{found} in {width} x {height}")
    return keep


def _kind(box: Float[np.ndarray, "4"], *, thick: bool, visible: bool) -> str:
    """What is wrong with a box."""
    if not np.isfinite(box).all():
        return "unreadable box"
    if not thick:
        return "degenerate box"
    return "box clipped" if visible else "box outside"


def _areas(areas: Float[np.ndarray, "m"], boxes: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "m"]:
    """Areas as the file gives them where it does, never more than the box holds after clipping."""
    box_areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    known = areas > 0  # False for NaN
    return np.asarray(np.where(known, np.minimum(areas, box_areas), box_areas), dtype=np.float32)
