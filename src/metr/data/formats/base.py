"""What the readers of all formats share: what they yield, what they note, and the checks that make it a record."""

import math
import posixpath
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from metr.data.formats.files import Files, OutsideError
from metr.data.images import probe_size
from metr.data.index.manifest import Fingerprints, encodable, shown_name
from metr.data.records import DataIssue, ImageRecord
from metr.data.splits import canonical_split
from metr.errors import DataError

# A box thinner than this, in pixels, is no object; a hair below 1 lets rounded boxes of one pixel live.
_THINNEST = 0.999
# Boxes pass the border by rounding; further out than this, in pixels, is worth telling.
_SLACK = 0.5

# Images that are checked at once: the boxes of hundreds take hardly longer than those of one.
_GROUP = 512

# What folders with images are called, and those with one annotation file an image.
IMAGE_FOLDERS = ("images", "Images", "JPEGImages", "imgs", "img", "data")
_ANNOTATION_FOLDERS = frozenset(
    {"annotations", "annotation", "annots", "annot", "ann", "labels", "label", "xml", "xmls", "json", "jsons"}
)

# The corners of a box that cannot be read. Its category is in the image all the same, which checking makes use of.
UNREADABLE = (math.nan,) * 4


@dataclass(frozen=True, kw_only=True)
class RawImage:
    """One image as its annotation file tells it, before any check of its boxes.

    `path` is relative to the dataset's folder, with slashes, and was found there. `size` is (height, width) in pixels,
    None where the file does not tell. `boxes` are xyxy in pixels of that size, or shares of the image if `relative`.
    `labels` are numbers that `Names` gave. `areas` are NaN where unknown. `marks` tell each box's place in the file,
    for messages. `annotated` are the numbers of the categories of which "no box" means "none there"; None: all that the
    dataset has. `amodal` boxes are of whole objects, also where those leave the image: they are cut at its border
    without an issue. `unknown` are categories of objects that the file has and does not tell in full: they are not
    annotated exhaustively in this image, as those of the boxes that the checks drop.
    """

    where: str
    image_id: int | str
    path: str
    size: tuple[int, int] | None
    boxes: Float[np.ndarray, "m 4"]
    labels: Int[np.ndarray, "m"]
    relative: bool = False
    areas: Float[np.ndarray, "m"] | None = None
    ignore: Bool[np.ndarray, "m"] | None = None
    marks: Sequence[int | str] | None = None
    annotated: Sequence[int] | None = None
    amodal: bool = False
    unknown: Sequence[int] = ()


class Names:
    """The category names of a dataset, numbered as they come up; equal names are one.

    `parents` are the names' supercategories, where they are declared.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.parents: dict[str, str] = {}

    def number(self, name: str) -> int:
        """The number of a name, a new one where the name is new."""
        return self._numbers.setdefault(plain_name(name), len(self._numbers))

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)


class IssueLog:
    """Counts issues by kind and keeps the first of each kind."""

    def __init__(self, keep: int = 100) -> None:
        self.keep = keep
        self.counts: Counter[str] = Counter()
        self._kept: dict[str, list[DataIssue]] = {}

    def add(self, kind: str, where: str, detail: str = "") -> None:
        """Notes an issue."""
        self.counts[kind] += 1
        kept = self._kept.setdefault(kind, [])
        if len(kept) < self.keep:
            kept.append(DataIssue(kind=kind, where=where, detail=detail))

    def once(self, kind: str, where: str, detail: str = "") -> None:
        """Notes an issue that reading several splits would bring up again."""
        if DataIssue(kind=kind, where=where, detail=detail) not in self._kept.get(kind, []):
            self.add(kind, where, detail)

    @property
    def kept(self) -> tuple[DataIssue, ...]:
        """The first issues of each kind."""
        return tuple(issue for issues in self._kept.values() for issue in issues)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a reader works with: the dataset's files, and what it notes. `notes` are about the dataset as a whole."""

    files: Files
    names: Names = field(default_factory=Names)
    notes: IssueLog = field(default_factory=IssueLog)
    issues: IssueLog = field(default_factory=IssueLog)
    fingerprints: Fingerprints = field(default_factory=Fingerprints)


class Reader(ABC):
    """Reads one annotation format. An instance is a folder recognised as that format.

    `splits` maps the dataset's own split names to the files and folders that define them.
    """

    format: ClassVar[str]
    # What the format looks like, for the message that nothing was recognised.
    looks_like: ClassVar[str]
    # Whether the files declare the categories in an order that is kept; else they are sorted.
    declares_categories: ClassVar[bool] = False

    def __init__(self, root: Path, splits: Mapping[str, tuple[Path, ...]]) -> None:
        self.root, self.splits = root, splits

    @classmethod
    @abstractmethod
    def recognise(cls, path: Path) -> "Reader | None":
        """A reader of this folder or annotation file if it looks like this format; a cheap look."""

    @abstractmethod
    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of one of `splits`, in a fixed order. Declared categories are numbered first."""

    def within(self, path: Path) -> str:
        """A path relative to the dataset's folder, with slashes; "" for that folder itself."""
        return "" if path == self.root else path.relative_to(self.root).as_posix()


