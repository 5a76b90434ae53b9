"""What the writers of all formats share: a folder that is whole or not there, its images, and what was left out."""

import contextlib
import logging
import os
import secrets
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal

from metr.data.datasets_file import DatasetSource
from metr.data.formats.files import there
from metr.data.records import Annotations, ImageRecord
from metr.errors import DataError

logger = logging.getLogger(__name__)

# How images get into the new folder: as hard links, where the file system can, or as copies.
Placement = Literal["link", "copy"]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written: images and boxes in all splits.

    `renamed` images had the name of another one of their split; `copied` ones are copies, the others hard links.
    `left_out` counts what is not in the new folder, or not as it was, by what it is.
    """

    out: Path
    format: str
    images: int
    boxes: int
    renamed: int = 0
    copied: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)

    def log(self, name: str) -> "ExportReport":
        """Logs what was written of the dataset `name`, and as a warning what was left out."""
        logger.info("%s: %d images with %d boxes written to %s", name, self.images, self.boxes, self.out)
        if self.left_out:
            listed = ", ".join(f"{count} x {kind}" for kind, count in self.left_out.items())
            logger.warning("%s: not in %s, as %s: %s", name, self.out, self.format, listed)
        return self


class ImageFolder:
    """The images of one split, put into one folder under names that differ.

    Hard links share the image with the dataset: who edits one edits both.

    Args:
        folder: Where they go; it is made.
        images: As links or as copies.
        stems: Whether the names must differ without their suffixes.
    """

    def __init__(self, folder: Path, placement: Placement, *, stems: bool = False) -> None:
        self.folder, self.placement, self.stems = folder, placement, stems
        self.renamed = self.copied = 0
        self._taken: set[str] = set()
        folder.mkdir(parents=True)

    def put(self, image: Path) -> str | None:
        """The name under which an image lies in the folder now; None where it cannot be read.

        Raises:
            OSError: the folder cannot be written to.
        """
        try:
            content = image.open("rb")
        except (OSError, ValueError):
            return None
        with content:
            name = self._free_name(image.name)
            self.renamed += name != image.name
            if self.placement == "link":
                # another disk, too many links, no permission
                with contextlib.suppress(OSError):
                    (self.folder / name).hardlink_to(image.resolve())
                    return name
            with (self.folder / name).open("wb") as copy:
                shutil.copyfileobj(content, copy)
            self.copied += 1
        return name

    def _free_name(self, name: str) -> str:
        """`name`, or `name-2` and so on where another image has it; case does not make names differ."""
        stem, suffix, number = PurePath(name).stem, PurePath(name).suffix, 1
        while (key := _folded(stem if self.stems else stem + suffix)) in self._taken:
            number += 1
            stem = f"{PurePath(name).stem}-{number}"
        self._taken.add(key)
        return stem + suffix


def unsaid_options(source: DatasetSource) -> Counter[str]:
    """What a dataset was opened with that no format has a place for; categories are written under their new names."""
    spec = source.config
    return Counter({"prompt": len(spec.prompts), "weight": int(spec.weight != 1), "old name": len(spec.renames)})


@contextlib.contextmanager
def new_folder(out: Path, root: Path) -> Iterator[Path]:
    """A folder to write a dataset to, which is moved to `out` when all is written.

    Where writing breaks off, nothing is left of it, so no part of a dataset is ever taken for the whole.

    Args:
        out: A folder that is empty or not there.
        root: The folder of the dataset that is written.

    Raises:
        DataError: `out` is a file, is not empty, lies in the dataset itself, or cannot be written.
    """
    target = Path(os.path.abspath(out.expanduser()))  # noqa: PTH100  (symbolic links stay)
    if target.is_relative_to(root):
        raise DataError("would be written into the dataset's own folder", where=target, hint="name a folder outside")
    building = target.with_name(f".{target.name}.writing-{secrets.token_hex(4)}")
    try:
        if there(target) and (not target.is_dir() or any(target.iterdir())):
            what = "the folder is not empty" if target.is_dir() else "there is a file of that name"
            raise DataError(what, where=target, hint="name another folder, or remove what is there")
        building.mkdir(parents=True)
        yield building
        if target.is_dir():
            target.rmdir()
        building.rename(target)
    except OSError as error:
        hint = "free some disk space, or name another folder"
        raise DataError(f"cannot be written: {error}", where=target, hint=hint) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def in_order(annotations: Annotations) -> Iterator[ImageRecord]:
    """The records of a split."""
    return (annotations[index] for index in range(len(annotations)))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
