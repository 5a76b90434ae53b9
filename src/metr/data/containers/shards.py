"""What containers of rows share: the files that a dataset is divided into, their splits, and the images in their rows.

The copy of such a container has a folder for each file, of the same path and name, with the images of its rows by their
numbers, from 1. So an image's path and a line's place tell the file and the row.
"""

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from metr.data.containers.store import Budget, write_file
from metr.data.formats.base import Reader, Reading
from metr.data.formats.files import files_in, folders_within, is_image, there
from metr.data.formats.locating import grouped
from metr.data.records import canonical_split

# Folders below a dataset's are looked into as deep as this.
_DEPTH = 4
_NUMBERED = re.compile(r"^(.*?)[-_.](\d{1,6})[-_]of[-_](\d{1,6})(?!\d)(.*)$")
# Files that say what the rows are, and whose they are; they are copied.
_ABOUT = ("README.md", "dataset_info.json", "LICENSE", "LICENSE.txt", "LICENSE.md")
_KINDS = (
    (b"\xff\xd8", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"RIFF", ".webp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"\0\0\0\x0cjP", ".jp2"),
)


class ShardedReader(Reader):
    """Reads a dataset of numbered files. `missing` are numbers without a file: where, and what is missing."""

    def __init__(
        self, root: Path, splits: Mapping[str, tuple[Path, ...]], missing: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(root, splits)
        self.missing = missing

    def note_missing(self, reading: Reading) -> None:
        """Notes the files that are missing."""
        for where, detail in self.missing:
            reading.notes.once("missing file", where, detail)


def files_below(root: Path, matches: re.Pattern[str]) -> list[Path]:
    """The files of a folder whose names match, a few folders deep, in the order of their paths."""
    found = (
        file for folder in folders_within(root, _DEPTH) for file in files_in(folder, "") if matches.search(file.name)
    )
    return sorted(found)


def shards_by_split(files: Iterable[Path], root: Path) -> dict[str, tuple[Path, ...]]:
    """Files by the first word in their name, else the last folder on their way, that means a split; else "all"."""
    return grouped((_split_of(file, root), file) for file in files)


def _split_of(file: Path, root: Path) -> str:
    for part in (file.name, *reversed(file.relative_to(root).parts[:-1])):
        words = re.split(r"[^a-zA-Z0-9]+", part)
        if (found := next((word for word in words if canonical_split(word)), None)) is not None:
            return found
    return "all"


def missing_shards(files: Sequence[Path], root: Path) -> list[tuple[str, str]]:
    """Which files are missing of those that are numbered as `-00000-of-00004`: where, and what is missing."""
    groups: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for file in files:
        if (match := _NUMBERED.match(file.name)) is not None:
            groups[file.parent, match[1], int(match[3])].add(int(match[2]))
    missing = []
    for (folder, name, total), numbers in sorted(groups.items()):
        first = 1 if 0 not in numbers and total in numbers else 0
        lost = [number for number in range(first, first + total) if number not in numbers] if total < 1e5 else []
        if lost:
            listed = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
            where = (folder / name).relative_to(root).as_posix()
            missing.append((where, f"{len(numbers)} of {total} files are here; missing are the numbers {listed}"))
    return missing


def copy_about(root: Path, folder: Path) -> None:
    """Copies the files that tell of a dataset as a whole."""
    for name in _ABOUT:
        if (root / name).is_file():
            shutil.copyfile(root / name, folder / name)


def write_image(data: bytes, row: int, named: str, folder: Path, budget: Budget) -> str:
    """Writes the bytes of an image as they are; returns its name in the folder, which has the suffix of its kind.

    Args:
        data: The bytes.
        row: Its number, from 1.
        named: The name that the row gives, for its suffix where the bytes are of no known kind.
        folder: Where it is written.
        budget: Counts it.
    """
    suffix = next((suffix for magic, suffix in _KINDS if data.startswith(magic)), None)
    if suffix is None and data[4:8] == b"ftyp":
        suffix = ".avif" if b"avi" in data[8:32] else ".heic"
    if suffix is None:
        suffix = Path(named).suffix.lower() if is_image(named) else ".jpg"
    name = f"{row:06d}{suffix}"
    write_file(folder / name, data, budget)
    return name


def link_image(named: str, row: int, bases: Sequence[Path], root: Path, folder: Path) -> str:
    """Makes a link to an image that lies beside the container, and returns its name in the folder.

    The name stays as it is where there is no such image inside of `root`; reading it then is an issue.
    """
    for base in bases:
        target = Path(os.path.normpath(base / named.replace("\\", "/")))
        if target.is_relative_to(root) and is_image(target.name) and there(target, Path.is_file):
            name = f"{row:06d}{target.suffix}"
            try:
                (folder / name).symlink_to(target)
            except OSError:
                shutil.copyfile(target, folder / name)
            return name
    return named


def copied_splits(splits: Mapping[str, Sequence[Path]], root: Path, copy: Path) -> dict[str, tuple[Path, ...]]:
    """The folders of the copy by split."""
    return {split: tuple(copy / file.relative_to(root) for file in files) for split, files in splits.items()}


def every_shard(splits: Mapping[str, Sequence[Path]]) -> Iterator[Path]:
    """The files of all splits, each once."""
    yield from dict.fromkeys(file for files in splits.values() for file in files)
