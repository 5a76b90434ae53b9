"""From the output of the network to detections: suppression, and COCO's form of results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from metr import boxes as geometry
from metr.boxes import xyxy_to_xywh
from metr.config import Calibration, Config
from metr.errors import ModelError
from metr.inference.config import PostprocessConfig
from metr.run_directory import explained_disk_errors, replaced_file
from metr.structures import Detections, DetectorOutput

ImageId = int | str
# the distance of a score from 0 and 1 from which its logit is finite
_EPS = 1e-6
# rows that suppression looks at together
_BLOCK = 128
Row = dict[str, Any]


def best_rows(found: Detections, image_id: ImageId, category_ids: Mapping[str, int], limit: int) -> list[Row]:
    """The `limit` best detections of an image as rows of COCO results, without names that have no id."""
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
        max_detections: Maximum number of detections per image; by default all.
    """
    return [
        {**row, "bbox": [round(side, 2) for side in row["bbox"]], "score": round(row["score"], 5)}
        for image_id, found in detections.items()
        for row in best_rows(found, image_id, category_ids, len(found) if max_detections is None else max_detections)
    ]


def write_coco_results(path: Path, detections: Mapping[ImageId, Detections], category_ids: Mapping[str, int]) -> None:
    """Writes detections as a COCO results file (JSON); see `coco_results`.

    Raises:
        CheckpointError: the disk refuses.
    """
    with explained_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as fresh:
        fresh.write_text(json.dumps(coco_results(detections, category_ids)), encoding="utf-8")


class ScoreThresholds(Config):
    """Which detections are shown to people: confident ones, with one name for each place. Metrics need all."""

    default: Annotated[float, Field(ge=0, le=1)] = 0.3
    """For names that have none of their own."""
    names: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """For some names, their own."""
    same_place: Annotated[float, Field(ge=0, le=1)] | None = 0.7
    """IoU over which the weaker of two shown boxes goes, whatever their names are; None shows both."""

    def shown(self, found: Detections) -> Detections:
        """Those of the detections, best first, that are shown."""
        least = torch.tensor([self.names.get(name, self.default) for name in found.names], dtype=found.scores.dtype)
        keep = found.scores >= least.to(found.labels.device)[found.labels]
        sure = replace(found, boxes=found.boxes[keep], scores=found.scores[keep], labels=found.labels[keep])
        if self.same_place is None:
            return sure
        everyone = torch.ones_like(sure.labels, dtype=torch.bool)[None]
        alone = _survivors(sure.boxes[None], torch.zeros_like(sure.labels)[None], everyone, self.same_place)[0]
        return replace(sure, boxes=sure.boxes[alone], scores=sure.scores[alone], labels=sure.labels[alone])


def postprocess(
    output: DetectorOutput,
    original_sizes: Sequence[tuple[int, int]],
    names: Sequence[str],
    config: PostprocessConfig | None = None,
) -> tuple[Detections, ...]:
    """The detections of each image of a batch, best first; equal scores keep the order of the queries.

    Invalid queries, empty slots, boxes without area inside the image and answers that are not finite are left out.

    Args:
        output: The network's answer; its last decoder layer counts.
        original_sizes: (height, width) in pixels of each image as it was given.
        names: The vocabulary that the network was given, row by row.
        config: Thresholds and limits.

    Raises:
        ModelError: the number of names or of sizes is not that of the answer.
    """
    config = config or PostprocessConfig()
    vocabulary = tuple(names)
    _check(output, original_sizes, vocabulary)
    boxes, scores, labels, keep = candidates(output, config.presence_power)
    scores = _calibrated(scores, labels, vocabulary, config.calibration)
    boxes = boxes * _pixels(boxes, original_sizes)
    keep = keep & (geometry.area(boxes) > 0)
    keep = keep & (scores >= config.score_threshold)

    order = scores.masked_fill(~keep, -1).sort(dim=1, descending=True, stable=True).indices
    boxes = boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
    scores, labels, keep = (values.gather(1, order) for values in (scores, labels, keep))
    if config.nms_iou is not None:
        rivals = torch.zeros_like(labels) if config.nms_across_names else labels
        keep = keep & _survivors(boxes, rivals, keep, config.nms_iou, config.max_detections)
    # Rows are sorted by score, so the best that suppression left are the first True values.
    keep = keep & (keep.cumsum(1) <= config.max_detections)
    first = keep.sort(dim=1, descending=True, stable=True).indices[:, : config.max_detections]
    boxes = boxes.gather(1, first.unsqueeze(-1).expand(-1, -1, 4))
    scores, labels = scores.gather(1, first), labels.gather(1, first)
    counts: list[int] = keep.sum(1).tolist()  # all that the host waits for, once a batch
    return tuple(
        Detections(boxes=b[:n], scores=s[:n], labels=k[:n], names=vocabulary)
        for b, s, k, n in zip(boxes, scores, labels, counts, strict=True)
    )


