"""VisDrone (images): a text file an image in `annotations`, beside `images`; a line an object, eight numbers.

As in the benchmark, ignored regions (category 0), objects of other kinds (category 11) and boxes of score 0 count
neither for nor against a detector: they are ignored boxes, the first two of every category.
"""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from metr.boxes import xywh_to_xyxy
from metr.data.formats.base import BoxList, RawImage, Reading
from metr.data.formats.file_per_image import LinePerObjectReader

# The published names, by their numbers in the files from 1 on.
NAMES = (
    "pedestrian",
    "people",
    "bicycle",
    "car",
    "van",
    "truck",
    "tricycle",
    "awning-tricycle",
    "bus",
    "motor",
)
_OTHERS = 11
# A name that says that nothing is known there.
_IGNORED = "ignored regions"
# left, top, width, height, score, category, truncation, occlusion
_COLUMNS = 8


class VisDroneReader(LinePerObjectReader):
    """VisDrone-DET. A split is made of folders with text files."""

    format = "visdrone"
    looks_like = "VisDrone: annotations/*.txt (left,top,width,height,score,category,truncation,occlusion) with images"
    declares_categories = True
    expected = f"{_COLUMNS} whole numbers"

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split, sorted by the names of their text files."""
        reading.number_declared(NAMES, self.within(self.splits[split][0]))
        yield from super().read(split, reading)

    def to_xyxy(self, boxes: Float[Tensor, "m 4"]) -> Float[Tensor, "m 4"]:
        """The boxes, which are given as left, top, width and height."""
        return xywh_to_xyxy(boxes)

    @classmethod
    def row(cls, line: str) -> tuple[int, ...] | None:
        """The numbers of a line, which may end with a comma; None where it has not eight whole ones."""
        try:
            row = tuple(int(cell) for cell in line.strip().removesuffix(",").split(","))
        except ValueError:
            return None
        return row if len(row) == _COLUMNS else None

    def add(self, row: tuple[int, ...], number: int, boxes: BoxList) -> None:
        """Adds the object of line `number`, as an ignored box where the benchmark ignores it."""
        box, score, category = [float(value) for value in row[:4]], row[4], row[5]
        name = _IGNORED if category in {0, _OTHERS} else None
        if 1 <= category <= len(NAMES):
            name = NAMES[category - 1]
        boxes.add(name, box, number, ignore=score == 0, found=f"category {category}, expected 0 to {_OTHERS}")
