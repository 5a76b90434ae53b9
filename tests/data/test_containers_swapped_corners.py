"""Swapped corners in TFRecord files, shards and tables: sorted and counted as in other formats of corners."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import test_containers_tfrecord as tfrecord
from reader_trees import NAMES, ExpectedImage, made_up
from shard_trees import jpeg, tar, write
from test_containers_huggingface import row, save, schema
from test_readers_swapped_corners import SWAPS, boxes_of, opened, swapped

from metr.data.images import check_image

Boxes = list[tuple[int, ...]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("layout", [tfrecord.roboflow, tfrecord.numbers_alone, tfrecord.in_pixels, tfrecord.tfds])
@pytest.mark.parametrize("order", SWAPS.values(), ids=SWAPS)
def test_tfrecord(tmp_path: Path, layout: Callable[..., None], order: tuple[int, ...]) -> None:
    layout(tmp_path / "plain", made_up())
    layout(tmp_path / "swapped", swapped(made_up(), order))
    plain, source = opened(tmp_path / "plain"), opened(tmp_path / "swapped")
    assert boxes_of(source) == boxes_of(plain)
    more = {kind: count - plain.issue_counts.get(kind, 0) for kind, count in source.issue_counts.items()}
    assert {kind: count for kind, count in more.items() if count} == {"swapped corners": 1}


def tars(folder: Path, boxes: Boxes) -> str:
    """A tar of one box an image."""
    files: list[tuple[str, bytes]] = []
    for number, box in enumerate(boxes):
        told = {"objects": [{"bbox": list(box), "category": "Car"}]}
        files += [(f"{number:03d}.jpg", jpeg(40, 30, number)), (f"{number:03d}.json", json.dumps(told).encode())]
    return str(write(folder, {"train-000000.tar": tar(files)}) / "*.tar")


def tables(folder: Path, boxes: Boxes) -> str:
    """A Parquet file of one box an image."""
    item = replace(made_up()["train"][0], width=40, height=30, labels=(NAMES[0],))
    rows = []
    for number, box in enumerate(boxes):
        one: ExpectedImage = replace(item, name=f"{number}.jpg", boxes=((0, 0, 1, 1),))
        rows.append(row(one))
        rows[-1]["objects"]["bbox"] = [[float(side) for side in box]]
    save(folder / "train-00000-of-00001.parquet", rows, schema(pa.int64()))
    write(folder, {"classes.txt": "\n".join(NAMES).encode()})
    return str(folder / "*.parquet")


def corner_boxes(count: int = 12) -> Boxes:
    """Boxes right and below of the middle: read as widths and heights, they would leave the image."""
    rng = np.random.default_rng(1)
    low = rng.integers((20, 15), (28, 20), (count, 2))
    return [(int(x), int(y), int(x) + 9, int(y) + 8) for x, y in low.tolist()]


@pytest.mark.parametrize("layout", [tars, tables])
@pytest.mark.parametrize("order", SWAPS.values(), ids=SWAPS)
def test_shards(tmp_path: Path, layout: Callable[[Path, Boxes], str], order: tuple[int, ...]) -> None:
    """Where `boxes` says that they are corners."""
    plain = corner_boxes()
    changed = [tuple(plain[0][place] for place in order), *plain[1:]]
    source = opened(Path(layout(tmp_path / "shards", changed)), splits={"train": "train"}, boxes="xyxy")
    records = list(source.split("train"))
    assert [tuple(record.boxes.round().astype(int).ravel().tolist()) for record in records] == plain
    assert source.issue_counts["swapped corners"] == 1
    issue = next(one for one in source.issues if one.kind == "swapped corners")
    assert issue.where.startswith("train-0000")
    assert all(check_image(record, decode=True) is None for record in records)


@pytest.mark.parametrize("layout", [tars, tables])
def test_corners_that_nobody_called_so(tmp_path: Path, layout: Callable[[Path, Boxes], str]) -> None:
    """Shards have widths unless all boxes show corners; one that is swapped does not, and the doubt is an issue."""
    plain = corner_boxes()
    recognised = opened(Path(layout(tmp_path / "plain", plain)), splits={"train": "train"})
    assert [tuple(one.boxes.round().astype(int).ravel().tolist()) for one in recognised.split("train")] == plain
    changed = [(*plain[0][2:], *plain[0][:2]), *plain[1:]]
    counts = opened(Path(layout(tmp_path / "swapped", changed)), splits={"train": "train"}).issue_counts
    assert counts["boxes are doubtful"] == 1
    assert "swapped corners" not in counts


@pytest.mark.parametrize("layout", [tars, tables])
def test_a_negative_width_in_a_shard_is_no_swapped_corner(tmp_path: Path, layout: Callable[[Path, Boxes], str]) -> None:
    widths: Boxes = [(4, 4, -3, 8), *((n, n, 10, 8) for n in range(8))]
    source = opened(Path(layout(tmp_path / "shards", widths)), splits={"train": "train"})
    assert source.issue_counts["degenerate box"] == 1
    assert "swapped corners" not in source.issue_counts
