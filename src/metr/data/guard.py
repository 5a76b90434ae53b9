"""The guard against training or measuring on nothing: splits without a box, or of which most was lost while reading."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from metr.data.datasets_file import DatasetSource
from metr.data.records import TRAIN, VAL, Annotations, DataIssue, Dropped
from metr.data.sampling import objects_of
from metr.errors import DataError, counted

# A split of which more than this fraction was lost is not used, unless that is asked for.
_MOST = 0.5
# Kinds of issues that a message names.
_KINDS = 3
_LONGEST = 160
# What to do about the main kinds of issues.
_TO_DO = {
    "unknown category": "declare the names of all classes where the dataset declares them",
    "missing image": "put the images where the annotations say",
    "path outside": "put the images into the dataset's folder",
    "missing annotation": "put the annotation files where the lists say",
    "no label files": "put the text files into `labels`, beside `images`",
    "box outside": "look whether the coordinates are pixels or shares of the image, as the format wants them",
}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Count:
    """How many boxes or images of a split there are, and how many were lost, by the kind of issue."""

    kept: int
    lost: Mapping[str, int]

    @property
    def mostly_lost(self) -> bool:
        """Whether more were lost than the limit allows."""
        lost = sum(self.lost.values())
        return lost > _MOST * (self.kept + lost)

    def told(self, what: str) -> str:
        """How many of how many were lost, and by which kinds of issues."""
        lost = sum(self.lost.values())
        kinds = sorted(self.lost.items(), key=lambda item: -item[1])[:_KINDS]
        listed = ", ".join(f"{count:,} x {kind}" for kind, count in kinds)
        return f"{lost:,} of {self.kept + lost:,} {what} were lost while reading ({listed})"


def faults_of(source: DatasetSource, split: str) -> list[DataIssue]:
    """Why a split of a dataset is not fit to be trained or evaluated on; nothing where it is.

    A val split that was held out of train is judged with train. Then "val" is a split of its own that came to nothing.
    """
    parts: tuple[str, ...] = (split,)
    if source.held_out and split in {TRAIN, VAL}:
        parts = (TRAIN, VAL) if split == TRAIN else ()
    found = _faults(source, parts, source.dropped.get(split))
    return [DataIssue(kind=kind, where=split, detail=detail) for kind, detail in found]


def _faults(source: DatasetSource, parts: Iterable[str], dropped: Dropped | None) -> list[tuple[str, str]]:
    counts = [source.splits[part].counts() for part in parts if part in source.splits]
    dropped = dropped or Dropped()
    images = _Count(kept=sum(count.images for count in counts), lost=dropped.images)
    boxes = _Count(kept=sum(int(count.boxes.sum()) for count in counts), lost=dropped.boxes)
    found = []
    if images.mostly_lost:
        found.append(("most images lost", images.told("images")))
    if boxes.mostly_lost:
        found.append(("most boxes lost", boxes.told("boxes")))
    elif counts and not boxes.kept:
        ignored = sum(count.ignored_boxes for count in counts)
        besides = f" but {ignored:,} to be ignored" if ignored else ""
        found.append(("split without a box", f"no box in {counted(images.kept, 'image')}{besides}"))
    return found


def check_usable(source: DatasetSource, split: str, chosen: Annotations | None = None) -> None:
    """Checks that a split has boxes, and that not most of its boxes or images were lost.

    Args:
        source: The dataset.
        split: The split that is trained or evaluated on.
        chosen: The part of it that is used, where it is not all.

    Raises:
        DataError: it is not fit to be used; the message says why, and what to do.
    """
    faults = [*faults_of(source, split)]
    if source.held_out and split == VAL:
        faults += faults_of(source, TRAIN)
    told = [fault.detail for fault in faults]
    if not told and chosen is not None and not any(len(images) for images, _ in objects_of(chosen)):
        told = [f"no box in the {counted(len(chosen), 'image')} chosen"]
    if not told:
        return
    kinds = _main_kinds(source, faults[0].where if faults else split)
    todo = next(
        (_TO_DO[kind] for kind in kinds if kind in _TO_DO), "mend the files" if kinds else "annotate some of its images"
    )
    first = next((issue for kind in kinds for issue in source.issues if issue.kind == kind), None)
    if first is not None:
        example = " ".join(f"{first.where}: {first.detail}".split())
        told.append(f"such as {example[:_LONGEST]}{'...' if len(example) > _LONGEST else ''}")
    what = f"the {split} split of {source.name!r} is not used: {'; '.join(told)}"
    hint = f"metr inspect {source.config.path} shows all; {todo}; --allow-empty goes on all the same"
    raise DataError(what, where=source.place, hint=hint)


def log_issues(sources: Iterable[DatasetSource]) -> None:
    """Logs how many issues of each kind were found in datasets that are going to be used, and which are the same.

    Not before it is known that they are: an error about a dataset names its own issues.
    """
    names: dict[tuple[str, str], str] = {}
    for source in sources:
        same = os.path.realpath(source.config.path), str(source.config.splits)
        if (first := names.setdefault(same, source.name)) != source.name:
            what = "%s and %s read the same files, %s: they count twice; `weight` in a datasets file takes more of them"
            _logger.warning(what, first, source.name, source.config.path)
        if source.issue_counts:
            listed = ", ".join(f"{count:,} x {kind}" for kind, count in source.issue_counts.items())
            path = source.config.path
            _logger.info("%s: issues in its files: %s; `metr inspect %s` shows where", source.name, listed, path)


def _main_kinds(source: DatasetSource, split: str) -> list[str]:
    """The kinds of issues by which a split lost most, most frequent first; else those that may say why it is empty."""
    dropped = source.dropped.get(split) or Dropped()
    counts = {**dropped.images, **dropped.boxes}
    return sorted(counts, key=lambda kind: -counts[kind]) or [
        kind for kind in ("no label files",) if kind in source.issue_counts
    ]
