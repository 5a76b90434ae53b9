"""The boxes around the shapes of annotation tools, whose numbers may be anything that JSON or XML can hold."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from metr.boxes import ellipse_to_xyxy, points_to_xyxy, turned
from metr.data.formats.json_lines import numbers


def around(points: Any, fewest: int = 3) -> list[float] | None:
    """The corners of the box around points [x, y]; None where any cannot be read, or there are fewer than `fewest`."""
    rows = [numbers(point, 2) for point in points] if isinstance(points, list) else []
    known = [row for row in rows if row is not None]
    if len(known) < max(len(rows), fewest):
        return None
    return points_to_xyxy(torch.tensor(known, dtype=torch.float64)).tolist()


def around_rectangle(
    corner: Sequence[Any], size: Sequence[Any], degrees: Any = 0, *, around_centre: bool = False
) -> list[float] | None:
    """The corners of the box around a rectangle; None where its numbers cannot be read.

    Args:
        corner: x and y of the corner that is top left before the rectangle is turned.
        size: Width and height.
        degrees: How far it is turned, clockwise.
        around_centre: Whether it is turned around its centre, instead of that corner.
    """
    known = numbers([*corner, *size, degrees], 5)
    if known is None or not all(map(math.isfinite, known)):
        return None
    x, y, width, height, angle = known
    points = torch.tensor([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], dtype=torch.float64)
    if angle % 360:
        points = turned(points, angle, points.mean(dim=0) if around_centre else points[0])
    return points_to_xyxy(points).tolist()


def around_ellipse(centre: Sequence[Any], radii: Sequence[Any], degrees: Any = 0) -> list[float] | None:
    """The corners of the box around an ellipse, turned clockwise; None where its numbers cannot be read."""
    known = numbers([*centre, *radii, degrees], 5)
    if known is None or not all(map(math.isfinite, known)):
        return None
    values = torch.tensor(known, dtype=torch.float64)
    return ellipse_to_xyxy(values[:2], values[2:4], known[4]).tolist()


def pairs(values: Iterable[Any]) -> list[list[Any]]:
    """x, y, x, y, ... as points; a last value without a partner makes a point that cannot be read."""
    flat = list(values)
    return [flat[place : place + 2] for place in range(0, len(flat), 2)]
