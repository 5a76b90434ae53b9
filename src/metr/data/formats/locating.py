"""Which files make a split, where the images lie that they name, and who owns an image that several entries name."""

import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from metr.data.formats.base import Reading
from metr.data.formats.files import Files, OutsideError, fold
from metr.data.records import TRAIN, VAL, canonical_split

# What folders with images are called.
IMAGE_FOLDERS = ("images", "Images", "JPEGImages", "imgs", "img", "data")

# Folders with images of another kind, which often are called like the photographs that they belong to.
_NOT_PHOTOGRAPHS = re.compile(
    r"(^|[^a-z])(masks?|labels?|annotations?|depth|thumbs?|thumbnails?|previews?|crops?|backups?)([^a-z]|$)|segmentation",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


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


def locate(name: str, folders: Sequence[str], where: str, reading: Reading, *, by_end: bool = True) -> str | None:
    """The image that an annotation file names, relative to the dataset's folder; an issue if it is missing.

    A path that does not exist here leads to the image that it ends like (see `locate_by_end`), if `by_end` allows it.
    """
    try:
        path, outside = reading.files.find(name, folders), False
    except OutsideError:
        path, outside = None, True
    if path is not None or by_end:
        return path or locate_by_end([name], folders, where, reading, outside=outside)
    _note(name, folders, where, reading, outside=outside)
    return None


def locate_by_end(
    names: Sequence[str], folders: Sequence[str], where: str, reading: Reading, *, outside: bool = False
) -> str | None:
    """The one image that a path ends like, which was not found as it is written; else None, and an issue.

    A path of another machine, an address, or one that leads out of the dataset's folder (`outside`) means the image of
    the dataset that shares the longest end with it, at least the base name. Any other path is one below the dataset's
    folder: the image must lie in one of `folders`, or its path must end with the whole name. Folders of other splits,
    and those of masks and the like, are left out.
    """
    for name in names:
        parts = _parts(name)
        foreign = outside or _ADDRESS.match(name) is not None or "?d=" in name
        options = _alike(parts, folders, where, reading.files, foreign=foreign) if parts else []
        if len(options) > 1:
            detail = f"{name} may be {' or '.join(options[:3])}: left out; write its path from the dataset's folder"
            reading.issues.add("ambiguous image", where, detail)
            return None
        if options and reading.files.claim(options[0], "/".join(parts), where):
            if not reading.notes.counts["image found by its name"]:
                detail = f"no {name} here: {options[0]} is taken, which ends alike; so are other images found"
                reading.notes.add("image found by its name", where, detail)
            return options[0]
        if options:
            detail = f"{name} ends like {options[0]}, but so does the image of another entry: left out"
            reading.issues.add("ambiguous image", where, detail)
            return None
    _note(" or ".join(names), folders, where, reading, outside=outside)
    return None


def _parts(name: str) -> list[str]:
    """The folders and the base name of a path, or of an address."""
    if "?d=" in name:  # Label Studio's, for files on its server
        name = unquote(name.partition("?d=")[2].partition("&")[0])
    elif _ADDRESS.match(name):
        name = unquote(re.split("[?#]", name, maxsplit=1)[0])
    return [part for part in name.replace("\\", "/").split("/") if part not in {"", ".", ".."}]


def _alike(parts: list[str], folders: Sequence[str], where: str, files: Files, *, foreign: bool) -> list[str]:
    """The images that share the longest end with a path; see `locate_by_end`."""
    named = [part for part in parts[:-1] if canonical_split(part)][-1:]
    splits = _splits([*named, *where.split("/")]) or _splits("/".join(folders).split("/"))
    best: tuple[int, list[str]] = 0, []
    for path in files.called(parts[-1]):
        *above, _ = path.split("/")
        common = _common_end(parts, path)
        own = _splits(above)
        if splits and own and not splits & own:
            continue
        known = "/".join(above[: len(above) - common + 1]) in folders or "/".join(above) in folders
        whole = common == len(parts)
        odd = any(map(_NOT_PHOTOGRAPHS.search, above[: len(above) - common + 1]))
        if known or ((foreign or whole) and not odd):
            best = max(best, (common, []), key=lambda pair: pair[0])
            if common == best[0]:
                best[1].append(path)
    return best[1]


def _common_end(parts: Sequence[str], path: str) -> int:
    """How many parts two paths have in common at their ends. The base names are alike, and count as one."""
    count = 1
    for one, other in zip(reversed(parts[:-1]), reversed(path.split("/")[:-1]), strict=False):
        if fold(one) != fold(other):
            break
        count += 1
    return count


def _splits(parts: Iterable[str]) -> set[str]:
    """The splits that folders and files are called after."""
    found = {split for part in parts if (split := canonical_split(part)) is not None}
    return found | {VAL} if TRAIN in found and any("trainval" in part.lower() for part in parts) else found


def _note(name: str, folders: Sequence[str], where: str, reading: Reading, *, outside: bool) -> None:
    """Notes an image that lies in none of the folders, or whose path leads out of the dataset's folder."""
    if outside:
        reading.issues.add("path outside", where, f"{name} leads out of the dataset's folder: left out")
    else:
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


def resolve_conflicts(found: Iterable[str | None], names_of: Callable[[int], Sequence[str]]) -> ImageConflicts:
    """Gives each image to the entry that names it best; the first of those that name it alike.

    Names are found loosely: in another case, with any suffix, or by the end of a path. So the true image of an entry
    may be missing, and what was found instead be that of another entry. Its boxes must not get there. Where two paths
    share the same end with that of an image, and neither is it, nobody gets it.

    Args:
        found: For each entry the image that was found; None where none was.
        names_of: The names of the image of an entry.
    """
    owners: dict[str, int] = {}
    claims: dict[str, list[int]] = {}
    for entry, path in enumerate(found):
        if path is not None and owners.setdefault(path, entry) != entry:
            claims.setdefault(path, [owners[path]]).append(entry)
    repeats: list[tuple[int, int]] = []
    misled: list[tuple[int, str]] = []
    for path, entries in claims.items():
        fits = {entry: max(_fit(name, path) for name in names_of(entry)) for entry in entries}
        best = max(fits.values())
        owner = next(entry for entry in entries if fits[entry] == best)
        mine = _spelt(names_of(owner))
        rivals = [entry for entry in entries if fits[entry] == best and _spelt(names_of(entry)) != mine]
        if best[0] == _BY_END and rivals:
            del owners[path]
            misled += [(entry, path) for entry in entries]
            continue
        owners[path] = owner
        for entry in entries:
            if entry != owner:
                same = _spelt(names_of(entry)) == mine or (fits[entry][0] == best[0] == _WHOLE)
                if same:
                    repeats.append((entry, owner))
                else:
                    misled.append((entry, path))
    if claims:
        owners = dict(sorted(owners.items(), key=lambda item: item[1]))
    return ImageConflicts(owners=owners, repeats=sorted(repeats), misled=sorted(misled))


# How well a name fits an image: another case or suffix, the same base name, the whole name.
_LOOSE, _BY_END, _WHOLE = range(3)


def _fit(name: str, path: str) -> tuple[int, int]:
    """How well a name fits an image, and how many parts they have in common at their ends."""
    parts = _parts(name)
    common = _common_end(parts, path)
    if not parts or parts[-1] != posixpath.basename(path):
        return _LOOSE, 0
    return (_WHOLE, 0) if common == len(parts) else (_BY_END, common)


def _spelt(names: Sequence[str]) -> list[list[str]]:
    return list(map(_parts, names))
