"""YOLO: a text file an image, described by `data.yaml`, by a darknet `*.data` file, or by a file of names alone.

A line is a class and a box, or a class and a polygon, which is read as the box around it (see `yolo_lines`). An image
without a text file has no objects, unless no image of the split has one: then nothing is known of them.
"""

import logging
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from metr.bounded_yaml import load_yaml_file, yaml_fault
from metr.data.formats.base import BoxList, RawImage, Reader, Reading, plain_name
from metr.data.formats.file_per_image import IMAGE_WORDS, called_like
from metr.data.formats.files import Files, decoded, files_in, folders_in, folders_within, glance, is_image, there
from metr.data.formats.locating import grouped, locate
from metr.data.formats.yolo_files import LabelFiles, folders_with_texts
from metr.data.formats.yolo_lines import LineKinds, is_class, numbers_of, told
from metr.data.records import UNNAMED, canonical_split
from metr.data.regular_files import open_regular
from metr.errors import DataError, counted

logger = logging.getLogger(__name__)

_SPLIT_KEYS = ("train", "val", "valid", "test")
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "classes.names")
# How deep images may lie below the folder that a split names.
_DEPTH = 3
# About so many text files of a split tell what its lines are.
_JUDGED = 1000
# What stands for a split that a dataset does not have.
_NOTHING = frozenset({"", "~", "null", "none"})


