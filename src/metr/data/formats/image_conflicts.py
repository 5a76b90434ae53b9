"""Whose image an image is, where several entries of annotation files lead to it.

Names are found loosely: in another case, or with any suffix. So the true image of an entry may be missing, and what
was found instead be that of another entry. Its boxes must not get there.
"""

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from metr.data.formats.base import Reading, locate
from metr.data.formats.files import fold


@dataclass(frozen=True, kw_only=True)
class ImageConflicts:
    """Entries by their numbers, and the images that are theirs.

    `owners` are the entries by image, in their order. `again` are the numbers of entries that mean the image of
    another one, which comes second. `strangers` are those that were led to the image of another one.
    """

    owners: dict[str, int]
    again: list[tuple[int, int]]
    strangers: list[tuple[int, str]]


def claim(found: Iterable[tuple[Sequence[str], str | None]]) -> ImageConflicts:
    """Gives each image to the first entry that names it exactly, else to the first that was led to it.

    Args:
        found: For each entry the names of its image and the one that was found, None where none was.
    """
    owners: dict[str, int] = {}
    near: dict[int, Sequence[str]] = {}  # the names of the owners that were led there
    again: list[tuple[int, int]] = []
    strangers: list[tuple[int, str]] = []
    replaced: dict[int, str] = {}
    for entry, (names, path) in enumerate(found):
        if path is None:
            continue
        exact = posixpath.basename(path) in map(base_name, names)
        owner = owners.setdefault(path, entry)
        if owner == entry:
            if not exact:
                near[entry] = names
        elif exact and owner in near:
            replaced[owner] = path
            del near[owner]
            owners[path] = entry
        elif exact or near.get(owner) == names:
            again.append((entry, owner))
        else:
            strangers.append((entry, path))
    if replaced:
        owners = dict(sorted(owners.items(), key=lambda item: item[1]))
        strangers += replaced.items()
        strangers += [(entry, replaced[owner]) for entry, owner in again if owner in replaced]
        again = [(entry, owner) for entry, owner in again if owner not in replaced]
    return ImageConflicts(owners=owners, again=again, strangers=sorted(strangers))


class Stems:
    """The annotation files of a folder, one an image, by their names.

    Args:
        names: The names in the folder.
        suffix: That of annotation files, in lower case.
    """

    def __init__(self, names: Iterable[str], suffix: str) -> None:
        self._exact = {posixpath.splitext(name)[0] for name in names if name.lower().endswith(suffix)}
        self._folded = set(map(fold, self._exact))

    def belongs(self, image: str, stem: str) -> bool:
        """Whether an image may be that of the file `stem`: no other file is called like it."""
        own = posixpath.splitext(posixpath.basename(image))[0]
        return own == stem or not (own in self._exact or (fold(own) != fold(stem) and fold(own) in self._folded))


def locate_own(name: str, stem: str, folders: Sequence[str], stems: Stems, where: str, reading: Reading) -> str | None:
    """The image that the annotation file `stem` names (see `locate`), unless it is another file's: then an issue."""
    path = locate(name, folders, where, reading)
    if path is None or stems.belongs(path, stem):
        return path
    reading.issues.add("missing image", where, f"it names {path}, which has an annotation file of its own")
    return None


def base_name(name: str) -> str:
    """The last part of a path with slashes of either kind."""
    return posixpath.basename(name.replace("\\", "/"))


def boxes_of(count: int) -> str:
    """A number of boxes in words."""
    return "1 box" if count == 1 else f"{count} boxes"
