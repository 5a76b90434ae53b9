"""KITTI: a text file an image in `label_2`, beside `image_2`; a line an object, fifteen columns.

Regions marked `DontCare` are ignored boxes of every category: objects there are not labelled. A sixteenth column, which
files with results have, is not read.
"""

import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path

from metr.data.formats.base import BoxList, RawImage, Reading
from metr.data.formats.file_per_image import AnnotationFolder, FilePerImageReader
from metr.data.formats.files import decoded, start_of
from metr.errors import DataError

_SNIFF_BYTES = 1 << 12
_COLUMNS, _WITH_SCORE = 15, 16
_DONT_CARE = "DontCare"


class KittiReader(FilePerImageReader):
    """KITTI's labels of objects. A split is made of folders with text files."""

    format = "kitti"
    looks_like = "KITTI: training/label_2/*.txt (type truncated occluded alpha left top right bottom ...) with image_2"
    suffix = ".txt"

    def __init__(self, root: Path, splits: Mapping[str, tuple[Path, ...]]) -> None:
        super().__init__(root, splits)
        self._categories: list[str] | None = None

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like KITTI's labels; a cheap look."""
        head = start_of(path, _SNIFF_BYTES)
        lines = decoded(head).splitlines()
        whole = [line for line in (lines[:-1] if len(head) == _SNIFF_BYTES else lines) if line.strip()]
        return bool(whole) and all(_row(line) is not None for line in whole)

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split, sorted by the names of their text files."""
        if self._categories is None:
            self._categories = self._all_categories(reading)
        yield from super().read(split, reading)

    def _all_categories(self, reading: Reading) -> list[str]:
        """The categories of all splits. They are needed before the first image: regions are ignored for each."""
        names: set[str] = set()
        for folder in dict.fromkeys(folder for folders in self.splits.values() for folder in folders):
            within = self.within(folder)
            for name in AnnotationFolder(within, self.suffix, reading.files).names:
                rows = map(_row, _lines(posixpath.join(within, name), Reading(files=reading.files)))
                names.update(row[0] for row in rows if row is not None)
        return sorted(names - {_DONT_CARE})

    def read_file(self, where: str, folder: AnnotationFolder, reading: Reading) -> RawImage | None:
        """The image of a text file; None, and an issue, where the file cannot be used."""
        path = folder.image_of(where, "", reading)
        if path is None:
            return None
        boxes = BoxList(where, reading)
        for number, line in enumerate(_lines(where, reading), start=1):
            row = _row(line)
            if row is None:
                if line.strip():
                    detail = f"expected a type and {_COLUMNS - 1} numbers: {line.strip()[:80]}; its image is left out"
                    reading.issues.add("unreadable annotation", f"{where}:{number}", detail)
                    return None
            elif row[0] == _DONT_CARE:
                boxes.ignore_region(self._categories or (), row[1], number)
            else:
                boxes.add(*row, number)
        return boxes.image(path)


def _lines(where: str, reading: Reading) -> list[str]:
    """The lines of a text file; none, and an issue, where it cannot be read."""
    try:
        return reading.text(where).splitlines()
    except DataError as error:
        reading.issues.add("unreadable annotation", where, error.what)
        return []


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
