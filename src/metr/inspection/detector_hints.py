"""Hints from a detector: objects that a dataset does not annotate, and boxes that it gives another name."""

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
from metr.errors import DataError, counted
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.inference.predictor import Predictor
from metr.inspection import InspectionConfig
from metr.inspection.duplicates import Progress
from metr.inspection.facts import spread
from metr.inspection.similar_names import SimilarNames, joint_vocabulary
from metr.structures import Detections

if TYPE_CHECKING:
    from metr.model import METR

# Largest IoU with any annotated box of a new object, and least IoU of an annotated object.
_APART, _SAME = 0.3, 0.5
# Least fraction and number of boxes to which the detector gives another name.
_CALLED, _FEWEST_CALLED = 0.3, 5
# Annotated objects of a name that the detector must find before its detections of it count elsewhere.
_FEWEST_FOUND = 3
# Least fraction of a dataset's boxes that the detector must find before it says what is unlabelled there.
_KNOWN = 0.1


@dataclass(frozen=True, kw_only=True)
class UnlabelledHint:
    """A name that a dataset does not annotate, detected apart from its boxes in `images` of `of` images.

    `example` is the image with the highest score, relative to the dataset's folder.
    """

    dataset: str
    name: str
    images: int
    of: int
    example: Path


@dataclass(frozen=True, kw_only=True)
class RenamedHint:
    """`boxes` of the `of` boxes of a dataset's `name` that the detector gives the name `called`."""

    dataset: str
    name: str
    called: str
    boxes: int
    of: int


@dataclass(frozen=True, kw_only=True)
class DetectorHints:
    """All hints of the detector `model`.

    `images` is the number of images of each dataset that it ran on. It hardly finds the `unreliable` names where they
    are annotated, so they give no hints elsewhere. It hardly finds what the `unknown` datasets annotate: such images
    are strange to it, so that what else it sees in them says nothing.
    """

    model: str
    unlabelled: tuple[UnlabelledHint, ...]
    called: tuple[RenamedHint, ...]
    images: Mapping[str, int]
    unreliable: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def detector_hints_of(
    model: "METR", sources: Sequence[DatasetSource], config: InspectionConfig, detector_name: str, progress: Progress
) -> DetectorHints:
    """Detects all names of all datasets in some images of each.

    Args:
        model: The detector.
        sources: The datasets.
        config: How many images, and the least score.
        detector_name: The name of the detector in messages.
        progress: Called with a line about the progress.
    """
    vocabulary = joint_vocabulary(sources)
    post = PostprocessConfig(score_threshold=config.threshold, nms_across_names=True)
    inference = InferenceConfig(batch_size=config.batch_size, postprocess=post)
    predictor = Predictor(model.network, model.embed(vocabulary), vocabulary.names, model.resize, inference)
    collectors = []
    for source in sources:
        collector = HintCollector(source.name, source.categories)
        whole = min(config.images, sum(map(len, source.splits.values())))
        for number, (record, found) in enumerate(_detected(predictor, source, config.images)):
            collector.add(replace(record, path=record.path.relative_to(source.root)), found)
            progress(f"{source.name}: the detector has seen {number + 1} of {counted(whole, 'image')}")
        collectors.append(collector)
    least = confidence_floors(collectors)
    return DetectorHints(
        model=detector_name,
        unlabelled=tuple(
            one for collector in collectors if collector.knows_dataset for one in collector.unlabelled(least)
        ),
        called=tuple(one for collector in collectors for one in collector.called(least)),
        images={collector.dataset: collector.images for collector in collectors},
        unreliable=tuple(name for name in vocabulary.names if name not in least),
        unknown=tuple(collector.dataset for collector in collectors if not collector.knows_dataset),
    )


def similar_by_detector(detector_hints: DetectorHints, owners: Mapping[str, Sequence[str]]) -> tuple[SimilarNames, ...]:
    """Pairs of names of which the detector often gives one to boxes of the other."""
    return tuple(
        SimilarNames(
            names=(one.name, one.called),
            owners=((one.dataset,), tuple(owners[one.called])),
            kind="detector",
            why=f"{one.boxes} of {one.of} boxes are seen as {one.called}",
            strength=one.boxes / one.of,
        )
        for one in detector_hints.called
        if one.boxes >= _FEWEST_CALLED and one.boxes / one.of >= _CALLED
    )


class HintCollector:
    """Collects the detections in the images of one dataset.

    Args:
        dataset: Its name.
        categories: Its names; all others are unannotated.

    Attributes:
        images: How many were added.
        found: The scores of detections that lie on a box of their own name, by name.
    """

    def __init__(self, dataset: str, categories: tuple[str, ...]) -> None:
        self.dataset, self.categories, self.images = dataset, categories, 0
        self.found: defaultdict[str, list[float]] = defaultdict(list)
        self._apart: list[tuple[str, float, Path]] = []
        self._upon: list[tuple[str, float, str]] = []
        self._boxes: Counter[str] = Counter()

    def add(self, record: ImageRecord, detections: Detections) -> None:
        """Adds the detections of one image, in pixels of its record, after suppression across names."""
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

    @property
    def knows_dataset(self) -> bool:
        """Whether the detector finds some of the dataset's own boxes, so that its images are not strange to it."""
        found = sum(map(len, self.found.values()))
        return found >= max(_FEWEST_FOUND, _KNOWN * self._boxes.total())

    def unlabelled(self, least: Mapping[str, float]) -> list[UnlabelledHint]:
        """Unannotated names detected apart from the boxes with a score of at least `least[name]`."""
        seen: defaultdict[str, dict[Path, float]] = defaultdict(dict)
        for name, score, path in self._apart:
            if score >= least.get(name, math.inf):
                seen[name][path] = max(score, seen[name].get(path, 0.0))
        most = sorted(seen.items(), key=lambda item: -len(item[1]))
        return [
            UnlabelledHint(
                dataset=self.dataset,
                name=name,
                images=len(scores),
                of=self.images,
                example=max(scores, key=scores.__getitem__),
            )
            for name, scores in most
        ]

    def called(self, least: Mapping[str, float]) -> list[RenamedHint]:
        """Unannotated names that the detector gave to boxes with a score of at least `least[name]`."""
        sure = Counter((own, name) for name, score, own in self._upon if score >= least.get(name, math.inf))
        return [
            RenamedHint(dataset=self.dataset, name=own, called=name, boxes=count, of=self._boxes[own])
            for (own, name), count in sure.most_common()
        ]


def confidence_floors(collectors: Sequence[HintCollector]) -> dict[str, float]:
    """The median score of correct detections of each name, from the datasets that annotate it.

    Detections with lower scores are not counted elsewhere, since a detector that never saw negatives of a name there
    gives many. Names with too few correct detections are left out.
    """
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for collector in collectors:
        for name, found in collector.found.items():
            scores[name] += found
    return {name: median(found) for name, found in scores.items() if len(found) >= _FEWEST_FOUND}


def _detected(predictor: Predictor, source: DatasetSource, most: int) -> Iterator[tuple[ImageRecord, Detections]]:
    """Records of some images with their detections, without unreadable images."""
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