def plain_name(name: str) -> str:
    """A category's name with single spaces and none around it."""
    return " ".join(name.split())


def whole_size(height: float | None, width: float | None) -> tuple[int, int] | None:
    """(height, width) in pixels as a file declares them; None where it declares nothing that can be true."""
    if height is None or width is None or not (1 <= height < 1e9 and 1 <= width < 1e9):
        return None
    return round(height), round(width)


def image_folders(files: Files, split: str, beside: str) -> tuple[str, ...]:
    """Where the images of a split may lie, likeliest first.

    They lie in a folder named like the split, or all together, near the annotation file in the folder `beside` or in
    the dataset's folder.
    """
    places = [beside, "", *(posixpath.join(base, name) for base in (beside, "") for name in IMAGE_FOLDERS)]
    bases = [place for place in dict.fromkeys(places) if files.listing(place)]
    named = [posixpath.join(base, name) for base in bases for name in _like(split, files.listing(base))]
    inner = [posixpath.join(place, name) for place in named for name in IMAGE_FOLDERS]
    return tuple(place for place in dict.fromkeys([*named, *inner, *bases]) if files.listing(place))


def twin_folders(files: Files, folder: str) -> tuple[str, ...]:
    """Where the images of a folder with one annotation file an image may lie, likeliest first.

    They lie in a folder that is called like images where this one is called like annotations, or beside the files.
    """
    parts, base = folder.split("/"), posixpath.dirname(folder)
    twins = [
        "/".join([*parts[:index], name, *parts[index + 1 :]])
        for index, part in enumerate(parts)
        if part.lower() in _ANNOTATION_FOLDERS
        for name in IMAGE_FOLDERS
    ]
    inner = [posixpath.join(place, name) for place in (folder, base) for name in IMAGE_FOLDERS]
    places = dict.fromkeys([*twins, folder, *inner, base])
    return tuple(place for place in places if files.listing(place))


def note_unannotated(annotated: Iterable[str], detail: str, reading: Reading) -> None:
    """Notes the images without annotations that lie where the annotated ones do."""
    known = set(annotated)
    for place in dict.fromkeys(posixpath.dirname(path) for path in sorted(known)):
        for image in reading.files.images(place):
            if image not in known:
                reading.issues.add("unannotated image", image, detail)


def locate(name: str, folders: Sequence[str], where: str, reading: Reading) -> str | None:
    """The image that an annotation file names, relative to the dataset's folder; an issue if it is missing."""
    try:
        path = reading.files.find(name, folders)
    except OutsideError:
        reading.issues.add("path outside", where, f"{name} leads out of the dataset's folder: left out")
        return None
    if path is None:
        looked = ", ".join(folder or "." for folder in folders[:4])
        reading.issues.add("missing image", where, f"{name}, looked for in {looked}")
    return path


def _like(split: str, names: Iterable[str]) -> list[str]:
    """The names that mean the same split, the very same name first."""
    canonical = canonical_split(split)
    alike = [name for name in names if name == split or (canonical is not None and canonical_split(name) == canonical)]
    return sorted(alike, key=lambda name: (name != split, name))


def corners(
    boxes: Float[np.ndarray, "m 4"], convert: Callable[[Float[Tensor, "m 4"]], Float[Tensor, "m 4"]]
) -> Float[np.ndarray, "m 4"]:
    """Boxes of a file through one of the conversions of `metr.boxes`."""
    return np.asarray(convert(torch.from_numpy(boxes)).numpy())


def records(reader: Reader, split: str, reading: Reading) -> Iterator[ImageRecord]:
    """The checked images of one split of a dataset; what is wrong is noted in `reading.issues`."""
    raws = iter(reader.read(split, reading))
    while group := list(islice(raws, _GROUP)):
        yield from _checked(group, reader.root, reading)


