"""What a detector sees in datasets: names that they do not annotate, and boxes that it calls by such a name."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch

from metr.boxes import pairwise_iou
from metr.data.datasets_file import DatasetSource
from metr.data.images import read_annotated
from metr.data.records import ImageRecord
from metr.errors import DataError
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.inference.predictor import Predictor
from metr.inspection.duplicates import Say
from metr.inspection.facts import spread
from metr.inspection.similar_names import InspectionConfig, SimilarNames, joint_vocabulary
from metr.structures import Detections

if TYPE_CHECKING:
    from metr.model import METR

# Overlap with every annotated box below which a detection is an object of its own, and from which it is that object.
_APART, _SAME = 0.3, 0.5
# A name is suggested for boxes of which the detector calls this share so, and at least so many.
_CALLED, _FEWEST_CALLED = 0.3, 5
# Objects of a name that must be found where it is annotated, before the detector is believed elsewhere.
_FEWEST_FOUND = 3


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A name that a dataset does not annotate, seen where none of its boxes is, in `images` of `of` images.

    `example` is the image in which it is seen best, relative to the dataset's folder.
    """

    dataset: str
    name: str
    images: int
    of: int
    example: Path


@dataclass(frozen=True, kw_only=True)
class Called:
    """Boxes of a dataset's `name` that the detector calls by the unannotated name `called`: `boxes` of `of`."""

    dataset: str
    name: str
    called: str
    boxes: int
    of: int


@dataclass(frozen=True, kw_only=True)
class Sights:
    """All that the detector `model` saw.

    `images` were looked at in each dataset. The `unjudged` names are hardly found even where they are annotated, so
    not seeing them elsewhere tells nothing.
    """

    model: str
    sightings: tuple[Sighting, ...]
    called: tuple[Called, ...]
    images: Mapping[str, int]
    unjudged: tuple[str, ...] = ()


def sights_of(
    model: "METR", sources: Sequence[DatasetSource], config: InspectionConfig, shown_as: str, say: Say
) -> Sights:
    """Looks for all names of all datasets in some images of each.

    Args:
        model: The detector.
        sources: The datasets.
        config: How many images, and the least score.
        shown_as: How the detector is called in messages.
        say: Told of the progress.
    """
    vocabulary = joint_vocabulary(sources)
    inference = InferenceConfig(batch_size=config.batch_size, postprocess=PostprocessConfig.to_show(config.threshold))
    predictor = Predictor(model.network, model.embed(vocabulary), vocabulary.names, model.resize, inference)
    looks = []
    for source in sources:
        look = Look(source.name, source.categories)
        for number, (record, found) in enumerate(_detected(predictor, source, config.images)):
            look.add(replace(record, path=record.path.relative_to(source.root)), found)
            say(f"{source.name}: the detector has seen {number + 1} of {config.images} images")
        looks.append(look)
    least = sureness(looks)
    return Sights(
        model=shown_as,
        sightings=tuple(one for look in looks for one in look.sightings(least)),
        called=tuple(one for look in looks for one in look.called(least)),
        images={look.dataset: look.images for look in looks},
        unjudged=tuple(name for name in vocabulary.names if name not in least),
    )


def near_by_sight(sights: Sights, owners: Mapping[str, Sequence[str]]) -> tuple[SimilarNames, ...]:
    """Names that the detector gives to boxes of another name, often enough to be perhaps the same."""
    return tuple(
        SimilarNames(
            names=(one.name, one.called),
            owners=((one.dataset,), tuple(owners[one.called])),
            kind="sight",
            why=f"{one.boxes} of {one.of} boxes are seen as {one.called}",
            strength=one.boxes / one.of,
        )
        for one in sights.called
        if one.boxes >= _FEWEST_CALLED and one.boxes / one.of >= _CALLED
    )


class Look:
    """Gathers what is seen in the images of one dataset.

    Args:
        dataset: Its name.
        categories: Its names; all others are unannotated.

    Attributes:
        images: How many were taken.
        found: The scores of detections that lie on a box of their own name, by name.
    """

    def __init__(self, dataset: str, categories: tuple[str, ...]) -> None:
        self.dataset, self.categories, self.images = dataset, categories, 0
        self.found: defaultdict[str, list[float]] = defaultdict(list)
        self._apart: list[tuple[str, float, Path]] = []
        self._upon: list[tuple[str, float, str]] = []
        self._boxes: Counter[str] = Counter()

    def add(self, record: ImageRecord, detections: Detections) -> None:
        """Takes the detections in one image, in the pixels of its record, one name a place."""
        self.images += 1
        own = [self.categories[label] for label in record.labels]
        self._boxes.update(name for name, ignored in zip(own, record.ignore, strict=True) if not ignored)
        overlaps = pairwise_iou(detections.boxes, torch.from_numpy(record.boxes).to(detections.boxes))
        taken: set[int] = set()
        for row, (label, score) in enumerate(zip(detections.labels.tolist(), detections.scores.tolist(), strict=True)):
            name = detections.names[label]
            box = int(overlaps[row].argmax()) if own else -1
            overlap = float(overlaps[row, box]) if own else 0.0
            if overlap < _APART and name not in self.categories:
                self._apart.append((name, score, record.path))
            elif overlap >= _SAME and box not in taken and not record.ignore[box]:
                taken.add(box)
                if name == own[box]:
                    self.found[name].append(score)
                elif name not in self.categories:
                    self._upon.append((name, score, own[box]))

    def sightings(self, least: Mapping[str, float]) -> list[Sighting]:
        """The unannotated names seen apart from the dataset's boxes with a score of at least `least[name]`."""
        seen: defaultdict[str, dict[Path, float]] = defaultdict(dict)
        for name, score, path in self._apart:
            if score >= least.get(name, math.inf):
                seen[name][path] = max(score, seen[name].get(path, 0.0))
        most = sorted(seen.items(), key=lambda item: -len(item[1]))
        return [
            Sighting(
                dataset=self.dataset,
                name=name,
                images=len(scores),
                of=self.images,
                example=max(scores, key=scores.__getitem__),
            )
            for name, scores in most
        ]

    def called(self, least: Mapping[str, float]) -> list[Called]:
        """The unannotated names that the dataset's boxes were given with a score of at least `least[name]`."""
        sure = Counter((own, name) for name, score, own in self._upon if score >= least.get(name, math.inf))
        return [
            Called(dataset=self.dataset, name=own, called=name, boxes=count, of=self._boxes[own])
            for (own, name), count in sure.most_common()
        ]


def sureness(looks: Sequence[Look]) -> dict[str, float]:
    """The median score with which the detector finds each name where it is annotated.

    Detections below it are not counted elsewhere: a detector may see much where it was never told what is not there.
    A name that is hardly found where it is annotated has none.
    """
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for look in looks:
        for name, found in look.found.items():
            scores[name] += found
    return {name: median(found) for name, found in scores.items() if len(found) >= _FEWEST_FOUND}


def _detected(predictor: Predictor, source: DatasetSource, most: int) -> Iterator[tuple[ImageRecord, Detections]]:
    """Records of some images with what is found in them; unreadable images are left out."""
    records: list[ImageRecord] = []

    def images() -> Iterator[np.ndarray]:
        for _, record in spread(source, most):
            try:
                image, fitted, _ = read_annotated(record)
            except DataError:
                continue
            records.append(fitted)
            yield image

    for number, prediction in enumerate(predictor.detect_many(images())):
        if prediction.detections is not None:
            yield records[number], prediction.detections
