"""What the readers of all formats share: what they yield, the names they number and the issues they note."""

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from metr.boxes import Conversion, converted
from metr.data.formats.files import Files, encoding_of
from metr.data.index.manifest import Fingerprints
from metr.data.records import UNNAMED, DataIssue, ImageBytes
from metr.errors import counted

# The corners of a box that cannot be read. Its category is in the image all the same, and checking makes use of that.
UNREADABLE = (math.nan,) * 4
# The most characters of a category's name: those of a long sentence.
LONGEST_NAME = 256
_CUT = re.compile(r"\.\.\. [0-9a-f]{12}$")


@dataclass(frozen=True, kw_only=True)
class RawImage:
    """One image as its annotation file describes it, before its boxes are checked.

    `path` is relative to the dataset's folder, with slashes, and was found there. `size` is (height, width) in pixels,
    None where the file gives none. `boxes` are xyxy in pixels of that size, or fractions of the image if `relative`.
    `labels` are numbers given by `Names`, `UNNAMED` for boxes that are dropped because their category has no name.
    `areas` are NaN where unknown. `marks` give each box's place in the file, for messages. `annotated` are the numbers
    of the categories that are annotated exhaustively, so that "no box" means "none there"; None: all of the dataset's.
    `amodal` boxes are of whole objects, also where those leave the image: they are cut at its border without an issue.
    `unknown` are categories that are not annotated exhaustively in this image, because the file describes objects of
    them in part; those of dropped boxes are added. `UNNAMED` among them: an object may be of any category. `source` is
    where the bytes of an image are that is no file of its own; `path` is then its name, and `size` is given. `corners`:
    the file writes its boxes as corners, so that swapped ones are sorted, which is an issue.
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
    source: ImageBytes | None = None
    corners: bool = False


@dataclass(frozen=True, kw_only=True)
class BoxTable:
    """The boxes of many images, column by column.

    `image` is the number of each box's image; the boxes of one image need not stand together. `outlined` are those that
    are not the file's own, but drawn around segmentations.
    """

    image: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    boxes: Float[np.ndarray, "n 4"]
    ignore: Bool[np.ndarray, "n"]
    areas: Float[np.ndarray, "n"] | None = None
    outlined: Bool[np.ndarray, "n"] | None = None

    @cached_property
    def by_image(self) -> "RowsByImage":
        """Finds the rows of an image; `image` must not change afterwards."""
        return RowsByImage(self.image)


class RowsByImage:
    """Where the rows of each image stand in a table, whatever their order."""

    def __init__(self, image: Int[np.ndarray, "n"]) -> None:
        self._order = np.argsort(image, kind="stable")
        self._starts = np.searchsorted(image, np.arange(image.max(initial=-1) + 2), sorter=self._order)

    def __getitem__(self, number: int) -> Int[np.ndarray, "m"]:
        """The rows of image `number`, in their order in the file."""
        if number + 1 >= len(self._starts):
            return self._order[:0]
        return self._order[self._starts[number] : self._starts[number + 1]]


class Names:
    """The category names of a dataset, numbered in the order in which they come up; equal names are one.

    `parents` are the names' supercategories, where they are declared. `mentioned` are those that only came up at
    objects without an extent so far: they are no categories of the dataset.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.parents: dict[str, str] = {}
        self.mentioned: set[str] = set()

    def number(self, name: str) -> int:
        """The number of a name, a new one where the name is new."""
        plain = plain_name(name)
        self.mentioned.discard(plain)
        return self._numbers.setdefault(plain, len(self._numbers))

    def mention(self, name: str) -> int:
        """The number of the name of an object without an extent."""
        plain = plain_name(name)
        if plain not in self._numbers:
            self.mentioned.add(plain)
        return self._numbers.setdefault(plain, len(self._numbers))

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
        """Notes an issue that comes up again with each split that is read."""
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

    def text(self, where: str) -> str:
        """The text of a file, relative to the dataset's folder; noted where its encoding is a guess.

        Raises:
            DataError: it cannot be read.
        """
        data = self.files.read(where)
        return data.decode(self.encoding(data, where))

    def encoding(self, data: bytes, where: str) -> str:
        """The encoding of the bytes of a file; noted where it is a guess, being neither UTF-8 nor UTF-16."""
        encoding = encoding_of(data)
        if not encoding.startswith("utf-"):
            self.notes.once("not UTF-8", where, f"read as {encoding}: save it as UTF-8 if names look wrong")
        return encoding

    def number_declared(self, names: Iterable[str], where: str) -> list[int]:
        """The numbers of the declared names of a file; noted where a name is declared more than once."""
        numbers: list[int] = []
        seen: set[int] = set()
        for name in names:
            number = self.names.number(name)
            if number in seen:
                self.notes.once("duplicate category", where, f"{name!r} is declared more than once: joined")
            seen.add(number)
            numbers.append(number)
        return numbers


