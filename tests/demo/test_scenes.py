"""The made datasets keep what they promise; their files are read here with parsers of their own."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as Xml

import cv2
import numpy as np
import pytest
import yaml

from metr.data.datasets_file import DatasetConfig, open_dataset
from metr.data.records import ImageRecord
from metr.demo import (
    FIELDS,
    DemoDataset,
    Field,
    draw_scene,
    scene_statistics,
    scenes,
    write_demo_datasets,
    write_unseen,
)
from metr.errors import DataError

SEED, TRAIN, VAL = 3, 14, 4


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DemoDataset]:
    folder = tmp_path_factory.mktemp("demo")
    return {dataset.name: dataset for dataset in write_demo_datasets(folder, SEED, TRAIN, VAL)}


def record(path: Path, width: int, height: int, rows: list[tuple[int, list[float]]]) -> ImageRecord:
    boxes = np.array([box for _, box in rows], np.float64).reshape(-1, 4)
    return ImageRecord(
        image_id=path.stem,
        path=path,
        width=width,
        height=height,
        boxes=boxes,
        labels=np.array([label for label, _ in rows], np.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        ignore=np.zeros(len(boxes), bool),
    )


def read_coco(folder: Path) -> tuple[list[str], list[ImageRecord]]:
    names: list[str] = []
    records = []
    for split in ("train", "val"):
        content = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        ids = {category["id"]: index for index, category in enumerate(content["categories"])}
        names = [category["name"] for category in content["categories"]]
        for image in content["images"]:
            rows = []
            for item in (item for item in content["annotations"] if item["image_id"] == image["id"]):
                x, y, w, h = item["bbox"]
                rows.append((ids[item["category_id"]], [x, y, x + w, y + h]))
            records.append(record(folder / split / image["file_name"], image["width"], image["height"], rows))
    return names, records


def read_voc(folder: Path) -> tuple[list[str], list[ImageRecord]]:
    main = folder / "ImageSets" / "Main"
    stems = (main / "train.txt").read_text().split() + (main / "val.txt").read_text().split()
    roots = [Xml.parse(folder / "Annotations" / f"{stem}.xml").getroot() for stem in stems]
    names = sorted({str(node.findtext("name")) for root in roots for node in root.iter("object")})
    records = []
    for root in roots:
        rows = []
        for node in root.iter("object"):
            corners = [float(str(node.findtext(f"bndbox/{tag}"))) for tag in ("xmin", "ymin", "xmax", "ymax")]
            rows.append((names.index(str(node.findtext("name"))), corners))
        path = folder / "JPEGImages" / str(root.findtext("filename"))
        size = [int(str(root.findtext(f"size/{tag}"))) for tag in ("width", "height")]
        records.append(record(path, size[0], size[1], rows))
    return names, records


def read_yolo(folder: Path) -> tuple[list[str], list[ImageRecord]]:
    names = yaml.safe_load((folder / "data.yaml").read_text())["names"]
    records = []
    for split in ("train", "valid"):
        for path in sorted((folder / split / "images").iterdir()):
            height, width = cv2.imread(str(path)).shape[:2]
            rows = []
            for line in (folder / split / "labels" / f"{path.stem}.txt").read_text().splitlines():
                label, *numbers = line.split()
                cx, cy, w, h = (float(number) for number in numbers)
                corners = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
                rows.append((int(label), corners))
            records.append(record(path, width, height, rows))
    return names, records


READERS = {"coco": read_coco, "voc": read_voc, "yolo": read_yolo}


def test_promised_scenes(datasets: dict[str, DemoDataset]) -> None:
    overlapping: list[tuple[float, int]] = []
    for dataset in datasets.values():
        names, records = READERS[dataset.format](dataset.folder)
        statistics = scene_statistics(records, names)
        assert statistics.images == TRAIN + VAL
        assert statistics.fewest >= 3
        assert statistics.most <= 12
        assert 0.1 < statistics.median_side < 0.25
        overlapping.append((statistics.overlapping, statistics.objects))
        assert min(statistics.counts.values()) >= 12
    shares, objects = zip(*overlapping, strict=True)
    assert 0.25 <= np.average(shares, weights=objects) <= 0.5
    assert min(shares) > 0.2


def test_label_spaces_and_formats(datasets: dict[str, DemoDataset]) -> None:
    assert {dataset.format for dataset in datasets.values()} == {"coco", "voc", "yolo"}
    written = {name: set(READERS[item.format](item.folder)[0]) for name, item in datasets.items()}
    assert written == {name: set(dataset.categories) for name, dataset in datasets.items()}
    labels = [name for names in written.values() for name in names]
    assert len(set(labels)) >= 9
    assert [name for name in set(labels) if labels.count(name) > 1] == ["leaf"]


def test_foreign_objects_stand_unlabelled(datasets: dict[str, DemoDataset]) -> None:
    for dataset in datasets.values():
        others = {name for other in datasets.values() for name in other.categories} - set(dataset.categories)
        unlabelled = [item.name for image in dataset.images for item in image.unlabelled]
        assert set(unlabelled) <= others
        assert len(unlabelled) >= 0.3 * len(dataset.images)


def test_annotations_are_what_was_drawn(datasets: dict[str, DemoDataset]) -> None:
    for dataset in datasets.values():
        names, records = READERS[dataset.format](dataset.folder)
        by_path = {item.path: item for item in records}
        assert len(by_path) == len(dataset.images)
        for image in dataset.images:
            read = by_path[image.path]
            height, width = cv2.imread(str(image.path)).shape[:2]
            assert (read.width, read.height) == image.size == (width, height)
            assert [names[label] for label in read.labels] == [item.name for item in image.labelled]
            drawn = np.array([item.box for item in image.labelled])
            assert np.abs(read.boxes - drawn).max() <= (0.5 if dataset.format == "voc" else 1e-3)
            inside = (read.boxes >= -1e-3).all() and (read.boxes <= np.array([width, height] * 2) + 1e-3).all()
            assert inside
            assert (read.boxes[:, 2:] - read.boxes[:, :2] >= 8).all()


def flat(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), (255, 0, 255), np.uint8)


@pytest.mark.parametrize("name", list(scenes.KINDS))
def test_boxes_are_tight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a flat ground, without shadow, light and noise, what differs from the ground is the object."""
    monkeypatch.setitem(scenes.KINDS, name, replace(scenes.KINDS[name], height=0.0))
    monkeypatch.setattr(scenes, "_photographed", lambda canvas, field, rng: canvas)
    field = Field(name="flat", size=(352, 264), ground=flat, labelled=(name,), unlabelled=(name,), clutter=())
    compared = 0
    for seed in range(3):
        scene = draw_scene(field, np.random.default_rng(seed))
        changed = (np.abs(scene.image.astype(int) - (255, 0, 255)) > 16).any(axis=2)
        boxes = np.array([item.box for item in scene.objects]) * scenes.OVERSAMPLING
        for index, box in enumerate(boxes):
            window = np.concatenate([box[:2] - 12, box[2:] + 12])
            others = np.delete(boxes, index, axis=0)
            if ((others[:, :2] < window[2:]) & (others[:, 2:] > window[:2])).all(axis=1).any():
                continue
            x0, y0, x1, y1 = np.maximum(window, 0).astype(int)
            rows, columns = np.nonzero(changed[y0:y1, x0:x1])
            extent = [x0 + columns.min(), y0 + rows.min(), x0 + columns.max() + 1, y0 + rows.max() + 1]
            assert np.abs(extent - box).max() / scenes.OVERSAMPLING <= 2
            compared += 1
    assert compared >= 3


