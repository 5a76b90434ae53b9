"""Mosaics: boxes stay on their pixels, nothing is annotated that is not everywhere, and a sample's number decides."""

from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_images import NAMES, VOCABULARY, make_annotations, make_dataset

from metr.boxes import cxcywh_to_xyxy
from metr.data.config import AugmentationConfig, LoaderConfig, MosaicConfig, ResizeConfig
from metr.data.dataset import ATTEMPTS, DetectionDataset, Example, Missing, MixedDataset
from metr.data.loading import build_train_loader
from metr.data.records import InMemoryAnnotations
from metr.data.sampling import SampleKey
from metr.data.transforms import Sample, build_transforms, draw_mosaic_window, side_by_side
from metr.errors import ConfigError
from metr.structures import Batch

ALWAYS = {"probability": 1.0, "until": 1.0}
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)
GREY = (128, 128, 128)


def painted(place: int, rng: np.random.Generator) -> Sample:
    """One rectangle of the colour of its place; the label says which."""
    height, width = int(rng.integers(40, 120)), int(rng.integers(40, 120))
    image = np.full((height, width, 3), GREY, np.uint8)
    x, y = int(rng.integers(0, width - 20)), int(rng.integers(0, height - 20))
    box = np.array([[x, y, int(rng.integers(x + 12, width + 1)), int(rng.integers(y + 12, height + 1))]], np.float64)
    image[y : int(box[0, 3]), x : int(box[0, 2])] = COLOURS[place]
    return Sample(image=image, boxes=box, labels=np.array([place]), ignore=np.zeros(1, bool))


def extent(image: np.ndarray, place: int) -> np.ndarray | None:
    """The xyxy box of the pixels that are nearer to a colour than to any other."""
    palette = np.concatenate([COLOURS, [GREY]]).astype(np.int64)
    nearest = ((image[:, :, None].astype(np.int64) - palette) ** 2).sum(-1).argmin(-1)
    rows, columns = np.nonzero(nearest == place)
    return None if not len(rows) else np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("resize", [ResizeConfig(size=128), ResizeConfig(mode="fit", size=96, longest=160)])
def test_boxes_stay_on_their_pixels(resize: ResizeConfig) -> None:
    settings = {"resize": resize, "mosaic": ALWAYS, "colour": 0.0, "fill": GREY}
    transforms = build_transforms(AugmentationConfig.checked(settings), training=True)
    counts = np.zeros(4, np.int64)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        result = transforms.mosaic([painted(place, rng) for place in range(4)], rng)
        assert len(result.boxes) == len(result.labels) == len(result.ignore)
        if resize.mode == "stretch":
            assert result.image.shape == (128, 128, 3)
        for place in range(4):
            found, rows = extent(result.image, place), np.flatnonzero(result.labels == place)
            if not len(rows):  # what is seen at all has a box, ignored or not
                assert found is None or min(found[2:] - found[:2]) <= 1
                continue
            box = result.boxes[rows[0]]
            counts[place] += not result.ignore[rows[0]]
            if min(box[2:] - box[:2]) >= 4:
                assert found is not None
                np.testing.assert_allclose(found, box, atol=1.6)
    assert (counts > 3).all()  # every place is really shown


def test_a_window_shows_all_four_and_cuts_like_a_crop() -> None:
    rng = np.random.default_rng(0)
    shapes = [(30, 10), (7, 50), (90, 40), (21, 3)]
    empty = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, np.int64), "ignore": np.zeros(0, bool)}
    parts = [Sample(image=np.full((*shape, 3), place, np.uint8), **empty) for place, shape in enumerate(shapes)]
    canvas, (x, y) = side_by_side(parts, GREY)
    assert (canvas.height, canvas.width, x, y) == (120, 90, 40, 30)
    around = [(x - 1, y - 1), (x, y - 1), (x - 1, y), (x, y)]
    assert [int(canvas.image[row, column, 0]) for column, row in around] == [0, 1, 2, 3]
    for _ in range(50):
        window = draw_mosaic_window(canvas, (x, y), (0.5, 2.0), rng)
        assert 0 <= window.left < x < window.left + window.width <= 90
        assert 0 <= window.top < y < window.top + window.height <= 120
    whole = draw_mosaic_window(canvas, (x, y), (0.5, 0.5), rng)
    assert (whole.width, whole.height) == (90, 120)
    with pytest.raises(ConfigError, match="least <= most"):
        MosaicConfig.checked({"scale": (1.0, 0.5)})


def sample(dataset: DetectionDataset, number: int, index: int = 0, *, mosaics: bool = True) -> Example:
    example = dataset.sample(SampleKey(number=number, dataset=0, index=index, seed=1), mosaics=mosaics)
    assert isinstance(example, Example)
    return example


