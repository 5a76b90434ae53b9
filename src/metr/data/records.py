"""Records, one for each image, which every annotation format is read into; and the names of splits."""

import hashlib
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from metr.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)

TRAIN, VAL, TEST = "train", "val", "test"
ALL = "all"  # the three as one

# In `unknown`: the category of a dropped box has no name here. It may be any, so nothing is known to be absent.
UNNAMED = -1

# The fraction of images that a seeded split holds out for evaluation.
HELD_OUT = 0.2

_WORDS = {
    "train": TRAIN,
    "training": TRAIN,
    "trainval": TRAIN,
    "val": VAL,
    "valid": VAL,
    "validate": VAL,
    "validation": VAL,
    "eval": VAL,
    "evaluation": VAL,
    "dev": VAL,
    "test": TEST,
    "testing": TEST,
}


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """Which of a dataset's own splits make up each of METR's splits.

    `seeded` says that a part of "train" has to be held out as "val": the dataset has none of its own. Its test split
    does not take the place of one: the best checkpoint would be chosen on the images that are to judge it.
    """

    parts: Mapping[str, tuple[str, ...]]
    seeded: bool = False

    def together(self) -> "SplitPlan":
        """Train, val and test as one split, "all"."""
        return SplitPlan(parts={ALL: tuple(dict.fromkeys(own for part in self.parts.values() for own in part))})


def canonical_split(name: str) -> str | None:
    """The split that the name of a folder or annotation file means: "train", "val" or "test"; None where it means none.

    The first word that names a split decides: `valid`, `val2017`, `instances_train2017`, `test_labels`, `Training`.
    """
    for word in re.split(r"[^a-z0-9]+", name.lower()):
        found = _WORDS.get(word.rstrip("0123456789"))
        if found is not None:
            return found
    return None


def plan_splits(own: Sequence[str], wanted: Mapping[str, Sequence[str]] | None, where: object) -> SplitPlan:
    """Orders a dataset's `own` splits into METR's, or takes them as the user `wanted` them.

    A user who names a train split alone wants all of it for training: then nothing is held out.

    Raises:
        DataError: a wanted split is not there.
    """
    if wanted is not None:
        chosen = {split: _chosen(names, own, where) for split, names in wanted.items()}
        return SplitPlan(parts=chosen, seeded={TRAIN, TEST} <= chosen.keys() and VAL not in chosen)
    groups: dict[str, list[str]] = {}
    for name in sorted(own):
        groups.setdefault(canonical_split(name) or name, []).append(name)
    parts = {split: (_preferred(split, names, where),) for split, names in groups.items()}
    if not parts.keys() & {TRAIN, VAL, TEST}:
        return SplitPlan(parts={TRAIN: tuple(sorted(own))}, seeded=True)
    return SplitPlan(parts=_in_order(parts), seeded=TRAIN in parts and VAL not in parts)


def hold_out(keys: Sequence[str], *, seed: int = 0, fraction: float = HELD_OUT) -> Bool[np.ndarray, "n"]:
    """True for the images of a seeded split that are held out.

    An image's place in the order depends on its key and the seed alone, so adding images hardly changes the others.
    Entries with one key, such as the captions of an image, stay together. At least one of two or more keys is held out.
    """
    different = sorted(set(keys))
    order = seeded_order(different, seed=seed)[: max(1, round(fraction * len(different)))]
    held = {different[place] for place in order.tolist()} if len(different) > 1 else set()
    return np.fromiter((key in held for key in keys), dtype=bool, count=len(keys))


def seeded_order(keys: Sequence[str], *, seed: int = 0) -> Int[np.ndarray, "n"]:
    """The numbers of the images in an order that is decided by each one's key and the seed alone."""
    digests = [hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest() for key in keys]
    return np.argsort(np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64), kind="stable")


def _chosen(names: Sequence[str], own: Sequence[str], where: object) -> tuple[str, ...]:
    """The own splits that a user names, by their own name or by METR's."""
    chosen = []
    for name in names:
        match = [split for split in own if split == name] or [split for split in own if canonical_split(split) == name]
        if not match:
            raise DataError(f"no split {name!r} in this dataset", where=where, hint=did_you_mean(name, own))
        chosen.append(match[0])
    return tuple(chosen)


def _preferred(split: str, names: Sequence[str], where: object) -> str:
    """The one of several own splits that is taken: the one of METR's name, else the last, which is the newest year."""
    taken = max(names, key=lambda name: (name == split, name))
    others = ", ".join(repr(name) for name in names if name != taken)
    if others:
        logger.warning(
            "%s: %r is taken as the %s split, not %s; `splits` can say otherwise", where, taken, split, others
        )
    return taken


