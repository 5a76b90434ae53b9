"""KITTI: a text file an image in `label_2`, beside `image_2`; a line an object, fifteen columns.

Regions marked `DontCare` are ignored boxes of every category: objects there are not labelled. A sixteenth column, which
files with results have, is not read.
"""

from metr.data.formats.base import BoxList
from metr.data.formats.file_per_image import LinePerObjectReader, is_number

_COLUMNS, _WITH_SCORE = 15, 16


class KittiReader(LinePerObjectReader):
    """KITTI's labels of objects. A split is made of folders with text files."""

    format = "kitti"
    looks_like = "KITTI: training/label_2/*.txt (type truncated occluded alpha left top right bottom ...) with image_2"
    writes_corners = True
    expected = f"a type and {_COLUMNS - 1} numbers"

    @classmethod
    def row(cls, line: str) -> tuple[str, list[float]] | None:
        """Type and box of an object; None where a line is none."""
        name, *cells = line.split() or [""]
        try:
            values = [float(cell) for cell in cells]
        except ValueError:
            return None
        return (name, values[3:7]) if len(values) + 1 in {_COLUMNS, _WITH_SCORE} and not is_number(name) else None

    def add(self, row: tuple[str, list[float]], number: int, boxes: BoxList) -> None:
        """Adds the object of line `number`."""
        boxes.add(*row, number)
