"""Detections in the form of COCO results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metr.boxes import xyxy_to_xywh
from metr.structures import Detections

ImageId = int | str
Row = dict[str, Any]


def best_rows(found: Detections, image_id: ImageId, category_ids: Mapping[str, int], limit: int) -> list[Row]:
    """The `limit` best detections of an image as rows of COCO results, less those whose name has no number."""
    order = found.scores.argsort(descending=True, stable=True)[:limit]
    boxes = xyxy_to_xywh(found.boxes[order].double()).tolist()
    return [
        {"image_id": image_id, "category_id": category_ids[name], "bbox": box, "score": score}
        for box, score, name in zip(
            boxes, found.scores[order].tolist(), (found.names[n] for n in found.labels[order].tolist()), strict=True
        )
        if name in category_ids
    ]


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
        for row in best_rows(found, image_id, category_ids, len(found) if max_detections is None else max_detections)
    ]


def write_coco_results(path: Path, detections: Mapping[ImageId, Detections], category_ids: Mapping[str, int]) -> None:
    """Writes detections as a COCO results file (JSON); see `coco_results`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(coco_results(detections, category_ids)), encoding="utf-8")
