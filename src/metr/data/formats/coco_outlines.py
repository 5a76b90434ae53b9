"""The boxes around the segmentations of COCO, for annotations without a box: polygons and run lengths."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def outline_box(segmentation: Any) -> list[float] | None:
    """[x, y, width, height] around a segmentation of COCO; None where it is none, or is empty.

    Args:
        segmentation: Polygons, each a list of x and y in turn, or pairs of them; or run lengths, `{"counts", "size"}`,
            compressed to a string or not. Several are one object.
    """
    parts = segmentation if isinstance(segmentation, list) and _has_dictionaries(segmentation) else [segmentation]
    boxes = [box for part in parts if (box := _corners(part)) is not None]
    if not boxes:
        return None
    left, top, right, bottom = (
        choose(values) for choose, values in zip((min, min, max, max), zip(*boxes, strict=True), strict=True)
    )
    return [left, top, right - left, bottom - top]


def _has_dictionaries(parts: list[Any]) -> bool:
    return any(isinstance(part, dict) for part in parts)


def _corners(part: Any) -> tuple[float, float, float, float] | None:
    try:
        return _runs_corners(part) if isinstance(part, dict) else _polygon_corners(part)
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError):
        return None


def _polygon_corners(polygons: Any) -> tuple[float, float, float, float] | None:
    values = np.array(list(_flat(polygons)), dtype=np.float64)
    if len(values) < 4 or not np.isfinite(values).all():
        return None
    (left, top), (right, bottom) = values.reshape(-1, 2).min(axis=0), values.reshape(-1, 2).max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def _flat(value: Any) -> Iterator[float]:
    """The numbers of nested lists.

    Raises:
        TypeError: a value is no list.
        ValueError: numbers are not in pairs.
    """
    if not isinstance(value, list):
        raise TypeError("no list")
    if value and not isinstance(value[0], list):
        if len(value) % 2:
            raise ValueError("x without y")
        yield from map(float, value)
    else:
        for part in value:
            yield from _flat(part)


def _runs_corners(part: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """The corners around a mask given by the lengths of runs of 0 and 1 in turn, column after column."""
    height, width = map(int, part["size"])
    counts = part["counts"]
    ends = np.cumsum(np.array(_decompressed(counts) if isinstance(counts, str) else counts, dtype=np.int64))
    starts, stops = ends[: len(ends) // 2 * 2 : 2], ends[1::2]
    starts, stops = starts[stops > starts], stops[stops > starts]
    if not len(starts) or min(height, width) < 1 or starts[0] < 0 or stops.max() > height * width:
        return None
    first, last = starts // height, (stops - 1) // height
    top, bottom = (0, height) if (first < last).any() else ((starts % height).min(), ((stops - 1) % height).max() + 1)
    return float(first.min()), float(top), float(last.max() + 1), float(bottom)


def _decompressed(text: str) -> Sequence[int]:
    """The run lengths in a string: 5 bits a character, the lowest first, then a bit that says whether more follow.

    From the fourth on, the difference to the one before the last is given.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts
