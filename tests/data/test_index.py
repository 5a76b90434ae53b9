"""The index: what is written is read back, mapped and not copied, built once, and built again when it must be."""

import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reader_trees import coco_plain, csv_plain, made_up, save_image, voc_beside, write_text, yolo_plain

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.index import annotation_index as index
from metr.data.index import cache as index_cache
from metr.data.index.annotation_index import AnnotationIndex, LabelMap, divide_index, write_index
from metr.data.records import Annotations, DataIssue, ImageRecord
from metr.errors import DataError

ROOT = Path("/nowhere/данные")


def made_records(count: int = 40, seed: int = 0) -> list[ImageRecord]:
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        boxes = int(rng.integers(0, 4)) if number else 0
        low = rng.uniform(0, 50, (boxes, 2))
        records.append(
            ImageRecord(
                image_id=number * 3 if number % 2 else f"no {number}",
                path=ROOT / f"train/snímek {number}.jpg",
                width=100 + number,
                height=200,
                boxes=np.concatenate([low, low + 5], axis=1).astype(np.float32),
                labels=rng.integers(0, 3, boxes),
                areas=rng.uniform(1, 25, boxes).astype(np.float32),
                ignore=rng.random(boxes) < 0.3,
                annotated=(None, (), (0, 2))[number % 3],
            )
        )
    return records


