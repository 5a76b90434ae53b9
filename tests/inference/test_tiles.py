"""Tiles: they cover the image, and an object that several of them see is found once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metr.boxes import paired_iou
from metr.errors import ConfigError
from metr.inference.config import TilesConfig
from metr.inference.request import parsed_tiles
from metr.inference.tiles import TiledPredictor, merged, tile_places
from metr.model import METR
from metr.structures import Detections

from drawn_cells import Cell, drawn

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints" / "metr-nano"


def found(*rows: tuple[tuple[float, float, float, float], float, int]) -> Detections:
    boxes = torch.tensor([list(box) for box, _, _ in rows], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([score for _, score, _ in rows], dtype=torch.float32)
    labels = torch.tensor([label for _, _, label in rows])
    return Detections(boxes=boxes, scores=scores, labels=labels.long(), names=("cell", "leaf"))


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(16, 900),
    st.integers(16, 900),
    st.sampled_from([0, 0.25, 0.5]),
)
def test_tiles_cover_the_image_and_overlap(height: int, width: int, tall: int, wide: int, overlap: float) -> None:
    config = TilesConfig(width=wide, height=tall, overlap=overlap)
    places = np.array(tile_places(height, width, config))
    for low, high, side, tile in ((0, 2, width, wide), (1, 3, height, tall)):
        starts, ends = np.unique(places[:, low]), np.unique(places[:, high])
        assert starts[0] == 0
        assert ends[-1] == side
        assert (ends - starts == min(tile, side)).all()
        assert (ends[:-1] - starts[1:] >= int(overlap * tile) - 1).all()
        assert len(starts) == 1 or len(starts) <= 1 + -(-(side - tile) // max(1, int(tile * (1 - overlap))))


def test_an_object_in_two_tiles_is_one_and_parts_give_way_to_the_whole() -> None:
    places = [(0, 0, 100, 100), (60, 0, 160, 100)]
    left = found(((70, 10, 100, 50), 0.9, 0), ((10, 10, 40, 40), 0.5, 0), ((62, 60, 90, 90), 0.6, 0))
    right = found(((10, 10, 50, 50), 0.7, 0), ((3, 61, 30, 91), 0.8, 0), ((10, 10, 50, 50), 0.4, 1))
    one = merged([left, right], places, (100, 160))
    assert one.names == ("cell", "leaf")
    rows = [
        ([round(side) for side in box], label)
        for box, label in zip(one.boxes.tolist(), one.labels.tolist(), strict=True)
    ]
    # the cut box of the left tile, 0.9, is a part of the whole one of the right tile; another name is another object
    assert rows == [([70, 10, 110, 50], 0), ([62, 60, 90, 90], 0), ([10, 10, 40, 40], 0), ([70, 10, 110, 50], 1)]


def test_what_nothing_covers_stays_although_it_is_cut() -> None:
    places = [(0, 0, 100, 100), (100, 0, 200, 100)]
    one = merged([found(((50, 10, 100, 50), 0.9, 0)), found(((0, 10, 50, 50), 0.8, 0))], places, (100, 200))
    assert len(one) == 2
    # with the whole image, which sees the object at once
    one = merged(
        [found(((50, 10, 150, 50), 0.5, 0)), found(((50, 10, 100, 50), 0.9, 0)), found(((0, 10, 50, 50), 0.8, 0))],
        [(0, 0, 200, 100), *places],
        (100, 200),
    )
    assert one.boxes.tolist() == [[50, 10, 150, 50]]


def test_nothing_found_is_nothing() -> None:
    one = merged([found(), found()], [(0, 0, 100, 100), (50, 0, 150, 100)], (100, 150))
    assert len(one) == 0


@pytest.mark.parametrize(("text", "sides"), [("640", (640, 640)), ("640x480", (640, 480)), (" 64X32 ", (64, 32))])
def test_what_a_command_says(text: str, sides: tuple[int, int]) -> None:
    config = parsed_tiles(text)
    assert (config.width, config.height) == sides


@pytest.mark.parametrize("text", ["", "x", "640x", "8", "640 480", "99999999"])
def test_what_a_command_may_not_say(text: str) -> None:
    with pytest.raises(ConfigError, match="--tiles"):
        parsed_tiles(text)


@pytest.mark.slow
def test_cells_of_a_large_image_are_found_once_each() -> None:
    predictor = METR.from_pretrained(SHIPPED, device="cpu").predictor(["RBC", "WBC"])
    # on a grid that tiles cut through, one cell exactly where four of them meet
    places = [(x, y, (x + y) % 600 == 0) for x in range(75, 1500, 150) for y in range(75, 1200, 150)]
    cells = [Cell(x, y, 60 if white else 45, white=white) for x, y, white in places]
    image = np.asarray(drawn(cells, 1500, 1200))
    tiled = TiledPredictor(predictor, TilesConfig(width=480, height=480))
    (prediction,) = tiled.detect_many([image])
    assert prediction.size == (1200, 1500)
    assert prediction.detections is not None
    sure = prediction.detections.scores > 0.5
    boxes = prediction.detections.boxes[sure]
    expected = torch.tensor([cell.box for cell in cells], dtype=torch.float32)
    overlaps = paired_iou(boxes[:, None].expand(-1, len(cells), -1), expected[None].expand(len(boxes), -1, -1)) > 0.6
    assert overlaps.any(0).float().mean() >= 0.95  # of the cells are found
    assert overlaps.sum(0).max() <= 2  # whatever name they have
    assert len(boxes) < 1.1 * len(cells)
    alone = predictor.detect(image)
    assert (alone.scores > 0.5).sum() < len(boxes)