class BoxList:
    """Collects the boxes of one image in the order of its file; boxes without a category are noted and left out.

    Args:
        where: The annotation file, and the line in it where it has one for each image.
        reading: Numbers the names, and takes the issues.
    """

    def __init__(self, where: str, reading: Reading) -> None:
        self.where, self.reading = where, reading
        self._boxes: list[Sequence[float]] = []
        self._labels: list[int] = []
        self._marks: list[int | str] = []
        self._flags: list[tuple[bool, float]] = []
        self._unknown: set[int] = set()

    def add(
        self,
        name: str | None,
        box: Sequence[float] | None,
        mark: int | str,
        *,
        ignore: bool = False,
        area: float = math.nan,
        found: object = "",
    ) -> None:
        """Adds a box.

        Args:
            name: Its category; None or blank where it has none.
            box: Four numbers; None where they cannot be read.
            mark: Its line, or what it is in the file ("box 3").
            ignore: Whether finding the object is neither right nor wrong.
            area: The object's area in square pixels.
            found: What the file says, for the message that the category is unknown.
        """
        if name is None or not plain_name(name):
            self.drop("unknown category", mark, str(found))
            return
        self._boxes.append(UNREADABLE if box is None else box)
        self._labels.append(self.reading.names.number(name))
        self._marks.append(mark)
        self._flags.append((ignore, area))

    def drop(self, kind: str, mark: int | str, found: str) -> None:
        """Notes an object that cannot be used and whose category cannot be told: none counts as absent here."""
        self.reading.issues.add(kind, place(self.where, mark), found[:80])
        self._unknown.add(UNNAMED)

    def leave_out(self, name: str | None, mark: int | str, shape: str) -> None:
        """Notes an object without an extent, such as a point or a line. Its category is unknown in this image."""
        self.reading.issues.add("unsupported shape", place(self.where, mark), f"a {shape} of {name!r}: left out")
        if name is not None and plain_name(name):
            self._unknown.add(self.reading.names.mention(name))

    @property
    def labels(self) -> set[int]:
        """The numbers of the categories so far."""
        return set(self._labels)

    def image(
        self,
        path: str,
        *,
        image_id: str | None = None,
        size: tuple[int, int] | None = None,
        convert: Conversion | None = None,
        relative: bool = False,
        amodal: bool = False,
        annotated: Sequence[int] | None = None,
        corners: bool = False,
    ) -> RawImage:
        """The image with the boxes; see `RawImage`. `convert` makes the boxes xyxy; the id is the path by default."""
        boxes = np.array(self._boxes, dtype=np.float64).reshape(-1, 4)
        ignore, areas = np.array(self._flags, dtype=np.float64).reshape(-1, 2).T
        return RawImage(
            where=self.where,
            image_id=path if image_id is None else image_id,
            path=path,
            size=size,
            boxes=boxes if convert is None else converted(boxes, convert),
            labels=np.array(self._labels, dtype=np.int64),
            relative=relative,
            areas=areas,
            ignore=ignore.astype(bool),
            marks=self._marks,
            annotated=annotated,
            amodal=amodal,
            unknown=sorted(self._unknown),
            corners=corners,
        )


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a user says of a dataset: how its files write `boxes` (see `box_kinds`), and what it is called."""

    boxes: str | None = None
    name: str = ""


class Reader(ABC):
    """Reads one annotation format. An instance is a folder recognised as that format.

    `splits` maps the dataset's own split names to the files and folders that define them. `options` may be set before
    reading.
    """

    format: ClassVar[str]
    # What the format looks like, for the message that nothing was recognised.
    looks_like: ClassVar[str]
    # Whether the files declare the categories in an order that is kept; else they are sorted.
    declares_categories: bool = False
    # Whether `options.boxes` can say how boxes are written.
    takes_boxes: ClassVar[bool] = False
    # Whether an annotation that cannot be read, a file or a line, is that of a whole image; else that of one box.
    annotates_whole_images: ClassVar[bool] = True

    def __init__(self, root: Path, splits: Mapping[str, tuple[Path, ...]]) -> None:
        self.root, self.splits = root, splits
        self.options = ReadOptions()

    @property
    def place(self) -> Path | str:
        """Where the dataset is, for messages."""
        return self.root

    @property
    def options_used(self) -> tuple[str | None, ...]:
        """The options that the result depends on."""
        return (self.options.boxes,)

    @classmethod
    def why_not(cls, path: Path) -> str | None:  # noqa: ARG003
        """What a folder or file lacks that almost is of this format; None where it is nothing like it."""
        return None

    @classmethod
    @abstractmethod
    def recognise(cls, path: Path) -> "Reader | None":
        """A reader of this folder or annotation file if it looks like this format; a cheap look."""

    def prepared(self) -> "Reader":
        """The reader that the dataset is read with, after all that `recognise` is too cheap for: here, itself.

        Raises:
            DataError: the files turn out to be damaged.
        """
        return self

    @abstractmethod
    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of one of `splits`, in a fixed order. Declared categories are numbered first."""

    def within(self, path: Path) -> str:
        """A path relative to the dataset's folder, with slashes; "" for that folder itself."""
        return "" if path == self.root else path.relative_to(self.root).as_posix()


