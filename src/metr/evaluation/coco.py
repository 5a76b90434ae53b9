"""The COCO protocol for boxes: average precision over IoU 0.50:0.95, at most 100 detections per image.

All scores are on the scale 0 to 100, or None where there is nothing to score.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from metr.data.records import Annotations, ImageRecord
from metr.errors import DataError
from metr.inference.postprocess import ImageId, Row, best_rows
from metr.structures import Detections

logger = logging.getLogger(__name__)

MAX_DETECTIONS = 100
# A threshold of few objects follows single images: that of the dataset counts as much as so many objects.
_SHARED_OBJECTS = 10


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """Precision and recall (0 to 100, at IoU 0.5) of the detections whose score is at least `threshold` (0 to 1).

    Both are the protocol's: recall in hundredths, precision the best at this recall or a higher one.
    """

    threshold: float
    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


@dataclass(frozen=True, kw_only=True)
class CategoryResult:
    """One category of one dataset: `objects` is the number of objects to find, without crowds.

    `best` is about where F1 is highest: between the best threshold of the category (the closer, the more objects it
    has) and that of all categories. None where nothing is found, or without objects.
    """

    name: str
    objects: int
    ap: float | None
    ap50: float | None
    best: OperatingPoint | None = None


@dataclass(frozen=True, kw_only=True)
class CocoResult:
    """The COCO numbers of one dataset. Means leave out categories without objects.

    Small, medium and large objects are told apart at annotated areas of 32 x 32 and 96 x 96 square pixels.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar100: float | None
    images: int
    objects: int
    categories: tuple[CategoryResult, ...]


def evaluate_detections(
    annotations: Annotations,
    detections: Mapping[ImageId, Detections],
    names: Sequence[str] | None = None,
) -> CocoResult:
    """Scores detections against the annotations of one dataset; `CocoScorer` describes the rules and the arguments."""
    return CocoScorer(annotations, names).score(detections)


class CocoScorer:
    """Scores detections against the annotations of one dataset; one scorer serves several detectors or vocabularies.

    Only the 100 best detections of each image count. Those whose name is not in the dataset are then left out. In
    an image where a category is not annotated exhaustively, its annotated objects count as found or missed, and its
    other detections count neither as right nor as wrong (LVIS's rule; Gupta et al., 2019). An image without an entry
    counts as one without detections.

    Args:
        annotations: The objects to find; ignored boxes are crowds, areas are those of the records.
        names: The detections' names for the dataset's categories; by default the dataset's own. Two categories with
            the same name are one.

    Raises:
        DataError: image ids are not unique, or there are too few names.
    """

    def __init__(self, annotations: Annotations, names: Sequence[str] | None = None) -> None:
        self.where = f"{annotations.name} ({annotations.split})"
        spelling = tuple(annotations.categories if names is None else names)
        if len(spelling) != len(annotations.categories):
            what = f"expected a name for each of {len(annotations.categories)} categories, found {len(spelling)}"
            raise DataError(what, where=annotations.name)
        self.categories = tuple(dict.fromkeys(spelling))
        self.numbers = {name: number for number, name in enumerate(self.categories, start=1)}
        labels = [self.numbers[name] for name in spelling]
        records = [annotations[index] for index in range(len(annotations))]
        # COCO's code wants integers; image ids may be file names.
        self.image_numbers = {record.image_id: number for number, record in enumerate(records, start=1)}
        if len(self.image_numbers) < len(records):
            raise DataError(f"{len(records)} images share {len(self.image_numbers)} image ids", where=self.where)
        self.scored = {record.image_id: _scored_there(record, labels) for record in records}
        self.truth = _truth(records, self.categories, labels)
        self.reference = COCO(self.truth, print_function=logger.debug)

    def score(self, detections: Mapping[ImageId, Detections]) -> CocoResult:
        """The COCO numbers of the detections of each image, given by image id.

        Raises:
            DataError: there are detections of an unknown image.
        """
        strange = [image_id for image_id in detections if image_id not in self.image_numbers]
        if strange:
            what = f"{len(strange)} images with detections are not in this split, the first is {strange[0]!r}"
            raise DataError(what, where=self.where, hint="evaluate with the annotations that belong to the images")
        results = [
            row
            for image_id, number in self.image_numbers.items()
            if image_id in detections
            for row in best_rows(detections[image_id], number, self.numbers, MAX_DETECTIONS)
            if row["category_id"] in self.scored[image_id]
        ]
        evaluation = COCOeval_faster(
            self.reference, self.reference.loadRes(results), "bbox", print_function=logger.debug
        )
        evaluation.evaluate()
        evaluation.accumulate()
        return _summary(evaluation, self.truth, self.categories)


def _truth(records: Sequence[ImageRecord], categories: Sequence[str], labels: Sequence[int]) -> Row:
    """The annotations as a COCO dataset whose image ids count from 1."""
    images, objects = [], []
    exhaustive = _annotated_somewhere(records, labels)
    for number, record in enumerate(records, start=1):
        images.append({"id": number, "width": record.width, "height": record.height})
        rows = _objects(record, number, labels) + _unfinished(record, number, labels)
        objects += [row for row in rows if row["category_id"] in exhaustive]
    # Number 0 would mean "unmatched" to COCO's code.
    for number, row in enumerate(objects, start=1):
        row["id"] = number
    named = [{"id": number, "name": name} for number, name in enumerate(categories, start=1)]
    return {"images": images, "annotations": objects, "categories": named}


