"""Turns the network's answers into detections in pixels of the original images."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metr import boxes as geometry
from metr.errors import ModelError
from metr.inference.config import PostprocessConfig
from metr.structures import Detections, DetectorOutput


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
    labels = output.categories.ids.gather(1, output.slot)
    scores = _scores(output, labels, config.presence_power)
    # Clipped while the image is the unit square: then the whole batch has one border.
    boxes = geometry.clip(geometry.cxcywh_to_xyxy(output.boxes[-1].float()), 1.0, 1.0)
    boxes = boxes * _pixels(boxes, original_sizes)
    keep = output.valid & output.categories.valid.gather(1, output.slot) & (geometry.area(boxes) > 0)
    keep = keep & scores.isfinite() & (scores >= config.score_threshold)

    order = scores.masked_fill(~keep, -1).sort(dim=1, descending=True, stable=True).indices
    boxes = boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
    scores, labels, keep = (values.gather(1, order) for values in (scores, labels, keep))
    if config.nms_iou is not None:
        rivals = torch.zeros_like(labels) if config.nms_across_names else labels
        keep = keep & _survivors(boxes, rivals, keep, config.nms_iou)
    # Whatever suppression took, the best of the rest are the first True values of each row.
    keep = keep & (keep.cumsum(1) <= config.max_detections)
    return tuple(
        Detections(boxes=b[k], scores=s[k], labels=n[k], names=vocabulary)
        for b, s, n, k in zip(boxes, scores, labels, keep, strict=True)
    )


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


def _pixels(boxes: Float[Tensor, "b q 4"], sizes: Sequence[tuple[int, int]]) -> Float[Tensor, "b 1 4"]:
    """The factors that take corners from 0..1 to pixels."""
    scale = torch.tensor([(width, height, width, height) for height, width in sizes], dtype=boxes.dtype)
    return scale.to(boxes.device).reshape(-1, 1, 4)


def _survivors(
    boxes: Float[Tensor, "b q 4"], rivals: Int[Tensor, "b q"], candidates: Bool[Tensor, "b q"], iou: float
) -> Bool[Tensor, "b q"]:
    """Greedy suppression among boxes with equal `rivals`; boxes are ordered with candidates first, best first.

    A candidate survives if no better survivor overlaps it by more than `iou`.
    """
    alive = candidates.clone()
    queries = int(candidates.sum(1).max()) if candidates.numel() else 0
    # One row of overlaps at a time, so that memory does not grow with the square of the queries.
    for better in range(queries - 1):
        head, rest = slice(better, better + 1), slice(better + 1, queries)
        overlaps = geometry.paired_iou(boxes[:, head], boxes[:, rest]) > iou
        beaten = overlaps & (rivals[:, rest] == rivals[:, head]) & alive[:, head]
        alive[:, rest] &= ~beaten
    return alive
