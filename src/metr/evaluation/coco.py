"""The COCO protocol for boxes: average precision over IoU 0.50:0.95, at most 100 detections an image.

All scores are on the scale 0 to 100; None stands where there is nothing to score.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from metr.boxes import xyxy_to_xywh
from metr.data.records import Annotations, ImageRecord
from metr.errors import DataError
from metr.structures import Detections

logger = logging.getLogger(__name__)

ImageId = int | str
Row = dict[str, Any]

MAX_DETECTIONS = 100


@dataclass(frozen=True, kw_only=True)
class CategoryResult:
    """One category of one dataset: `objects` is how many there are to find, crowds apart."""

    name: str
    objects: int
    ap: float | None
    ap50: float | None


@dataclass(frozen=True, kw_only=True)
class CocoResult:
    """The COCO numbers of one dataset. Categories without objects do not enter the means.

    Small, medium and large are split at 32 x 32 and 96 x 96 square pixels of the object's area as annotated.
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
    """Scores detections against the annotations of one dataset.

    Of each image the 100 best count, whatever they name; then those go that name what the dataset does not know.
    Categories that are not annotated in an image are not judged there, but for the objects that it shows of them: to
    find those is right, and nothing else of that category is wrong (LVIS's rule; Gupta et al., 2019). Images without
    an entry count as ones where nothing was found.

    Args:
        annotations: What there is to find; ignored boxes are crowds, areas are the records'.
        detections: The detections of each image, by image id.
        names: How the detections spell the dataset's categories; by default as the dataset does. Two categories with
            one name are one.

    Raises:
        DataError: detections of an unknown image, image ids that are not unique, or too few names.
    """
    spelling = tuple(annotations.categories if names is None else names)
    if len(spelling) != len(annotations.categories):
        what = f"expected a name for each of {len(annotations.categories)} categories, found {len(spelling)}"
        raise DataError(what, where=annotations.name)
    categories = tuple(dict.fromkeys(spelling))
    numbers = {name: number for number, name in enumerate(categories, start=1)}
    labels = [numbers[name] for name in spelling]
    truth, results = _truth(annotations, categories, labels), []
    known: set[ImageId] = set()
    # Inside, images are counted: ids may be file names, and the evaluator wants integers.
    for index in range(len(annotations)):
        record = annotations[index]
        known.add(record.image_id)
        if record.image_id in detections:
            best = _rows(detections[record.image_id], index + 1, numbers, MAX_DETECTIONS)
            judged = _judged(record, labels)
            results += [row for row in best if row["category_id"] in judged]
    _check_ids(annotations, known, detections)
    return _summary(truth, results, categories)


def coco_results(
    detections: Mapping[ImageId, Detections], category_ids: Mapping[str, int], max_detections: int | None = None
) -> list[Row]:
    """Detections in the form of COCO results: a list of image_id, category_id, bbox (x, y, width, height), score.

    Args:
        detections: The detections of each image, by image id.
        category_ids: The number of each name; other names are left out.
        max_detections: Most detections an image; all of them by default.
    """
    return [
        {**row, "bbox": [round(side, 2) for side in row["bbox"]], "score": round(row["score"], 5)}
        for image_id, found in detections.items()
        for row in _rows(found, image_id, category_ids, len(found) if max_detections is None else max_detections)
    ]


