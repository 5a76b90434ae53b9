"""What the writers of all formats share: a folder that is complete or not there, its images, and what is left out."""

import contextlib
import logging
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal

from metr.data.datasets_file import DatasetSource
from metr.data.formats.files import fold, there
from metr.data.records import Annotations, ImageRecord
from metr.errors import DataError

logger = logging.getLogger(__name__)

# How images get into the new folder: as hard links, where the file system can, or as copies.
Placement = Literal["link", "copy"]


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written: images and boxes in all splits.

    `renamed` images had the name of another one of their split; `copied` ones are copies, the others hard links.
    `left_out` counts what the new folder lacks, by kind.
    """

    out: Path
    format: str
    images: int
    boxes: int
    renamed: int = 0
    copied: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)


class Export:
    """A dataset on its way into a new folder, with counts of what is written and what is left out.

    Args:
        folder: The folder.
        placement: Images as links or as copies.
        left_out: What is known to be left out already.
    """

    def __init__(self, folder: Path, placement: Placement, left_out: Counter[str]) -> None:
        self.folder, self.placement, self.left_out = folder, placement, left_out
        self.images = self.boxes = self.renamed = self.copied = 0

    def image_folder(self, split: str, *, stems: bool = False) -> "ImageFolder":
        """The folder `images/SPLIT`, which is made. `stems`: names must differ without their suffixes."""
        return ImageFolder(self.folder / "images" / split, self, stems=stems)

    def report(self, name: str, out: Path, format_name: str) -> ExportReport:
        """Logs what was written of the dataset `name`, and as a warning what was left out."""
        report = ExportReport(
            out=out,
            format=format_name,
            images=self.images,
            boxes=self.boxes,
            renamed=self.renamed,
            copied=self.copied,
            left_out=dict(+self.left_out),
        )
        logger.info("%s: %d images with %d boxes written to %s", name, report.images, report.boxes, out)
        if report.left_out:
            listed = ", ".join(f"{count} x {kind}" for kind, count in report.left_out.items())
            logger.warning("%s: not in %s, as %s: %s", name, out, format_name, listed)
        return report


class ImageFolder:
    """The images of one split, put into one folder under names that differ.

    A hard link shares the file with the dataset: editing one edits both.
    """

    def __init__(self, folder: Path, export: Export, *, stems: bool) -> None:
        self.folder, self.export, self.stems = folder, export, stems
        self._taken: set[str] = set()
        folder.mkdir(parents=True)

    def put(self, image: Path) -> str | None:
        """The name under which an image lies in the folder now; None where it cannot be read, which is counted.

        Raises:
            OSError: the folder cannot be written to.
        """
        try:
            content = image.open("rb")
        except (OSError, ValueError):
            self.export.left_out["missing image"] += 1
            return None
        with content:
            name = self._free_name(image.name)
            self.export.images += 1
            self.export.renamed += name != image.name
            if self.export.placement == "link":
                # another disk, too many links, no permission
                with contextlib.suppress(OSError):
                    (self.folder / name).hardlink_to(image.resolve())
                    return name
            with (self.folder / name).open("wb") as copy:
                shutil.copyfileobj(content, copy)
            self.export.copied += 1
        return name

    def _free_name(self, name: str) -> str:
        """`name`, or `name-2` and so on where another image has it; case does not make names differ."""
        stem, suffix, number = PurePath(name).stem, PurePath(name).suffix, 1
        while (key := fold(stem if self.stems else stem + suffix)) in self._taken:
            number += 1
            stem = f"{PurePath(name).stem}-{number}"
        self._taken.add(key)
        return stem + suffix


@contextlib.contextmanager
def new_export(source: DatasetSource, out: Path, placement: Placement) -> Iterator[Export]:
    """A dataset's export into a folder that is moved to `out` when all is written.

    Where writing fails, the folder is removed, so that a part of a dataset is never taken for all of it. Options that
    the dataset was opened with and that no format has a place for are counted as left out. Categories are written under
    their new names.

    Args:
        source: The dataset.
        out: A folder that is empty or not there.
        placement: Images as links or as copies.

    Raises:
        DataError: `out` is a file, is not empty, lies in the dataset's folder, or cannot be written.
    """
    spec = source.config
    options = {"prompt": len(spec.prompts), "weight": int(spec.weight != 1), "old name": len(spec.renames)}
    target = Path(os.path.abspath(out.expanduser()))  # noqa: PTH100  (symbolic links stay)
    if target.is_relative_to(source.root):
        raise DataError("would be written into the dataset's own folder", where=target, hint="name a folder outside")
    building = target.with_name(f".{target.name}.writing-{secrets.token_hex(4)}")
    try:
        if there(target) and (not target.is_dir() or any(target.iterdir())):
            what = "the folder is not empty" if target.is_dir() else "there is a file of that name"
            raise DataError(what, where=target, hint="name another folder, or remove what is there")
        building.mkdir(parents=True)
        yield Export(building, placement, Counter(options))
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
