"""The checkpoint's own training runs in miniature, ships what it measured, and leaves out what may not be used."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from metr.data.images import read_image
from metr.errors import DataError
from metr.model import METR

from tiny import TinyRun, as_overrides


@pytest.fixture
def checkpoint(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("checkpoint")


@pytest.fixture
def study_data(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("study_data")


@pytest.fixture
def run(checkpoint: ModuleType, study_data: ModuleType, tiny_run: TinyRun, tmp_path: Path) -> Callable[..., int]:
    """The command on six datasets: tiny ones under the names of the real ones, and photographs with licences."""
    (tmp_path / "data").mkdir()
    for number, name in enumerate(study_data.DATASETS):
        if name != study_data.PHOTOGRAPHS:
            (tmp_path / "data" / name).symlink_to(tiny_run.datasets[number % 3], target_is_directory=True)
    write_photographs(tmp_path / "data" / study_data.PHOTOGRAPHS)
    places = {"data": "data", "out": "run", "target": "shipped", "results": "results"}
    arguments = [part for name, place in places.items() for part in (f"--{name}", str(tmp_path / place))]
    sets = (*as_overrides(tiny_run), "augmentation.sizes=[64]", "train.loop.steps=2")
    return lambda: checkpoint.main([*arguments, *(part for one in sets for part in ("--set", one))])


def write_photographs(folder: Path) -> None:
    """A COCO folder with two images of every licence in each split."""
    generator = np.random.default_rng(0)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir(parents=True)
        images = [
            {"id": i, "file_name": f"{i}.jpg", "height": 60, "width": 80, "license": 1 + i // 2} for i in range(14)
        ]
        boxes = [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [9, 9, 30, 30], "area": 900, "iscrowd": 0}
            for i in range(14)
        ]
        for image in images:
            pixels = generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / image["file_name"])
        tree = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "kite"}]}
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))


def test_photographs_that_may_not_be_used_stay_out(study_data: ModuleType, tmp_path: Path) -> None:
    write_photographs(tmp_path / "all")
    assert study_data.licensed_copy(tmp_path / "all", tmp_path / "some") == 16
    dates = {path: path.lstat().st_mtime_ns for path in (tmp_path / "some").rglob("*")}
    # again: what is the same stays untouched, as another process may read it
    assert study_data.licensed_copy(tmp_path / "all", tmp_path / "some") == 16
    assert {path: path.lstat().st_mtime_ns for path in (tmp_path / "some").rglob("*")} == dates
    tree = json.loads((tmp_path / "some" / "annotations" / "instances_val2017.json").read_text())
    assert {image["license"] for image in tree["images"]} == {4, 5, 6, 7}
    kept = {image["id"] for image in tree["images"]}
    assert {one["image_id"] for one in tree["annotations"]} == kept
    assert {path.stem for path in (tmp_path / "some" / "val2017").iterdir()} == {str(one) for one in kept}
    with pytest.raises(DataError, match="annotations"):
        study_data.licensed_copy(tmp_path, tmp_path / "none")


@pytest.mark.slow
def test_what_is_shipped_is_what_was_measured(run: Callable[..., int], tiny_run: TinyRun, tmp_path: Path) -> None:
    assert run() == 0
    result = json.loads((tmp_path / "results" / "checkpoint-cpu.json").read_text(), parse_constant=pytest.fail)
    assert (result["steps"], result["images_seen"]) == (2, 4)
    assert "Weights in float16" in (tmp_path / "results" / "checkpoint-cpu.md").read_text()
    assert min(read_image(tmp_path / "results" / "checkpoint-cpu-detections.jpg").shape[:2]) > 100
    shipped = tmp_path / "shipped"
    stored = load_file(shipped / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    assert json.loads((shipped / "evaluation.json").read_text()) == result["report"]
    card = (shipped / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "coco_mini" in card
    assert "Measured with the weights stored as float16." in card
    METR.from_pretrained(shipped).detect(tiny_run.unseen[0])
    assert run() == 0  # again: nothing is left to train, and the card is written anew
