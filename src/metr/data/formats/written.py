"""What writers of annotation formats are given: an image with named boxes, of people or of a detector."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from metr.data.records import ImageRecord

# Corners are rounded to so many digits: a thousandth of a pixel.
_DIGITS = 3
# What XML 1.0 cannot say, also not as a reference.
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, kw_only=True)
class WrittenBox:
    """A box of a category: `box` are xyxy in pixels; `score` is that of a detector, None where a person drew it."""

    name: str
    box: tuple[float, float, float, float]
    ignore: bool = False
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class WrittenImage:
    """An image as a file of annotations describes it; `name` is its path as the file gives it, with slashes."""

    name: str
    width: int
    height: int
    boxes: tuple[WrittenBox, ...]


def written_image(record: ImageRecord, name: str, categories: Sequence[str]) -> WrittenImage:
    """A record as writers take it, under the name that its image has now."""
    scores = [math.nan] * len(record.boxes) if record.scores is None else record.scores.tolist()
    boxes = (
        WrittenBox(
            name=categories[label],
            box=(box[0], box[1], box[2], box[3]),
            ignore=ignore,
            score=None if math.isnan(score) else score,
        )
        for box, label, ignore, score in zip(
            record.boxes.tolist(), record.labels.tolist(), record.ignore.tolist(), scores, strict=True
        )
    )
    return WrittenImage(name=text_of(name), width=record.width, height=record.height, boxes=tuple(boxes))


def rounded(value: float | int) -> float | int:
    """A coordinate to a thousandth, as a whole number where it is one: many tools expect those."""
    short = round(value, _DIGITS)
    return int(short) if short == int(short) else short


def text_of(name: str) -> str:
    """The name of a file as text of UTF-8: bytes that are none become question marks."""
    return name.encode(errors="replace").decode()


def xml_text(text: str) -> str:
    """A text without the characters that XML lacks, which become U+FFFD; not escaped."""
    return _NOT_IN_XML.sub("\ufffd", text)