def _annotated_somewhere(records: Sequence[ImageRecord], labels: Sequence[int]) -> set[int]:
    """The categories annotated exhaustively in some image; no detection of another category can count as wrong."""
    scored: set[int] = set()
    for record in records:
        if record.annotated is None:
            return set(labels)
        scored.update(labels[label] for label in record.annotated)
    return scored


def _objects(record: ImageRecord, image_id: int, labels: Sequence[int]) -> list[Row]:
    boxes = record.boxes.astype(np.float64)
    sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    columns = (sides, record.labels, record.areas, record.ignore)
    return [
        {"image_id": image_id, "category_id": labels[label], "bbox": box, "area": area, "iscrowd": int(ignore)}
        for box, label, area, ignore in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _scored_there(record: ImageRecord, labels: Sequence[int]) -> set[int]:
    """The categories whose detections are scored in an image."""
    if record.annotated is None:
        return set(labels)
    return {labels[label] for label in (*record.annotated, *record.labels.tolist())}


def _unfinished(record: ImageRecord, image_id: int, labels: Sequence[int]) -> list[Row]:
    """A crowd over the whole image for each category that has objects there but is not annotated exhaustively.

    The protocol matches to a crowd every detection that matches no object, and counts it neither as right nor as wrong.
    """
    annotated = range(len(labels)) if record.annotated is None else record.annotated
    partly = {labels[label] for label in {*record.labels.tolist()}.difference(annotated)}
    whole = {"bbox": [0.0, 0.0, float(record.width), float(record.height)], "area": record.width * record.height}
    return [{"image_id": image_id, "category_id": category, "iscrowd": 1, **whole} for category in sorted(partly)]


def _summary(evaluation: COCOeval_faster, truth: Row, categories: Sequence[str]) -> CocoResult:
    # Axes: IoU thresholds, recall thresholds, categories, areas (all, small, medium, large), detections (1, 10, 100).
    precision, recall = evaluation.eval["precision"][..., -1], evaluation.eval["recall"][..., -1]
    whole = precision[..., 0]
    objects = np.bincount(
        [row["category_id"] for row in truth["annotations"] if not row["iscrowd"]], minlength=len(categories) + 1
    )[1:]
    return CocoResult(
        ap=_mean(whole),
        ap50=_mean(whole[0]),
        ap75=_mean(whole[5]),
        ap_small=_mean(precision[..., 1]),
        ap_medium=_mean(precision[..., 2]),
        ap_large=_mean(precision[..., 3]),
        ar100=_mean(recall[..., 0]),
        images=len(truth["images"]),
        objects=int(objects.sum()),
        categories=tuple(
            CategoryResult(
                name=name, objects=int(number), ap=_mean(whole[..., k]), ap50=_mean(whole[0, :, k]), best=point
            )
            for k, (name, number, point) in enumerate(
                zip(categories, objects, _best_points(evaluation, objects), strict=True)
            )
        ),
    )


def _best_points(evaluation: COCOeval_faster, objects: np.ndarray) -> list[OperatingPoint | None]:
    """About where F1 at IoU 0.5 is highest for each category; see `CategoryResult.best`."""
    # [category, recall threshold]; precision is the best at this recall or a higher one
    precision, scores = (np.asarray(evaluation.eval[key])[0, :, :, 0, -1].T for key in ("precision", "scores"))
    recall = np.asarray(evaluation.params.recThrs)
    reached = (precision > 0) & (objects[:, None] > 0)
    precision = np.where(reached, precision, 0.0)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    shared = _shared_threshold(f1, scores, reached)
    points: list[OperatingPoint | None] = []
    for k, number in enumerate(objects.tolist()):
        if not reached[k].any():
            points.append(None)
            continue
        own = float(scores[k, f1[k].argmax()])
        threshold = (number * own + _SHARED_OBJECTS * shared) / (number + _SHARED_OBJECTS)
        at = int((reached[k] & (scores[k] >= threshold)).sum()) - 1
        found = (100 * float(precision[k, at]), 100 * float(recall[at])) if at >= 0 else (0.0, 0.0)
        points.append(OperatingPoint(threshold=threshold, precision=found[0], recall=found[1]))
    return points


def _shared_threshold(f1: np.ndarray, scores: np.ndarray, reached: np.ndarray) -> float:
    """The score at which the mean F1 of the categories with detections is highest; 0 without any detection."""
    candidates = np.unique(scores[reached].round(3))
    best, chosen = -1.0, 0.0
    for threshold in candidates:
        last = (reached & (scores >= threshold)).sum(axis=1) - 1
        mean = float(np.where(last >= 0, f1[np.arange(len(f1)), last], 0.0).sum())
        if mean > best:
            best, chosen = mean, float(threshold)
    return chosen


def _mean(values: np.ndarray) -> float | None:
    """The mean of the scored values on the scale 0 to 100; -1 marks values that were not scored."""
    scored = values[values > -1]
    return float(scored.mean()) * 100 if scored.size else None