def test_a_sample_key_decides_which_images_are_joined(tmp_path: Path) -> None:
    annotations = make_annotations(tmp_path, "fish", 8)
    plain, dataset = make_dataset(annotations), make_dataset(annotations, mosaic=ALWAYS)
    some = make_dataset(annotations, mosaic={"probability": 0.5})
    assert [sample(plain, n, 3).image_id for n in range(4)] == ["fish-3"] * 4
    example = sample(dataset, 5, 3)
    ids = str(example.image_id).split(" + ")
    assert (len(ids), ids[0], example.position, example.original_size) == (4, "fish-3", 3, (48, 64))
    assert torch.equal(example.image, sample(dataset, 5, 3).image)
    assert not torch.equal(example.image, sample(dataset, 6, 3).image)
    boxes = cxcywh_to_xyxy(example.targets.boxes)
    assert ((boxes >= 0) & (boxes <= 1)).all()
    names = {VOCABULARY.names[row] for row in example.targets.labels[0]}
    assert names <= set(NAMES["fish"])
    # without mosaics a sample is what it always was
    assert torch.equal(sample(dataset, 5, 3, mosaics=False).image, sample(plain, 5, 3).image)
    assert 5 < sum(" + " in str(sample(some, n).image_id) for n in range(40)) < 35
    one = make_dataset(replace(annotations, records=annotations.records[3:4]), mosaic=ALWAYS)
    assert sample(one, 0).image_id == "fish-3 + fish-3 + fish-3 + fish-3"


def test_only_what_every_part_annotates_is_annotated(tmp_path: Path) -> None:
    annotations = make_annotations(tmp_path, "fish", 4)
    known = (None, (0, 1), (1, 2), ())
    records = tuple(replace(one, annotated=which) for one, which in zip(annotations.records, known, strict=True))
    dataset = make_dataset(replace(annotations, records=records), mosaic=ALWAYS, unannotated="negative")
    seen = set()
    for number in range(24):
        example = sample(dataset, number)
        targets, ids = example.targets, str(example.image_id).split(" + ")
        expected = set.intersection(*(set(known[int(one[-1])] or range(3 * (one == "fish-0"))) for one in ids))
        assert {VOCABULARY.names[row] for row in targets.annotated[0].nonzero()} == {NAMES["fish"][i] for i in expected}
        # objects of other categories keep their boxes; what is not annotated is not assumed to be absent
        assert not targets.assumed_negative[0][dataset.rows].any()
        seen.add((frozenset(expected), bool((~targets.annotated[0][targets.labels[0]]).any())))
    assert {unknown for _, unknown in seen} == {True, False}
    assert len({expected for expected, _ in seen}) >= 3


def test_unreadable_parts_are_replaced(tmp_path: Path) -> None:
    annotations = make_annotations(tmp_path)
    for index in (0, 2, 3):
        annotations.records[index].path.write_bytes(b"no image")
    dataset = make_dataset(annotations, mosaic=ALWAYS)
    for number in range(8):
        example = sample(dataset, number)
        assert set(str(example.image_id).split(" + ")) <= {"cells-1", "cells-4", "cells-5"}
        assert Path(example.issues[0].where).name == "0.png"
    broken = make_dataset(replace(annotations, records=annotations.records[2:4]), mosaic=ALWAYS)
    missing = broken.sample(SampleKey(number=0, dataset=0, index=1, seed=1))
    assert isinstance(missing, Missing)
    assert len(missing.issues) == ATTEMPTS


def test_mosaics_end_and_resume_and_need_no_worker(tmp_path: Path) -> None:
    made: list[InMemoryAnnotations] = [make_annotations(tmp_path, "cells", 7), make_annotations(tmp_path, "fish", 3)]
    datasets = [make_dataset(one, mosaic={"probability": 1.0, "until": 0.5}) for one in made]

    def batches(steps: int, workers: int = 0, **options: int) -> list[Batch]:
        config = LoaderConfig(batch_size=2, workers=workers)
        with closing(iter(build_train_loader(datasets, config, seed=3, batches=6, **options))) as stream:  # type: ignore[type-var,arg-type]
            return list(islice(stream, steps))

    alone = batches(6)
    joined = [[" + " in str(one) for one in batch.image_ids] for batch in alone]
    assert joined == [[True, True]] * 3 + [[False, False]] * 3
    for one, other in zip(alone[2:], batches(4, workers=2, start=4), strict=True):
        assert one.image_ids == other.image_ids
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets.boxes, other.targets.boxes)
    # two processes show twice the images, and stop at the same step
    ranks = [batches(6, rank=rank, world=2) for rank in range(2)]
    assert [" + " in str(part[step].image_ids[0]) for part in ranks for step in (2, 3)] == [True, False] * 2
    endless = MixedDataset(datasets)[SampleKey(number=10**6, dataset=1, index=1, seed=0)]
    assert isinstance(endless, Example)
    assert " + " in str(endless.image_id)
