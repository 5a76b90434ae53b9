"""The lines of YOLO's text files: a class, and a box, a polygon, or a box with key points or a confidence after it.

Nothing in a line says which of these it is. So the lines of a split that have equally many numbers are judged together.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

Kind = Literal["box", "confidence", "key points", "polygon", "polygon with confidence", "unknown"]

# The numbers of a box, and the fewest of a polygon, which is three points.
_BOX, _TRIANGLE = 4, 6
# So many of the lines must agree; hand-made labels have some outliers.
_AGREE, _NEARLY_ALL = 0.9, 0.95
# How far a box or a point may lie outside of the image, as a fraction of it: by rounding, or by a careless hand.
_ROUNDING, _FAR = 0.01, 0.5


def numbers_of(line: str) -> list[float] | None:
    """The numbers of a line, also with commas between them or in them; None if something else is there."""
    cells = line.split()
    if "," in line:
        apart = len(cells) > 1 and not all(cell.endswith(",") for cell in cells[:-1])
        cells = [cell.replace(",", ".") for cell in cells] if apart else line.replace(",", " ").split()
    try:
        return [float(cell) for cell in cells]
    except ValueError:
        return None


class LineKinds:
    """What the lines of a split are, by how many numbers they have after the class.

    Args:
        rows: The numbers after the class, of all lines or of enough of them.
        key_points: Whether the description of the dataset says that lines go on with key points after the box.
    """

    def __init__(self, rows: Iterable[Sequence[float]], *, key_points: bool = False) -> None:
        self.key_points = key_points
        by_length: dict[int, list[Sequence[float]]] = {}
        for row in rows:
            by_length.setdefault(len(row), []).append(row)
        self._kinds: Mapping[int, Kind] = {length: self._judged(same) for length, same in by_length.items()}

    def kind(self, row: Sequence[float]) -> Kind:
        """What a line is, from the numbers after its class."""
        return self._kinds.get(len(row)) or self._judged([row])

    def corners(self, row: Sequence[float]) -> list[float] | None:
        """The corners of the box of a line, or of the box around its polygon; None if they cannot be told."""
        kind = self.kind(row)
        if kind in {"box", "confidence", "key points"}:
            x, y, width, height = row[:4]
            return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        if kind == "unknown":
            return None
        points = np.array(row[: len(row) // 2 * 2]).reshape(-1, 2)
        near = ~np.isfinite(points) | (np.abs(points - 0.5) <= 0.5 + _FAR)
        return [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()] if near.all() else None

    def _judged(self, rows: Sequence[Sequence[float]]) -> Kind:
        length, values = len(rows[0]), np.array(rows, dtype=np.float64)
        if length <= _BOX:
            return "box" if length == _BOX else "unknown"
        if self.key_points:
            return "key points"
        last = values[:, -1]
        sure = bool(((last >= 0) & (last <= 1)).all())
        if length < _TRIANGLE:  # where it is no confidence, it may be an angle, or the number of a track
            return "confidence" if sure else "unknown"
        if _have_key_points(values):
            return "key points"
        if length % 2 == 0:
            return "polygon"
        return "polygon with confidence" if sure else "unknown"


def _have_key_points(values: Float[np.ndarray, "n c"]) -> bool:
    """Whether lines are a box with key points (x, y, or x, y and visibility) after it, and no polygons."""
    centre, size, rest = values[:, :2], values[:, 2:4], values[:, 4:]
    low, high = centre - size / 2, centre + size / 2
    fits = ((size > 0) & (low >= -_ROUNDING) & (high <= 1 + _ROUNDING)).all(axis=1)
    if fits.mean() < _AGREE:
        return False
    if rest.shape[1] % 3 == 0:
        visible = rest[:, 2::3]
        if np.isin(visible, (0, 1, 2)).all(axis=1).mean() >= _NEARLY_ALL:
            return True
        points = rest.reshape(len(rest), -1, 3)
        if ((visible >= 0) & (visible <= 1)).all() and _lie_in_boxes(points[..., :2], centre, size):
            return True
    return rest.shape[1] % 2 == 0 and _lie_in_boxes(rest.reshape(len(rest), -1, 2), centre, size)


def _lie_in_boxes(
    points: Float[np.ndarray, "n k 2"], centre: Float[np.ndarray, "n 2"], size: Float[np.ndarray, "n 2"]
) -> bool:
    """Whether points lie in the boxes, and the sizes of these would be no points of a polygon with the others."""
    missing = (points == 0).all(axis=-1)
    inside = (np.abs(points - centre[:, None]) <= size[:, None]).all(axis=-1) | missing
    others = np.concatenate([centre[:, None], points], axis=1)
    low, high = others.min(axis=1), others.max(axis=1)
    away: Bool[np.ndarray, "n 2"] = np.maximum(low - size, size - high) > (high - low).max(axis=1, keepdims=True)
    return bool(inside.all(axis=1).mean() >= _AGREE and away.any(axis=1).mean() >= 1 / 2)


def told(kind: Kind) -> str | None:
    """What is said once of lines of this kind; None for what every YOLO dataset has."""
    return {
        "confidence": "a sixth number, taken for a confidence, is left out: are these the detections of a model?",
        "polygon with confidence": "a number after the polygon, taken for a confidence, is left out",
        "key points": "the key points after the boxes are left out; `kpt_shape` in data.yaml says it for sure",
    }.get(kind)


def is_class(value: float) -> bool:
    """Whether a number may be that of a class."""
    return math.isfinite(value) and value.is_integer()
