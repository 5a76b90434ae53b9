"""Records: what every annotation format is read into, one for each image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """The annotations of one image.

    `boxes` are xyxy in pixels, inside the image, never degenerate (faulty ones are dropped and listed as `DataIssue`).
    `labels` are indices of the dataset's categories. `areas` are in square pixels (COCO's own where the file gives
    them: that of the polygon). `ignore` marks crowds and group-of boxes. `annotated` lists the categories that are
    annotated exhaustively in this image; None means all of the dataset's. `unknown` are those of boxes that were
    dropped while the dataset was read; the index removes them from `annotated` and leaves this empty.
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


@dataclass(frozen=True, kw_only=True)
class DataIssue:
    """Something wrong in a dataset that did not stop the reader.

    `kind` is one of a few words that can be counted ("degenerate box", "missing image", ...); `where` names file and
    line, image or key; `detail` says what was found.
    """

    kind: str
    where: str
    detail: str = ""


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
        """What the files are written in."""
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


@dataclass(frozen=True, kw_only=True)
class InMemoryAnnotations:
    """Annotations that are in memory: of small datasets, of tests, and of evaluation."""

    name: str
    split: str
    categories: tuple[str, ...]
    records: tuple[ImageRecord, ...]
    format: str = "memory"
    issues: tuple[DataIssue, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ImageRecord:
        """The annotations of image `index`."""
        return self.records[index]
