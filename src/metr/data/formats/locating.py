"""Which files make a split, where the images lie that they name, and who owns an image that several entries name."""

import posixpath
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from metr.data.formats.base import Reading
from metr.data.formats.files import Files, OutsideError
from metr.data.records import canonical_split

# What folders with images are called.
IMAGE_FOLDERS = ("images", "Images", "JPEGImages", "imgs", "img", "data")


def dataset_root(file: Path, annotation_folders: Collection[str] = ("annotations",)) -> Path:
    """The dataset's folder where a user names its one annotation file."""
    return file.parent.parent if file.parent.name in annotation_folders else file.parent


def grouped(pairs: Iterable[tuple[str, Path]]) -> dict[str, tuple[Path, ...]]:
    """The files and folders of each split, from pairs of a split's name and one of them."""
    splits: dict[str, tuple[Path, ...]] = {}
    for name, path in pairs:
        splits[name] = (*splits.get(name, ()), path)
    return splits


def splits_of_files(files: Iterable[Path]) -> dict[str, tuple[Path, ...]]:
    """Files by the split in their own name, else in that of their folder, else by their name.

    Where some name a split, the others are left out: they often repeat what is in those.
    """
    splits = grouped((split_of_file(file), file) for file in files)
    return {name: paths for name, paths in splits.items() if canonical_split(name)} or splits


def split_of_file(file: Path) -> str:
    """The name of the split of a file: its own name, or that of its folder where only that names a split."""
    in_folder = canonical_split(file.stem) is None and canonical_split(file.parent.name) is not None
    return file.parent.name if in_folder else file.stem


def split_of_folder(folder: Path, root: Path) -> str:
    """The last folder on the way from `root` that is called like a split; "all" where none is."""
    return next((part for part in reversed(folder.relative_to(root).parts) if canonical_split(part)), "all")


def image_folders(files: Files, split: str, beside: str, *, anywhere: bool = False) -> tuple[str, ...]:
    """Where the images of a split may lie, likeliest first.

    They lie in a folder named like the split, or all together, near the annotation file in the folder `beside` or in
    the dataset's folder. `anywhere` adds the dataset's other folders, but for those of other splits: some formats leave
    it to the configuration of training where the images lie.
    """
    places = [beside, "", *(posixpath.join(base, name) for base in (beside, "") for name in IMAGE_FOLDERS)]
    bases = [place for place in dict.fromkeys(places) if files.listing(place)]
    named = [posixpath.join(base, name) for base in bases for name in _like(split, files.listing(base))]
    inner = [posixpath.join(place, name) for place in named for name in IMAGE_FOLDERS]
    others: list[str] = []
    if anywhere:
        own = {None, canonical_split(split)}
        top = sorted(name for name in files.listing("") if "." not in name and canonical_split(name) in own)
        others = [posixpath.join(name, below) for name in top for below in (*IMAGE_FOLDERS, "ImageFolder")] + top
    return tuple(place for place in dict.fromkeys([*named, *inner, *bases, *others]) if files.listing(place))


def _like(split: str, names: Iterable[str]) -> list[str]:
    """The names that mean the same split, the very same name first."""
    canonical = canonical_split(split)
    alike = [name for name in names if name == split or (canonical is not None and canonical_split(name) == canonical)]
    return sorted(alike, key=lambda name: (name != split, name))


def locate(name: str, folders: Sequence[str], where: str, reading: Reading) -> str | None:
    """The image that an annotation file names, relative to the dataset's folder; an issue if it is missing."""
    try:
        path = reading.files.find(name, folders)
    except OutsideError:
        note_outside(name, where, reading)
        return None
    if path is None:
        note_missing(name, folders, where, reading)
    return path


def note_outside(name: object, where: str, reading: Reading) -> None:
    """Notes an image whose path leads out of the dataset's folder."""
    reading.issues.add("path outside", where, f"{name} leads out of the dataset's folder: left out")


def note_missing(name: str, folders: Sequence[str], where: str, reading: Reading) -> None:
    """Notes an image that lies in none of the folders."""
    looked = ", ".join(folder or "." for folder in folders[:4])
    reading.issues.add("missing image", where, f"{name}, looked for in {looked}")


@dataclass(frozen=True, kw_only=True)
class ImageConflicts:
    """Which entries of annotation files, by their numbers, own which images.

    `owners` are the owning entries by image, in their order. `repeats` are entries that mean the image of another one,
    each with that owner. `misled` are entries that were led to the image of another one, each with that image.
    """

    owners: dict[str, int]
    repeats: list[tuple[int, int]]
    misled: list[tuple[int, str]]


def resolve_conflicts(found: Iterable[tuple[Sequence[str], str | None]]) -> ImageConflicts:
    """Gives each image to the first entry that names it exactly, else to the first that was led to it.

    Names are found loosely: in another case, or with any suffix. So the true image of an entry may be missing, and what
    was found instead be that of another entry. Its boxes must not get there.

    Args:
        found: For each entry the names of its image, and the image that was found; None where none was.
    """
    owners: dict[str, int] = {}
    near: dict[int, Sequence[str]] = {}  # the names of the owners that were led there
    repeats: list[tuple[int, int]] = []
    misled: list[tuple[int, str]] = []
    replaced: dict[int, str] = {}
    for entry, (names, path) in enumerate(found):
        if path is None:
            continue
        exact = posixpath.basename(path) in {posixpath.basename(name.replace("\\", "/")) for name in names}
        owner = owners.setdefault(path, entry)
        if owner == entry:
            if not exact:
                near[entry] = names
        elif exact and owner in near:
            replaced[owner] = path
            del near[owner]
            owners[path] = entry
        elif exact or near.get(owner) == names:
            repeats.append((entry, owner))
        else:
            misled.append((entry, path))
    if replaced:
        owners = dict(sorted(owners.items(), key=lambda item: item[1]))
        misled += replaced.items()
        misled += [(entry, replaced[owner]) for entry, owner in repeats if owner in replaced]
        repeats = [(entry, owner) for entry, owner in repeats if owner not in replaced]
    return ImageConflicts(owners=owners, repeats=repeats, misled=sorted(misled))
