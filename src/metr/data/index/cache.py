"""Where indices are kept, and when they are built again.

A dataset's indices lie in a folder whose name is a digest of what they are built from. Beside them lies a manifest of
the files and directories that the reader touched. While these are unchanged, the folder is used. Otherwise a new one is
built and then renamed in one step, so that no process sees half an index. If several processes need the same index, one
builds it and the others wait; on a file system without locks all of them build it.
"""

import atexit
import contextlib
import hashlib
import logging
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from metr.data.formats.base import Reader
from metr.data.formats.files import signature
from metr.data.index.annotation_index import VERSION as INDEX_VERSION
from metr.data.index.annotation_index import AnnotationIndex, LabelMap
from metr.data.index.build import MANIFEST, build_index
from metr.data.index.manifest import Manifest, checksum_of, encodable, shown_name, unpacked_name
from metr.data.records import DataIssue, SplitPlan
from metr.errors import DataError
from metr.text.cache import cache_root

logger = logging.getLogger(__name__)

# Raised whenever a reader's result for the same files changes.
READER_VERSION = 14

# Outdated indices are removed after this time, in seconds: other processes may still use them.
_KEPT = 7 * 24 * 3600

_LOCK = ".lock"
_BUILDING = ".building-"


@dataclass(frozen=True, kw_only=True)
class StoredDataset:
    """A dataset's index folder with its manifest; `fresh` if it was built just now."""

    folder: Path
    manifest: Manifest
    fresh: bool = False

    def issues(self, split: str) -> tuple[DataIssue, ...]:
        """The first issues of each kind of one split; of the dataset as a whole for ""."""
        first = self.manifest.issues[split].first if split in self.manifest.issues else []
        return tuple(DataIssue(kind=kind, where=where, detail=detail) for kind, where, detail in first)

    def open(self, split: str, *, name: str, format_name: str, labels: LabelMap) -> AnnotationIndex:
        """The annotations of one split."""
        path = self.folder / f"{split}.arrow"
        return AnnotationIndex(path, labels, name=name, split=split, format=format_name, issues=self.issues(split))


def default_cache() -> Path:
    """The folder of indices: `index` in the folder that METR_CACHE names, else in `~/.cache/metr`."""
    return cache_root() / "index"


def stored(reader: Reader, plan: SplitPlan, cache: Path) -> StoredDataset:
    """The index of a dataset, built unless there is one that fits.

    Raises:
        DataError: an annotation file cannot be read, or there is no image at all.
    """
    if odd := next((split for split in plan.parts if not encodable(split)), None):
        hint = "rename the file or folder that it is named after"
        raise DataError(f"a split whose name is not UTF-8: {shown_name(odd)}", where=reader.root, hint=hint)
    place = cache / _key(reader, plan)
    if (found := _found(reader, place)) is not None:
        return found
    try:
        place.mkdir(parents=True, exist_ok=True)
        with locked(place):
            return _found(reader, place) or _build(reader, plan, place)
    except OSError as error:
        temporary = Path(tempfile.mkdtemp(prefix="metr-index-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        logger.warning("%s cannot be written (%s): the index goes to %s until the end", cache, error, temporary)
    try:
        return _build(reader, plan, temporary)
    except OSError as error:
        hint = "free some disk space, or name another folder in METR_CACHE"
        raise DataError(f"the index of {reader.root} cannot be written: {error}", where=temporary, hint=hint) from None


def locked(place: Path) -> contextlib.AbstractContextManager[object]:
    """Waits until no other process builds in a folder; the lock ends with the block, or with its process."""
    lock = FileLock(place / _LOCK)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        logger.info("another process builds the index in %s; waiting for it", place)
        return lock.acquire()


def _found(reader: Reader, place: Path) -> StoredDataset | None:
    """The index among those in `place` that fits the dataset as it is now."""
    for folder in sorted(place.glob("[!.]*/")):
        manifest = _valid_manifest(folder, reader.root)
        if manifest is not None:
            return StoredDataset(folder=folder, manifest=manifest)
    return None


def _key(reader: Reader, plan: SplitPlan) -> str:
    """A digest of everything that an index is built from, except for the state of the files."""
    sources = sorted((split, [str(path) for path in paths]) for split, paths in reader.splits.items())
    parts = sorted((split, list(own)) for split, own in plan.parts.items())
    origin = [INDEX_VERSION, READER_VERSION, reader.format, str(reader.root), sources, parts, plan.seeded]
    origin += reader.options_used
    return hashlib.sha256(ascii(origin).encode()).hexdigest()[:24]


def _valid_manifest(folder: Path, root: Path) -> Manifest | None:
    """The manifest of a folder, if everything that it was built from is unchanged."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        manifest = None
    if manifest is None or manifest != manifest.sealed():
        _warn_of_damage(folder, MANIFEST)
        return None
    if any(signature(root / unpacked_name(path)) != then for path, then in manifest.touched.items()):
        return None
    for split in manifest.splits:
        file = folder / f"{split}.arrow"
        if not file.is_file() or checksum_of(file) != manifest.checksums.get(split):
            _warn_of_damage(folder, file.name)
            return None
    return manifest


def _warn_of_damage(folder: Path, file: str) -> None:
    """Says that an index is not as it was written; the caller builds it again."""
    logger.warning("the index in %s is damaged (%s): it is built again", folder, file)


def _build(reader: Reader, plan: SplitPlan, place: Path) -> StoredDataset:
    """Reads a dataset into a new folder in `place`, then moves it to its name."""
    for left in place.glob(f"{_BUILDING}*"):  # of a process that was killed: whoever builds holds the lock
        shutil.rmtree(left, ignore_errors=True)
    building = place / f"{_BUILDING}{secrets.token_hex(8)}"
    building.mkdir()
    try:
        manifest = build_index(reader, plan, building)
        state = hashlib.sha256(msgspec.json.encode(sorted(manifest.touched.items()))).hexdigest()[:24]
        folder = place / state
        _remove_outdated(place)
        try:
            building.rename(folder)
        except OSError:
            # Another process was faster, and its index is the same; or a damaged one is in the way.
            if _valid_manifest(folder, reader.root) is None:
                shutil.rmtree(folder)
                building.rename(folder)
        return StoredDataset(folder=folder, manifest=manifest, fresh=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_outdated(place: Path) -> None:
    for folder in place.iterdir():
        with contextlib.suppress(OSError):  # another process may remove it too
            if folder.is_dir() and time.time() - folder.stat().st_mtime > _KEPT:
                shutil.rmtree(folder)
