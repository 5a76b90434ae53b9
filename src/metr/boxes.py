"""Conversions of boxes between formats, boxes around other shapes, and comparisons of boxes.

Formats: `cxcywh` centre and size, `xyxy` corners, `xywh` top left corner and size (COCO's files).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Conversion = Callable[[Float[Tensor, "*n 4"]], Float[Tensor, "*n 4"]]
"""A conversion between two formats of boxes."""


def converted(boxes: Float[np.ndarray, "*n 4"], conversion: Conversion) -> Float[np.ndarray, "*n 4"]:
    """Boxes of NumPy through one of the conversions."""
    return np.asarray(conversion(torch.from_numpy(boxes)).numpy())


def cxcywh_to_xyxy(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Corners of boxes given by centre and size."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Centre and size of boxes given by their corners."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def moved(boxes: Float[Tensor, "*#n 4"], change: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n 4"]:
    """cxcywh boxes whose centres move by multiples of their sides, and whose sides are multiplied by exponentials."""
    sides = boxes[..., 2:]
    return torch.cat([boxes[..., :2] + change[..., :2] * sides, sides * change[..., 2:].exp()], dim=-1)


def xyxy_to_xywh(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Top left corner and size of boxes given by their corners (COCO results)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([low, high - low], dim=-1)


def xywh_to_xyxy(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Corners of boxes given by top left corner and size (COCO's files)."""
    low, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([low, low + size], dim=-1)


def points_to_xyxy(points: Float[Tensor, "*n p 2"]) -> Float[Tensor, "*n 4"]:
    """Corners of the upright boxes around points (x, y)."""
    return torch.cat([points.amin(dim=-2), points.amax(dim=-2)], dim=-1)


def turned(points: Float[Tensor, "*n p 2"], degrees: float, pivot: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n p 2"]:
    """Points (x, y) turned clockwise, as an image is seen (y points down), around a pivot."""
    angle = math.radians(degrees)
    x, y = (points - pivot.unsqueeze(-2)).unbind(-1)
    rotated = [x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)]
    return pivot.unsqueeze(-2) + torch.stack(rotated, dim=-1)


def ellipse_to_xyxy(
    centre: Float[Tensor, "*n 2"], radii: Float[Tensor, "*n 2"], degrees: float = 0.0
) -> Float[Tensor, "*n 4"]:
    """Corners of the upright boxes around ellipses that are turned clockwise around their centres."""
    squared, angle = radii**2, math.radians(degrees)
    share = squared.new_tensor([math.cos(angle) ** 2, math.sin(angle) ** 2])
    half = torch.stack([(squared * share).sum(dim=-1), (squared * share.flip(0)).sum(dim=-1)], dim=-1).sqrt()
    return torch.cat([centre - half, centre + half], dim=-1)


def area(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Area of xyxy boxes; 0 if the corners are swapped."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return width * height


def _overlap(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n"]:
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height


def paired_iou(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n"]:
    """Intersection over union of xyxy boxes, pair by pair (leading axes broadcast); 0 where both are empty."""
    overlap = _overlap(a, b)
    union = area(a) + area(b) - overlap
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)


def paired_giou(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n"]:
    """Generalised IoU of xyxy boxes, pair by pair, in -1..1 (Rezatofighi et al., 2019)."""
    tiny = torch.finfo(a.dtype).tiny
    overlap = _overlap(a, b)
    union = area(a) + area(b) - overlap
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:])
    hull = area(torch.cat([low, high], dim=-1))
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def pairwise_iou(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*m 4"]) -> Float[Tensor, "..."]:
    """IoU of every box of `a` with every box of `b`: [... n m]."""
    return paired_iou(a.unsqueeze(-2), b.unsqueeze(-3))


def pairwise_coverage(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*m 4"]) -> Float[Tensor, "..."]:
    """The fraction of each box of `a` that is inside each box of `b` (COCO's overlap with a crowd): [... n m]."""
    overlap = _overlap(a.unsqueeze(-2), b.unsqueeze(-3))
    return overlap / area(a).unsqueeze(-1).clamp(min=torch.finfo(a.dtype).tiny)


def clip(boxes: Float[Tensor, "*n 4"], height: float, width: float) -> Float[Tensor, "*n 4"]:
    """xyxy boxes clipped to the image."""
    x, y = boxes[..., 0::2].clamp(0.0, width), boxes[..., 1::2].clamp(0.0, height)
    return torch.stack([x, y], dim=-1).flatten(-2)
