"""How a file writes its boxes: corners, a corner and a size, or a centre and a size; in pixels, fractions or per cent.

Files often write them in another way than their format says. All boxes of a file together show it: as what the format
says many leave their images, and as something else none does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from metr.data.formats.base import Reading
from metr.data.images import probe_size
from metr.errors import DataError, counted

BoxKind = Literal["xywh", "xyxy", "cxcywh", "xywhn", "xyxyn", "cxcywhn", "xywh%", "xyxy%", "cxcywh%"]
BOX_KINDS: dict[str | None, BoxKind] = {kind: kind for kind in get_args(BoxKind)}


@dataclass(frozen=True, kw_only=True)
class Written:
    """How a file writes its boxes. `doubtful`: many of them cannot be that, and nothing else fits them all."""

    kind: BoxKind
    doubtful: bool = False

    @staticmethod
    def asked(kind: str | None) -> "Written | None":
        """What a user says of a file (`boxes`); None where he says nothing."""
        return None if kind is None else Written(kind=BOX_KINDS[kind])

    @property
    def as_fractions(self) -> bool:
        """Whether `to_corners` gives fractions of the image."""
        return self.kind.endswith((_FRACTIONS, _PERCENT))

    @property
    def corners(self) -> bool:
        """Whether they are corners for certain, so that those that are swapped may be sorted."""
        return self.kind.startswith("xyxy") and not self.doubtful


# Behind the kinds whose numbers are not pixels: fractions of the image, and per cent of it.
_FRACTIONS, _PERCENT = "n", "%"
# What the kinds are called in messages.
_WORDS = {"xywh": "x, y, width, height", "xyxy": "corners", "cxcywh": "centre, width, height"}
# Boxes that are looked at together, for the sake of memory.
_PIECE = 1 << 20
# Images whose size is measured to judge the boxes of a file that gives none.
_MEASURED = 200
# A file's boxes are of another kind than it says if so many of them, and this share, cannot be what it says.
_FEWEST, _SHARE = 3, 0.1
# Fractions of the image are at most 1, but for rounding.
_LARGEST_FRACTION = 1.001
# Numbers up to 100 are taken for per cent where boxes would all be in that corner of their images with less than this
# probability, if one box of each image were anywhere in it; and where they reach nearly to 100 in both directions.
_UNLIKELY, _NEARLY_ALL = 1e-4, 80.0
# How far, in pixels and as a share of the side, boxes may leave the image by rounding.
_SLACK, _SLACK_SHARE = 1.5, 0.01


def judged(
    boxes: Float[np.ndarray, "n 4"],
    image: Int[np.ndarray, "n"],
    sizes: Float[np.ndarray, "k 2"],
    written: BoxKind,
    where: str,
    reading: Reading,
) -> Written:
    """The kind of the boxes of a file: `written`, unless that cannot be and one other kind fits them all.

    What is taken in place of `written` is noted, and so is a doubt that could not be settled. Corners are never taken
    for anything else: those that do not fit may be swapped.

    Args:
        boxes: The numbers as the file has them; NaN where it has none.
        image: The number of each box's image.
        sizes: (width, height) of each image in pixels; NaN where it is unknown.
        written: What the format, or the file's header, says.
        where: The file, for notes.
        reading: Takes the notes.
    """
    plain: str = written
    suffix = _unit(boxes, image, sizes, plain, where, reading)
    if suffix:
        sizes = np.full_like(sizes, 1.0 if suffix == _FRACTIONS else 100.0)
    total, odd = _misfits(boxes, image, sizes, plain)
    if odd < _FEWEST or odd < _SHARE * total:
        return Written(kind=BOX_KINDS[plain + suffix])
    others = {kind: _misfits(boxes, image, sizes, kind)[1] for kind in _WORDS if kind != plain}
    fitting = [kind for kind, count in others.items() if count == 0]
    says = f"{odd} of {counted(total, 'box', 'boxes')} cannot be {_WORDS[plain]}: they are empty or leave their images"
    if len(fitting) == 1 and plain != "xyxy":
        way_back = f"`boxes: {plain}{suffix}` in a datasets file decides otherwise"
        detail = f"{says}; all can be {_WORDS[fitting[0]]} and are read so ({way_back})"
        reading.notes.once(f"boxes are not {plain}", where, detail)
        return Written(kind=BOX_KINDS[fitting[0] + suffix])
    doubtful = min(others.values()) < odd / 2
    if doubtful:
        named = ", ".join(f"{count} cannot be {_WORDS[kind]}" for kind, count in others.items())
        detail = f"{says}; {named}. `boxes` in a datasets file says what they are"
        reading.notes.once("boxes are doubtful", where, detail)
    return Written(kind=BOX_KINDS[plain + suffix], doubtful=doubtful)


def to_corners(boxes: Float[np.ndarray, "n 4"], kind: BoxKind) -> None:
    """Makes boxes of a kind xyxy, in place; fractions stay fractions, and per cent become fractions."""
    for piece in _pieces(len(boxes)):
        part = boxes[piece]
        if kind.endswith(_PERCENT):
            part /= 100
        if kind.startswith("cxcywh"):
            part[:, :2] -= part[:, 2:] / 2
        if not kind.startswith("xyxy"):
            part[:, 2:] += part[:, :2]


def sizes_of(
    declared: Sequence[tuple[int, int] | None], paths: Sequence[str | None], reading: Reading
) -> Float[np.ndarray, "k 2"]:
    """(width, height) of images, as declared; a few are measured where none is declared, the others are NaN."""
    sizes = np.array([(np.nan, np.nan) if size is None else size[::-1] for size in declared], dtype=np.float32)
    sizes = sizes.reshape(-1, 2)
    if np.isfinite(sizes).all(axis=1).sum() < min(_MEASURED, len(sizes)):
        there = [number for number, path in enumerate(paths) if path and declared[number] is None]
        for number in there[:: max(1, len(there) // _MEASURED)]:
            try:
                sizes[number] = probe_size(reading.files.root / str(paths[number]))[::-1]
            except DataError:  # noted where its record is made
                continue
    return sizes


def _unit(
    boxes: Float[np.ndarray, "n 4"],
    image: Int[np.ndarray, "n"],
    sizes: Float[np.ndarray, "k 2"],
    plain: str,
    where: str,
    reading: Reading,
) -> str:
    """What stands behind the kind of boxes that are not in pixels; it is noted, as is a doubt."""
    if _are_fractions(boxes):
        if plain != "xyxy":
            detail = "no number is above 1: read as fractions of the image"
            reading.notes.once("boxes are fractions", where, detail)
        return _FRACTIONS
    if not _are_in_a_corner(boxes, image, sizes):
        return ""
    says = "no number is above 100, though images are larger"
    if any(_reach_100(boxes, kind) for kind in _WORDS):
        detail = (
            f"{says}: read as per cent of the image; if they are pixels, `boxes: {plain}` in a datasets file says so"
        )
        reading.notes.once("boxes are per cent", where, detail)
        return _PERCENT
    detail = f"{says}: read as pixels; if they are per cent of the image, `boxes: {plain}%` in a datasets file says so"
    reading.notes.once("boxes may be per cent", where, detail)
    return ""


def _are_in_a_corner(
    boxes: Float[np.ndarray, "n 4"], image: Int[np.ndarray, "n"], sizes: Float[np.ndarray, "k 2"]
) -> bool:
    """Whether no number is above 100, although images are so large and many that this is odd for pixels."""
    for piece in _pieces(len(boxes)):
        part = boxes[piece]
        if part[np.isfinite(part).all(axis=1)].max(initial=0) > 100:
            return False
    boxed = sizes[np.unique(image)].astype(np.float64)
    known = boxed[np.isfinite(boxed).all(axis=1)]
    return bool(np.prod(np.minimum(1.0, 100 / np.maximum(known, 1.0))) < _UNLIKELY)


def _reach_100(boxes: Float[np.ndarray, "n 4"], kind: str) -> bool:
    """Whether the right and lower edges of boxes of a kind come near to 100, and not beyond it."""
    reach = np.zeros(2)
    for piece in _pieces(len(boxes)):
        part = boxes[piece].astype(np.float64)
        to_corners(part, BOX_KINDS[kind])
        reach = np.maximum(reach, part[np.isfinite(part).all(axis=1)][:, 2:].max(axis=0, initial=0))
    return bool(reach.min() >= _NEARLY_ALL and reach.max() <= 100 + _SLACK)


def _are_fractions(boxes: Float[np.ndarray, "n 4"]) -> bool:
    """Whether all numbers that can be read are at most 1, and some are not whole."""
    whole = True
    for piece in _pieces(len(boxes)):
        part = boxes[piece]
        read = part[np.isfinite(part).all(axis=1)]
        if read.max(initial=0) > _LARGEST_FRACTION:
            return False
        whole = whole and not (read % 1 > 0).any()
    return not whole


def _misfits(
    boxes: Float[np.ndarray, "n 4"], image: Int[np.ndarray, "n"], sizes: Float[np.ndarray, "k 2"], kind: str
) -> tuple[int, int]:
    """How many boxes can be judged, and how many of them are empty or leave their image if they are of a kind."""
    total = odd = 0
    for piece in _pieces(len(boxes)):
        part, limit = boxes[piece].astype(np.float64), sizes[image[piece]].astype(np.float64)
        known = np.isfinite(part).all(axis=1) & np.isfinite(limit).all(axis=1)
        part, limit = part[known], limit[known]
        to_corners(part, BOX_KINDS[kind])
        slack = np.where(limit > 1, np.maximum(_SLACK, _SLACK_SHARE * limit), _SLACK_SHARE)
        fits = (part[:, :2] >= -slack) & (part[:, 2:] <= limit + slack) & (part[:, 2:] > part[:, :2])
        total, odd = total + len(part), odd + int((~fits.all(axis=1)).sum())
    return total, odd


def _pieces(count: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, count, _PIECE))