def write_coco_results(path: Path, detections: Mapping[ImageId, Detections], category_ids: Mapping[str, int]) -> None:
    """Writes detections as a COCO results file (JSON); see `coco_results`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(coco_results(detections, category_ids)), encoding="utf-8")


def _rows(found: Detections, image_id: ImageId, category_ids: Mapping[str, int], limit: int) -> list[Row]:
    """The `limit` best detections of an image, less those whose name has no number."""
    order = found.scores.argsort(descending=True, stable=True)[:limit]
    boxes = xyxy_to_xywh(found.boxes[order].double()).tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[name], "bbox": box, "score": score}
        for box, score, name in zip(
            boxes, found.scores[order].tolist(), (found.names[n] for n in found.labels[order].tolist()), strict=True
        )
        if name in category_ids
    ]


def _truth(annotations: Annotations, categories: Sequence[str], labels: Sequence[int]) -> Row:
    """The annotations as a COCO dataset whose image ids count from 1."""
    images, objects = [], []
    scored = _scored(annotations, labels)
    for index in range(len(annotations)):
        record = annotations[index]
        images.append({"id": index + 1, "width": record.width, "height": record.height})
        rows = _objects(record, index + 1, labels) + _unfinished(record, index + 1, labels)
        objects += [row for row in rows if row["category_id"] in scored]
    # Number 0 would mean "unmatched" to the evaluator.
    for number, row in enumerate(objects, start=1):
        row["id"] = number
    named = [{"id": number, "name": name} for number, name in enumerate(categories, start=1)]
    return {"images": images, "annotations": objects, "categories": named}


def _scored(annotations: Annotations, labels: Sequence[int]) -> set[int]:
    """The categories that are annotated exhaustively in some image: of others, nothing could be wrong."""
    scored: set[int] = set()
    for index in range(len(annotations)):
        annotated = annotations[index].annotated
        if annotated is None:
            return set(labels)
        scored.update(labels[label] for label in annotated)
    return scored


def _objects(record: ImageRecord, image_id: int, labels: Sequence[int]) -> list[Row]:
    boxes = record.boxes.astype(np.float64)
    sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    columns = (sides, record.labels, record.areas, record.ignore)
    return [
        {"image_id": image_id, "category_id": labels[label], "bbox": box, "area": area, "iscrowd": int(ignore)}
        for box, label, area, ignore in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _judged(record: ImageRecord, labels: Sequence[int]) -> set[int]:
    """The categories of which detections in an image are judged."""
    if record.annotated is None:
        return set(labels)
    return {labels[label] for label in (*record.annotated, *record.labels.tolist())}


def _unfinished(record: ImageRecord, image_id: int, labels: Sequence[int]) -> list[Row]:
    """A crowd over the whole image for each category that it shows and does not annotate exhaustively.

    The protocol gives to a crowd what no object took, and that is neither right nor wrong.
    """
    annotated = range(len(labels)) if record.annotated is None else record.annotated
    partly = {labels[label] for label in {*record.labels.tolist()}.difference(annotated)}
    whole = {"bbox": [0.0, 0.0, float(record.width), float(record.height)], "area": record.width * record.height}
    return [{"image_id": image_id, "category_id": category, "iscrowd": 1, **whole} for category in sorted(partly)]


def _check_ids(annotations: Annotations, known: set[ImageId], detections: Mapping[ImageId, Detections]) -> None:
    where = f"{annotations.name} ({annotations.split})"
    if len(known) != len(annotations):
        raise DataError(f"{len(annotations)} images share {len(known)} image ids", where=where)
    strange = [image_id for image_id in detections if image_id not in known]
    if strange:
        what = f"{len(strange)} images with detections are not in this split, the first is {strange[0]!r}"
        raise DataError(what, where=where, hint="evaluate with the annotations that belong to the images")


def _summary(truth: Row, results: list[Row], categories: Sequence[str]) -> CocoResult:
    reference = COCO(truth, print_function=logger.debug)
    evaluation = COCOeval_faster(reference, reference.loadRes(results), "bbox", print_function=logger.debug)
    evaluation.evaluate()
    evaluation.accumulate()
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
            CategoryResult(name=name, objects=int(number), ap=_mean(whole[..., k]), ap50=_mean(whole[0, :, k]))
            for k, (name, number) in enumerate(zip(categories, objects, strict=True))
        ),
    )


def _mean(values: np.ndarray) -> float | None:
    """The mean on the scale 0 to 100 of what was scored: -1 marks what was not."""
    scored = values[values > -1]
    return float(scored.mean()) * 100 if scored.size else None