def candidates(
    output: DetectorOutput, presence_power: float
) -> tuple[Float[Tensor, "b q 4"], Float[Tensor, "b q"], Int[Tensor, "b q"], Bool[Tensor, "b q"]]:
    """Box (xyxy in 0..1 of the image, clipped to it), score and label of each query, and whether it may be a detection.

    Invalid queries, those of empty slots and those whose score is not finite may not.

    Args:
        output: The network's answer; its last decoder layer counts.
        presence_power: See `PostprocessConfig`.
    """
    labels = output.categories.ids.gather(1, output.slot)
    scores = _scores(output, labels, presence_power)
    # clipped while the image is the unit square: then the whole batch has one border
    boxes = geometry.clip(geometry.cxcywh_to_xyxy(output.boxes[-1].float()), 1.0, 1.0)
    return boxes, scores, labels, output.valid & output.categories.valid.gather(1, output.slot) & scores.isfinite()


def _check(output: DetectorOutput, original_sizes: Sequence[tuple[int, int]], names: tuple[str, ...]) -> None:
    images, rows = output.slot.shape[0], output.categories.presence_logits.shape[-1]
    if len(names) != rows:
        raise ModelError(f"expected {rows} names, one for each row of the text, found {len(names)}", where="names")
    if len(original_sizes) != images:
        raise ModelError(f"expected the sizes of {images} images, found {len(original_sizes)}", where="sizes")


def _scores(output: DetectorOutput, labels: Int[Tensor, "b q"], presence_power: float) -> Float[Tensor, "b q"]:
    scores = output.logits[-1].float().sigmoid()
    if presence_power == 0:
        return scores
    presence = output.categories.presence_logits[-1].float().sigmoid()
    return scores * presence.gather(1, labels).pow(presence_power)


def _calibrated(
    scores: Float[Tensor, "b q"],
    labels: Int[Tensor, "b q"],
    names: tuple[str, ...],
    calibration: Mapping[str, Calibration],
) -> Float[Tensor, "b q"]:
    """The probability of being right where a name's is known, else the score as it is."""
    if not any(name in calibration for name in names):
        return scores
    known = torch.tensor([name in calibration for name in names]).to(scores.device)[labels]
    rows = torch.tensor([calibration.get(name, (1.0, 0.0)) for name in names], dtype=scores.dtype)
    scale, shift = rows.to(scores.device)[labels].unbind(-1)
    return torch.where(known, (scale * scores.logit(_EPS) + shift).sigmoid(), scores)


def _pixels(boxes: Float[Tensor, "b q 4"], sizes: Sequence[tuple[int, int]]) -> Float[Tensor, "b 1 4"]:
    """The factors that scale corners from 0..1 to pixels."""
    scale = torch.tensor([(width, height, width, height) for height, width in sizes], dtype=boxes.dtype)
    return scale.to(boxes.device, non_blocking=True).reshape(-1, 1, 4)


def _survivors(
    boxes: Float[Tensor, "b q 4"],
    rivals: Int[Tensor, "b q"],
    candidates: Bool[Tensor, "b q"],
    iou: float,
    wanted: int | None = None,
) -> Bool[Tensor, "b q"]:
    """Greedy suppression among boxes with equal `rivals`; boxes are ordered with candidates first, best first.

    A candidate survives if no better survivor overlaps it by more than `iou`. Only the best `wanted` survivors of each
    image are sure to be true ones, if that is given.
    """
    alive = candidates.clone()
    queries = int(candidates.sum(1).max()) if candidates.numel() else 0
    # A block of rows at a time, so that memory does not grow with the square of the queries.
    for start in range(0, queries, _BLOCK):
        stop = min(start + _BLOCK, queries)
        heads, rest = slice(start, stop), slice(start, queries)
        overlaps = geometry.paired_iou(boxes[:, heads].unsqueeze(2), boxes[:, rest].unsqueeze(1)) > iou
        beats = overlaps & (rivals[:, heads].unsqueeze(2) == rivals[:, rest].unsqueeze(1))
        alive[:, heads] = _unbeaten(alive[:, heads], beats[:, :, : stop - start].triu(diagonal=1))
        alive[:, stop:queries] &= ~_beaten(alive[:, heads], beats[:, :, stop - start :])
        if wanted is not None and bool((alive[:, :stop].sum(1) >= wanted).all()):
            break
    return alive


def _unbeaten(candidates: Bool[Tensor, "b n"], beats: Bool[Tensor, "b n n"]) -> Bool[Tensor, "b n"]:
    """The candidates that no better one of those that are left beats; `beats` is of better ones and worse ones.

    Whatever is left of the first k is right after k rounds, so the rounds end at what one by one would give.
    """
    left, before = candidates, None
    while before is None or not torch.equal(left, before):
        left, before = candidates & ~_beaten(left, beats), left
    return left


def _beaten(alive: Bool[Tensor, "b n"], beats: Bool[Tensor, "b n m"]) -> Bool[Tensor, "b m"]:
    return (beats & alive.unsqueeze(2)).any(1)
