"""What the formats with one annotation file an image share: their splits, their files, and which image is whose."""

import contextlib
import posixpath
import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from metr.data.formats.base import BoxList, RawImage, Reader, Reading, without_repeats
from metr.data.formats.files import Files, OutsideError, decoded, files_in, fold, folders_within, start_of
from metr.data.formats.locating import IMAGE_FOLDERS, grouped, locate, split_of_folder
from metr.data.records import canonical_split
from metr.errors import DataError

# What folders with one annotation file an image are called, and those with the images; likeliest first.
ANNOTATION_WORDS = (
    *("labels", "label", "annotations", "annotation", "annots", "annot", "ann", "xml", "xmls", "json", "jsons"),
    *("txt", "txts", "labeltxt", "yolo", "bboxes", "bbox"),
)
IMAGE_WORDS = ("images", "image", "jpegimages", "jpgimages", "imgs", "img", "pictures", "photos", "frames")
_DEPTH = 3
# A folder's first files may be broken or something else.
_SNIFFED = 20
_SNIFF_BYTES = 1 << 12


class FilePerImageReader(Reader):
    """Reads a format with one annotation file an image. A split is made of folders with such files."""

    # What the names of annotation files end with, in lower case.
    suffix: ClassVar[str]

    @classmethod
    @abstractmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like this format; a cheap look."""

    @abstractmethod
    def read_file(self, where: str, folder: "AnnotationFolder", reading: Reading) -> RawImage | None:
        """The image of an annotation file; None, and an issue, where it cannot be used."""

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with such files, at most a few folders deep."""
        if not path.is_dir():
            return None
        folders = (
            folder
            for folder in folders_within(path, _DEPTH)
            if any(map(cls.fits, islice(files_in(folder, cls.suffix), _SNIFFED)))
        )
        splits = grouped((split_of_folder(folder, path), folder) for folder in folders)
        return cls(path, splits) if splits else None

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split, sorted by the names of their annotation files."""
        seen: set[str] = set()
        for source in self.splits[split]:
            folder = AnnotationFolder(self.within(source), self.suffix, reading.files)
            found = (self.read_file(posixpath.join(folder.path, name), folder, reading) for name in folder.names)
            yield from without_repeats((raw for raw in found if raw is not None), seen, reading)
        note_unannotated(
            seen, f"no {self.suffix} file for it: left out", reading, self._stems_elsewhere(split, reading)
        )

    def _stems_elsewhere(self, split: str, reading: Reading) -> set[str]:
        """The names of the annotation files of other splits, without suffix: all images may lie in one folder."""
        sources = (self.within(source) for name, own in self.splits.items() if name != split for source in own)
        names = (name for source in sources for name in reading.files.listing(source))
        return {fold(posixpath.splitext(name)[0]) for name in names if name.lower().endswith(self.suffix)}


class LinePerObjectReader(FilePerImageReader):
    """Reads a format with a text file an image and a line an object.

    A line that cannot be read leaves its image out: nobody knows what else is in it.
    """

    suffix = ".txt"
    # What a line is, for messages.
    expected: ClassVar[str]
    # Whether boxes are written as corners, so that swapped ones are sorted.
    writes_corners: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def row(cls, line: str) -> tuple[Any, ...] | None:
        """What a line says of an object; None where it is no such line."""

    @abstractmethod
    def add(self, row: tuple[Any, ...], number: int, boxes: BoxList) -> None:
        """Adds the object of line `number` to those of its image."""

    def to_xyxy(self, boxes: Float[Tensor, "m 4"]) -> Float[Tensor, "m 4"]:
        """Boxes as a file gives them, as xyxy."""
        return boxes

    @classmethod
    def says_nothing(cls, line: str) -> bool:
        """Whether a line is empty, or about something else than an object."""
        return not line.strip()

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether the first lines of a file are all of this format."""
        head = start_of(path, _SNIFF_BYTES)
        lines = decoded(head).splitlines()
        whole = [line for line in (lines[:-1] if len(head) == _SNIFF_BYTES else lines) if not cls.says_nothing(line)]
        return bool(whole) and all(cls.row(line) is not None for line in whole)

    def read_file(self, where: str, folder: "AnnotationFolder", reading: Reading) -> RawImage | None:
        """The image of a text file; None, and an issue, where the file cannot be used."""
        path = folder.image_of(where, "", reading)
        try:
            lines = reading.text(where).splitlines()
        except DataError as error:
            reading.issues.add("unreadable annotation", where, error.what)
            return None
        if path is None:
            return None
        boxes = BoxList(where, reading)
        for number, line in enumerate(lines, start=1):
            row = self.row(line)
            if row is not None:
                self.add(row, number, boxes)
            elif not self.says_nothing(line):
                detail = f"expected {self.expected}: {line.strip()[:80]}; its image is left out"
                reading.issues.add("unreadable annotation", f"{where}:{number}", detail)
                return None
        return boxes.image(path, convert=self.to_xyxy, corners=self.writes_corners)


