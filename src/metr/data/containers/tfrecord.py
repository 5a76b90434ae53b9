"""TFRecord files with the keys of TensorFlow's Object Detection API, which Roboflow exports too, or those of TFDS.

Names come from `image/object/class/text`, else from a label map (`.pbtxt`) by `image/object/class/label`. Crowds,
groups and difficult objects are ignored ones. Such a dataset is unpacked once: the bytes of the images as they are, and
a `records.jsonl` for each file whose lines are the records.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from metr.data.containers.shards import (
    ShardedReader,
    copied_splits,
    copy_about,
    every_shard,
    files_below,
    link_image,
    missing_shards,
    shards_by_split,
    write_image,
)
from metr.data.containers.store import Budget, unpacked
from metr.data.containers.tf_example import Feature, is_tfrecord, parse_example, records
from metr.data.formats.base import BoxList, RawImage, Reader, Reading, whole_size, without_repeats
from metr.data.formats.files import decoded, files_in, start_of
from metr.data.formats.json_lines import json_lines
from metr.data.formats.locating import locate
from metr.errors import DataError

_FILES = re.compile(r"\.(tf_?records?|tfrecs?|records?)([-_.].*)?$|-\d{5}-of-\d{5}$", re.IGNORECASE)
_SNIFFED, _SNIFFED_RECORDS = 5, 20
_LINES, _NAMES = "records.jsonl", "names.json"
_SIDES = tuple(f"image/object/bbox/{side}" for side in ("xmin", "ymin", "xmax", "ymax"))
_TFDS_BOXES = "objects/bbox"
_IMAGES = ("image/encoded", "image", "image/image")
_FILE_NAMES = ("image/filename", "image/source_id", "image/path")
_TEXTS = ("image/object/class/text",)
_LABELS = ("image/object/class/label", "objects/label")
_IGNORED = (
    *(f"image/object/{name}" for name in ("is_crowd", "difficult", "group_of")),
    *(f"objects/{name}" for name in ("is_crowd", "is_difficult", "is_group_of")),
)
# Boxes are shares of the image; a number beyond this shows that a writer put pixels instead.
_LARGEST_SHARE = 2
_LARGEST_MAP = 1 << 24
_ITEM = re.compile(r"item\s*:?\s*\{([^{}]*)\}")
_TEXT = re.compile(r"""\b(name|display_name)\s*:\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""")
_ID = re.compile(r"\bid\s*:\s*(-?\d+)")
_ESCAPE = re.compile(rb"\\([0-7]{1,3}|x[0-9a-fA-F]{1,2}|.)", re.DOTALL)


class _Line(msgspec.Struct, omit_defaults=True):
    """A record as it is unpacked. `boxes` are xyxy; None where the record has none, not even an empty list."""

    file_name: str
    height: float | None = None
    width: float | None = None
    relative: bool = True
    boxes: list[list[float | None]] | None = None
    names: list[str] = []
    ignored: list[int] = []
    trouble: str = ""


class LabelMap(msgspec.Struct):
    """The names of a label map by their numbers, and the names to show in place of others."""

    by_number: dict[int, str] = {}
    shown: dict[str, str] = {}


class TFRecordReader(ShardedReader):
    """TFRecord files of object detection. A split is made of such files, and once unpacked of their folders."""

    format = "tfrecord"
    looks_like = (
        "TFRecord: *.tfrecord or *.record with image/encoded and image/object/bbox/xmin, and a *.pbtxt label map"
    )

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with such files, a few folders deep, or of one such file."""
        if path.is_file():
            return cls(path.parent, {"all": (path,)}) if _FILES.search(path.name) and _fits(path) else None
        files = files_below(path, _FILES)
        files = [file for file in files if file.suffix not in {".json", ".txt", ".pbtxt", ".md"}]
        if not any(map(_fits, files[:_SNIFFED])):
            return None
        return cls(path, shards_by_split(files, path), missing_shards(files, path))

    def prepared(self) -> "TFRecordReader":
        """A reader of the unpacked dataset.

        Raises:
            DataError: a file is damaged, or the disk is too small.
        """
        files = list(every_shard(self.splits))
        maps = [found for folder in self._folders(files) for found in _label_maps(folder)]
        source = files[0] if list(self.splits) == ["all"] and len(files) == 1 else self.root
        copy = unpacked(source, [*files, *maps], lambda folder: self._unpack(files, folder), kind=self.format)
        return TFRecordReader(copy, copied_splits(self.splits, self.root, copy), self.missing)

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of the records."""
        self.note_missing(reading)
        seen: set[str] = set()
        for folder in self.splits[split]:
            yield from without_repeats(self._read_folder(folder, reading), seen, reading)

    def _read_folder(self, folder: Path, reading: Reading) -> Iterator[RawImage]:
        own = self.within(folder)
        declared = msgspec.json.decode(reading.files.read(f"{own}/{_NAMES}"), type=list[str])
        reading.number_declared(declared, f"{own}/{_NAMES}")
        for place, line in json_lines(f"{own}/{_LINES}", msgspec.json.Decoder(_Line), reading):
            if line.trouble:
                reading.issues.add("unreadable annotation", place, line.trouble)
                continue
            if line.boxes is None:
                detail = f"{line.file_name} has no list of boxes, not even an empty one: left out"
                reading.issues.add("unannotated image", place, detail)
                continue
            path = locate(line.file_name, [own], place, reading)
            if path is not None:
                yield _raw_image(line, path, place, reading)

    def _folders(self, files: Sequence[Path]) -> list[Path]:
        """The folders of the files and those above them, up to the dataset's, nearest first."""
        folders = (
            folder
            for file in files
            for folder in [file.parent, *file.parent.parents[: len(file.parent.relative_to(self.root).parts)]]
        )
        return list(dict.fromkeys(folders))

    def _unpack(self, files: Sequence[Path], folder: Path) -> None:
        size = sum(file.stat().st_size for file in files)
        budget = Budget(self.root, size, folder)
        budget.expect(size)
        copy_about(self.root, folder)
        for file in files:
            place = folder / file.relative_to(self.root)
            place.mkdir(parents=True)
            found = (read_label_map(found) for above in self._folders([file]) for found in _label_maps(above))
            names = next((one for one in found if one.by_number), LabelMap())
            declared = [names.by_number[number] for number in sorted(names.by_number)]
            (place / _NAMES).write_bytes(msgspec.json.encode(list(dict.fromkeys(declared))))
            _unpack_file(file, names, self.root, place, budget)


