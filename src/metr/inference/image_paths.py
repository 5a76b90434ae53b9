"""Which images a command names: files, folders, patterns, lists of paths, and addresses of other file systems."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8

from metr.data.images import SUFFIXES, read_image
from metr.data.records import InMemoryBytes
from metr.data.regular_files import is_hidden
from metr.data.shards.stores import filesystem, is_url, read_whole, tried
from metr.errors import ConfigError, DataError, StoreError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".3gp", ".ogv"}
)
CAMERA = "camera:"
"""What the address of a camera begins with; its number follows."""
# paths of a list that are looked up before a run begins
_LOOKED_UP = 100
# that a store may take to list a folder, which may hold millions of images
_SECONDS_TO_LIST = 3600.0


def expanded_paths(images: Sequence[str | Path], out: Path, *, recursive: bool = True) -> list[Path]:
    """Every image that is named, lies in a named folder or fits a pattern, each once.

    Images in `out` are left out, because earlier calls may have drawn them.

    Args:
        images: Files; folders, whose images are taken, those of their subfolders too, but nothing hidden; patterns such
            as `**/*.jpg`.
        out: The folder that the command writes.
        recursive: Whether subfolders of a folder count.

    Raises:
        DataError: one of them does not exist, or gives no image.
    """
    found: list[Path] = []
    for image in images:
        path = Path(image)
        if path.is_dir():
            found += _images_in(path, out, recursive)
        elif path.is_file():
            found.append(path)
        elif has_magic(str(image)):
            found += _fitting(str(image), out)
        else:
            hint = "addresses of other file systems need --engine ray" if is_url(image) else "check the path"
            raise DataError("no such image or folder", where=image, hint=hint)
    return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class ImagesToDraw:
    """Images, and for each of them the path of its drawing."""

    paths: tuple[Path, ...]
    drawings: tuple[Path, ...]


def check_images_there(images: Sequence[str | Path]) -> None:
    """Checks that images, folders and patterns are there which are no addresses in stores.

    Raises:
        DataError: one is not.
    """
    for image in images:
        if not is_url(image) and not Path(image).exists() and not has_magic(str(image)):
            raise DataError("no such image or folder", where=image, hint="check the path")


def images_to_draw(images: Sequence[str | Path], out: Path, *, recursive: bool = True) -> ImagesToDraw:
    """The images that `expanded_paths` finds, each with a drawing in `out`; those that share a name are numbered.

    Raises:
        DataError: as `expanded_paths`, or an image would be drawn over one of the given images.
    """
    paths = expanded_paths(images, out, recursive=recursive)
    names: dict[str, None] = {}
    for path in paths:
        name, number = f"{path.stem}.jpg", 2
        while name in names:
            name, number = f"{path.stem}-{number}.jpg", number + 1
        names[name] = None
    originals = {real_path(path) for path in paths}
    for name in names:
        if real_path(out / name) in originals:
            raise DataError("a drawing would take the place of this image", where=out / name, hint="another -o")
    return ImagesToDraw(paths=tuple(paths), drawings=tuple(out / name for name in names))


def as_videos(images: Sequence[str | Path]) -> list[str] | None:
    """The videos and cameras (`camera:0`) that are named; None if images are.

    Raises:
        ConfigError: both are named, or a camera has no number.
        DataError: a video is missing.
    """
    texts = [str(image) for image in images]
    videos = [one for one in texts if one.startswith(CAMERA) or Path(one).suffix.lower() in VIDEO_SUFFIXES]
    videos = [one for one in videos if not Path(one).is_dir()]
    if not videos:
        return None
    if len(videos) < len(texts):
        raise ConfigError("expected images or videos, found both", where="IMAGE", hint="a call for each")
    for one in videos:
        if one.startswith(CAMERA):
            if not one.removeprefix(CAMERA).isdecimal():
                raise ConfigError(f"expected a number, found {one!r}", where="IMAGE", hint="camera:0 is the first one")
        elif not Path(one).is_file():
            raise DataError("no such video", where=one, hint="check the path")
    return videos


def expanded_images(images: Sequence[str | Path], out: Path) -> list[str]:
    """As `expanded_paths`, with addresses in stores (`s3://bucket/folder`), as datasets have them.

    Raises:
        DataError: a path or an address does not exist, or gives no image; or there is no such kind of store.
        DependencyError: the package for this kind of store is not installed.
        StoreError: the store does not answer.
    """
    found: list[str] = []
    for image in images:
        found += _images_at(str(image)) if is_url(image) else map(str, expanded_paths([image], out))
    return list(dict.fromkeys(found))


def listed_images(file: Path) -> list[str]:
    """The paths and addresses in a text file, one a line, each once; empty lines are left out.

    Relative paths are taken from the current folder. Paths beyond the first hundred are not looked up.

    Raises:
        ConfigError: the file cannot be read or lists nothing.
        DataError: none of the first hundred paths exists: the list is meant for another place.
    """
    hint = "a text file with one path a line"
    try:
        # names of files are bytes: those that are not UTF-8 are read as the operating system gives them
        lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise ConfigError(f"the list of images cannot be read: {error.strerror}", where=file, hint=hint) from None
    found = list(dict.fromkeys(line.removesuffix("\r") for line in lines if line.strip()))
    if not found:
        raise ConfigError("the list names no image", where=file, hint=hint)
    first = [path for path in found[:_LOOKED_UP] if not is_url(path)]
    if "\0" in "".join(first) or (first and not any(Path(path).exists() for path in first)):
        hint = f"one path a line; relative paths are taken from the current folder, {Path.cwd()}"
        what = f"none of the first {len(first)} paths of this list exists, such as {first[0][:200]!r}"
        raise DataError(what, where=file, hint=hint)
    return found


def read_named_image(image: str) -> UInt8[np.ndarray, "h w 3"]:
    """The image at a path or an address as 8-bit RGB; see `read_image`.

    Raises:
        DataError: it is missing, unreadable or no image.
        StoreError: the store does not answer. That says nothing about the image.
    """
    if not is_url(image):
        return read_image(Path(image))
    try:
        return read_image(Path(PurePosixPath(image).name), InMemoryBytes(read_whole(image)))
    except StoreError as error:
        if not isinstance(error.__cause__, (FileNotFoundError, PermissionError)):
            raise
        raise DataError(f"an image that {error.what}", where=image) from None
    except DataError as error:
        raise DataError(error.what, where=image, hint=error.hint) from None


def real_path(path: Path) -> Path:
    """A path without links; `Path.resolve` raises an error for a link to itself."""
    return Path(os.path.realpath(path))


def _images_in(folder: Path, out: Path, recursive: bool) -> list[Path]:
    inside, written = _images_within(folder), real_path(out)
    inside = inside if recursive else [path for path in inside if path.parent == folder]
    if written != real_path(folder):
        inside = [item for item in inside if written not in real_path(item).parents]
    if not inside:
        raise DataError("no image in this folder", where=folder, hint=_endings())
    return inside


def _images_within(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, sorted. Links are followed; no folder is visited twice.

    Hidden files and folders are left out.
    Broken links are included, so that they are reported.
    """
    found, known = [], {real_path(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        fresh = []
        for name in sorted(name for name in folders if not is_hidden(name)):
            real = real_path(Path(place, name))
            if real not in known:
                known.add(real)
                fresh.append(name)
        folders[:] = fresh
        shown = (name for name in names if not is_hidden(name))
        images = [Path(place, name) for name in shown if Path(name).suffix.lower() in SUFFIXES]
        found += [path for path in images if path.is_file() or not path.exists()]
    return sorted(found)


def _fitting(pattern: str, out: Path) -> list[Path]:
    """The images that fit a pattern; `**` stands for folders of any depth."""
    fitting = [Path(path) for path in sorted(glob(pattern, recursive=True))]  # noqa: PTH207 (an absolute pattern)
    written = real_path(out)
    found = [
        path
        for path in fitting
        if path.suffix.lower() in SUFFIXES and not path.is_dir() and written not in real_path(path).parents
    ]
    if not found:
        raise DataError("no image fits this pattern", where=pattern, hint=f"check the path; {_endings()}")
    return found


def _endings() -> str:
    return f"images end in {', '.join(sorted(SUFFIXES))}"


def _images_at(address: str) -> list[str]:
    """The address itself, or those of the images in the folder that it names and in its subfolders, sorted."""
    files, path = filesystem(address)
    try:
        if tried(address, lambda: files.info(path))["type"] == "file":
            return [address]
        inside: list[str] = tried(address, lambda: files.find(path), _SECONDS_TO_LIST)
    except StoreError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise DataError("no such image or folder", where=address, hint="check the address") from None
    below = ((one, one.removeprefix(path).split("/")) for one in inside)
    shown = (one for one, parts in below if not any(map(is_hidden, parts)))
    found = sorted(one for one in shown if PurePosixPath(one).suffix.lower() in SUFFIXES)
    if not found:
        raise DataError("no image in this folder", where=address, hint=_endings())
    return [files.unstrip_protocol(one) for one in found]
