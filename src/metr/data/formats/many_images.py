"""What the formats share whose annotation files each hold many images."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import ClassVar

from metr.data.formats.base import RawImage, Reader, Reading, without_repeats
from metr.data.formats.files import files_in, folders_within
from metr.data.formats.locating import dataset_root, image_folders, split_of_file, splits_of_files

# What the folders are called that hold annotation files beside those of the images.
ANNOTATION_FOLDERS = ("annotations", "labels", "wider_face_split")
# A folder with more files of the kind than this has one for each image.
_SNIFFED = 20


class ManyImagesReader(Reader):
    """Reads a format whose annotation files each hold many images. A split is made of such files."""

    # What the names of annotation files end with, in lower case.
    suffixes: ClassVar[tuple[str, ...]] = (".json",)
    # How deep below the dataset's folder annotation files lie.
    depth: ClassVar[int] = 2

    @classmethod
    @abstractmethod
    def fits(cls, path: Path) -> bool:
        """Whether a file looks like this format; a cheap look."""

    @abstractmethod
    def read_file(self, where: str, folders: tuple[str, ...], reading: Reading) -> Iterator[RawImage]:
        """The images of an annotation file, in its order; `folders` are where they may lie, likeliest first."""

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with such files, at most a few folders deep, or of one such file."""
        if path.is_file():
            fits = path.suffix.lower() in cls.suffixes and cls.fits(path)
            return cls(dataset_root(path, ANNOTATION_FOLDERS), {split_of_file(path): (path,)}) if fits else None
        splits = splits_of_files(cls.annotation_files(path))
        return cls(path, splits) if splits else None

    @classmethod
    def annotation_files(cls, path: Path) -> Iterator[Path]:
        """The files of this format in a folder and those below it."""
        for folder in folders_within(path, cls.depth):
            yield from filter(cls.fits, islice(files_in(folder, *cls.suffixes), _SNIFFED))

    def read(self, split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of a split in the order of its files."""
        yield from self.images_of(self.splits[split], split, reading)

    def images_of(self, files: Iterable[Path], split: str, reading: Reading) -> Iterator[RawImage]:
        """The images of some files, each once."""
        seen: set[str] = set()
        for file in files:
            folders = image_folders(reading.files, split, self.within(file.parent), anywhere=True)
            yield from without_repeats(self.read_file(self.within(file), folders, reading), seen, reading)
