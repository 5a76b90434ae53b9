"""Facts about one dataset: counts and sizes of its images and boxes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from metr.data.datasets_file import DatasetSource
from metr.data.index.annotation_index import AnnotationIndex
from metr.data.records import DataIssue, ImageRecord
from metr.text.similar_names import by_head, ending_in

# Where COCO's small objects end, and its medium ones, in square pixels.
_SMALL, _MEDIUM = 32**2, 96**2
# A name with at most this fraction of the boxes of the names that end in it may be a labelling mistake.
_STRAY = 0.01


@dataclass(frozen=True, kw_only=True)
class BoxSizes:
    """Sizes of boxes: `side` is the median of sqrt(box area / image area).

    `small`, `medium` and `large` are fractions of the boxes, by COCO's areas (up to 32 x 32 and 96 x 96 pixels).
    """

    side: float
    small: float
    medium: float
    large: float


@dataclass(frozen=True, kw_only=True)
class NameFacts:
    """One category of a dataset.

    `boxes` counts each split, without ignored boxes. The rest is measured in the inspected images: `side` as in
    `BoxSizes` (None without boxes), and `annotated`, the fraction of the images in which the category is annotated
    exhaustively.
    """

    name: str
    boxes: Mapping[str, int]
    side: float | None
    annotated: float

    @property
    def count(self) -> int:
        """The boxes of all splits."""
        return sum(self.boxes.values())


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """One dataset, all splits together.

    `images` counts each split; `looked_at` of them were measured. A row (image, category) of `shown` says that a
    measured image shows a category. `unread` are names of the files that a datasets file leaves out.
    """

    name: str
    format: str
    images: Mapping[str, int]
    empty: int
    ignored: int
    names: Mapping[str, NameFacts]
    sizes: BoxSizes | None
    looked_at: int
    shown: Int[np.ndarray, "n 2"]
    unread: tuple[str, ...] = ()

    @property
    def boxes(self) -> int:
        """The boxes of all categories and splits, without ignored ones."""
        return sum(name.count for name in self.names.values())


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Boxes of the images that were looked at, one row a box that is not ignored."""

    images: Int[np.ndarray, "m"]
    labels: Int[np.ndarray, "m"]
    sides: Float[np.ndarray, "m"]
    areas: Float[np.ndarray, "m"]
    annotated: Float[np.ndarray, "c"]
    looked_at: int


def facts_of(source: DatasetSource, most: int) -> DatasetFacts:
    """Counts a dataset, and measures the boxes of at most so many of its images."""
    counts = {split: annotations.counts() for split, annotations in source.splits.items()}
    measured = _measured(source, most)
    sides = _medians(measured.sides, measured, len(source.categories))
    names = {
        name: NameFacts(
            name=name,
            boxes={split: int(count.boxes[label]) for split, count in counts.items()},
            side=sides[label],
            annotated=float(measured.annotated[label]),
        )
        for label, name in enumerate(source.categories)
    }
    return DatasetFacts(
        name=source.name,
        format=source.format,
        images={split: count.images for split, count in counts.items()},
        empty=sum(count.empty for count in counts.values()),
        ignored=sum(count.ignored_boxes for count in counts.values()),
        names=names,
        sizes=_sizes(measured),
        looked_at=measured.looked_at,
        shown=np.unique(np.stack([measured.images, measured.labels], axis=1), axis=0),
        unread=tuple(dict.fromkeys(name for split in source.splits.values() for name in split.unknown_names)),
    )


def strays_of(facts: DatasetFacts) -> list[DataIssue]:
    """Names with very few boxes beside names of the same dataset that end in them: `bishop` and `white-bishop`."""
    heads, found = by_head(facts.names), []
    for name in facts.names.values():
        others = ending_in(name.name, heads)
        count = sum(facts.names[other].count for other in others)
        if 0 < name.count <= _STRAY * count:
            detail = f"{name.count} x {name.name!r}, but {count:,} x {', '.join(others)}: labelled by mistake?"
            found.append(DataIssue(kind="stray name", where="categories", detail=detail))
    return found


def without_boxes(facts: DatasetFacts) -> list[DataIssue]:
    """Categories of which no split has a box, so that they can be neither learned nor measured."""
    todo = "label it, take it out of the annotation files, or use `renames` in a datasets file if it is another name"
    return [
        DataIssue(kind="category without a box", where="categories", detail=f"{name.name!r}: {todo}")
        for name in facts.names.values()
        if not name.count
    ]


def spread(source: DatasetSource, most: int) -> Iterator[tuple[str, ImageRecord]]:
    """Split and record of images of all splits: every one, or `most` evenly spaced ones where there are more."""
    return (record_at(source, int(place)) for place in spread_places(source, most))


def spread_places(source: DatasetSource, most: int) -> Int[np.ndarray, "n"]:
    """The places (see `record_at`) of all images of a dataset, or of `most` evenly spaced ones."""
    images = sum(len(annotations) for annotations in source.splits.values())
    if images <= most:
        return np.arange(images)
    return np.unique(np.linspace(0, images - 1, most).round().astype(np.int64))


def record_at(source: DatasetSource, place: int) -> tuple[str, ImageRecord]:
    """Split and record of the image at a place, counted from 0 through all splits in their order."""
    splits: list[tuple[str, AnnotationIndex]] = list(source.splits.items())
    starts = np.cumsum([0, *(len(annotations) for _, annotations in splits)])
    number = int(np.searchsorted(starts, place, side="right")) - 1
    split, annotations = splits[number]
    return split, annotations[place - int(starts[number])]


def _measured(source: DatasetSource, most: int) -> _Measured:
    columns: list[tuple[np.ndarray, ...]] = []
    annotated = np.zeros(len(source.categories))
    looked_at = 0
    for number, (_, record) in enumerate(spread(source, most)):
        looked_at = number + 1
        annotated[slice(None) if record.annotated is None else list(record.annotated)] += 1
        keep = ~record.ignore & (record.labels >= 0)
        width, height = (record.boxes[keep, 2:] - record.boxes[keep, :2]).astype(np.float64).T
        side = np.sqrt(width * height / (record.width * record.height))
        images = np.full(len(side), number)
        columns.append((images, record.labels[keep], side, record.areas[keep].astype(np.float64)))
    images, labels, sides, areas = (np.concatenate(column) for column in zip(*columns, strict=True))
    return _Measured(
        images=images,
        labels=labels,
        sides=sides,
        areas=areas,
        annotated=annotated / looked_at,
        looked_at=looked_at,
    )


def _medians(values: Float[np.ndarray, "m"], measured: _Measured, categories: int) -> list[float | None]:
    """The median of the values of each category; None for one without boxes."""
    order = np.argsort(measured.labels, kind="stable")
    ends = np.cumsum(np.bincount(measured.labels, minlength=categories))
    groups = np.split(values[order], ends[:-1])
    return [float(np.median(group)) if len(group) else None for group in groups]


def _sizes(measured: _Measured) -> BoxSizes | None:
    if not len(measured.areas):
        return None
    small, medium = (float((measured.areas < limit).mean()) for limit in (_SMALL, _MEDIUM))
    return BoxSizes(side=float(np.median(measured.sides)), small=small, medium=medium - small, large=1 - medium)
