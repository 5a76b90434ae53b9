"""ODVG (Grounding DINO, MM-Grounding-DINO): a JSON line an image, with detections or with grounded phrases.

A detection has a label, which a label map beside the file translates to a name, and mostly the name itself, which is
taken where the two differ. All names of the label map are annotated in all images of the file. A grounded region is a
box whose category is its phrase. A caption mentions some objects and not others, so in images with captions "no box"
never means "none there": nothing counts as annotated exhaustively. An image may be listed with several captions.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal

import msgspec

from metr.data.formats.base import BoxList, RawImage, Reader, Reading, place, plain_name, whole_size
from metr.data.formats.files import files_in, folders_within
from metr.data.formats.json_lines import first_keys, json_lines, numbers, read_label_map
from metr.data.formats.locating import dataset_root, image_folders, locate, split_of_file, splits_of_files

_DEPTH = 1
_SUFFIXES = (".json", ".jsonl")
# Folders with one JSON file an image are distinguished from these by their first files.
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


class OdvgReader(Reader):
    """ODVG lines. A split is made of files, each of detections or of grounded phrases."""

    format = "odvg"
    looks_like = 'ODVG: JSON lines with "filename" and "detection" or "grounding", with label_map.json beside them'

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with ODVG files, at most one folder deep, or of one such file."""
        if path.is_file():
            return cls(dataset_root(path), {split_of_file(path): (path,)}) if _kind(path) else None
        splits = splits_of_files(file for folder in folders_within(path, _DEPTH) for file in _odvg_files(folder))
        return cls(path, splits) if splits else None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of its files."""
        # Where some names of the dataset are phrases, its detections do not annotate those.
        mixed = len({_kind(file) for files in self.splits.values() for file in files}) > 1
        seen: set[str] = set()
        for file in self.splits[split]:
            kind, where = _kind(file), self.within(file)
            if kind is None:
                reading.files.touch(where)
                reading.issues.add("unreadable annotation", where, "none of its first lines is ODVG: left out")
                continue
            labels = self._label_map(file, reading) if kind == "detection" else {}
            folders = image_folders(reading.files, split, self.within(file.parent), anywhere=True)
            for line_place, line in json_lines(where, _DECODER, reading):
                path = locate(line.filename, folders, line_place, reading)
                if path is None or not _fits(line, kind, line_place, path in seen, reading):
                    continue
                boxes, annotated = BoxList(line_place, reading), None
                if kind == "grounding":
                    _add_regions(boxes, line.grounding)
                    annotated = []
                else:
                    _add_instances(boxes, line.detection, labels)
                    if mixed:
                        annotated = sorted(set(map(reading.names.number, labels.values())) or boxes.labels)
                # An image is listed again with each of its captions.
                image_id = f"{path} ({line_place})" if path in seen else path
                seen.add(path)
                size = whole_size(line.height, line.width)
                yield boxes.image(path, image_id=image_id, size=size, annotated=annotated, corners=True)

    def _label_map(self, file: Path, reading: Reading) -> dict[str, str]:
        """The names by label, of the label map of a file: the one near it whose name begins most like the file's."""
        near = (
            [found for found in files_in(folder, ".json") if "label_map" in found.name.lower()]
            for folder in (file.parent, self.root)
        )
        maps = next(filter(None, near), None)
        if maps is None:
            return {}
        # The likeness of two names is the number of characters that they begin with alike.
        best = max(maps, key=lambda found: (len(commonprefix([found.stem, file.stem])), -len(found.stem)))  # noqa: RUF071
        declared = read_label_map(self.within(best), reading.files)
        names = {label: plain_name(name) for label, name in declared.items() if plain_name(name)}
        reading.number_declared(names.values(), self.within(best))
        return names


def _fits(line: _Line, kind: Kind, where: str, again: bool, reading: Reading) -> bool:
    """Whether a line is one that its file should have; else it is noted."""
    if (line.detection if kind == "detection" else line.grounding) is None:
        reading.issues.add("unreadable annotation", where, f"no {kind!r}, which the first lines of this file have")
        return False
    if again and kind == "detection":
        reading.issues.add("duplicate image", where, f"{line.filename} again: left out")
        return False
    return True


def _add_instances(boxes: BoxList, detection: _Detection | None, labels: Mapping[str, str]) -> None:
    for index, item in enumerate([] if detection is None else detection.instances, start=1):
        declared, name = labels.get(str(item.label)), plain_name(item.category or "")
        if declared and name and name != declared:
            detail = f"label {item.label} is {name!r} here and {declared!r} in the label map"
            boxes.reading.notes.once("conflicting name", boxes.where.rpartition(":")[0], detail)
        found = f"label {item.label!r}, bbox {item.bbox!r}"
        boxes.add(name or declared, numbers(item.bbox, 4), f"instance {index}", found=found)


def _add_regions(boxes: BoxList, grounding: _Grounding | None) -> None:
    """Adds the boxes of regions; a region is one box or a list of them."""
    for index, region in enumerate([] if grounding is None else grounding.regions, start=1):
        several = isinstance(region.bbox, list) and len(region.bbox) > 0 and isinstance(region.bbox[0], list)
        phrase = " ".join(region.phrase) if isinstance(region.phrase, list) else region.phrase
        items: Sequence[Any] = region.bbox if several else [region.bbox]
        for item in items:
            box, mark, found = numbers(item, 4), f"region {index}", f"phrase {region.phrase!r}, bbox {item!r}"
            if box is None:  # a phrase without any box is no category
                boxes.reading.issues.add("unreadable box", place(boxes.where, mark), found[:80])
            else:
                boxes.add(phrase, box, mark, found=found)


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
    files = files_in(folder, *_SUFFIXES)
    if not any(map(_kind, islice(files, _SNIFFED))):
        return []
    # Beside a file that fits, one without a single JSON line is a damaged one; it is noted when it is read.
    return [file for file in files if _kind(file) or (file.suffix.lower() == ".jsonl" and not any(first_keys(file)))]
