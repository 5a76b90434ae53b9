"""MOTChallenge: a folder a sequence, with its frames in `img1` and its boxes in `gt/gt.txt`.

As in the benchmark, persons that are marked to be disregarded, and distractors (persons on vehicles, static persons,
reflections; in MOT20 also vehicles without a motor), are ignored objects of "pedestrian". So are MOT20's crowds, whose
persons have no boxes. Cars and other things that only help trackers are left out. Other datasets of this form name
their classes in `gt/labels.txt`; then all classes are read. Pixels count from 1.
"""

import configparser
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from metr.boxes import xywh_to_xyxy
from metr.data.formats.base import BoxList, RawImage, Reader, Reading, plain_name, whole_size, without_repeats
from metr.data.formats.files import folders_within, there
from metr.data.formats.locating import grouped, split_of_folder
from metr.errors import DataError

_DEPTH = 3
_PEDESTRIAN = 1
# Person on vehicle, static person, distractor, reflection, crowd; and vehicle without a motor.
_DISTRACTORS = frozenset({2, 7, 8, 12, 13})
_DISTRACTORS_OF_MOT20 = _DISTRACTORS | {6}
_GROUND_TRUTH, _NAMES, _INFO = "gt/gt.txt", "gt/labels.txt", "seqinfo.ini"
# MOT17 has each sequence three times, each with the detections of another public detector.
_DETECTOR = re.compile(r"(MOT17-\d+)-(DPM|FRCNN|SDP)")
# 2015's files have ten columns: world coordinates follow the score, and there is no class.
_WITH_CLASS = range(8, 10)


class MotReader(Reader):
    """Sequences of MOT15, 16, 17 and 20, and of datasets in their form. A split is made of sequences."""

    format = "mot"
    looks_like = "MOTChallenge: train/SEQUENCE/gt/gt.txt (frame,id,left,top,width,height,...) with the frames in img1"

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with sequences, at most a few folders deep."""
        if not path.is_dir():
            return None
        sequences = (folder for folder in folders_within(path, _DEPTH) if there(folder / _GROUND_TRUTH, Path.is_file))
        splits = grouped((split_of_folder(folder, path), folder) for folder in sequences)
        return cls(path, splits) if splits else None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The frames of a split, sequence by sequence."""
        seen: set[str] = set()
        detectors: dict[str, str] = {}
        for folder in self.splits[split]:
            match, sequence = _DETECTOR.fullmatch(folder.name), self.within(folder)
            first = detectors.setdefault(match[1], sequence) if match else sequence
            if first != sequence:
                reading.notes.once("repeated sequence", sequence, f"the same frames and boxes as {first}: left out")
                continue
            yield from without_repeats(_frames(sequence, reading), seen, reading)


def _frames(sequence: str, reading: Reading) -> Iterator[RawImage]:
    """The frames of a sequence; those without a line in its ground truth have no objects."""
    where = posixpath.join(sequence, _GROUND_TRUTH)
    names = _names(posixpath.join(sequence, _NAMES), reading)
    folder, size, length = _info(sequence, reading)
    images = {int(Path(path).stem): path for path in reading.files.images(folder) if Path(path).stem.isdecimal()}
    distractors = _DISTRACTORS_OF_MOT20 if posixpath.basename(sequence).startswith("MOT20") else _DISTRACTORS
    frames: dict[int, BoxList] = {}
    broken: set[int] = set()
    for number, line in enumerate(reading.text(where).splitlines(), start=1):
        row = _row(line)
        if row is None:
            if line.strip():
                detail = f"expected frame,id,left,top,width,height,...: {line[:80]}; a frame that it names is left out"
                reading.issues.add("unreadable annotation", f"{where}:{number}", detail)
                start = line.partition(",")[0].strip()
                broken |= {int(start)} if start.isdecimal() else set()
            continue
        _add(row, number, frames.setdefault(int(row[0]), BoxList(where, reading)), names, distractors)
    for frame in sorted(frames.keys() - images.keys()):
        reading.issues.add("missing image", where, f"frame {frame}, looked for in {folder}")
    for frame, path in sorted(images.items()):
        if length is not None and frame > length:
            reading.issues.add("unannotated image", path, f"the sequence has {length} frames: left out")
        elif frame not in broken:
            boxes = frames.get(frame) or BoxList(where, reading)
            yield boxes.image(path, size=size, convert=xywh_to_xyxy, amodal=True)


def _add(row: list[float], number: int, boxes: BoxList, names: list[str], distractors: frozenset[int]) -> None:
    """Adds a line of ground truth to the boxes of its frame."""
    left, top, width, height = row[2:6]
    box, kind = [left - 1, top - 1, width, height], row[7] if len(row) in _WITH_CLASS else _PEDESTRIAN
    disregarded = len(row) > 6 and row[6] == 0
    if names:
        name = names[int(kind) - 1] if kind in range(1, len(names) + 1) else None
        boxes.add(name, box, number, ignore=disregarded, found=f"class {kind:g} of {len(names)}")
    elif kind == _PEDESTRIAN or kind in distractors:
        boxes.add("pedestrian", box, number, ignore=disregarded or kind in distractors)


def _row(line: str) -> list[float] | None:
    """The numbers of a line; None where it has no box."""
    try:
        row = [float(cell) for cell in line.split(",")]
    except ValueError:
        return None
    return row if len(row) >= 6 and row[0].is_integer() else None


def _names(where: str, reading: Reading) -> list[str]:
    """The names of the classes from 1 on; none where a dataset does not declare them."""
    if posixpath.basename(where) not in reading.files.listing(posixpath.dirname(where)):
        return []
    return [plain_name(line) for line in reading.text(where).splitlines() if line.strip()]


def _info(sequence: str, reading: Reading) -> tuple[str, tuple[int, int] | None, int | None]:
    """The folder of the frames, their size and their number, as far as `seqinfo.ini` tells."""
    frames, size, length = posixpath.join(sequence, "img1"), None, None
    if _INFO in reading.files.listing(sequence):
        where = posixpath.join(sequence, _INFO)
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(reading.text(where))
            section = parser["Sequence"]
            frames = reading.files.resolve(section.get("imDir", "img1"), sequence)
            size = whole_size(section.getfloat("imHeight"), section.getfloat("imWidth"))
            length = section.getint("seqLength")
        except (configparser.Error, DataError, KeyError, ValueError) as error:
            reading.issues.add("unreadable annotation", where, str(error))
    return frames, size, length
