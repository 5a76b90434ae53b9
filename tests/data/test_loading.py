"""Loaders: the same batches whatever the workers and wherever a run was cut; annotations are not copied."""

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from synthetic_images import make_annotations, make_dataset

from metr.data.config import LoaderConfig, ResizeConfig
from metr.data.dataset import DetectionDataset
from metr.data.index.annotation_index import AnnotationIndex, LabelMap, write_index
from metr.data.loading import (
    IssueList,
    build_evaluation_loader,
    build_train_loader,
    explained_loss_of_workers,
    shape_groups,
)
from metr.data.records import DataIssue, ImageRecord, InMemoryAnnotations
from metr.errors import DataError
from metr.structures import Batch

FIT = ResizeConfig(mode="fit", size=48, longest=96)


def mixed(folder: Path, **settings: object) -> list[DetectionDataset]:
    return [
        make_dataset(make_annotations(folder, name, count), **settings) for name, count in (("cells", 7), ("fish", 3))
    ]


def some(datasets: Sequence[DetectionDataset], steps: int, workers: int = 0, **options: int) -> list[Batch]:
    loader = build_train_loader(datasets, LoaderConfig(batch_size=4, workers=workers), seed=3, **options)  # type: ignore[arg-type]
    with closing(iter(loader)) as batches:  # type: ignore[type-var]
        return list(islice(batches, steps))