def _unpack_file(file: Path, names: LabelMap, root: Path, folder: Path, budget: Budget) -> None:
    """Writes the images and lines of a file."""
    with (folder / _LINES).open("wb") as lines:
        for number, data in enumerate(records(file), start=1):
            try:
                example = parse_example(data)
            except ValueError as error:
                what = f"record {number} is no tf.train.Example: {error}"
                raise DataError(what, where=file, hint="only such records are read") from None
            encoded = next((value for key in _IMAGES if isinstance(value := _first(example, key), bytes)), b"")
            named = next((text for key in _FILE_NAMES if (text := _as_text(_first(example, key)))), "")
            if encoded:
                name = write_image(encoded, number, named, folder, budget)
            else:
                name = link_image(named, number, [file.parent, root], root, folder) if named else ""
            line = msgspec.json.encode(_line(example, name, names)) + b"\n"
            budget.add_bytes(len(line))
            lines.write(line)


def _line(example: Mapping[str, Feature], name: str, names: LabelMap) -> _Line:
    height, width = (_number(_first(example, f"image/{side}")) for side in ("height", "width"))
    line = _Line(file_name=name, height=height, width=width)
    if not name:
        line.trouble = "a record without an image or the name of one"
        return line
    boxes = _boxes(example)
    if boxes is None:
        sides = {key.rpartition("/")[2]: len(example.get(key, [])) for key in (*_SIDES, _TFDS_BOXES) if key in example}
        line.trouble = f"boxes have sides of different numbers: {sides}" if sides else ""
        return line
    line.boxes = boxes
    line.names = _names(example, len(boxes), names)
    flags = [example.get(key, []) for key in _IGNORED]
    line.ignored = [
        int(any(len(flag) == len(boxes) and bool(flag[row]) for flag in flags)) for row in range(len(boxes))
    ]
    line.relative = all(side is None or abs(side) <= _LARGEST_SHARE for box in boxes for side in box)
    return line


