"""Detection in large images by overlapping tiles, each of which the network sees in full."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metr import boxes as geometry
from metr.data.images import ImageSource, load_image
from metr.data.records import DataIssue
from metr.errors import DataError
from metr.inference.config import TilesConfig
from metr.inference.predictor import Prediction, Predictor
from metr.structures import Detections

__all__ = ["TiledPredictor", "merged", "tile_places"]

Place = tuple[int, int, int, int]
# pixels from an edge within which a box ends there
_AT_EDGE = 3.0
# what the score of a cut box counts beside that of a whole one
_CUT = 0.3
# steps of tiles that are prepared at once
_STEPS_AHEAD = 4


def tile_places(height: int, width: int, config: TilesConfig) -> list[Place]:
    """The tiles of an image as (x1, y1, x2, y2), row by row: as few as the overlap allows, evenly spread."""
    rows, columns = (
        _starts(side, tile, config.overlap) for side, tile in ((height, config.height), (width, config.width))
    )
    return [
        (left, top, min(left + config.width, width), min(top + config.height, height))
        for top in rows
        for left in columns
    ]


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin along one side of an image."""
    if side <= tile:
        return [0]
    steps = -(-(side - tile) // max(1, int(tile * (1 - overlap))))
    return [round(step * (side - tile) / steps) for step in range(steps + 1)]


class TiledPredictor:
    """Detects in images of any size as a `Predictor` does, tile by tile; one that fits into a tile is looked at once.

    Args:
        predictor: Looks at the tiles. Its limit of detections holds for each of them.
        config: Size and overlap of the tiles.
    """

    def __init__(self, predictor: Predictor, config: TilesConfig | None = None) -> None:
        self.predictor, self.config = predictor, config or TilesConfig()
        self.names = predictor.names

    @property
    def batch_size(self) -> int:
        """Maximum number of tiles per step."""
        return self.predictor.batch_size

    def detect(self, image: ImageSource) -> Detections:
        """The detections of one image, best first.

        Raises:
            DataError: the image is missing or unreadable.
        """
        array = load_image(image, "image")
        height, width = int(array.shape[0]), int(array.shape[1])
        places = tile_places(height, width, self.config)
        if self.config.whole and len(places) > 1:
            places = [(0, 0, width, height), *places]
        found: list[Detections] = []
        ahead = _STEPS_AHEAD * self.predictor.batch_size
        for start in range(0, len(places), ahead):
            some = places[start : start + ahead]
            tiles = [self.predictor.prepare(array[top:bottom, left:right]) for left, top, right, bottom in some]
            found += [one.detections for one in self.predictor.detect_prepared(tiles) if one.detections is not None]
        if len(places) == 1:
            return found[0]
        return merged(found, places, (height, width), self.config)

    def detect_many(self, images: Iterable[ImageSource]) -> Iterator[Prediction]:
        """The detections of each image in order; one that cannot be read gives its issue."""
        for index, image in enumerate(images):
            source = str(image) if not hasattr(image, "size") else f"image {index}"
            try:
                array = load_image(image, source)
            except DataError as error:
                issue = DataIssue(kind="unreadable image", where=source, detail=error.what)
                yield Prediction(source=source, issue=issue)
            else:
                size = (int(array.shape[0]), int(array.shape[1]))
                yield Prediction(source=source, size=size, detections=self.detect(array))


def merged(
    found: Sequence[Detections], places: Sequence[Place], size: tuple[int, int], config: TilesConfig | None = None
) -> Detections:
    """The detections of tiles as those of the image, best first, each object once.

    Within a name, boxes that overlap by more than `nms_iou` are one object: the best whole one stays. Boxes that end
    where a tile is cut are perhaps parts of objects: they give way to any that covers them.

    Args:
        found: The detections of each tile, in its own pixels.
        places: The tiles, xyxy.
        size: (height, width) of the image in pixels.
        config: The thresholds.
    """
    config = config or TilesConfig()
    boxes, cut = [], []
    for one, place in zip(found, places, strict=True):
        boxes.append(one.boxes + torch.tensor([*place[:2], *place[:2]], dtype=one.boxes.dtype))
        cut.append(_ends_at_cut(one.boxes, place, size))
    xyxy, scores = torch.cat(boxes), torch.cat([one.scores for one in found])
    labels, parts = torch.cat([one.labels for one in found]), torch.cat(cut)
    kept = torch.cat([_kept(xyxy, scores, parts, rows, config) for rows in _by_name(labels)] or [labels])
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    return Detections(boxes=xyxy[kept], scores=scores[kept], labels=labels[kept], names=found[0].names)


def _ends_at_cut(boxes: Float[Tensor, "n 4"], place: Place, size: tuple[int, int]) -> Bool[Tensor, "n"]:
    """Which boxes of a tile, in its own pixels, end where it is cut: at an edge that is none of the image."""
    left, top, right, bottom = place
    height, width = size
    none = torch.zeros(len(boxes), dtype=torch.bool)
    edges = [
        boxes[:, 0] <= _AT_EDGE if left > 0 else none,
        boxes[:, 1] <= _AT_EDGE if top > 0 else none,
        boxes[:, 2] >= right - left - _AT_EDGE if right < width else none,
        boxes[:, 3] >= bottom - top - _AT_EDGE if bottom < height else none,
    ]
    return torch.stack(edges).any(0)


def _by_name(labels: Int[Tensor, "n"]) -> Iterator[Int[Tensor, "k"]]:
    """The rows of each name that was found."""
    for label in sorted({*labels.tolist()}):
        yield (labels == label).nonzero().flatten()


def _kept(
    boxes: Float[Tensor, "n 4"],
    scores: Float[Tensor, "n"],
    cut: Bool[Tensor, "n"],
    rows: Int[Tensor, "k"],
    config: TilesConfig,
) -> Int[Tensor, "m"]:
    """Those of the rows, all of one name, that stay; whole boxes go before cut ones that are not far better."""
    rank = scores[rows] * torch.where(cut[rows], _CUT, 1.0)
    order = rows[rank.argsort(descending=True, stable=True)]
    xyxy, parts = boxes[order], cut[order]
    areas, alive = geometry.area(xyxy), torch.ones(len(order), dtype=torch.bool)
    for row in range(len(order) - 1):
        if not alive[row]:
            continue
        rest = xyxy[row + 1 :]
        corners = torch.cat([torch.maximum(xyxy[row, :2], rest[:, :2]), torch.minimum(xyxy[row, 2:], rest[:, 2:])], 1)
        shared = (corners[:, 2:] - corners[:, :2]).clamp(min=0).prod(1)
        same = shared / (areas[row] + areas[row + 1 :] - shared) > config.nms_iou
        part = parts[row + 1 :] & (shared > config.contained * areas[row + 1 :])
        alive[row + 1 :] &= ~(same | part)
    return order[alive]