def assert_same(one: ImageRecord, other: ImageRecord) -> None:
    assert (one.image_id, one.path, one.width, one.height) == (other.image_id, other.path, other.width, other.height)
    for name in ("boxes", "labels", "areas", "ignore"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.annotated == other.annotated


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of 40 records in pieces of 7."""
    monkeypatch.setattr(index, "_PIECE", 7)
    counts = write_index(tmp_path / "a.arrow", iter(made_records()), root=ROOT)
    assert counts.tolist() == np.bincount(np.concatenate([record.labels for record in made_records()])).tolist()
    return tmp_path / "a.arrow"


LABELS = LabelMap.identity(("a", "b", "c"))


def test_round_trip(written: Path) -> None:
    issue = DataIssue(kind="missing image", where="x")
    annotations: Annotations = AnnotationIndex(written, LABELS, name="made", split="val", format="voc", issues=[issue])
    records = made_records()
    assert len(annotations) == 40
    for place in [*range(40), -1, -40]:
        assert_same(annotations[place], records[place])
    assert (annotations.name, annotations.split, annotations.format) == ("made", "val", "voc")
    assert annotations.categories == ("a", "b", "c")
    assert list(annotations.issues) == [issue]
    for place in (40, -41):
        with pytest.raises(IndexError, match=f"image {place} of 40"):
            annotations[place]


def test_records_are_plain_arrays(written: Path) -> None:
    """torch takes them without a warning, and changing them changes no file."""
    annotations = AnnotationIndex(written, LABELS)
    record = next(record for record in annotations if len(record.boxes))
    torch.from_numpy(record.boxes).zero_()
    for values in (record.labels, record.areas, record.ignore):
        assert torch.from_numpy(values).shape == (len(record.boxes),)
    assert (record.boxes == 0).all()
    assert record.labels.dtype == np.int64
    assert any((again.boxes != 0).any() for again in annotations if again.path == record.path)


def test_counts(written: Path) -> None:
    counts, records = AnnotationIndex(written, LABELS).counts(), made_records()
    labels, ignore = (np.concatenate([getattr(record, name) for record in records]) for name in ("labels", "ignore"))
    assert counts.images == 40
    assert counts.empty == sum(not (~record.ignore).any() for record in records)
    assert counts.boxes.tolist() == np.bincount(labels[~ignore], minlength=3).tolist()
    assert counts.ignored.tolist() == np.bincount(labels[ignore], minlength=3).tolist()


def test_labels_are_mapped(written: Path) -> None:
    labels = LabelMap(categories=("x", "y"), rows=np.array([1, 0, 1]), annotated=(0,))
    annotations, records = AnnotationIndex(written, labels), made_records()
    for found, record in zip(annotations, records, strict=True):
        assert_same(found, replace(record, labels=np.array([1, 0, 1])[record.labels], annotated=(0,)))
    assert annotations.counts().boxes.sum() == AnnotationIndex(written, LABELS).counts().boxes.sum()


def test_what_a_image_annotates_follows_the_labels(written: Path) -> None:
    """A joined category is annotated where all that it was joined from are; a dropped one is not asked for."""
    joined = LabelMap(categories=("x", "y"), rows=np.array([0, 1, 0]))
    halved = LabelMap(categories=("x", "y"), rows=np.array([0, 0, 1]))
    dropped = LabelMap(categories=("x",), rows=np.array([0, -1, -1]))
    for labels, expected in ((joined, (0,)), (halved, (1,)), (dropped, (0,))):
        assert [AnnotationIndex(written, labels)[place].annotated for place in range(3)] == [None, (), expected]


def test_pickling_carries_the_path(written: Path) -> None:
    annotations = AnnotationIndex(written, LABELS, name="made")
    assert len(annotations[5].boxes) >= 0  # views are open
    data = pickle.dumps(annotations)
    assert len(data) < 2000
    again = pickle.loads(data)
    assert again.name == "made"
    for one, other in zip(again, annotations, strict=True):
        assert_same(one, other)


def test_dividing(written: Path, tmp_path: Path) -> None:
    chosen = np.random.default_rng(0).random(40) < 0.3
    chosen[7:14] = True  # a whole piece
    divide_index(written, chosen, into=(tmp_path / "rest.arrow", tmp_path / "chosen.arrow"))
    records = made_records()
    for name, mask in (("rest", ~chosen), ("chosen", chosen)):
        part = AnnotationIndex(tmp_path / f"{name}.arrow", LABELS)
        assert len(part) == mask.sum()
        for found, place in zip(part, np.flatnonzero(mask), strict=True):
            assert_same(found, records[place])


def test_nothing_at_all(tmp_path: Path) -> None:
    write_index(tmp_path / "a.arrow", [], root=ROOT)
    annotations = AnnotationIndex(tmp_path / "a.arrow", LABELS)
    assert len(annotations) == 0
    assert annotations.counts().boxes.tolist() == [0, 0, 0]


def test_a_stream_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one piece of records is alive while an index is written."""
    monkeypatch.setattr(index, "_PIECE", 5)
    alive, most = 0, 0

    class Counted(ImageRecord):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[ImageRecord]:
        nonlocal alive, most
        for record in made_records(100):
            counted = Counted(**vars(record))
            alive += 1
            most = max(most, alive)
            yield counted
            del counted

    write_index(tmp_path / "a.arrow", stream(), root=ROOT)
    assert most <= 11


@pytest.mark.parametrize("content", [None, b"", b"not an index"])
def test_broken_files(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.arrow"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="not readable as an index"):
        AnnotationIndex(path, LABELS)


# The cache ------------------------------------------------------------------------------------------------------------


def opened(tmp_path: Path, **options: object) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=tmp_path / "data", **options), tmp_path / "cache")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that indices were built in."""
    found: list[Path] = []
    build = index_cache._build

    def counted(reader: object, plan: object, place: Path) -> object:
        found.append(place)
        return build(reader, plan, place)

    monkeypatch.setattr(index_cache, "_build", counted)
    return found


@pytest.mark.parametrize("write", [coco_plain, voc_beside, yolo_plain, csv_plain])
def test_built_once(tmp_path: Path, builds: list[Path], write: object) -> None:
    write(tmp_path / "data", made_up())
    first = list(opened(tmp_path).split("train"))
    second = opened(tmp_path)
    assert len(builds) == 1
    for one, other in zip(first, second.split("train"), strict=True):
        assert_same(one, other)
    opened(tmp_path, renames={"red cell": "cell"}, exhaustive=["cell"])  # needs no new index
    assert len(builds) == 1


def test_built_again_when_an_annotation_file_changes(tmp_path: Path, builds: list[Path]) -> None:
    yolo_plain(tmp_path / "data", made_up())
    before = opened(tmp_path).split("train").counts().boxes.sum()
    label = next((tmp_path / "data" / "labels" / "train").iterdir())
    label.write_text(label.read_text() + "0 0.5 0.5 0.5 0.5\n")
    assert opened(tmp_path).split("train").counts().boxes.sum() == before + 1
    assert len(builds) == 2


def test_built_again_when_a_file_comes_up(tmp_path: Path, builds: list[Path]) -> None:
    """The text file of an image that had none; an image that was missing."""
    yolo_plain(tmp_path / "data", made_up())
    before = opened(tmp_path).split("train").counts()
    assert before.empty == 1
    write_text(tmp_path / "data" / "labels" / "train" / "train 01 снимок.txt", "0 0.5 0.5 0.5 0.5\n")
    assert opened(tmp_path).split("train").counts().empty == 0
    save_image(tmp_path / "data" / "images" / "train" / "new.jpg")
    assert opened(tmp_path).split("train").counts().images == before.images + 1
    assert len(builds) == 3


def test_built_again_when_a_missing_image_is_put_in_place(tmp_path: Path, builds: list[Path]) -> None:
    coco_plain(tmp_path / "data", made_up())
    image = next((tmp_path / "data" / "val2017").iterdir())
    moved = image.rename(tmp_path / "aside.jpg")
    assert opened(tmp_path).issue_counts == {"missing image": 1}
    moved.rename(image)
    assert opened(tmp_path).issue_counts == {}
    assert len(builds) == 2


def test_built_again_for_other_splits(tmp_path: Path, builds: list[Path]) -> None:
    coco_plain(tmp_path / "data", made_up())
    opened(tmp_path)
    assert list(opened(tmp_path, splits={"train": "val2017"}).splits) == ["train"]
    assert len(builds) == 2


def test_built_again_when_the_cache_is_damaged(tmp_path: Path, builds: list[Path]) -> None:
    coco_plain(tmp_path / "data", made_up())
    folder = opened(tmp_path).split("train").path.parent
    (folder / "manifest.json").write_text("{")
    assert len(opened(tmp_path).split("train")) == 5
    (folder / "train.arrow").unlink()
    assert len(opened(tmp_path).split("train")) == 5
    assert len(builds) == 3
    opened(tmp_path)
    assert len(builds) == 3


def test_nothing_is_left_of_a_failed_build(tmp_path: Path) -> None:
    coco_plain(tmp_path / "data", made_up())
    (tmp_path / "data" / "annotations" / "instances_val2017.json").write_text('{"images": [], "annotations": [')
    with pytest.raises(DataError, match="not readable as COCO"):
        opened(tmp_path)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() or path.name.startswith(".")]
    assert [path.name for path in left if path.name != ".lock"] == []  # a lock file stays, unlocked


def test_outdated_indices_are_removed_in_time(tmp_path: Path) -> None:
    coco_plain(tmp_path / "data", made_up())
    first = opened(tmp_path).split("train").path.parent
    file = tmp_path / "data" / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text() + " ")
    second = opened(tmp_path).split("train").path.parent
    assert first.exists()
    os.utime(first, (0, 0))
    file.write_text(file.read_text() + " ")
    third = opened(tmp_path).split("train").path.parent
    assert (first.exists(), second.exists(), third.exists()) == (False, True, True)


def test_a_cache_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    coco_plain(tmp_path / "data", made_up())
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        source = opened(tmp_path)
    assert len(source.split("train")) == 5
    assert "cannot be written" in caplog.text
    shutil.rmtree(source.split("train").path.parents[1])


def test_threads_that_build_at_the_same_time(tmp_path: Path) -> None:
    """Each finds a whole index, and they find the same."""
    coco_plain(tmp_path / "data", made_up())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: opened(tmp_path).split("train"), range(4)))
    assert len({annotations.path for annotations in found}) == 1
    assert [len(list(annotations)) for annotations in found] == [5] * 4
    assert {path.name for path in (tmp_path / "cache").glob("*/.*")} <= {".lock"}


@pytest.mark.slow
def test_other_processes_map_the_same_file(tmp_path: Path, written: Path) -> None:
    annotations = AnnotationIndex(written, LABELS)
    (tmp_path / "pickled").write_bytes(pickle.dumps(annotations))
    script = (
        "import pickle, sys; found = pickle.load(open(sys.argv[1], 'rb'))\n"
        "sys.stdout.write(repr([float(record.boxes.sum()) for record in found]))"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "pickled")]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert output == repr([float(record.boxes.sum()) for record in annotations])


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METR_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert index_cache.default_cache() == tmp_path / ".cache" / "metr" / "index"
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "elsewhere"))
    assert index_cache.default_cache() == tmp_path / "elsewhere" / "index"
    coco_plain(tmp_path / "data", made_up())
    source = open_dataset(DatasetConfig(name="made", path=tmp_path / "data"))
    assert source.split("train").path.is_relative_to(tmp_path / "elsewhere" / "index")