def _boxes(example: Mapping[str, Feature]) -> list[list[float | None]] | None:
    """The boxes as xyxy; None where there is no list of them, or lists of different lengths."""
    if any(key in example for key in _SIDES):
        sides = [[_number(value) for value in example.get(key, [])] for key in _SIDES]
        return list(map(list, zip(*sides, strict=True))) if len({*map(len, sides)}) == 1 else None
    flat = [_number(value) for value in example[_TFDS_BOXES]] if _TFDS_BOXES in example else None
    if flat is None or len(flat) % 4:
        return None
    return [[flat[at + 1], flat[at], flat[at + 3], flat[at + 2]] for at in range(0, len(flat), 4)]


def _names(example: Mapping[str, Feature], count: int, names: LabelMap) -> list[str]:
    """The name of each box: the text of its category, else that of its number in the label map; "" for none."""
    texts, labels = (
        next((example[key] for key in keys if key in example and len(example[key]) == count), [])
        for keys in (_TEXTS, _LABELS)
    )
    found = []
    for row in range(count):
        text = _as_text(texts[row]) if texts else ""
        number = labels[row] if labels else None
        if not text and isinstance(number, int):
            text = names.by_number.get(number, f"category {number}")
        found.append(names.shown.get(text, text))
    return found


def _raw_image(line: _Line, path: str, place: str, reading: Reading) -> RawImage:
    boxes = BoxList(place, reading)
    for row, box in enumerate(line.boxes or []):
        whole = [side for side in box if side is not None and math.isfinite(side)]
        boxes.add(
            line.names[row] or None,
            whole if len(whole) == 4 else None,
            f"box {row + 1}",
            ignore=bool(line.ignored[row]),
            found="neither a name nor a number of one",
        )
    return boxes.image(path, size=whole_size(line.height, line.width), relative=line.relative, corners=True)


def _fits(file: Path) -> bool:
    """Whether a file has records of object detection; a look at the first ones."""
    if not is_tfrecord(file):
        return False
    try:
        first = map(parse_example, islice(records(file), _SNIFFED_RECORDS))
        return any(_SIDES[0] in example or _TFDS_BOXES in example for example in first)
    except (DataError, ValueError):
        return True  # damaged further on, which is an error when it is unpacked


def read_label_map(path: Path) -> LabelMap:
    """The names of a label map: `item { id: 1 name: "cat" }`, or a name a line where TFDS wrote it."""
    text = decoded(start_of(path, _LARGEST_MAP))
    if path.suffix != ".pbtxt":
        return LabelMap(by_number=dict(enumerate(line.strip() for line in text.splitlines() if line.strip())))
    names = LabelMap()
    for item in _ITEM.findall(re.sub(r"(?m)^\s*#.*$", "", text)):
        words = {key: _unquoted(value) for key, value in _TEXT.findall(item)}
        number = _ID.search(_TEXT.sub("", item))
        name = words.get("display_name") or words.get("name")
        if name:
            if number is not None:
                names.by_number[int(number[1])] = name
            names.shown[words.get("name", name)] = name
    return names


def _label_maps(folder: Path) -> list[Path]:
    """The label maps in a folder, those that are called so first."""
    found = files_in(folder, ".pbtxt", "label.labels.txt")
    return sorted(found, key=lambda path: ("label" not in path.name.lower(), path.name))


def _unquoted(text: str) -> str:
    """The text in quotes; its bytes may be written as numbers in base 8 or 16."""
    plain = {"n": b"\n", "t": b"\t", "r": b"\r"}

    def escaped(match: re.Match[bytes]) -> bytes:
        code = match[1].decode("latin-1")
        if code[0] in "01234567":
            return bytes([int(code, 8) & 0xFF])
        if code[0] == "x" and len(code) > 1:
            return bytes([int(code[1:], 16)])
        return plain.get(code, match[1])

    return decoded(_ESCAPE.sub(escaped, text[1:-1].encode()))


def _first(example: Mapping[str, Feature], key: str) -> bytes | float | int | None:
    values = example.get(key, [])
    return values[0] if values else None


def _as_text(value: Any) -> str:
    return decoded(value).strip() if isinstance(value, bytes) else ""


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
