"""Where indices are kept, and when they are built again.

A dataset's indices lie in a folder named by what they are built from, with a manifest that lists the files and
directories that reading touched. While those are unchanged the folder is used; else another is built and moved into
place at once, so none sees half an index. Of the processes that find none, one builds and the others wait for it; on a
file system without locks they build at the same time.
"""

import atexit
import contextlib
import hashlib
import logging
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Int

from metr.data.file_names import encodable, packed_name, shown_name, unpacked_name
from metr.data.formats.base import IssueLog, Names, Reader, Reading, records
from metr.data.formats.files import Files, signature
from metr.data.index.annotation_index import VERSION as INDEX_VERSION
from metr.data.index.annotation_index import AnnotationIndex, LabelMap, divide_index, write_index
from metr.data.index.fingerprints import Fingerprints
from metr.data.index.split_merge import joined
from metr.data.records import DataIssue
from metr.data.splits import TRAIN, VAL, SplitPlan, hold_out
from metr.errors import DataError
from metr.text.cache import cache_root

logger = logging.getLogger(__name__)

# Changes whenever a reader gives something else for the same files.
READER_VERSION = 4

# Outdated indices are removed after this time, in seconds: other processes may still use them.
_KEPT = 7 * 24 * 3600

_MANIFEST = "manifest.json"
_LOCK = ".lock"


class _Issues(msgspec.Struct, frozen=True):
    """The issues of one split: how many of each kind, and (kind, where, detail) of the first of each."""

    counts: dict[str, int]
    first: list[tuple[str, str, str]]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What an index folder holds, as `manifest.json` keeps it.

    `names` are the labels of the Arrow files in their order, `counts` their boxes in all splits. `touched` are the
    paths that reading depended on, relative to the dataset's folder (packed as `packed_name` does), with size and time
    of change. Issues under "" are about the dataset as a whole.
    """

    names: list[str]
    parents: dict[str, str]
    counts: list[int]
    splits: list[str]
    issues: dict[str, _Issues]
    touched: dict[str, tuple[int, int]]


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
    """The index of a dataset, built where there is none that fits.

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
        with _locked(place):
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


def _locked(place: Path) -> contextlib.AbstractContextManager[object]:
    """Waits until no other process builds in a folder; the lock ends with the block, or with its process."""
    lock = FileLock(place / _LOCK)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        logger.info("another process builds the index in %s; waiting for it", place)
        return lock.acquire()


def _found(reader: Reader, place: Path) -> StoredDataset | None:
    """The index in a folder of indices that fits the dataset as it is."""
    for folder in sorted(place.glob("[!.]*/")):
        manifest = _valid_manifest(folder, reader.root)
        if manifest is not None:
            return StoredDataset(folder=folder, manifest=manifest)
    return None


def _key(reader: Reader, plan: SplitPlan) -> str:
    """What an index is built from, but for the state of the files."""
    sources = sorted((split, [str(path) for path in paths]) for split, paths in reader.splits.items())
    parts = sorted((split, list(own)) for split, own in plan.parts.items())
    origin = [INDEX_VERSION, READER_VERSION, reader.format, str(reader.root), sources, parts, plan.seeded]
    return hashlib.sha256(ascii(origin).encode()).hexdigest()[:24]


def _valid_manifest(folder: Path, root: Path) -> Manifest | None:
    """The manifest of a folder if all that it was built from is unchanged."""
    try:
        manifest = msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError):
        return None
    if any(signature(root / unpacked_name(path)) != then for path, then in manifest.touched.items()):
        return None
    return manifest if all((folder / f"{split}.arrow").is_file() for split in manifest.splits) else None


def _build(reader: Reader, plan: SplitPlan, place: Path) -> StoredDataset:
    """Reads a dataset into a new folder in `place`, then moves it to its name."""
    building = place / f".building-{secrets.token_hex(8)}"
    building.mkdir()
    try:
        manifest = _write(reader, plan, building)
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


