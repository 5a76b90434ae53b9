"""WIDER FACE: `wider_face_train_bbx_gt.txt` lists each image, its number of faces, and a line for each face.

An image without faces has the number 0 and one line of zeros. Faces marked `invalid` are ignored ones, as the benchmark
leaves them out. The only category is "face".
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from metr.boxes import xywh_to_xyxy
from metr.data.formats.base import BoxList, RawImage, Reading, place
from metr.data.formats.files import is_image, text_start_of
from metr.data.formats.locating import locate
from metr.data.formats.many_images import ManyImagesReader

_SNIFF_BYTES = 1 << 12
_FACE = "face"
# x, y, width, height, blur, expression, illumination, invalid, occlusion, pose
_COLUMNS, _INVALID = 10, 7


class WiderFaceReader(ManyImagesReader):
    """WIDER FACE. A split is made of `wider_face_*_bbx_gt.txt`."""

    format = "wider_face"
    looks_like = "WIDER FACE: wider_face_split/wider_face_train_bbx_gt.txt with the images in WIDER_train/images"
    suffixes = (".txt",)
    declares_categories = True

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like WIDER FACE; a cheap look."""
        lines = text_start_of(path, _SNIFF_BYTES).decode(errors="replace").splitlines()[:3]
        if len(lines) < 3 or not (is_image(lines[0].strip()) and lines[1].strip().isdigit()):
            return False
        return _numbers(lines[2]) is not None

    def read_file(self, where: str, folders: tuple[str, ...], reading: Reading) -> Iterator[RawImage]:
        """The images of a file."""
        reading.number_declared([_FACE], where)
        split = Path(where).stem.removeprefix("wider_face_").removesuffix("_bbx_gt")
        own = [f"{base}WIDER_{split}/images" for base in ("", *(f"{folder}/" for folder in folders if folder))]
        places = (*(folder for folder in own if reading.files.listing(folder)), *folders)
        lines = reading.text(where).splitlines()
        starts = [number for number, line in enumerate(lines) if is_image(line.strip())]
        for start, end in pairwise([*starts, len(lines)]):
            name, rest = lines[start].strip(), [line for line in lines[start + 1 : end] if line.strip()]
            at = place(where, start + 1)
            faces = _faces(rest)
            if faces is None:
                detail = f"{name}: {len(rest[1:])} lines of faces after {(rest or ['nothing'])[0][:20]!r}: left out"
                reading.issues.add("unreadable annotation", at, detail)
                continue
            path = locate(name, places, at, reading)
            if path is not None:
                boxes = BoxList(where, reading)
                for number, face in enumerate(faces, start=start + 3):
                    is_invalid = len(face) > _INVALID and face[_INVALID] == 1
                    boxes.add(_FACE, face[:4], number, ignore=is_invalid)
                yield boxes.image(path, convert=xywh_to_xyxy)


def _faces(lines: list[str]) -> list[list[float]] | None:
    """The rows of faces after their number; None where there are more or fewer than that, or one cannot be read."""
    if not lines or not lines[0].strip().isdigit():
        return None
    count, rows = int(lines[0]), [_numbers(line) for line in lines[1:]]
    known = [row for row in rows if row is not None]
    if count == 0 and all(not any(row) for row in known) and len(known) == len(rows) <= 1:
        return []
    return known if len(known) == len(rows) == count else None


def _numbers(line: str) -> list[float] | None:
    """The numbers of a face's line, at least its box; None where it is none."""
    try:
        row = [float(cell) for cell in line.split()]
    except ValueError:
        return None
    return row if 4 <= len(row) <= _COLUMNS else None
