"""Training from shards: the batches of the same data in a folder, in every process and worker, and after a pause."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reader_trees import write_json
from shard_trees import CountingFileSystem, put, served

from metr.data.config import AugmentationConfig, LoaderConfig, MosaicConfig, ResizeConfig
from metr.data.dataset import DetectionDataset
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.export_shards import write_webdataset
from metr.data.joint import shards_of_images
from metr.data.loading import build_evaluation_loader, build_train_loader
from metr.data.sampling import EpochImages, Epochs, MixedSampler
from metr.data.shards import stores
from metr.data.transforms import build_transforms
from metr.errors import StoreError
from metr.structures import Batch
from metr.text.vocabulary import Vocabulary
from metr.training.step_report import UnreadReport
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts

Losses = list[dict[str, float]]

NAMES = ("platelet", "puffin", "red cell", "shark")


@pytest.fixture(autouse=True)
def _own_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "PAUSES", (0.0, 0.0, 0.0))
    CountingFileSystem.reset()
    yield
    CountingFileSystem.reset()


@pytest.fixture
def folder(tmp_path: Path) -> DatasetSource:
    """Twenty images in a folder, as COCO."""
    rng = np.random.default_rng(3)
    images, boxes = [], []
    (tmp_path / "folder" / "images").mkdir(parents=True)
    for number in range(20):
        pixels = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "folder" / "images" / f"{number:02d}.png")
        images.append({"id": number, "file_name": f"{number:02d}.png", "width": 48, "height": 48})
        box = [*rng.uniform(0, 20, 2).tolist(), *rng.uniform(8, 20, 2).tolist()]
        boxes.append({"id": number, "image_id": number, "category_id": number % 4, "bbox": box, "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
    content = {"images": images, "annotations": boxes, "categories": categories}
    write_json(tmp_path / "folder" / "annotations" / "train.json", content)
    return opened(tmp_path / "folder")


def opened(path: Path | str) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=path, splits={"train": "train"}))


def written(source: DatasetSource, folder: Path) -> Path:
    write_webdataset(source, folder, images_a_shard=3)
    return folder


def dataset(source: DatasetSource, mosaic: float = 0.0) -> DetectionDataset:
    config = AugmentationConfig(resize=ResizeConfig(size=32), mosaic=MosaicConfig(probability=mosaic))
    transforms = build_transforms(config, training=True)
    return DetectionDataset(source.split("train"), Vocabulary.union({"made": source.categories}), transforms)


def batches(source: DatasetSource, count: int, *, workers: int = 0, mosaic: float = 0.0, **options: Any) -> list[Batch]:
    loader = build_train_loader([dataset(source, mosaic)], LoaderConfig(batch_size=2, workers=workers), **options)
    stream = iter(loader)
    return [next(stream) for _ in range(count)]


def assert_equal(one: Sequence[Batch], other: Sequence[Batch]) -> None:
    assert [batch.image_ids for batch in one] == [batch.image_ids for batch in other]
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.targets.boxes, second.targets.boxes)
        assert torch.equal(first.targets.labels, second.targets.labels)


def in_memory(folder: Path, name: str) -> str:
    return put(f"memory://{name}", {file.name: file.read_bytes() for file in folder.iterdir()}) + "/*.tar"


def test_batches_are_those_of_the_folder(folder: DatasetSource, tmp_path: Path) -> None:
    """Two epochs; with workers and without, and resumed in the middle."""
    wanted = batches(folder, 20)
    tars = written(folder, tmp_path / "shards")
    shards = opened(f"file://{tars}/train-{{000000..000006}}.tar")
    assert_equal(batches(shards, 20), wanted)
    assert_equal(batches(shards, 20, workers=2), wanted)
    assert_equal(batches(opened(in_memory(tars, "loading")), 20), wanted)
    assert_equal(batches(shards, 7, start=26), wanted[13:])
    assert_equal(batches(shards, 7, start=26, workers=2), wanted[13:])
    assert_equal(batches(shards, 4, mosaic=0.5), batches(folder, 4, mosaic=0.5))


def test_two_processes_share_the_images(folder: DatasetSource, tmp_path: Path) -> None:
    shards = opened(written(folder, tmp_path / "shards"))
    both = [batches(shards, 5, rank=rank, world=2, workers=workers) for rank, workers in ((0, 0), (1, 2))]
    ids = [{image for batch in part for image in batch.image_ids} for part in both]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == set(range(20))


def test_workers_and_a_web_server(folder: DatasetSource, tmp_path: Path) -> None:
    """Workers are forked after the store was used: each has a connection of its own."""
    pytest.importorskip("aiohttp", reason="needs aiohttp, with which fsspec reads from the web")
    wanted = batches(folder, 8)
    with served(written(folder, tmp_path / "shards")) as (address, asked):
        shards = opened(f"{address}/train-{{000000..000006}}.tar")
        assert_equal(batches(shards, 2), wanted[:2])
        del asked[:]
        loader = build_train_loader([dataset(shards)], LoaderConfig(batch_size=2, workers=2))
        stream = iter(loader)
        found = [next(stream) for _ in range(8)]
        del stream
        assert_equal(found, wanted)
        images = [request for request in asked if request.startswith("GET")]
        assert all("bytes=" in request for request in images)
        assert len(images) >= 16
        assert not [request for request in asked if request.startswith("HEAD")]


@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.skipif(sys.platform != "linux", reason="fork"))]
)
def test_a_store_that_is_down_ends_training(folder: DatasetSource, tmp_path: Path, workers: int) -> None:
    """No image takes the place of one that cannot be reached, in training and in evaluation."""
    tars = written(folder, tmp_path / "shards")
    put("flaky://down", {file.name: file.read_bytes() for file in tars.iterdir()})
    shards = opened("flaky://down/*.tar")
    CountingFileSystem.down.update(f"train-{number:06d}.tar" for number in range(7))
    with pytest.raises(StoreError, match=r"flaky://down/train-00000\d\.tar: cannot be read after 4 attempts"):
        batches(shards, 4, workers=workers)
    with pytest.raises(StoreError, match="--resume"):
        list(build_evaluation_loader(dataset(shards), 2, workers=workers))


def test_a_flaky_store_changes_nothing(folder: DatasetSource, tmp_path: Path) -> None:
    wanted = batches(folder, 20)
    put("flaky://some", {file.name: file.read_bytes() for file in written(folder, tmp_path / "shards").iterdir()})
    shards = opened("flaky://some/*.tar")
    CountingFileSystem.fails_every = 3
    assert_equal(batches(shards, 20), wanted)


def losses(source: DatasetSource, folder: Path, steps: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> Losses:
    """The figures of each step of a short training."""
    parts = make_parts(folder)
    vocabulary = Vocabulary(names=parts.checkpoint.vocabulary.names, datasets={"made": source.categories})
    transforms = build_transforms(AugmentationConfig(resize=ResizeConfig(size=32)), training=True)
    data = [DetectionDataset(source.split("train"), vocabulary, transforms)]
    loader = partial(build_train_loader, data, LoaderConfig(batch_size=2, workers=workers))
    found: Losses = []
    step = Trainer.train_step

    def noted(self: Trainer, given: Sequence[Batch]) -> UnreadReport:
        report = step(self, given)
        found.append(dict(report.read().figures))
        return report

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", noted)
        Trainer(replace(parts, loader=loader), make_config(steps), folder / "run").fit()
    return found


@pytest.mark.slow
def test_training_is_that_of_the_folder(folder: DatasetSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty steps from memory without workers, and from tars with two workers: the same losses to the last bit."""
    tars = written(folder, tmp_path / "shards")
    wanted = losses(folder, tmp_path / "a", 20, 0, monkeypatch)
    assert len(wanted) == 20
    assert losses(opened(in_memory(tars, "training")), tmp_path / "b", 20, 0, monkeypatch) == wanted
    assert losses(opened(f"file://{tars}"), tmp_path / "c", 20, 2, monkeypatch) == wanted