def _write(reader: Reader, plan: SplitPlan, folder: Path) -> Manifest:
    """Writes an Arrow file for each split, and the manifest."""
    files, names, notes, fingerprints = Files(reader.root), Names(), IssueLog(), Fingerprints()
    counts, issues, splits = np.zeros(0, dtype=np.int64), {}, []
    for split, parts in plan.parts.items():
        reading = Reading(files=files, names=names, notes=notes, issues=IssueLog(), fingerprints=fingerprints)
        found = _write_split(reader, parts, reading, folder / f"{split}.arrow")
        counts = np.pad(counts, (0, max(0, len(names) - len(counts))))
        counts[: len(found)] += found
        issues[split] = _summary(reading.issues)
        splits.append(split)
    splits = _hold_out(folder) if plan.seeded else splits
    splits = _without_empty(folder, splits, issues, notes)
    if not splits:
        raise _no_images(reader, issues)
    manifest = Manifest(
        names=list(names),
        parents=names.parents,
        counts=counts.tolist(),
        splits=splits,
        issues={**issues, "": _summary(notes)},
        touched={packed_name(path): state for path, state in {**fingerprints.signatures, **files.touched}.items()},
    )
    (folder / _MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return manifest


def _write_split(reader: Reader, parts: Sequence[str], reading: Reading, path: Path) -> Int[np.ndarray, "c"]:
    """Writes a split, and counts the boxes of each label: one of the dataset's own splits, or several joined."""
    own = [path.with_name(f"{path.stem}.part-{number}") for number in range(len(parts))]
    counts = [
        write_index(target, records(reader, part, reading), root=reader.root)
        for target, part in zip(own, parts, strict=True)
    ]
    indices = [AnnotationIndex(target, LabelMap.identity(())) for target in own]
    if len(own) == 1 and not indices[0].repeated_ids():
        own[0].rename(path)
        return counts[0]
    total = write_index(path, joined(dict(zip(parts, indices, strict=True)), reading.issues), root=reader.root)
    for target in own:
        target.unlink()
    return total


def _hold_out(folder: Path) -> list[str]:
    """Divides the one index of a dataset without a split to evaluate on."""
    whole, train, val = folder / "whole.arrow", folder / f"{TRAIN}.arrow", folder / f"{VAL}.arrow"
    train.rename(whole)
    keys = AnnotationIndex(whole, LabelMap.identity(())).relative_paths()
    divide_index(whole, hold_out(keys), into=(train, val))
    whole.unlink()
    return [TRAIN, VAL]


def _without_empty(folder: Path, splits: list[str], issues: Mapping[str, _Issues], notes: IssueLog) -> list[str]:
    """The splits that have an image; the others are noted."""
    kept = []
    for split in splits:
        if len(AnnotationIndex(folder / f"{split}.arrow", LabelMap.identity(()))):
            kept.append(split)
        else:
            counts = issues[split].counts if split in issues else {}
            found = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
            notes.add("empty split", split, f"no image is left in it ({found or 'none is listed'})")
    return kept


def _no_images(reader: Reader, issues: Mapping[str, _Issues]) -> DataError:
    first = [issue for summary in issues.values() for issue in summary.first]
    what = f"recognised as {reader.format}, but no image is left to read"
    if not first:
        return DataError(what, where=reader.root, hint="put the images into the dataset's folder")
    kind, where, detail = first[0]
    counts = sum(count for summary in issues.values() for count in summary.counts.values())
    hint = "put the images where the annotations say, or check the paths in the annotations"
    return DataError(f"{what}; {counts} issues, the first: {kind} ({where}: {detail})", where=reader.root, hint=hint)


def _summary(log: IssueLog) -> _Issues:
    first = [(issue.kind, shown_name(issue.where), shown_name(issue.detail)) for issue in log.kept]
    return _Issues(counts=dict(log.counts), first=first)