def assert_same(left: Batch, right: Batch) -> None:
    assert left.image_ids == right.image_ids
    assert left.datasets == right.datasets
    assert left.sizes == right.sizes
    assert torch.equal(left.images, right.images)
    assert torch.equal(left.padding_mask, right.padding_mask)
    assert left.targets.noise_seeds == right.targets.noise_seeds
    for f in fields(left.targets):
        one, other = getattr(left.targets, f.name), getattr(right.targets, f.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, f.name


def broken(annotations: InMemoryAnnotations, *indices: int) -> InMemoryAnnotations:
    for index in indices:
        annotations.records[index].path.write_bytes(b"no image")
    return annotations


def test_a_resumed_run_gets_the_very_same_batches(tmp_path: Path) -> None:
    datasets = mixed(tmp_path, sizes=(32, 64))
    whole = some(datasets, 7)
    assert {batch.images.shape[-1] for batch in whole} == {32, 64}
    state = build_train_loader(datasets, LoaderConfig(batch_size=4, workers=0)).sampler.samples_after(3)
    torch.rand(17)  # the global generator has no say
    for before, after in zip(whole[3:], some(datasets, 4, start=state), strict=True):
        assert_same(before, after)


def test_workers_change_nothing(tmp_path: Path) -> None:
    datasets = mixed(tmp_path)
    broken(datasets[0].annotations, 2)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    for alone, helped in zip(some(datasets, 5), some(datasets, 5, workers=2), strict=True):
        assert_same(alone, helped)
    assert torch.equal(torch.get_rng_state(), state)


def test_processes_share_the_samples(tmp_path: Path) -> None:
    datasets = mixed(tmp_path)
    loader = build_train_loader(datasets, LoaderConfig(batch_size=8, workers=0), seed=3)
    with closing(iter(loader)) as batches:  # type: ignore[type-var]
        alone = [image_id for batch in islice(batches, 2) for image_id in batch.image_ids]
    left, right = (some(datasets, 2, rank=rank, world=2) for rank in range(2))
    together = [
        i for a, b in zip(left, right, strict=True) for pair in zip(a.image_ids, b.image_ids, strict=True) for i in pair
    ]
    assert together == alone


class Counted:
    """Annotations that refuse to be copied to another process."""

    def __init__(self, inner: InMemoryAnnotations) -> None:
        self.inner, self.name, self.split, self.format = inner, inner.name, inner.split, inner.format
        self.categories, self.issues = inner.categories, inner.issues
        self.asked = 0

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> ImageRecord:
        self.asked += 1
        return self.inner[index]

    def __reduce__(self) -> tuple[object, ...]:
        raise AssertionError("annotations were pickled")


def test_workers_inherit_the_annotations(tmp_path: Path) -> None:
    annotations = Counted(make_annotations(tmp_path, "cells", 7))
    assert len(some([make_dataset(annotations)], 3, workers=2)) == 3
    assert len(list(build_evaluation_loader(make_dataset(annotations, training=False), 4, workers=1))) == 2
    # Records are read where the images are: none in this process.
    assert annotations.asked == 0


def test_another_process_gets_the_place_of_an_index_not_its_records(tmp_path: Path) -> None:
    sizes = []
    for count in (4, 40):
        annotations = make_annotations(tmp_path / str(count), "cells", count)
        path = tmp_path / f"{count:02}.arrow"
        write_index(path, annotations.records, root=tmp_path)
        index = AnnotationIndex(path, LabelMap.identity(annotations.categories), name="cells", split="train")
        dataset = make_dataset(index, training=False)
        sent = ForkingPickler.dumps(dataset)
        sizes.append(len(sent))
        received, original = ForkingPickler.loads(sent)[3], dataset[3]
        assert torch.equal(received.image, original.image)
        assert torch.equal(received.targets.boxes, original.targets.boxes)
    assert sizes[0] == sizes[1] < 5000


def test_unreadable_images_are_listed_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make_dataset(broken(make_annotations(tmp_path), 0, 3))
    loader = build_train_loader([dataset], LoaderConfig(batch_size=4, workers=1))
    with caplog.at_level(logging.WARNING, logger="metr"), closing(iter(loader)) as batches:  # type: ignore[type-var]
        ids = {image_id for batch in islice(batches, 8) for image_id in batch.image_ids}
    assert ids == {"cells-1", "cells-2", "cells-4", "cells-5"}
    assert sorted(Path(issue.where).name for issue in loader.issues) == ["0.png", "3.png"]
    assert sorted(record.args[1] for record in caplog.records) == sorted(issue.where for issue in loader.issues)  # type: ignore[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_without_readable_images_stops_the_run(tmp_path: Path, workers: int) -> None:
    dataset = make_dataset(broken(make_annotations(tmp_path), *range(6)))
    loader = build_train_loader([dataset], LoaderConfig(batch_size=4, workers=workers))
    with (
        pytest.raises(DataError, match=r"^cells: 20 images in a row(.|\n)*not an image"),
        closing(iter(loader)) as batches,
    ):  # type: ignore[type-var]
        next(batches)


def test_a_dataset_without_images_stops_the_run(tmp_path: Path) -> None:
    datasets = [make_dataset(make_annotations(tmp_path, name, 0)) for name in ("cells", "fish")]
    with pytest.raises(DataError, match="cells, fish: no images"):
        build_train_loader(datasets, LoaderConfig(workers=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_shows_every_image_once_in_groups_of_one_shape(tmp_path: Path, workers: int) -> None:
    annotations = make_annotations(tmp_path, "cells", 11, shapes=((48, 64), (64, 48), (48, 60), (50, 300)))
    dataset = make_dataset(broken(annotations, 5), training=False, resize=FIT)
    loader = build_evaluation_loader(dataset, 2, workers=workers)
    for _ in range(2):
        ids: list[int | str] = []
        for batch in loader:
            shapes = {tuple(-(-side // 32) for side in size) for size in batch.sizes}
            assert len(shapes) == 1
            assert len(batch.image_ids) <= 2
            ids += batch.image_ids
        expected = [f"cells-{i}" for i in range(11) if i != 5]
        assert ids != expected
        assert loader.in_order(ids) == expected
    assert [Path(issue.where).name for issue in loader.issues] == ["5.png"]


def test_evaluation_of_squares_keeps_the_order_and_splits_over_processes(tmp_path: Path) -> None:
    dataset = make_dataset(make_annotations(tmp_path, "cells", 7, shapes=((48, 64), (64, 48))), training=False)
    assert [batch.image_ids for batch in build_evaluation_loader(dataset, 3, workers=0)] == [
        ("cells-0", "cells-1", "cells-2"),
        ("cells-3", "cells-4", "cells-5"),
        ("cells-6",),
    ]
    second = build_evaluation_loader(dataset, 3, workers=0, rank=1, world=2)
    assert [batch.image_ids for batch in second] == [("cells-1", "cells-3", "cells-5")]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 16])
def test_processes_have_equal_shares_of_every_shape(tmp_path: Path, count: int, world: int) -> None:
    annotations = make_annotations(tmp_path, "cells", count, shapes=((48, 64), (64, 48), (33, 200)))
    dataset = make_dataset(annotations, training=False, resize=FIT)
    shapes = shape_groups(dataset, range(count), 100, 32)
    shares = [shape_groups(dataset, range(count), 2, 32, rank, world) for rank in range(world)]
    dealt = [[index for batch in share for index in batch] for share in shares]
    assert sorted(index for share in dealt for index in share) == list(range(count)), "each once, none repeated"
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    for shape in shapes:
        numbers = [len({*share} & {*shape}) for share in dealt]
        assert max(numbers) - min(numbers) <= 1
    for batch in (batch for share in shares for batch in share):
        assert any({*batch} <= {*shape} for shape in shapes)
        assert 1 <= len(batch) <= 2


def test_groups_match_what_each_image_gets_alone(tmp_path: Path) -> None:
    annotations = make_annotations(tmp_path, "cells", 9, shapes=((48, 64), (64, 48), (33, 32)))
    dataset = make_dataset(annotations, training=False, resize=FIT)
    groups = shape_groups(dataset, range(9), 8, 32)
    assert sorted(index for group in groups for index in group) == list(range(9))
    for batch in build_evaluation_loader(dataset, 8, workers=0):
        for row, image_id in enumerate(batch.image_ids):
            index = int(str(image_id).split("-")[1])
            (alone,) = build_evaluation_loader(
                make_dataset(only(annotations, index), training=False, resize=FIT), 1, workers=0
            )
            assert torch.equal(alone.images[0], batch.images[row])


def only(annotations: InMemoryAnnotations, index: int) -> InMemoryAnnotations:
    return InMemoryAnnotations(
        name=annotations.name,
        split="val",
        categories=annotations.categories,
        records=annotations.records[index : index + 1],
    )


def test_an_empty_split_evaluates_to_nothing(tmp_path: Path) -> None:
    dataset = make_dataset(make_annotations(tmp_path, "cells", 0), training=False)
    loader = build_evaluation_loader(dataset, 4)
    assert list(loader) == []
    assert loader.in_order([]) == []


class Fatal(Counted):
    """Annotations that end the process that asks for a record."""

    def __getitem__(self, index: int) -> ImageRecord:
        os.kill(os.getpid(), signal.SIGKILL)
        return self.inner[index]


def test_a_killed_worker_is_explained(tmp_path: Path) -> None:
    dataset = make_dataset(Fatal(make_annotations(tmp_path)), training=False)
    with pytest.raises(DataError, match=r"died(.|\n)*fewer workers"):
        list(build_evaluation_loader(dataset, 4, workers=1))


def kill_and_sleep(worker: int) -> None:
    os.kill(worker, signal.SIGKILL)
    time.sleep(60)


@pytest.mark.slow
def test_a_killed_worker_is_explained_wherever_the_main_process_is(tmp_path: Path) -> None:
    """torch says it in a signal handler, for example while a checkpoint is written."""
    others = {*multiprocessing.active_children()}
    loader = build_train_loader(mixed(tmp_path), LoaderConfig(batch_size=2, workers=1))
    with closing(iter(loader)) as batches:  # type: ignore[type-var]
        next(batches)
        (worker,) = {*multiprocessing.active_children()} - others
        with pytest.raises(DataError, match=r"died(.|\n)*fewer workers"), explained_loss_of_workers():
            kill_and_sleep(worker.pid or 0)


def test_issues_are_logged_up_to_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    issues = IssueList()
    with caplog.at_level(logging.WARNING, logger="metr"):
        issues.add(DataIssue(kind="unreadable image", where=str(i % 40)) for i in range(200))
    assert len(issues.all()) == 40
    assert len(caplog.records) == IssueList.LOGGED + 1
