"""Images with more objects of a name than it has queries."""

from pathlib import Path

import numpy as np
import pytest

from metr.data.joint import open_joint
from metr.data.records import ImageRecord, InMemoryAnnotations
from metr.inference.selection import queries_a_name
from metr.models.config import CategoryConfig, DetectorConfig, QueryConfig
from metr.training.crowds import crowd_advice, crowding

from tiny import TinyRun


def record(labels: list[int], ignored: int = 0) -> ImageRecord:
    """An image with these objects, of which the last ones are ignored."""
    count = len(labels)
    return ImageRecord(
        image_id=0,
        path=Path("image.png"),
        width=64,
        height=64,
        boxes=np.ones((count, 4), dtype=np.float32),
        labels=np.array(labels, dtype=np.int64),
        areas=np.ones(count),
        ignore=np.arange(count) >= count - ignored,
    )


def test_what_is_left_out_equals_a_count_by_hand() -> None:
    rng = np.random.default_rng(3)
    labels = [rng.integers(0, 3, rng.integers(0, 15)).tolist() for _ in range(60)]
    records = (*(record(each) for each in labels), record([1] * 30, ignored=26))
    annotations = InMemoryAnnotations(name="x", split="train", categories=("a", "b", "c"), records=records)
    found = crowding(annotations, 4)
    counted = [[each.count(label) for label in range(3)] for each in [*labels, [1] * 4]]
    over = [sum(max(0, count - 4) for count in row) for row in counted]
    assert (found.images, found.crowded, found.left_out) == (61, sum(map(bool, over)), sum(over))
    assert found.objects == sum(map(sum, counted))
    assert found.most == max(map(max, counted))
    assert any(row["abc".index(found.name)] == found.most for row in counted)
    many = InMemoryAnnotations(name="x", split="train", categories=("a",), records=(record([0] * 9),) * 999)
    assert crowding(many, 4).images == 200, "no more are looked at"


@pytest.mark.parametrize(
    ("options", "queries"),
    [
        ({}, {1: 40, 2: 30, 3: 20, 9: 20}),
        ({"layout": "budget"}, {1: 40, 9: 40}),
        ({"varied": (5, 30)}, {1: 40, 9: 40}),
        ({"layout": "places", "content": "place_only"}, {1: 60, 9: 60}),
    ],
)
def test_queries_of_a_name(options: dict[str, object], queries: dict[int, int]) -> None:
    config = DetectorConfig(
        categories=CategoryConfig(kept=3), queries=QueryConfig(**{"number": 60, "ceiling": 40, "floor": 1} | options)
    )
    assert {names: queries_a_name(names, config) for names in queries} == queries


def test_what_helps_is_told(tiny_run: TinyRun) -> None:
    """With one query a name whatever stands there twice is told of; with what is advised nothing is."""
    joint = open_joint(tiny_run.data)
    config = DetectorConfig(queries=QueryConfig(number=24, ceiling=1, floor=1))
    told = [*crowd_advice(joint, config, from_nothing=True)]
    assert told
    for line in told:
        assert "a name has 1 query in an image, which leaves out" in line
        assert "--set model.queries.ceiling=" in line
    ceiling = max(int(line.rpartition("ceiling=")[2]) for line in told)
    enough = DetectorConfig(queries=QueryConfig(number=24 * ceiling, ceiling=ceiling, floor=1))
    assert not [*crowd_advice(joint, enough, from_nothing=True)]
    assert not any("--set" in line for line in crowd_advice(joint, config, from_nothing=False))