class YoloReader(Reader):
    """YOLO text files. A split is made of folders with images, or of lists of them.

    Args:
        root: The dataset's folder.
        splits: For each split its folders and lists.
        description: The file that declares the names.
        names: The declared names by class number.
        keypoints: Whether lines go on with key points after the box, instead of holding polygons.
    """

    format = "yolo"
    looks_like = "YOLO: data.yaml with names and splits, a darknet *.data file, or classes.txt with images and labels"
    declares_categories = True

    def __init__(
        self,
        root: Path,
        splits: Mapping[str, tuple[Path, ...]],
        *,
        description: Path,
        names: Mapping[int, str],
        keypoints: bool = False,
    ) -> None:
        super().__init__(root, splits)
        self.description, self.names, self.keypoints = description, names, keypoints

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with one of the descriptions, or of one such file.

        The description may also lie in a folder of its own, such as `data`, if no other folder has one.

        Raises:
            DataError: a description is there but cannot be used.
        """
        if path.is_file():
            suffix = path.suffix.lower()
            return cls._from_yaml(path) if suffix in {".yaml", ".yml"} else cls._from_darknet(path)
        found = next(filter(None, map(cls._described, _descriptions(path))), None) or cls._from_names(path)
        if found is not None:
            return found
        below = [reader for folder in folders_in(path) for reader in cls._described_below(folder, path)]
        return below[0] if len(below) == 1 else None

    @classmethod
    def _described(cls, description: Path, root: Path | None = None) -> Reader | None:
        is_yaml = description.suffix.lower() in {".yaml", ".yml"}
        return cls._from_yaml(description, root) if is_yaml else cls._from_darknet(description, root)

    @classmethod
    def _described_below(cls, folder: Path, root: Path) -> Iterator[Reader]:
        """The reader of a description in a folder of the dataset `root`, if that has one which can be used."""
        for description in _descriptions(folder):
            try:
                found = cls._described(description, root)
            except DataError as error:
                logger.debug("%s: %s", description, error)
                continue
            if found is not None:
                yield found
                return

    @classmethod
    def _from_yaml(cls, description: Path, root: Path | None = None) -> Reader | None:
        values = _yaml(description)
        if not isinstance(values, dict) or "names" not in values:
            return None
        entries = [(key, entry) for key in _SPLIT_KEYS for entry in _entries(values.get(key))]
        for place, bases in _roots(description, root, str(values.get("path") or ""), entries):
            splits = _declared_splits(place, bases, entries)
            if not splits:
                continue
            if not description.is_relative_to(place):
                logger.warning("%s: its images lie elsewhere, and are read in %s", description, place)
            _tell_missing(description, entries, splits)
            names = _declared_names(values["names"], description)
            return cls(place, splits, description=description, names=names, keypoints="kpt_shape" in values)
        told = [("path", values["path"])] if values.get("path") else []
        found = ", ".join(f"{key}: {entry}" for key, entry in told + entries) or "there is none"
        hint = "write `train:` and `val:` as folders below the file, or the dataset's folder as `path:`"
        raise DataError(f"none of its splits is a folder or list here ({found})", where=description, hint=hint)

    @classmethod
    def _from_darknet(cls, description: Path, root: Path | None = None) -> Reader | None:
        if description.suffix.lower() != ".data":
            return None
        pairs = (line.partition("=") for line in _lines(description))
        values = {key.strip(): value.strip() for key, equals, value in pairs if equals}
        if not {"names", "train"} <= values.keys():
            return None
        root = root or description.parent
        bases = [root, description.parent]
        names = _inside(values["names"], bases)
        if names is None:
            raise DataError(f"names = {values['names']} is not in this folder", where=description)
        found = {key: _inside(values[key], bases) for key in _SPLIT_KEYS if key in values}
        splits = {key: (place,) for key, place in found.items() if place is not None}
        if not splits:
            raise DataError("none of its lists of images is in this folder", where=description)
        return cls(root, splits, description=names, names=dict(enumerate(filter(None, _lines(names)))))

    @classmethod
    def _from_names(cls, root: Path) -> Reader | None:
        """Reads a folder that has a file of names and text files, but no description."""
        splits = _conventional_splits(root)
        places = [place for places in splits.values() for place in places]
        files = (folder / name for folder in [root, root / "labels", *places] for name in _NAME_FILES)
        names = next((file for file in files if there(file, Path.is_file)), None)
        if names is None or not _have_labels(root, places):
            return None
        return cls(root, splits, description=names, names=dict(enumerate(filter(None, _lines(names)))))

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split: those of its folders sorted by name, those of its lists in their order."""
        where = self._described_in
        reading.text(where)  # notes an encoding that was guessed
        names = {index: plain_name(name) or f"category {index}" for index, name in self.names.items()}
        reading.number_declared(names.values(), where)
        files = LabelFiles(reading.files)
        images = list(self._different_images(split, files, reading))
        texts = [files.of(image) for image in images]
        self._note_missing(split, images, texts, files, reading)
        nothing_known = not any(texts)
        kinds = self._line_kinds(filter(None, texts), reading)
        for image, text in zip(images, texts, strict=True):
            raw = self._read_labels(image, text, names, kinds, reading)
            if raw is not None:
                yield replace(raw, unknown=(UNNAMED,)) if nothing_known else raw

    @property
    def _described_in(self) -> str:
        """The description as a path below the dataset's folder; as it is where it lies elsewhere."""
        inside = self.description.is_relative_to(self.root)
        return self.within(self.description) if inside else str(self.description)

    def _note_missing(
        self, split: str, images: Sequence[str], texts: Sequence[str | None], files: LabelFiles, reading: Reading
    ) -> None:
        """Notes images without text files, where these are all or most of them, and text files without images."""
        missing = texts.count(None)
        if images and missing == len(images):
            places = ", ".join(files.places(posixpath.dirname(images[0]))[:4])
            looked = f"in {places}" if places else "in vain for a folder of labels beside that of the images"
            others = folders_with_texts(self.root)
            lie = f"; text files lie in {', '.join(map(self.within, others[:4]))}" if others else ""
            detail = (
                f"none of {counted(len(images), 'image')}, such as {images[0]}, has a text file; looked {looked}{lie}"
            )
            reading.issues.add("no label files", split, detail)
        elif 2 * missing > len(images):
            detail = f"{missing} of {len(images)} images have no text file, such as {images[texts.index(None)]}"
            reading.issues.add("few label files", split, f"{detail}: taken for images without objects")
        if all(there(source, Path.is_dir) for source in self.splits[split]):
            for text in files.without_image():
                reading.issues.add("missing image", text, "a text file of labels, but no image is called like it")

    def _line_kinds(self, texts: Iterable[str], reading: Reading) -> LineKinds:
        """What the lines of a split are, judged by those of some of its files."""
        files = list(texts)
        step = max(1, len(files) // _JUDGED)
        contents = (decoded(reading.files.peek(text)) for text in files[::step])
        rows = (numbers_of(line) for content in contents for line in content.splitlines())
        return LineKinds((row[1:] for row in rows if row is not None and len(row) > 1), key_points=self.keypoints)

    def _different_images(self, split: str, files: LabelFiles, reading: Reading) -> Iterator[str]:
        """The images of a split, each once, without those that would share the text file of another."""
        owners: dict[str, str] = {}  # by their paths without suffixes, as text files are called
        known: set[str] = set()
        for image in (image for source in self.splits[split] for image in self._images(source, reading)):
            if image in known:
                continue
            known.add(image)
            owner = owners.setdefault(posixpath.splitext(image)[0], image)
            where = None if owner == image else files.of(image)
            if where is None:
                yield image
            else:
                detail = f"{where} is that of {owner}, too, and this one is left out: rename one of them"
                reading.issues.add("shared annotation", image, detail)

    def _images(self, source: Path, reading: Reading) -> Iterator[str]:
        if there(source, Path.is_dir):
            for place in folders_within(source, _DEPTH):
                yield from reading.files.images(self.within(place))
            return
        where, folder = self.within(source), self.within(source.parent)
        lines = reading.text(where).splitlines()
        for number, line in enumerate(map(str.strip, lines), start=1):
            if line:
                path = _listed(line, folder, reading) or locate(line, [folder, ""], f"{where}:{number}", reading)
                if path is not None:
                    yield path

    def _read_labels(
        self, image: str, where: str | None, names: Mapping[int, str], kinds: LineKinds, reading: Reading
    ) -> RawImage | None:
        """The image with the boxes of its text file; None, and an issue, where that cannot be read."""
        boxes = BoxList(where or image, reading)
        try:
            lines = [] if where is None else reading.text(where).splitlines()
        except DataError as error:
            reading.issues.add("unreadable annotation", where or image, error.what)
            return None
        for number, line in enumerate(lines, start=1):
            row = numbers_of(line)
            box = None if not row else kinds.corners(row[1:])
            if row and box is not None:
                if said := told(kinds.kind(row[1:])):
                    reading.notes.once("numbers left out", "text files", said)
                name = names.get(int(row[0])) if is_class(row[0]) else None
                found = f"class {row[0]:g} has no name (`names` has {len(names)}, counted from 0)"
                boxes.add(name, box, number, found=found)
            elif line.strip():
                boxes.drop("unreadable label", number, line.strip())
        return boxes.image(image, relative=True)


def _descriptions(folder: Path) -> list[Path]:
    """The files of a folder that may describe a dataset, likeliest first."""
    found = sorted(files_in(folder, ".yaml", ".yml"), key=lambda file: (file.stem != "data", file.name))
    return [*found, *files_in(folder, ".data")]


def _entries(value: Any) -> list[str]:
    """The folders and lists of a split in a description whose scalars are read as they are written."""
    entries = value if isinstance(value, list) else [value]
    return [str(entry) for entry in entries if entry is not None and str(entry).strip().lower() not in _NOTHING]


def _roots(
    description: Path, root: Path | None, path: str, entries: Sequence[tuple[str, str]]
) -> Iterator[tuple[Path, list[Path]]]:
    """Where the dataset of a description may lie: its folder, and the folders that entries are relative to.

    It lies where the description does, else in the folder that its `path` names, else above if its entries lead up.
    """
    own = root or description.parent
    yield own, [base for base in (_inside(path, [description.parent, own]), description.parent, own) if base]
    elsewhere = Path(os.path.normpath(description.parent / path)) if path else None
    if elsewhere is not None and there(elsewhere, Path.is_dir):
        yield elsewhere, [elsewhere]
    if root is None and any(entry.startswith(("../", "..\\")) for _, entry in entries):
        yield own.parent, [own.parent]


def _declared_splits(
    root: Path, bases: Sequence[Path], entries: Sequence[tuple[str, str]]
) -> dict[str, tuple[Path, ...]]:
    """The splits of a description that are there, and those that it leaves out or whose folder is called otherwise."""
    splits = grouped((key, place) for key, entry in entries if (place := _inside(entry, bases)) is not None)
    named = {canonical_split(key) for key in splits}
    for key, places in _conventional_splits(root).items():
        if canonical_split(key) not in named and (canonical_split(key) or not splits):
            splits[key] = places  # descriptions often leave out the test images
    return splits


def _tell_missing(
    description: Path, entries: Sequence[tuple[str, str]], splits: Mapping[str, tuple[Path, ...]]
) -> None:
    """Logs the entries of a description that are not there, and what is read in their place."""
    bases = [description.parent]
    for key, entry in entries:
        taken = next((other for other in splits if canonical_split(other) == canonical_split(key)), None)
        if taken is None:
            logger.warning("%s: the %s split %r is not in this folder: left out", description, key, entry)
        elif taken != key and not _inside(entry, bases):
            message = "%s: the %s split %r is not in this folder: %s is read in its place"
            logger.warning(message, description, key, entry, splits[taken][0])


def _yaml(path: Path) -> Any:
    """What a YAML file holds, its scalars as they are written; None where it is no YAML.

    Raises:
        DataError: it is no YAML, but is called like the description of a dataset.
    """
    try:
        return load_yaml_file(path, as_written=True)
    except (yaml.YAMLError, OSError) as error:
        if path.stem in {"data", "dataset"}:
            raise DataError(f"not readable as YAML: {yaml_fault(error)}", where=path) from None
        return None


def _lines(path: Path) -> list[str]:
    try:
        with open_regular(path) as file:
            return [line.strip() for line in decoded(file.read()).splitlines()]
    except OSError:
        return []


def _declared_names(names: Any, where: Path) -> dict[int, str]:
    """The names by class number, from a list or a mapping.

    Raises:
        DataError: they are neither.
    """
    if isinstance(names, list):
        return {index: str(name) for index, name in enumerate(names)}
    if isinstance(names, dict) and all(re.fullmatch(r"\d+", str(key)) for key in names):
        return {index: str(name) for index, name in sorted((int(key), name) for key, name in names.items())}
    what = f"`names` is a {type(names).__name__}, expected a list or numbers with names"
    raise DataError(what, where=where, hint="write names: [cat, dog] or names: {0: cat, 1: dog}")


def _inside(entry: str, bases: Sequence[Path]) -> Path | None:
    """The file or folder that an entry of a description means, below one of `bases`; None where there is none.

    Descriptions often name paths of another machine, or start with `../` (Roboflow). So leading parts are left out one
    by one until the rest exists. Nothing outside of the bases is ever looked at.
    """
    parts = [part for part in re.split(r"[\\/]+", entry) if part not in {"", ".", ".."} and not part.endswith(":")]
    places = [base.joinpath(*parts[start:]) for start in range(max(1, len(parts))) for base in bases]
    return next((place for place in places if there(place)), None)


def _conventional_splits(root: Path) -> dict[str, tuple[Path, ...]]:
    """Folders called like splits that hold images, or one folder with all of them."""
    splits: dict[str, tuple[Path, ...]] = {}
    with_images = [root / name for name in called_like(IMAGE_WORDS, [folder.name for folder in folders_in(root)])]
    for base in (*with_images, root):
        for entry in glance(base):
            if entry.is_dir() and canonical_split(entry.name):
                inner = called_like(IMAGE_WORDS, [folder.name for folder in folders_in(Path(entry.path))])
                splits.setdefault(entry.name, (Path(entry.path, *inner[:1]),))
    if splits:
        return splits
    places = [place for place in (*with_images, root) if any(is_image(entry.name) for entry in glance(place))]
    return {"all": (places[0],)} if places else {}


def _have_labels(root: Path, folders: Sequence[Path]) -> bool:
    """Whether an image in one of the folders has a text file."""
    files = LabelFiles(Files(root))
    images = (folder.relative_to(root) / entry.name for folder in folders for entry in glance(folder))
    return any(files.of(image.as_posix()) for image in images if is_image(image.name))


def _listed(line: str, folder: str, reading: Reading) -> str | None:
    """The image that a relative line of a list means; darknet resolves it in the folder that it is started in."""
    path = PurePosixPath(line.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        return None
    for start in range(len(path.parts)):
        found = reading.files.find("/".join(path.parts[start:]), [folder, ""])
        if found is not None:
            return found
    return None