def _checked(group: Iterable[RawImage], root: Path, reading: Reading) -> Iterator[ImageRecord]:
    """Images with the boxes that can be used, all boxes checked at once."""
    sized = [(raw, size) for raw in group if (size := _size(raw, root, reading)) is not None]
    if not sized:
        return
    raws, counts = [raw for raw, _ in sized], [len(raw.boxes) for raw, _ in sized]
    limit = np.repeat(np.array([(width, height) * 2 for _, (height, width) in sized], dtype=np.float64), counts, axis=0)
    boxes = np.concatenate([raw.boxes for raw in raws]).astype(np.float64)
    relative = np.repeat([raw.relative for raw in raws], counts)
    boxes[relative] *= limit[relative]
    inside = np.minimum(np.maximum(boxes, 0), limit)
    keep = _usable(sized, boxes, inside, reading.issues)
    kept = inside[keep].astype(np.float32)
    areas = _areas(np.concatenate([_filled(raw.areas, raw, np.nan) for raw in raws])[keep], kept)
    labels = np.concatenate([raw.labels for raw in raws]).astype(np.int64)
    unknown = _owned(labels, ~keep, counts)
    labels = labels[keep]
    ignore = np.concatenate([_filled(raw.ignore, raw, 0.0) for raw in raws])[keep].astype(bool)
    ends = np.concatenate([[0], np.cumsum(keep)])[np.cumsum([0, *counts])].tolist()
    for number, (raw, (height, width)) in enumerate(sized):
        start, stop = ends[number], ends[number + 1]
        yield ImageRecord(
            image_id=raw.image_id if isinstance(raw.image_id, int) else shown_name(raw.image_id),
            path=root / raw.path,
            width=width,
            height=height,
            boxes=kept[start:stop],
            labels=labels[start:stop],
            areas=areas[start:stop],
            ignore=ignore[start:stop],
            annotated=None if raw.annotated is None else tuple(sorted(set(raw.annotated))),
            unknown=tuple(sorted({*raw.unknown, *unknown.get(number, ())})),
        )


def _owned(
    labels: Int[np.ndarray, "m"], chosen: Bool[np.ndarray, "m"], counts: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """The labels of the chosen boxes by the number of their image, each once, of images that have any."""
    rows = np.flatnonzero(chosen)
    owners = np.searchsorted(np.cumsum(counts), rows, side="right").tolist()
    found: dict[int, set[int]] = {}
    for owner, label in zip(owners, labels[rows].tolist(), strict=True):
        found.setdefault(owner, set()).add(label)
    return {owner: tuple(sorted(mine)) for owner, mine in found.items()}


def _size(raw: RawImage, root: Path, reading: Reading) -> tuple[int, int] | None:
    """(height, width) as the file tells it, else as the image does; None, and an issue, where that is unreadable."""
    if not encodable(raw.path):
        detail = "not UTF-8: the image is left out; rename it"
        reading.issues.add("unreadable file name", shown_name(raw.path), detail)
        return None
    if raw.size is not None:
        return raw.size
    try:
        reading.fingerprints.add(raw.path, root)
        return probe_size(root / raw.path)
    except DataError as error:
        reading.files.touch(raw.path)
        reading.issues.add("unreadable image", raw.path, error.what)
        return None


def _filled(values: Shaped[np.ndarray, "m"] | None, raw: RawImage, value: float) -> Shaped[np.ndarray, "m"]:
    """One value a box, where the file tells none."""
    return np.full(len(raw.boxes), value, dtype=np.float32) if values is None else values


def _usable(
    sized: Sequence[tuple[RawImage, tuple[int, int]]],
    boxes: Float[np.ndarray, "m 4"],
    inside: Float[np.ndarray, "m 4"],
    issues: IssueLog,
) -> Bool[np.ndarray, "m"]:
    """Which boxes are kept. `inside` are `boxes` cut at the border; what is dropped or cut is noted."""
    counts = [len(raw.boxes) for raw, _ in sized]
    amodal = np.repeat([raw.amodal for raw, _ in sized], counts)
    with np.errstate(invalid="ignore"):
        thick = (boxes[:, 2:] - boxes[:, :2] >= _THINNEST).all(axis=1) & np.isfinite(boxes).all(axis=1)
        visible = (inside[:, 2:] - inside[:, :2] >= _THINNEST).all(axis=1)
        fine = thick & visible & (amodal | (np.abs(boxes - inside) <= _SLACK).all(axis=1))
    starts = np.cumsum([0, *counts])
    for row in np.flatnonzero(~fine).tolist():
        owner = int(np.searchsorted(starts, row, side="right")) - 1
        raw, size = sized[owner]
        place = row - int(starts[owner])
        issues.add(*_box_issue(raw, place, boxes[row], bool(thick[row]), bool(visible[row]), size))
    keep: Bool[np.ndarray, "m"] = thick & visible
    return keep


def _box_issue(
    raw: RawImage, row: int, box: Float[np.ndarray, "4"], thick: bool, visible: bool, size: tuple[int, int]
) -> tuple[str, str, str]:
    mark = f"box {row + 1}" if raw.marks is None else raw.marks[row]
    where = f"{raw.where}:{mark}" if isinstance(mark, int) else f"{raw.where}, {mark}"
    corners_text = ", ".join(f"{value:.6g}" for value in box)
    detail = f"[{corners_text}] in {size[1]} x {size[0]}"
    if not np.isfinite(box).all():
        return "unreadable box", where, detail
    if not thick:
        return "degenerate box", where, detail
    return ("box clipped" if visible else "box outside"), where, detail


def _areas(areas: Float[np.ndarray, "m"], boxes: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "m"]:
    """Areas as the file gives them where it does, never more than the box holds after clipping."""
    box_areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    known = areas > 0  # False for NaN
    return np.asarray(np.where(known, np.minimum(areas, box_areas), box_areas), dtype=np.float32)