def plain_name(name: str) -> str:
    """A category's name with single spaces and none around it.

    A name of more than `LONGEST_NAME` characters is cut, and ends in a digest that keeps it apart from others.
    """
    plain = " ".join(name.split())
    if len(plain) <= LONGEST_NAME:
        return plain
    digest = hashlib.sha256(plain.encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{plain[: LONGEST_NAME - 16].ljust(LONGEST_NAME - 16, '.')}... {digest}"


def was_cut(name: str) -> bool:
    """Whether a name is one that `plain_name` has cut."""
    return len(name) == LONGEST_NAME and _CUT.search(name) is not None


def place(where: str, mark: int | str) -> str:
    """A place in a file, for messages: `where:line`, or `where, mark` where the mark is no line."""
    return f"{where}:{mark}" if isinstance(mark, int) else f"{where}, {mark}"


def whole_size(height: float | None, width: float | None) -> tuple[int, int] | None:
    """(height, width) in pixels as a file declares them; None where it declares none, or an impossible one."""
    if height is None or width is None or not (1 <= height < 1e9 and 1 <= width < 1e9):
        return None
    return round(height), round(width)


def without_repeats(images: Iterable[RawImage], seen: set[str], reading: Reading) -> Iterator[RawImage]:
    """The images that are not in `seen` yet, which they are added to; the others are noted and left out."""
    for raw in images:
        if raw.path in seen:
            detail = f"{raw.path} again, with {counted(len(raw.boxes), 'box', 'boxes')}: left out"
            reading.issues.add("duplicate image", raw.where, detail)
        else:
            seen.add(raw.path)
            yield raw
