"""VisDrone (images): a text file an image in `annotations`, beside `images`; a line an object, eight numbers.

As in the benchmark, ignored regions (category 0), objects of other kinds (category 11) and boxes of score 0 count
neither for nor against a detector: they are ignored boxes, the first two of every category.
"""

from collections.abc import Iterator
from pathlib import Path

from metr.boxes import xywh_to_xyxy
from metr.data.formats.base import BoxList, RawImage, Reading
from metr.data.formats.file_per_image import AnnotationFolder, FilePerImageReader, text_lines
from metr.data.formats.files import decoded, start_of

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
_SNIFF_BYTES = 1 << 12


class VisDroneReader(FilePerImageReader):
    """VisDrone-DET. A split is made of folders with text files."""

    format = "visdrone"
    looks_like = "VisDrone: annotations/*.txt (left,top,width,height,score,category,truncation,occlusion) with images"
    suffix = ".txt"
    declares_categories = True

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like VisDrone's annotations; a cheap look."""
        head = start_of(path, _SNIFF_BYTES)
        lines = decoded(head).splitlines()
        whole = [line for line in (lines[:-1] if len(head) == _SNIFF_BYTES else lines) if line.strip()]
        return bool(whole) and all(_row(line) is not None for line in whole)

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split, sorted by the names of their text files."""
        reading.number_declared(NAMES, self.within(self.splits[split][0]))
        yield from super().read(split, reading)

    def read_file(self, where: str, folder: AnnotationFolder, reading: Reading) -> RawImage | None:
        """The image of a text file; None, and an issue, where the file cannot be used."""
        path, lines = folder.image_of(where, "", reading), text_lines(where, reading)
        if path is None or lines is None:
            return None
        boxes = BoxList(where, reading)
        for number, line in enumerate(lines, start=1):
            row = _row(line)
            if row is None:
                if line.strip():
                    detail = f"expected {_COLUMNS} whole numbers: {line.strip()[:80]}; its image is left out"
                    reading.issues.add("unreadable annotation", f"{where}:{number}", detail)
                    return None
                continue
            box, score, category = [float(value) for value in row[:4]], row[4], row[5]
            name = _IGNORED if category in {0, _OTHERS} else None
            if 1 <= category <= len(NAMES):
                name = NAMES[category - 1]
            boxes.add(name, box, number, ignore=score == 0, found=f"category {category}, expected 0 to {_OTHERS}")
        return boxes.image(path, convert=xywh_to_xyxy)


def _row(line: str) -> list[int] | None:
    """The numbers of a line, which may end with a comma; None where it has not eight whole ones."""
    try:
        row = [int(cell) for cell in line.strip().removesuffix(",").split(",")]
    except ValueError:
        return None
    return row if len(row) == _COLUMNS else None
