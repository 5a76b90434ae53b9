"""Objects365 JSON: fakes are ignored, and images are found in patches wherever these were unpacked."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reader_trees import coco_plain, made_up, save_image, write_json
from test_readers_damaged import damaged

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.formats.registry import recognise
from metr.errors import DataError, MetrError

NAMES = ("Person", "Cabinet/shelf", "Street Lights")
SPLITS = ("train", "val")
# Where patch 8 of a split may lie once it is unpacked.
LAYOUTS = {
    "patches in the split": "{split}/patch8/{name}",
    "patches in images": "images/{split}/patch8/{name}",
    "the path of the file": "images/v1/patch8/{name}",
    "the path in the split": "{split}/images/v1/patch8/{name}",
    "patches of all splits": "patch8/{name}",
    "no patches": "images/{split}/{name}",
    "no patches, no images": "{split}/{name}",
}


def name_of(split: str, number: int) -> str:
    return f"objects365_v1_{number + 1000 * SPLITS.index(split):08d}.jpg"


def content(split: str, boxes: list[list[tuple[int, list[float], dict[str, int]]]]) -> dict[str, Any]:
    """A file as it is distributed, for images with boxes (category, xywh, flags)."""
    images = [
        {"height": 30, "id": 11 * number, "license": 5, "width": 40, "url": ""}
        | {"file_name": f"images/v1/patch8/{name_of(split, number)}"}
        for number in range(len(boxes))
    ]
    annotations = [
        {"id": 1, "iscrowd": 0, "isfake": 0, "area": 1e9, "isreflected": 0, "bbox": bbox, "image_id": 11 * number}
        | {"category_id": kind + 1}
        | flags
        for number, mine in enumerate(boxes)
        for kind, bbox, flags in mine
    ]
    categories = [{"name": name, "id": kind + 1} for kind, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories, "licenses": []}


def truth(seed: int) -> dict[str, list[list[tuple[int, list[float], dict[str, int]]]]]:
    rng = np.random.default_rng(seed)
    flags = ({}, {"iscrowd": 1}, {"isfake": 1}, {"isreflected": 1}, {"isfake": 1, "isreflected": 1})
    return {
        split: [
            [
                (int(rng.integers(3)), [int(rng.integers(20)), int(rng.integers(15)), 4 + n, 9], flags[rng.integers(5)])
                for n in range(int(rng.integers(0, 4)))
            ]
            for _ in range(5)
        ]
        for split in SPLITS
    }


def write(root: Path, seed: int = 0, layout: str = "patches in the split", folder: str = "annotations") -> Any:
    made = truth(seed)
    for split, images in made.items():
        write_json(root / folder.format(split=split) / f"zhiyuan_objv2_{split}.json", content(split, images))
        for number in range(len(images)):
            save_image(root / LAYOUTS[layout].format(split=split, name=name_of(split, number)))
    return made


def opened(root: Path, tmp_path: Path, **options: Any) -> DatasetSource:
    return open_dataset(DatasetConfig(name="made", path=root, **options), tmp_path / "cache")


@pytest.mark.parametrize("folder", ["annotations", "", "{split}"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(tmp_path: Path, layout: str, folder: str) -> None:
    root = tmp_path / "data"
    made = write(root, len(layout), layout, folder)
    source = opened(root, tmp_path)
    assert (source.format, source.categories, source.issue_counts) == ("objects365", NAMES, {})
    for split in SPLITS:
        records = list(source.split(split))
        assert [record.image_id for record in records] == [11 * number for number in range(5)]
        for number, (record, boxes) in enumerate(zip(records, made[split], strict=True)):
            assert record.path == root / LAYOUTS[layout].format(split=split, name=name_of(split, number))
            assert record.labels.tolist() == [kind for kind, _, _ in boxes]
            expected = np.array([[x, y, x + w, y + h] for _, (x, y, w, h), _ in boxes]).reshape(-1, 4)
            np.testing.assert_allclose(record.boxes, expected)
            ignored = [bool(flags.get("iscrowd") or flags.get("isfake")) for _, _, flags in boxes]
            assert record.ignore.tolist() == ignored
            assert record.annotated is None


def test_what_plain_coco_makes_of_it(tmp_path: Path) -> None:
    """The format can be set to COCO: then fakes are objects, which is the difference between the two."""
    write(tmp_path / "data", layout="the path of the file")
    ours, plain = (opened(tmp_path / "data", tmp_path, format=name) for name in ("objects365", "coco"))
    ignored = [sum(int(record.ignore.sum()) for record in source.split("train")) for source in (ours, plain)]
    assert ignored[0] > ignored[1] > 0


def test_recognition(tmp_path: Path) -> None:
    """By name, by the flag, by what images are called; COCO stays COCO."""
    whole = content("train", truth(0)["train"])
    bare = {**whole, "annotations": [], "images": [{"id": 1, "file_name": "a.jpg"}]}
    for number, (name, held) in enumerate(
        [
            ("zhiyuan_objv2_train.json", bare),
            ("Objects365_val.json", bare),
            ("instances_train.json", {**whole, "images": bare["images"]}),
            ("instances_train.json", {**whole, "annotations": []}),
        ]
    ):
        file = write_json(tmp_path / str(number) / "annotations" / name, held)
        assert recognise(tmp_path / str(number)).format == recognise(file).format == "objects365"
    coco_plain(tmp_path / "plain", made_up())
    assert recognise(tmp_path / "plain").format == "coco"
    with pytest.raises(DataError, match="no annotations of a known format"):
        recognise(tmp_path / "plain", "objects365")


def test_a_part_of_the_patches(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root)
    held = content("train", truth(0)["train"])
    for listed, name in zip(held["images"], ["images/v2/patch16/a.jpg", "../../a.jpg", "/a.jpg", ""], strict=False):
        listed["file_name"] = name
    save_image(root / "a.jpg")
    (root / "a.jpg").rename(tmp_path / "a.jpg")
    write_json(root / "annotations" / "zhiyuan_objv2_train.json", held)
    source = opened(root, tmp_path)
    assert source.issue_counts == {"missing image": 2, "path outside": 2}
    assert [record.image_id for record in source.split("train")] == [44]


def test_damaged_files(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write(root)
    file, rng = root / "annotations" / "zhiyuan_objv2_val.json", np.random.default_rng(0)
    whole = file.read_bytes()
    for number in range(12):
        file.write_bytes(damaged(whole, rng))
        with contextlib.suppress(MetrError):
            source = open_dataset(DatasetConfig(name="made", path=root), tmp_path / f"cache {number}")
            for record in (record for annotations in source.splits.values() for record in annotations):
                assert record.labels.max(initial=0) < len(source.categories)
