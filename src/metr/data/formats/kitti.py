"""KITTI: a text file an image in `label_2`, beside `image_2`; a line an object, fifteen columns.

Regions marked `DontCare` are ignored boxes of every category: objects there are not labelled. A sixteenth column, which
files with results have, is not read.
"""

from pathlib import Path

from metr.data.formats.base import BoxList, RawImage, Reading
from metr.data.formats.file_per_image import AnnotationFolder, FilePerImageReader, text_lines
from metr.data.formats.files import decoded, start_of

_SNIFF_BYTES = 1 << 12
_COLUMNS, _WITH_SCORE = 15, 16


class KittiReader(FilePerImageReader):
    """KITTI's labels of objects. A split is made of folders with text files."""

    format = "kitti"
    looks_like = "KITTI: training/label_2/*.txt (type truncated occluded alpha left top right bottom ...) with image_2"
    suffix = ".txt"

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like KITTI's labels; a cheap look."""
        head = start_of(path, _SNIFF_BYTES)
        lines = decoded(head).splitlines()
        whole = [line for line in (lines[:-1] if len(head) == _SNIFF_BYTES else lines) if line.strip()]
        return bool(whole) and all(_row(line) is not None for line in whole)

    def read_file(self, where: str, folder: AnnotationFolder, reading: Reading) -> RawImage | None:
        """The image of a text file; None, and an issue, where the file cannot be used."""
        path, lines = folder.image_of(where, "", reading), text_lines(where, reading)
        if path is None or lines is None:
            return None
        boxes = BoxList(where, reading)
        for number, line in enumerate(lines, start=1):
            row = _row(line)
            if row is not None:
                boxes.add(*row, number)
            elif line.strip():
                detail = f"expected a type and {_COLUMNS - 1} numbers: {line.strip()[:80]}; its image is left out"
                reading.issues.add("unreadable annotation", f"{where}:{number}", detail)
                return None
        return boxes.image(path)


def _row(line: str) -> tuple[str, list[float]] | None:
    """Type and box of an object; None where a line is none."""
    name, *cells = line.split() or [""]
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        return None
    return (name, values[3:7]) if len(values) + 1 in {_COLUMNS, _WITH_SCORE} and not is_number(name) else None


def is_number(text: str) -> bool:
    """Whether a cell of a text file is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
