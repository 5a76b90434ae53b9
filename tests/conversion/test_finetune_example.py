"""The example that fine-tunes Deformable DETR: mistakes end in a line, and batches hold what the dataset tells."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conversion_cases import SIDE, alike, stirred
from PIL import Image

from metr.conversion.export import colours_of
from metr.conversion.targets import find_target
from metr.conversion.transfer import trainer_batch, trainer_images
from metr.data.config import ResizeConfig
from metr.data.joint import open_joint
from metr.data.records import ImageRecord
from metr.errors import DataError

from tiny import TinyRun

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/finetune_deformable_detr.py"


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *map(str, words)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_a_missing_argument_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "runs/joint", "--steps", 3)
    assert ended.value.code == 2
    assert "required: FOLDER, OUT" in capsys.readouterr().err


def test_a_mistake_ends_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"no such"):
        run(monkeypatch, tmp_path / "run", tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_are_those_that_the_detector_has_by_name(tiny_run: TinyRun) -> None:
    data, (source,) = tiny_run.data[0], open_joint(tiny_run.data[:1]).sources
    names = list(reversed(source.categories))
    model = SimpleNamespace(config=SimpleNamespace(label2id={name: row for row, name in enumerate(["zebra", *names])}))
    before = source.split("train")
    for row, record in enumerate(trainer_images(data, model)):
        assert record.path == before[row].path
        expected = [1 + names.index(source.categories[label]) for label in before[row].labels.tolist()]
        assert record.labels.tolist() == expected
    model.config.label2id.pop(names[0])
    with pytest.raises(DataError, match=f"the detector has no label for {names[0]}; it has zebra"):
        trainer_images(data, model)


def test_a_batch_for_a_trainer(tmp_path: Path) -> None:
    """Two images of two shapes, with a crowd, which is not taught, and one without objects."""
    target = find_target("deformable_detr")
    processor = target.image_processor(ResizeConfig(mode="fit", size=SIDE), colours_of(stirred(alike(target.name))))
    records = []
    for number, (width, height) in enumerate(((64, 128), (80, 40))):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (width, height), (200, 10, 90)).save(path)
        boxes = np.array([[8, 16, 40, 80], [0, 0, 64, 128]], dtype=np.float32)[: 2 * (1 - number)]
        labels = np.array([2, 1])[: len(boxes)]
        ignore = np.array([False, True])[: len(boxes)]
        areas = np.array([2048.0, 8192.0], dtype=np.float32)[: len(boxes)]
        record = ImageRecord(
            image_id=number,
            path=path,
            width=width,
            height=height,
            boxes=boxes,
            labels=labels,
            areas=areas,
            ignore=ignore,
        )
        records.append(record)
    batch = trainer_batch(processor, records)
    assert batch["pixel_values"].shape[:2] == (2, 3)
    first, second = batch["labels"]
    assert first["class_labels"].tolist() == [2]
    assert len(second["class_labels"]) == 0
    # cxcywh, as shares of the image with its padding
    height, width = batch["pixel_values"].shape[2:]
    share = torch.tensor([64 / width, 128 / height]).repeat(2)
    torch.testing.assert_close(first["boxes"], torch.tensor([[24 / 64, 48 / 128, 32 / 64, 64 / 128]]) * share)
