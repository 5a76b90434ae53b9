"""Tiles on real images: mosaics of 2,000 pixels are detected in about as well as the images that they are made of."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from metr.data.datasets_file import open_dataset, parse_data_arguments
from metr.data.images import exif_oriented, read_image
from metr.data.records import ImageRecord
from metr.evaluation.coco import CocoScorer
from metr.inference.config import TilesConfig
from metr.inference.tiles import TiledPredictor
from metr.model import METR
from metr.structures import Detections

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints" / "metr-nano"
COLUMNS, ROWS, WIDTH, HEIGHT = 3, 4, 640, 480  # 1,920 x 1,920 pixels


def part(found: Detections, left: int, top: int) -> Detections:
    """The detections whose middle is in one image of a mosaic, in its pixels."""
    boxes = found.boxes - torch.tensor([left, top, left, top])
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((middle >= 0) & (middle < torch.tensor([WIDTH, HEIGHT]))).all(1)
    limits = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    clipped = boxes[inside].clamp(min=0).minimum(limits)
    return replace(found, boxes=clipped, scores=found.scores[inside], labels=found.labels[inside])


def in_mosaics(records: list[ImageRecord], predictor: TiledPredictor) -> dict[int | str, Detections]:
    """What is found of each image where it is a part of a mosaic."""
    places = [(column * WIDTH, row * HEIGHT) for row in range(ROWS) for column in range(COLUMNS)]
    done: dict[int | str, Detections] = {}
    for start in range(0, len(records), len(places)):
        some = records[start : start + len(places)]
        mosaic = np.full((ROWS * HEIGHT, COLUMNS * WIDTH, 3), 124, dtype=np.uint8)
        for (left, top), record in zip(places, some, strict=False):
            mosaic[top : top + HEIGHT, left : left + WIDTH] = read_image(record.path)
        found = predictor.detect(mosaic)
        done |= {record.image_id: part(found, left, top) for (left, top), record in zip(places, some, strict=False)}
    return done


@pytest.mark.slow
def test_mosaics_reach_nine_tenths_of_the_single_images(shared: Path) -> None:
    if not (shared / "data/bccd").is_dir():
        pytest.skip("needs the dataset ../shared/data/bccd beside the checkout")
    (spec,) = parse_data_arguments([str(shared / "data/bccd")])
    annotations = exif_oriented(open_dataset(spec).split("val"))
    records = [annotations[index] for index in range(len(annotations))]
    assert {(record.width, record.height) for record in records} == {(WIDTH, HEIGHT)}
    predictor = METR.from_pretrained(SHIPPED, device="cpu").predictor(list(annotations.categories))
    scorer = CocoScorer(annotations)
    single = scorer.score({one.image_id: predictor.detect(read_image(one.path)) for one in records}).ap
    values = {
        "as one image": TiledPredictor(predictor, TilesConfig(width=16_384, height=16_384)),
        "tiles of 640": TiledPredictor(predictor, TilesConfig()),
        "tiles of 640x480": TiledPredictor(predictor, TilesConfig(width=640, height=480)),
    }
    scores = {what: scorer.score(in_mosaics(records, tiled)).ap for what, tiled in values.items()}
    print(f"single images {single:.1f};", "; ".join(f"{k} {v:.1f}" for k, v in scores.items()), file=sys.stderr)
    assert scores["tiles of 640"] >= 0.9 * single
    assert scores["tiles of 640x480"] >= 0.9 * single
    assert scores["as one image"] < 0.5 * single
