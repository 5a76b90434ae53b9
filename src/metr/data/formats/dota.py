"""DOTA, and Roboflow's "YOLOv8 OBB" in this form: a text file an image in `labelTxt`, four corners and a name a line.

Boxes of any direction are read as the upright boxes around them. Difficult objects are ignored ones, as in the
benchmark.
"""

import re
from pathlib import Path

from metr.data.formats.base import BoxList
from metr.data.formats.file_per_image import LinePerObjectReader, is_number
from metr.data.formats.files import decoded, start_of, there
from metr.data.formats.shapes import around, pairs

_SNIFF_BYTES = 1 << 12
# The first lines of DOTA's own files tell where the image is from and how large a pixel is.
_HEADER = re.compile(r"\s*(imagesource|gsd|acquisition dates)\s*:", re.IGNORECASE)
_CONVERTED = "_original"


class DotaReader(LinePerObjectReader):
    """DOTA's text files. A split is made of folders with them."""

    format = "dota"
    looks_like = "DOTA, OBB: labelTxt/*.txt (x1 y1 x2 y2 x3 y3 x4 y4 name difficult) with images"
    expected = "8 numbers and a name"

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether the first object of a file looks like DOTA's."""
        folder = path.parent
        if folder.name.endswith(_CONVERTED) and there(folder.with_name(folder.name.removesuffix(_CONVERTED))):
            return False  # kept beside the YOLO files that it was converted to
        lines = decoded(start_of(path, _SNIFF_BYTES)).splitlines()
        first = next((line for line in lines if not cls.says_nothing(line)), "")
        row = cls.row(first)
        if row is None:
            return False
        # A polygon of YOLO's is all numbers, and all of them at most 1.
        rest = first.split()[8:]
        return not all(map(is_number, rest)) or (len(rest) == 2 and rest[0].isdigit() and max(row[1]) > 1)

    @classmethod
    def says_nothing(cls, line: str) -> bool:
        """Whether a line is empty or one of the header."""
        return super().says_nothing(line) or _HEADER.match(line) is not None

    @classmethod
    def row(cls, line: str) -> tuple[str, list[float], bool] | None:
        """Name, corners and difficulty of an object; None where a line is none."""
        cells = line.split()
        try:
            corners = [float(cell) for cell in cells[:8]]
        except ValueError:
            return None
        name = cells[8:]
        if len(corners) < 8 or not name:
            return None
        difficult = name.pop() if len(name) > 1 and name[-1].isdigit() else "0"
        return " ".join(name), corners, int(difficult) != 0

    def add(self, row: tuple[str, list[float], bool], number: int, boxes: BoxList) -> None:
        """Adds the upright box around the object of line `number`."""
        name, corners, difficult = row
        boxes.add(name, around(pairs(corners)), number, ignore=difficult)