class AnnotationFolder:
    """A folder with one annotation file an image: its files, and where their images may lie.

    Args:
        path: The folder, relative to the dataset's.
        suffix: What the names of annotation files end with, in lower case.
        files: The dataset's files.
    """

    def __init__(self, path: str, suffix: str, files: Files) -> None:
        self.path, self.files = path, files
        self.names = sorted(name for name in files.listing(path) if name.lower().endswith(suffix))
        self.image_folders = twin_folders(files, path)
        self._stems = {posixpath.splitext(name)[0] for name in self.names}
        self._folded = set(map(fold, self._stems))

    def image_of(self, where: str, named: str, reading: Reading, *, beside_first: bool = False) -> str | None:
        """The image of an annotation file: of the same name, else the one that the file names; an issue if missing.

        Tools let the names in files grow stale. An image that is called like another annotation file is that file's.

        Args:
            where: The annotation file.
            named: The name of the image in it; may be empty.
            reading: The dataset's files and issues.
            beside_first: Whether images beside the file, of its name or named by it, come before those elsewhere.
        """
        stem = posixpath.splitext(posixpath.basename(where))[0]
        options = []
        if beside_first:
            options.append(self.files.find_stem(stem, [self.path], named))
            with contextlib.suppress(OutsideError):  # written where the folders lay otherwise
                options.append(self.files.find(named, [self.path]) if named else None)
        options.append(self.files.find_stem(stem, self.image_folders, named))
        own = next((option for option in options if option and self._may_own(stem, option)), None)
        path = own or locate(named or stem, self.image_folders, where, reading)
        if path is None or self._may_own(stem, path):
            return path
        reading.issues.add("missing image", where, f"it names {path}, which has an annotation file of its own")
        return None

    def _may_own(self, stem: str, image: str) -> bool:
        """Whether an image may be that of the file `stem`: no other file is called like it."""
        own = posixpath.splitext(posixpath.basename(image))[0]
        return own == stem or not (own in self._stems or (fold(own) != fold(stem) and fold(own) in self._folded))


def twin_folders(files: Files, folder: str) -> tuple[str, ...]:
    """Where the images of a folder with one annotation file an image may lie, likeliest first.

    They lie in a folder that is called like images where this one is called like annotations, or beside the files.
    """
    base = posixpath.dirname(folder)
    twins = [
        place
        for sibling, rest in counterparts(files, folder, ANNOTATION_WORDS, IMAGE_WORDS)
        for place in (posixpath.join(sibling, *rest), sibling)
    ]
    inner = [posixpath.join(place, name) for place in (folder, base) for name in IMAGE_FOLDERS]
    places = dict.fromkeys([*twins, folder, *inner, base])
    return tuple(place for place in places if files.listing(place))


def counterparts(
    files: Files, folder: str, own: Sequence[str], wanted: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Folders called like `wanted` beside a part of a path that is called like `own`, likeliest first.

    `train_images`, `JPEGImages-test` and `Images` are called like images. Folders of other splits are left out.

    Args:
        files: The dataset's files.
        folder: The path.
        own: What one of its parts is called.
        wanted: What the folders are called.

    Yields:
        Such a folder, and the parts of the path that follow.
    """
    parts = folder.split("/") if folder else []
    for index in reversed(range(len(parts))):
        if words_of(parts[index]).isdisjoint(own):
            continue
        above = "/".join(parts[:index])
        for name in called_like(wanted, files.listing(above), beside=parts[index]):
            yield posixpath.join(above, name), tuple(parts[index + 1 :])


def called_like(wanted: Sequence[str], names: Iterable[str], *, beside: str = "") -> list[str]:
    """The folders among `names` that are called like `wanted`, likeliest first: those that are most like `beside`."""
    split, own = canonical_split(beside), words_of(beside)
    found = []
    for name in names:
        words = words_of(name)
        likeliest = next((place for place, word in enumerate(wanted) if word in words), None)
        fits = split is None or canonical_split(name) in {None, split}
        if likeliest is not None and fits and name != beside and not posixpath.splitext(name)[1][1:].isalpha():
            found.append((-len(words & own), len(words), likeliest, name))
    return [name for *_, name in sorted(found)]


def words_of(name: str) -> set[str]:
    """The words of the name of a folder, in lower case."""
    return set(re.split(r"[^a-z]+", name.lower()))


def note_unannotated(
    annotated: Iterable[str], detail: str, reading: Reading, elsewhere: Collection[str] = frozenset()
) -> None:
    """Notes the images without annotations that lie where the annotated ones do; not those called as `elsewhere`."""
    known = set(annotated)
    for folder in dict.fromkeys(posixpath.dirname(path) for path in sorted(known)):
        for image in reading.files.images(folder):
            if image not in known and fold(posixpath.splitext(posixpath.basename(image))[0]) not in elsewhere:
                reading.issues.add("unannotated image", image, detail)


def is_number(text: str) -> bool:
    """Whether a cell of a text file is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
