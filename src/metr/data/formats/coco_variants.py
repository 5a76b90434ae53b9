"""LVIS and Objects365: COCO JSON with rules of their own.

LVIS says for each image which of its many categories were looked for. A category is annotated in an image where it has
boxes or is listed in `neg_category_ids` (none is there), unless it is listed in `not_exhaustive_category_ids` (some are
left unboxed). Of all others nothing is known. LVIS's own names (those with a synset) are words: `aerosol_can` is read
as `aerosol can`, `bow_(weapon)` as `bow (weapon)`, because the text encoder reads them, and other datasets write them
so. Synonyms, definitions and frequencies are left out. Images are COCO's: named by `file_name`, or by the end of
`coco_url`, which tells whether one lies in `train2017` or `val2017`.

Objects365 (v2) has its images in numbered patches, and more flags on a box. `isfake` marks what only looks like the
object (an image of it, a doll): like a crowd it is ignored, so that finding it is neither right nor wrong. Reflections
(`isreflected`) are objects. Every image was searched for all categories. An image is named by its path in the archives
(`images/v1/patch8/objects365_v1_00420917.jpg`), of which only the end need be there, below `train`, `val` or `images`.
"""

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from metr.data.formats.base import Reader, Reading, plain_name
from metr.data.formats.coco import CocoReader, split_of
from metr.data.formats.coco_json import CocoAnnotation, CocoCategory, CocoImage, Id, coco_ends
from metr.data.formats.files import OutsideError, files_in, folders_in
from metr.data.formats.locating import image_folders, locate_by_end
from metr.data.records import UNNAMED


class CocoVariant(CocoReader):
    """COCO JSON that is recognised by the names of its files, or by keys that plain COCO does not have.

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
        ends = coco_ends(path)
        return bool(ends) and (cls._is_named(path) or any(key in ends for key in cls.keys))

    @classmethod
    def recognise(cls, path: Path) -> Reader | None:
        """A reader of a folder with such files, where they may also lie one folder deeper, or of one such file."""
        found = super().recognise(path)
        if found is not None or path.is_file():
            return found
        files = [file for folder in folders_in(path) for file in files_in(folder, ".json")]
        splits = {split_of(file): (file,) for file in files if cls._is_named(file) and cls.fits(file)}
        return cls(path, splits) if splits else None

    @classmethod
    def _is_named(cls, path: Path) -> bool:
        return cls.file_names.match(path.name) is not None

    def image_finder(self, split: str, file: Path, reading: Reading) -> Callable[[CocoImage], str | None]:
        """Finds images by the ends of their names; where one is missing, None and an issue."""
        where = self.within(file)
        folders = (*image_folders(reading.files, split, self.within(file.parent)), *self.bases)
        tails = _Tails(folders, reading)
        return lambda image: tails.locate(self.image_names(image), where)


class _Tails:
    """Finds images by the end of a path whose start may not exist here: it is of another machine, or of an archive.

    The directories that the end of a path may mean are looked up once for each directory in the names.

    Args:
        folders: Where images may lie, relative to the dataset's folder, likeliest first.
        reading: The dataset's files, and its issues.
    """

    def __init__(self, folders: Sequence[str], reading: Reading) -> None:
        self.folders, self.reading = folders, reading
        self._homes: dict[str, tuple[str, ...]] = {}

    def locate(self, names: Sequence[str], where: str) -> str | None:
        """The image of one of these names, relative to the dataset's folder; an issue if it is missing."""
        try:
            found = next(filter(None, map(self._find, names)), None)
        except OutsideError:
            return locate_by_end(names, self.folders, where, self.reading, outside=True)
        return locate_by_end(names, self.folders, where, self.reading) if found is None else found

    def _find(self, name: str) -> str | None:
        directory, base = posixpath.split(self.reading.files.resolve(name.replace("\\", "/")))
        if not base:
            return None
        homes = self._homes.get(directory)
        if homes is None:
            homes = self._homes[directory] = tuple(self._directories(directory))
        return self.reading.files.find(base, homes)

    def _directories(self, directory: str) -> Iterable[str]:
        """The existing directories that may be meant, those that share most of the path first."""
        parts = [part for part in directory.split("/") if part]
        ends = ("/".join(parts[start:]) for start in range(len(parts) + 1))
        places = (posixpath.join(folder, end).rstrip("/") for end in ends for folder in self.folders)
        return (place for place in dict.fromkeys(places) if self.reading.files.listing(place))


class LvisImage(CocoImage, gc=False):
    """An image with the categories that were looked for in vain, and those of which only some objects are boxed."""

    file_name: str = ""
    coco_url: str = ""
    neg_category_ids: list[Id] = []  # noqa: RUF012  (msgspec copies it)
    not_exhaustive_category_ids: list[Id] = []  # noqa: RUF012

    def __post_init__(self) -> None:
        """Names an image that has no file name by its address."""
        self.file_name = self.file_name or self.tail

    @property
    def tail(self) -> str:
        """Folder and name of the image in its address at COCO."""
        return "/".join(self.coco_url.split("/")[-2:])


class LvisReader(CocoVariant):
    """LVIS JSON: `lvis_v1_train.json` and `lvis_v1_val.json` with COCO's images."""

    format = "lvis"
    looks_like = "LVIS: lvis_v1_*.json, or COCO JSON with neg_category_ids, and the folders train2017 and val2017"
    image_type = LvisImage
    file_names = re.compile(r"lvis_", re.IGNORECASE)
    keys = (b'"neg_category_ids"',)
    bases = ("coco",)
    federated = True

    def image_names(self, image: CocoImage) -> Sequence[str]:
        """The file name, and the end of the address where that is another name."""
        tail = image.tail if isinstance(image, LvisImage) else ""
        return tuple(dict.fromkeys(filter(None, (image.file_name, tail))))

    def category_name(self, category: CocoCategory) -> str:
        """The name; in words where it is one of LVIS's own, which carry a synset."""
        name = category.name if category.synset is None else category.name.replace("_", " ")
        return plain_name(name) or f"category {category.id}"

    def annotated(
        self, image: CocoImage, labels: Int[np.ndarray, "m"], numbers: Mapping[Id, int]
    ) -> Sequence[int] | None:
        """The categories that have boxes and those that are not there, without those that are boxed in part."""
        if not isinstance(image, LvisImage):
            return None
        absent, partly = (
            {numbers[category] for category in ids if category in numbers}
            for ids in (image.neg_category_ids, image.not_exhaustive_category_ids)
        )
        return sorted({*labels.tolist(), *absent} - partly - {UNNAMED})


class Objects365Annotation(CocoAnnotation, gc=False):
    """A box that may be of something that only looks like the object."""

    isfake: int | bool | None = None

    @property
    def ignored(self) -> bool:
        """Whether finding the object is neither right nor wrong: a crowd, or a fake."""
        return bool(self.iscrowd or self.isfake)


class Objects365Reader(CocoVariant):
    """Objects365 JSON: `zhiyuan_objv2_train.json` and `zhiyuan_objv2_val.json` with images in patches."""

    format = "objects365"
    looks_like = "Objects365: zhiyuan_objv2_*.json, or COCO JSON with isfake, and images in patch folders"
    annotation_type = Objects365Annotation
    file_names = re.compile(r"(zhiyuan_)?(objv2|objects?365|obj365)", re.IGNORECASE)
    keys = (b'"isfake"', b"/objects365_v")
