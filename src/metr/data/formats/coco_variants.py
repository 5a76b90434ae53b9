"""What the formats share that are COCO JSON with rules of their own: how they are recognised, where images lie."""

import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from metr.data.formats.base import Reader, Reading, image_folders
from metr.data.formats.coco import CocoReader, split_of
from metr.data.formats.coco_files import CocoImage, file_ends, looks_like_coco
from metr.data.formats.files import OutsideError, glance


class CocoVariant(CocoReader):
    """COCO JSON that tells itself apart by the names of its files, or by keys that plain COCO does not have.

    Its images are named by paths of which only the end need be there.
    """

    file_names: ClassVar[re.Pattern[str]]
    keys: ClassVar[tuple[bytes, ...]]
    # Folders, beside the usual ones, that the images may lie below.
    bases: ClassVar[tuple[str, ...]] = ()
    # Two names may end alike and be two images.
    joins_images = False

    @classmethod
    def fits(cls, path: Path) -> bool:
        """Whether a JSON file is COCO and has the name or a key of this format; a cheap look."""
        ends = file_ends(path)
        return looks_like_coco(ends) and (cls._is_named(path) or any(key in ends for key in cls.keys))

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with such files, where they may also lie one folder deeper, or of one such file."""
        found = super().recognise(path)
        if found is not None or path.is_file():
            return found
        folders = [Path(entry.path) for entry in glance(path) if entry.is_dir()]
        files = [Path(entry.path) for folder in folders for entry in glance(folder) if entry.name.endswith(".json")]
        splits = {split_of(file): (file,) for file in files if cls._is_named(file) and cls.fits(file)}
        return cls(path, splits) if splits else None

    @classmethod
    def _is_named(cls, path: Path) -> bool:
        return cls.file_names.match(path.name) is not None

    def image_finder(self, split: str, file: Path, reading: Reading) -> Callable[[CocoImage], str | None]:
        """Finds images by the ends of their names; where one is missing, None and an issue."""
        where = self.within(file)
        folders = (*image_folders(reading.files, split, self.within(file.parent)), *self.bases)
        tails = Tails(folders, reading)
        return lambda image: tails.locate(self.image_names(image), where)


class Tails:
    """Finds images by the end of a path that may begin in a way that is not there: on another machine, in an archive.

    Which directories the end of a path may mean is looked up once for each directory that the names have.

    Args:
        folders: Where images may lie, relative to the dataset's folder, likeliest first.
        reading: The dataset's files, and its issues.
    """

    def __init__(self, folders: Iterable[str], reading: Reading) -> None:
        self.folders, self.reading = tuple(folders), reading
        self._homes: dict[str, tuple[str, ...]] = {}

    def locate(self, names: Sequence[str], where: str) -> str | None:
        """The image of one of these names, relative to the dataset's folder; an issue if it is missing."""
        try:
            found = next(filter(None, map(self._find, names)), None)
        except OutsideError as error:
            self.reading.issues.add("path outside", where, f"{error} leads out of the dataset's folder: left out")
            return None
        if found is None:
            looked = ", ".join(folder or "." for folder in self.folders[:4])
            self.reading.issues.add("missing image", where, f"{' or '.join(names)}, looked for in {looked}")
        return found

    def _find(self, name: str) -> str | None:
        directory, base = posixpath.split(self.reading.files.resolve(name.replace("\\", "/")))
        if not base:
            return None
        homes = self._homes.get(directory)
        if homes is None:
            homes = self._homes[directory] = tuple(self._directories(directory))
        return self.reading.files.find(base, homes)

    def _directories(self, directory: str) -> Iterable[str]:
        """The directories that are there and may be meant: those that share most of the path first."""
        parts = [part for part in directory.split("/") if part]
        ends = ("/".join(parts[start:]) for start in range(len(parts) + 1))
        places = (posixpath.join(folder, end).rstrip("/") for end in ends for folder in self.folders)
        return (place for place in dict.fromkeys(places) if self.reading.files.listing(place))
