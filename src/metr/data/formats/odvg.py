"""ODVG (Grounding DINO, MM-Grounding-DINO): a JSON line an image, with detections or with grounded phrases.

Detections have a label, which a label map beside the file names, and mostly the name itself, which is believed where
the two differ. All names of the label map are annotated in all its images. Grounded regions are boxes whose category
is their phrase. A caption names what somebody chose to mention and is silent about all else, so in images with
captions "no box" never means "none there": nothing counts as annotated exhaustively. An image may come up again with
each of its captions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from metr.data.formats.base import UNREADABLE, RawImage, Reader, Reading, locate, plain_name, whole_size
from metr.data.formats.files import folders_within, glance
from metr.data.formats.json_lines import first_keys, json_lines, numbers, read_label_map, wide_image_folders
from metr.data.splits import canonical_split

_DEPTH = 1
_SUFFIXES = (".json", ".jsonl")
# Folders with one JSON file an image are told from these by their first files.
_SNIFFED = 20

Kind = Literal["detection", "grounding"]


class _Instance(msgspec.Struct, gc=False):
    bbox: Any = None
    label: int | str | None = None
    category: str | None = None


class _Region(msgspec.Struct, gc=False):
    bbox: Any = None
    phrase: str | list[str] | None = None


class _Detection(msgspec.Struct):
    instances: list[_Instance]


class _Grounding(msgspec.Struct):
    regions: list[_Region]


class _Line(msgspec.Struct):
    filename: str
    height: float | None = None
    width: float | None = None
    detection: _Detection | None = None
    grounding: _Grounding | None = None


_DECODER = msgspec.json.Decoder(_Line, strict=False)


@dataclass(frozen=True, kw_only=True)
class _Rules:
    """How the lines of a file are meant.

    `labels` are the numbers of the labels of its label map. `mixed` says that some names of the dataset are phrases,
    which its detections know nothing about.
    """

    kind: Kind
    labels: Mapping[str, int]
    mixed: bool


class OdvgReader(Reader):
    """ODVG lines. A split is made of files, each of detections or of grounded phrases."""

    format = "odvg"
    looks_like = 'ODVG: JSON lines with "filename" and "detection" or "grounding", with label_map.json beside them'

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with ODVG files, at most one folder deep, or of one such file."""
        if path.is_file():
            root = path.parent.parent if path.parent.name == "annotations" else path.parent
            return cls(root, {_split_of(path): (path,)}) if _kind(path) else None
        splits: dict[str, tuple[Path, ...]] = {}
        for folder in folders_within(path, _DEPTH):
            for file in _odvg_files(folder):
                splits[_split_of(file)] = (*splits.get(_split_of(file), ()), file)
        named = {name: files for name, files in splits.items() if canonical_split(name)}
        return cls(path, named or splits) if splits else None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of its files."""
        kinds = {_kind(file) for files in self.splits.values() for file in files}
        seen: set[str] = set()
        for file in self.splits[split]:
            kind, where = _kind(file), self.within(file)
            if kind is None:
                reading.files.touch(where)
                reading.issues.add("unreadable annotation", where, "none of its first lines is ODVG: left out")
                continue
            labels = self._number_labels(file, reading) if kind == "detection" else {}
            rules = _Rules(kind=kind, labels=labels, mixed=len(kinds) > 1)
            folders = wide_image_folders(reading.files, split, self.within(file.parent))
            for place, line in json_lines(file, _DECODER, where, reading):
                path = locate(line.filename, folders, place, reading)
                if path is not None and _fits(line, rules, place, path in seen, reading):
                    # an image comes up again with each of its captions
                    image_id = f"{path} ({place})" if path in seen else path
                    seen.add(path)
                    yield _raw_image(line, path, image_id, place, rules, reading)

    def _number_labels(self, file: Path, reading: Reading) -> dict[str, int]:
        """The numbers of the labels of the label map that belongs to a file; none where there is no label map."""
        found = _label_map(file, self.root)
        if found is None:
            return {}
        where = self.within(found)
        labels = read_label_map(found, where, reading.files)
        numbered = {label: reading.names.number(name) for label, name in labels.items() if plain_name(name)}
        if len(set(numbered.values())) < len(numbered):
            reading.notes.once("duplicate category", where, "a name has more than one label: joined")
        return numbered


def _fits(line: _Line, rules: _Rules, place: str, again: bool, reading: Reading) -> bool:
    """Whether a line is one that its file should have; else it is noted."""
    if (line.detection if rules.kind == "detection" else line.grounding) is None:
        detail = f"no {rules.kind!r}, which the first lines of this file have"
        reading.issues.add("unreadable annotation", place, detail)
        return False
    if again and rules.kind == "detection":
        reading.issues.add("duplicate image", place, f"{line.filename} again: left out")
        return False
    return True


def _raw_image(line: _Line, path: str, image_id: str, place: str, rules: _Rules, reading: Reading) -> RawImage:
    annotated: Sequence[int] | None = None
    if rules.kind == "grounding":
        found, annotated = _regions(line.grounding, place, reading), ()
    else:
        found = _detections(line.detection, rules.labels, place, reading)
        if rules.mixed:
            annotated = sorted(set(rules.labels.values()) or {number for number, _, _ in found})
    return RawImage(
        where=place,
        image_id=image_id,
        path=path,
        size=whole_size(line.height, line.width),
        boxes=np.array([box for _, box, _ in found], dtype=np.float64).reshape(-1, 4),
        labels=np.array([number for number, _, _ in found], dtype=np.int64),
        marks=[mark for _, _, mark in found],
        annotated=annotated,
    )


def _detections(
    detection: _Detection | None, labels: Mapping[str, int], place: str, reading: Reading
) -> list[tuple[int, list[float], str]]:
    """Number, corners and place of each box that can be understood."""
    found = []
    for index, item in enumerate([] if detection is None else detection.instances, start=1):
        number = labels.get(str(item.label))
        if item.category and plain_name(item.category):
            named = reading.names.number(item.category)
            if number is not None and named != number:
                detail = f"label {item.label} is {item.category!r} here and another name in the label map"
                reading.notes.once("conflicting name", place.rpartition(":")[0], detail)
            number = named
        box = numbers(item.bbox, 4)
        if number is None:
            detail = f"label {item.label!r}, bbox {item.bbox!r}"[:80]
            reading.issues.add("unknown category", f"{place}, instance {index}", detail)
        else:
            found.append((number, box or list(UNREADABLE), f"instance {index}"))
    return found


def _regions(grounding: _Grounding | None, place: str, reading: Reading) -> list[tuple[int, list[float], str]]:
    """Number, corners and place of each box of each region; a region is one box or a list of them."""
    found = []
    for index, region in enumerate([] if grounding is None else grounding.regions, start=1):
        several = isinstance(region.bbox, list) and len(region.bbox) > 0 and isinstance(region.bbox[0], list)
        phrase = plain_name(" ".join(region.phrase) if isinstance(region.phrase, list) else region.phrase or "")
        for item in region.bbox if several else [region.bbox]:
            box = numbers(item, 4)
            if box is None or not phrase:
                kind = "unreadable box" if box is None else "unknown category"
                detail = f"phrase {region.phrase!r}, bbox {item!r}"[:80]
                reading.issues.add(kind, f"{place}, region {index}", detail)
            else:
                found.append((reading.names.number(phrase), box, f"region {index}"))
    return found


def _kind(path: Path) -> Kind | None:
    """What a file holds, from its first lines; None if it is not ODVG."""
    if path.suffix.lower() not in _SUFFIXES:
        return None
    for keys in first_keys(path):
        if {"filename", "detection"} <= keys:
            return "detection"
        if {"filename", "grounding"} <= keys:
            return "grounding"
    return None


def _odvg_files(folder: Path) -> list[Path]:
    files = [Path(entry.path) for entry in glance(folder) if entry.name.lower().endswith(_SUFFIXES)]
    if not any(map(_kind, islice(files, _SNIFFED))):
        return []
    # Beside one that fits, lines of which none can be read are a damaged file, which reading tells.
    return [file for file in files if _kind(file) or (file.suffix.lower() == ".jsonl" and not any(first_keys(file)))]


def _split_of(file: Path) -> str:
    """The name of the split of a file: in its own name, else in that of its folder."""
    if canonical_split(file.stem) is None and canonical_split(file.parent.name):
        return file.parent.name
    return file.stem


def _label_map(file: Path, root: Path) -> Path | None:
    """The label map of a file: near it, and the one whose name is most like the file's where there are several."""
    for folder in dict.fromkeys([file.parent, root]):
        entries = [Path(entry.path) for entry in glance(folder) if "label_map" in entry.name.lower()]
        maps = [entry for entry in entries if entry.suffix.lower() == ".json"]
        if maps:
            return max(maps, key=lambda entry: (_shared(entry.stem, file.stem), -len(entry.stem)))
    return None


def _shared(one: str, other: str) -> int:
    """The number of characters that two names begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
