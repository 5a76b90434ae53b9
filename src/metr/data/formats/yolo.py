"""YOLO: a text file an image, described by `data.yaml`, by a darknet `*.data` file, or by a file of names alone.

A line is a class and a box, or a class and a polygon, which is read as the box around it. An image without a text file
has no objects.
"""

import logging
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from metr.bounded_yaml import load_yaml_file
from metr.data.formats.base import BoxList, RawImage, Reader, Reading, plain_name
from metr.data.formats.files import decoded, files_in, folders_within, glance, is_image, there
from metr.data.formats.locating import locate
from metr.data.images import open_regular
from metr.data.records import canonical_split
from metr.errors import DataError

logger = logging.getLogger(__name__)

_SPLIT_KEYS = ("train", "val", "valid", "test")
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "classes.names")
# How deep images may lie below the folder that a split names.
_DEPTH = 3


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

        Raises:
            DataError: a description is there but cannot be used.
        """
        if path.is_file():
            suffix = path.suffix.lower()
            return cls._from_yaml(path) if suffix in {".yaml", ".yml"} else cls._from_darknet(path)
        descriptions = sorted(files_in(path, ".yaml", ".yml"), key=lambda file: (file.stem != "data", file.name))
        darknet = (file for folder in (path, path / "data", path / "cfg") for file in files_in(folder, ".data"))
        readers = chain(map(cls._from_yaml, descriptions), (cls._from_darknet(file, path) for file in darknet))
        return next(filter(None, readers), None) or cls._from_names(path)

    @classmethod
    def _from_yaml(cls, description: Path) -> Reader | None:
        root, values = description.parent, _yaml(description)
        if not isinstance(values, dict) or "names" not in values:
            return None
        base = _inside(str(values.get("path") or ""), [root]) or root
        splits: dict[str, tuple[Path, ...]] = {}
        for key in _SPLIT_KEYS:
            entries = values.get(key) or []
            for entry in map(str, entries if isinstance(entries, list) else [entries]):
                place = _inside(entry, [base, root])
                if place is None:
                    logger.warning("%s: the %s split %r is not in this folder: left out", description, key, entry)
                else:
                    splits[key] = (*splits.get(key, ()), place)
        named = {canonical_split(key) for key in splits}
        for key, places in _conventional_splits(root).items():
            if canonical_split(key) not in named and (canonical_split(key) or not splits):
                splits[key] = places  # descriptions often leave out the test images
        if not splits:
            hint = "write `train:` and `val:` as folders below the file"
            raise DataError("none of its splits is a folder or list here", where=description, hint=hint)
        names = _declared_names(values["names"], description)
        return cls(root, splits, description=description, names=names, keypoints="kpt_shape" in values)

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
        if names is None or not any(map(_has_labels, places)):
            return None
        return cls(root, splits, description=names, names=dict(enumerate(filter(None, _lines(names)))))

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split: those of its folders sorted by name, those of its lists in their order."""
        where = self.within(self.description)
        reading.text(where)  # notes an encoding that was guessed
        names = {index: plain_name(name) or f"category {index}" for index, name in self.names.items()}
        reading.number_declared(names.values(), where)
        for image in self._different_images(split, reading):
            yield self._read_labels(image, names, reading)

    def _different_images(self, split: str, reading: Reading) -> Iterator[str]:
        """The images of a split, each once, without those that would share the text file of another."""
        owners: dict[str, str] = {}  # by their paths without suffixes, as text files are called
        known: set[str] = set()
        for image in (image for source in self.splits[split] for image in self._images(source, reading)):
            if image in known:
                continue
            known.add(image)
            owner = owners.setdefault(posixpath.splitext(image)[0], image)
            where = None if owner == image else _label_file(image, reading)
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

    def _read_labels(self, image: str, names: Mapping[int, str], reading: Reading) -> RawImage:
        where = _label_file(image, reading)
        boxes = BoxList(where or image, reading)
        for number, line in enumerate([] if where is None else _label_lines(where, reading), start=1):
            row = _numbers(line, self.keypoints)
            if row is not None:
                name = names.get(int(row[0])) if row[0].is_integer() else None
                found = f"class {row[0]:g} has no name (`names` has {len(names)}, counted from 0)"
                boxes.add(name, _corners(row[1:]), number, found=found)
            elif line.strip():
                reading.issues.add("unreadable label", f"{where}:{number}", line.strip()[:80])
        return boxes.image(image, relative=True)


def _yaml(path: Path) -> Any:
    """What a YAML file holds; None where it is no YAML.

    Raises:
        DataError: it is no YAML, but is called like the description of a dataset.
    """
    try:
        return load_yaml_file(path)
    except (yaml.YAMLError, OSError) as error:
        if path.stem in {"data", "dataset"}:
            raise DataError(f"not readable as YAML: {error}", where=path) from None
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
    for base in (root / "images", root):
        for entry in glance(base):
            if entry.is_dir() and canonical_split(entry.name):
                inner = Path(entry.path) / "images"
                splits.setdefault(entry.name, (inner if there(inner, Path.is_dir) else Path(entry.path),))
    if splits:
        return splits
    places = [place for place in (root / "images", root) if any(is_image(entry.name) for entry in glance(place))]
    return {"all": (places[0],)} if places else {}


def _has_labels(folder: Path) -> bool:
    """Whether a folder's images have text files, beside them or in a folder `labels`."""
    images = {Path(entry.name).stem for entry in glance(folder) if is_image(entry.name)}
    twin = Path(*("labels" if part == "images" else part for part in folder.parts))
    entries = [*glance(folder), *(glance(twin) if twin != folder else [])]
    return any(entry.name.endswith(".txt") and Path(entry.name).stem in images for entry in entries)


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


def _label_file(image: str, reading: Reading) -> str | None:
    """The text file of an image: in `labels` instead of `images`, else beside it; None where it has none."""
    folder, name = posixpath.split(posixpath.splitext(image)[0] + ".txt")
    parts = folder.split("/")
    places = [folder]
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        places.insert(0, "/".join([*parts[:last], "labels", *parts[last + 1 :]]))
    return next((posixpath.join(place, name) for place in places if name in reading.files.listing(place)), None)


def _label_lines(where: str, reading: Reading) -> list[str]:
    try:
        return reading.text(where).splitlines()
    except DataError as error:
        reading.issues.add("unreadable annotation", where, error.what)
        return []


def _numbers(line: str, keypoints: bool) -> list[float] | None:
    """The class and the box or polygon of a line; None if it is not a valid line."""
    try:
        row = [float(cell) for cell in line.split()]
    except ValueError:
        return None
    if keypoints:
        row = row[:5]
    return row if len(row) == 5 or (len(row) >= 7 and len(row) % 2 == 1) else None


def _corners(values: Sequence[float]) -> list[float]:
    """The corners of a box given by centre and size, or of the box around a polygon x, y, x, y, ..."""
    if len(values) == 4:
        x, y, width, height = values
        return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    points = np.array(values).reshape(-1, 2)
    return [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]