def _in_order(parts: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    first = [split for split in (TRAIN, VAL, TEST) if split in parts]
    return {split: parts[split] for split in [*first, *sorted(parts.keys() - set(first))]}


ReadableBytes = io.BufferedReader | io.BytesIO
"""The bytes of an image to read: of a file, or in memory."""


@runtime_checkable
class ImageBytes(Protocol):
    """Where the bytes of an image are that is no file of its own, such as a part of a shard."""

    @property
    def size(self) -> int:
        """How many bytes there are."""
        ...

    def open(self) -> ReadableBytes:
        """The bytes, to be read from the first on.

        Raises:
            StoreError: they cannot be reached.
        """
        ...


@dataclass(frozen=True)
class InMemoryBytes:
    """The bytes of an image that are held in memory, as `ImageBytes`."""

    data: bytes

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return len(self.data)

    def open(self) -> io.BytesIO:
        """The bytes, to be read from the first on."""
        return io.BytesIO(self.data)


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """The annotations of one image.

    `boxes` are xyxy in pixels, inside the image, never degenerate (faulty ones are dropped and listed as `DataIssue`).
    `labels` are indices of the dataset's categories. `areas` are in square pixels (COCO's own where the file gives
    them: that of the polygon). `ignore` marks crowds and group-of boxes. `annotated` lists the categories that are
    annotated exhaustively in this image; None means all of the dataset's. `unknown` are those of boxes that were
    dropped while the dataset was read (`UNNAMED`: perhaps any); the index removes them from `annotated` and leaves this
    empty. `source` is where the bytes of the image are; None: in the file at `path`, which else is a name alone.
    `scores` are those of boxes that a detector found, NaN for the others; None: no box is a detector's.
    """

    image_id: int | str
    path: Path
    width: int
    height: int
    boxes: Float[np.ndarray, "m 4"]
    labels: Int[np.ndarray, "m"]
    areas: Float[np.ndarray, "m"]
    ignore: Bool[np.ndarray, "m"]
    annotated: tuple[int, ...] | None = None
    unknown: tuple[int, ...] = ()
    source: ImageBytes | None = None
    scores: Float[np.ndarray, "m"] | None = None


@dataclass(frozen=True, kw_only=True)
class DataIssue:
    """Something wrong in a dataset that did not stop the reader.

    `kind` is one of a few words that can be counted ("degenerate box", "missing image", ...); `where` names file and
    line, image or key; `detail` says what was found.
    """

    kind: str
    where: str
    detail: str = ""


# Kinds of issues by which a box, or a whole image, is lost.
_LOST_BOXES = frozenset(
    {"degenerate box", "box outside", "unreadable box", "unknown category", "unreadable label", "unknown image"}
)
_LOST_IMAGES = frozenset(
    {"missing image", "ambiguous image", "unreadable image", "unreadable file name", "path outside"}
    | {"missing annotation", "shared annotation", "duplicate image id", "damaged shard"}
)
_LOST_EITHER = "unreadable annotation"


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """What of a split was lost while it was read: the numbers of images and of boxes by kind of issue."""

    images: Mapping[str, int] = field(default_factory=dict)
    boxes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, counts: Mapping[str, int], *, of_images: bool) -> "Dropped":
        """What was lost by issues of these numbers; `of_images`: unreadable annotations are those of whole images."""
        images = {kind: count for kind, count in counts.items() if kind in _LOST_IMAGES}
        boxes = {kind: count for kind, count in counts.items() if kind in _LOST_BOXES}
        if count := counts.get(_LOST_EITHER):
            (images if of_images else boxes)[_LOST_EITHER] = count
        return cls(images=images, boxes=boxes)


@runtime_checkable
class Annotations(Protocol):
    """One split of one dataset, as training and evaluation see it: a sequence of records."""

    @property
    def name(self) -> str:
        """The dataset's name."""
        ...

    @property
    def split(self) -> str:
        """Which part of the dataset this is."""
        ...

    @property
    def format(self) -> str:
        """The format of the files."""
        ...

    @property
    def categories(self) -> tuple[str, ...]:
        """Names, in the order of `ImageRecord.labels`."""
        ...

    @property
    def issues(self) -> Sequence[DataIssue]:
        """What was found wrong while the dataset was read."""
        ...

    def __len__(self) -> int:
        """The number of images."""
        ...

    def __getitem__(self, index: int) -> ImageRecord:
        """The annotations of image `index`."""
        ...


@runtime_checkable
class ColumnarAnnotations(Annotations, Protocol):
    """Annotations whose columns can be read without making a record of each image."""

    def objects(self) -> Iterator[tuple[Int[np.ndarray, "p"], Int[np.ndarray, "p"]]]:
        """Image and category of every object, in pieces, in the order of the images; without ignored boxes."""
        ...


@runtime_checkable
class PartlyRead(Protocol):
    """Annotations that say which names of their files are not read: of these nothing is known in any image."""

    @property
    def unknown_names(self) -> tuple[str, ...]:
        """The names that a user dropped or ignores."""
        ...


@dataclass(frozen=True, kw_only=True)
class InMemoryAnnotations:
    """Annotations that are in memory: of small datasets, of tests, and of evaluation."""

    name: str
    split: str
    categories: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    format: str = "memory"
    issues: tuple[DataIssue, ...] = field(default=())
    unknown_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ImageRecord:
        """The annotations of image `index`."""
        return self.records[index]