def test_few_shards_at_a_time(folder: DatasetSource, tmp_path: Path) -> None:
    """An epoch shows each image once, whole shards one group after the other; any sample is known from its number."""
    shards = shards_of_images(opened(written(folder, tmp_path / "shards")).split("train"))
    assert shards is not None
    assert np.bincount(shards).tolist() == [3] * 6 + [2]
    images = EpochImages(images=20, shards=shards, shards_at_once=2)
    epochs = Epochs(images, 5, 0)
    first, second = ([epochs.image(number) for number in range(start, start + 20)] for start in (0, 20))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    for order in (first, second):
        seen = [int(shards[image]) for image in order]
        groups = [set(seen[: seen.index(shard) + 1]) for shard in dict.fromkeys(seen)]
        assert len(groups) == 7
        for place, shard in enumerate(seen):
            later = set(seen[place:]) & set(seen[:place])
            assert len(later | {shard}) <= 2
    assert Epochs(images, 5, 0).image(33) == second[13]
    sampler = MixedSampler({"made": images}, {"made": 1.0}, 2, seed=5)
    resumed = MixedSampler({"made": images}, {"made": 1.0}, 2, seed=5, start=26)
    keys = [key.index for _, batch in zip(range(20), sampler, strict=False) for key in batch]
    assert [key.index for _, batch in zip(range(7), resumed, strict=False) for key in batch] == keys[26:40]


def test_few_shards_at_a_time_with_a_loader(folder: DatasetSource, tmp_path: Path) -> None:
    shards = opened(written(folder, tmp_path / "shards"))
    config = LoaderConfig(batch_size=2, workers=0, shards_at_once=1)
    (name,) = {record.path.parent.name for record in list(shards.split("train"))[:3]}
    stream = iter(build_train_loader([dataset(shards)], config))
    ids = [image for _, batch in zip(range(10), stream, strict=False) for image in batch.image_ids]
    assert sorted(ids) == list(range(20))
    assert name == "train-000000.tar"
    place = ids.index(0)
    assert {0, 1, 2} <= set(ids[max(0, place - 2) : place + 3])
    # a folder has no shards: nothing changes
    assert_equal(
        batches(folder, 5),
        [batch for _, batch in zip(range(5), build_train_loader([dataset(folder)], config), strict=False)],
    )