def test_hidden_objects_are_not_drawn() -> None:
    sprite = scenes.draw_sprite("turtle", np.random.default_rng(0), 80.0)
    lower, upper = (scenes._Placed(sprite=sprite, kind=scenes.KINDS["turtle"], left=20 + i, top=20) for i in range(2))
    aside = replace(upper, left=20 + sprite.width)
    assert scenes._visible([lower, upper], 200, 400) == [upper]
    assert scenes._visible([lower, aside], 200, 400) == [lower, aside]


def test_metr_reads_them(datasets: dict[str, DemoDataset], tmp_path: Path) -> None:
    for dataset in datasets.values():
        source = open_dataset(DatasetConfig(name=dataset.name, path=dataset.folder), tmp_path)
        assert (source.format, set(source.categories)) == (dataset.format, set(dataset.categories))
        assert not source.issues
        assert {name: len(split) for name, split in source.splits.items()} == {"train": TRAIN, "val": VAL}
        drawn = {image.path.name: image for image in dataset.images}
        for item in (item for split in source.splits.values() for item in split):
            expected = drawn[item.path.name].labelled
            assert [source.categories[label] for label in item.labels] == [one.name for one in expected]
            assert np.abs(item.boxes - np.array([one.box for one in expected])).max() <= 0.51


def test_same_seed_same_images_whatever_the_counts(tmp_path: Path, datasets: dict[str, DemoDataset]) -> None:
    for again in write_demo_datasets(tmp_path, SEED, 1, 1):
        before = {image.path.name: image for image in datasets[again.name].images}
        for image in again.images:
            assert image.path.read_bytes() == before[image.path.name].path.read_bytes()
            assert image.objects == before[image.path.name].objects


def test_another_seed_another_image() -> None:
    first, second = (draw_scene(FIELDS[0], np.random.default_rng([seed, 0, 0, 0])) for seed in (0, 1))
    assert first.objects != second.objects


def test_drawn_again_leaves_nothing_behind(tmp_path: Path) -> None:
    write_unseen(tmp_path / "unseen", 0, 2)
    write_unseen(tmp_path / "unseen", 0, 1)
    assert {path.name for path in (tmp_path / "unseen").iterdir()} == {"01_pond.jpg", "README.txt"}


def test_strange_files_are_spared(tmp_path: Path) -> None:
    (tmp_path / "desk").mkdir()
    (tmp_path / "desk" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="desk"):
        write_demo_datasets(tmp_path, 0, 1, 1)
    assert (tmp_path / "desk" / "mine.txt").read_text() == "keep"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        write_demo_datasets(tmp_path / "file", 0, 1, 1)
    with pytest.raises(DataError, match="file"):
        write_unseen(tmp_path / "file", 0, 1)
    with pytest.raises(DataError, match="val"):
        write_demo_datasets(tmp_path, 0, 1, 0)
    with pytest.raises(DataError, match="seed"):
        write_unseen(tmp_path / "unseen", -1, 1)


def test_unseen_images(tmp_path: Path, datasets: dict[str, DemoDataset]) -> None:
    images = write_unseen(tmp_path / "unseen", SEED, 6)
    assert len(list((tmp_path / "unseen").glob("*.jpg"))) == len(images) == 6
    assert {path.suffix for path in (tmp_path / "unseen").iterdir()} == {".jpg", ".txt"}
    seen = {image.path.read_bytes() for dataset in datasets.values() for image in dataset.images}
    assert not any(image.path.read_bytes() in seen for image in images)
    mixed = [image for image in images if "mixed" in image.path.name]
    assert len(mixed) == 2
    for image in mixed:
        names = {item.name for item in image.objects}
        home = next(field for field in FIELDS if field.name in image.path.name)
        assert names & set(home.labelled)
        assert names & {name for field in FIELDS if field is not home for name in field.labelled} - set(home.labelled)
