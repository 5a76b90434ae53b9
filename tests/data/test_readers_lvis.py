"""LVIS JSON: which categories are annotated in which image, and where the images of COCO are found."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import coco_plain, made_up, save_image, write_json
from test_readers_damaged import damaged

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.formats import coco
from metr.data.formats.registry import recognise
from metr.errors import DataError, MetrError

NAMES = ("aerosol_can", "bow_(weapon)", "cat", "Ferris_wheel", "bow_(decorative_ribbons)")
READ_AS = ("aerosol can", "bow (weapon)", "cat", "Ferris wheel", "bow (decorative ribbons)")
SPLITS = ("train", "val")


def category(number: int) -> dict[str, Any]:
    """Ids start at 1, have a gap, and are not in the order of the list."""
    name = NAMES[number]
    rest = {"synonyms": [name, f"{name}_2"], "frequency": "r", "synset": f"{name}.n.01", "instance_count": 3}
    return {"id": 20 - 3 * number, "name": name, "image_count": 1, "def": "a thing", **rest}


IDS = {number: category(number)["id"] for number in range(len(NAMES))}


def image(number: int, split: str = "train", **rest: Any) -> dict[str, Any]:
    """An image as LVIS v1 lists it: named by its address alone."""
    url = f"http://images.cocodataset.org/{split}2017/{number:012d}.jpg"
    return {
        "id": number,
        "coco_url": url,
        "width": 40,
        "height": 30,
        "license": 1,
        "flickr_url": "http://x/y.jpg",
    } | rest


def box(image_id: int, number: int, bbox: list[float]) -> dict[str, Any]:
    polygon = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    values = {"id": 1, "area": bbox[2] * bbox[3] / 2, "segmentation": polygon}
    return {"image_id": image_id, "category_id": IDS[number], "bbox": bbox} | values


def content(images: list[dict[str, Any]], boxes: list[dict[str, Any]]) -> dict[str, Any]:
    """The keys in the order of the real files, where images come after boxes."""
    categories = [category(number) for number in range(len(NAMES))]
    return {"info": {}, "annotations": boxes, "images": images, "licenses": [], "categories": categories}


def truth(seed: int) -> dict[str, list[dict[str, Any]]]:
    """For each image of each split its boxes and the numbers of categories that are absent or boxed in part."""
    rng = np.random.default_rng(seed)
    result: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        result[split] = []
        for number in range(6):
            kinds = rng.permutation(len(NAMES))
            shown, absent = kinds[: int(rng.integers(0, 3))], kinds[3 : 3 + int(rng.integers(0, 3))]
            boxes = [
                (int(kind), [int(rng.integers(0, 20)), int(rng.integers(0, 15)), 5 + n, 7])
                for kind in shown
                for n in range(int(rng.integers(1, 3)))
            ]
            partly = [int(kind) for kind in shown if rng.random() < 0.3]
            result[split].append(
                {"id": number * 7, "boxes": boxes, "absent": sorted(map(int, absent)), "partly": partly}
            )
    return result


def write(root: Path, splits: Mapping[str, list[dict[str, Any]]]) -> None:
    """As it is distributed: images of either split may lie in either folder of COCO."""
    for split, items in splits.items():
        images = [
            image(
                item["id"],
                split if item["id"] % 2 else "val",
                neg_category_ids=[IDS[kind] for kind in item["absent"]],
                not_exhaustive_category_ids=[IDS[kind] for kind in item["partly"]],
            )
            for item in items
        ]
        for listed in images:
            save_image(root / "/".join(listed["coco_url"].split("/")[-2:]))
        boxes = [box(item["id"], kind, bbox) for item in items for kind, bbox in item["boxes"]]
        write_json(root / "annotations" / f"lvis_v1_{split}.json", content(images, boxes[::2] + boxes[1::2]))


def opened(root: Path, tmp_path: Path, **options: Any) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root, **options), tmp_path / "cache")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_round_trip(tmp_path: Path, seed: int) -> None:
    images = truth(seed)
    write(tmp_path / "data", images)
    source = opened(tmp_path / "data", tmp_path)
    assert (source.format, source.categories, source.issue_counts) == ("lvis", READ_AS, {})
    for split in SPLITS:
        assert [record.image_id for record in source.split(split)] == [item["id"] for item in images[split]]
        for record, item in zip(source.split(split), images[split], strict=True):
            assert record.path.is_file()
            expected = sorted((kind, [x, y, x + w, y + h]) for kind, (x, y, w, h) in item["boxes"])
            found = zip(record.labels.tolist(), record.boxes.tolist(), strict=True)
            assert sorted((label, [round(value) for value in corners]) for label, corners in found) == expected
            np.testing.assert_allclose(sorted(record.areas), sorted(w * h / 2 for _, (_, _, w, h) in item["boxes"]))
            assert not record.ignore.any()
            shown = {kind for kind, _ in item["boxes"]}
            assert record.annotated == tuple(sorted((shown | set(item["absent"])) - set(item["partly"])))


def test_pieces_give_what_the_whole_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", truth(3))
    whole = [record.annotated for record in opened(tmp_path / "data", tmp_path / "whole").split("train")]
    monkeypatch.setattr(coco, "_PIECE_BYTES", 300)
    pieces = [record.annotated for record in opened(tmp_path / "data", tmp_path / "pieces").split("train")]
    assert pieces == whole
    assert len(set(whole)) > 1


def made(tmp_path: Path, images: list[dict[str, Any]], *files: str, name: str = "lvis_v1_val.json") -> DatasetSource:
    """A dataset of one file, with images."""
    for file in files:
        save_image(tmp_path / "data" / file)
    write_json(tmp_path / "data" / "annotations" / name, content(images, []))
    return opened(tmp_path / "data", tmp_path)


@pytest.mark.parametrize(
    "place",
    [
        "train2017/000000000005.jpg",
        "images/train2017/000000000005.jpg",
        "coco/train2017/000000000005.jpg",
        "val2017/000000000005.jpg",
        "images/000000000005.jpg",
    ],
)
def test_places_of_images(tmp_path: Path, place: str) -> None:
    """The end of the address leads there; a file name need not be given, and need not be right."""
    for number, rest in enumerate(({}, {"file_name": ""}, {"file_name": "somewhere/else.jpg"})):
        source = made(tmp_path / str(number), [image(5, "train", neg_category_ids=[20], **rest)], place)
        assert source.split("val")[0].path == tmp_path / str(number) / "data" / place


def test_a_file_name_comes_before_the_address(tmp_path: Path) -> None:
    listed = image(5, neg_category_ids=[], file_name="own/5.jpg")
    source = made(tmp_path, [listed], "own/5.jpg", "train2017/000000000005.jpg")
    assert source.split("val")[0].path.parent.name == "own"


def test_images_that_are_not_there(tmp_path: Path) -> None:
    images = [
        image(1, neg_category_ids=[20]),
        image(2, neg_category_ids=[]),
        image(3, neg_category_ids=[], file_name="../../secret.jpg"),
        image(4, neg_category_ids=[], coco_url=""),
    ]
    save_image(tmp_path / "secret.jpg")
    source = made(tmp_path, images, "train2017/000000000001.jpg")
    assert source.issue_counts == {"missing image": 2, "path outside": 1}
    assert [record.image_id for record in source.split("val")] == [1]


def test_without_what_was_looked_for(tmp_path: Path) -> None:
    """Without the two lists only categories with boxes are annotated; undeclared ids in them are left out."""
    listed = [image(1), image(2, neg_category_ids=[20, 999], not_exhaustive_category_ids=[998])]
    images = [f"train2017/{number:012d}.jpg" for number in (1, 2)]
    source = made(tmp_path, listed, *images)
    assert [record.annotated for record in source.split("val")] == [(), (0,)]
    assert source.issue_counts == {}


def test_recognition(tmp_path: Path) -> None:
    """By the key in files of any name, by the name where no image has the key; COCO stays COCO."""
    by_key, by_name, plain = tmp_path / "key", tmp_path / "name", tmp_path / "plain"
    write_json(by_key / "annotations" / "instances_train.json", content([image(1, neg_category_ids=[])], []))
    write_json(by_name / "data" / "lvis_v1_train.json", content([image(1)], []))
    coco_plain(plain, made_up())
    assert [recognise(path).format for path in (by_key, by_name, plain)] == ["lvis", "lvis", "coco"]
    assert recognise(by_key / "annotations" / "instances_train.json").format == "lvis"
    assert recognise(by_key, "coco").format == "coco"
    with pytest.raises(DataError, match="no annotations of a known format"):
        recognise(plain, "lvis")


def test_beside_the_files_of_coco(tmp_path: Path) -> None:
    """LVIS describes COCO's images and may lie in the same folder; either can be asked for."""
    coco_plain(tmp_path / "data", made_up())
    write(tmp_path / "data", truth(0))
    assert opened(tmp_path / "data", tmp_path).categories == READ_AS
    source = opened(tmp_path / "data", tmp_path, format="coco")
    assert (source.format, len(source.categories)) == ("coco", 3)
    assert source.split("val")[0].annotated is None


@pytest.mark.parametrize("wrong", [{"neg_category_ids": [None]}, {"neg_category_ids": 5}, {"coco_url": 7}])
def test_wrong_images_are_noted(tmp_path: Path, wrong: dict[str, Any]) -> None:
    listed = [image(1, neg_category_ids=[20]), image(2) | wrong]
    source = made(tmp_path, listed, "train2017/000000000001.jpg", "train2017/000000000002.jpg")
    assert source.issue_counts == {"unreadable annotation": 1}
    assert len(source.split("val")) == 1


def test_damaged_files(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root, truth(0))
    file, rng = root / "annotations" / "lvis_v1_val.json", np.random.default_rng(0)
    whole = file.read_bytes()
    for number in range(12):
        file.write_bytes(damaged(whole, rng))
        with contextlib.suppress(MetrError):
            source = open_dataset(DatasetConfig(name="made", path=root), tmp_path / f"cache {number}")
            for record in (record for annotations in source.splits.values() for record in annotations):
                assert set(record.annotated or ()) <= set(range(len(source.categories)))
