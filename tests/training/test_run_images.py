"""The first batch and the val images of a run, drawn; training is not disturbed by it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metr.data.joint import open_joint
from metr.evaluation.runner import EvaluationRunner
from metr.inference.draw import Mark
from metr.model import METR
from metr.structures import Batch, Targets
from metr.training import images
from metr.training.config import load_recipe
from metr.training.images import VAL_IMAGES, ValImages, draw_train_batch
from metr.training.train import train

from small import targets_of
from tiny import TinyRun


def batch_of(targets: list[Targets], size: int = 32) -> Batch:
    count = len(targets)
    padding = torch.zeros(count, size, size, dtype=torch.bool)
    padding[:, :, size // 2 :] = True
    return Batch(
        images=torch.zeros(count, 3, size, size),
        padding_mask=padding,
        targets=Targets.stack(targets),
        image_ids=tuple(range(count)),
        original_sizes=((100, 50),) * count,
        sizes=((size, size // 2),) * count,
        datasets=("cells",) * count,
    )


def test_boxes_of_a_batch_are_drawn_where_the_network_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[Mark]] = []
    draw = images.draw

    def spied(image: np.ndarray, marks: list[Mark], longest: int) -> np.ndarray:
        assert image.shape == (32, 16, 3), "without padding"
        drawn.append(marks)
        return draw(image, marks, longest)

    monkeypatch.setattr(images, "draw", spied)
    crowd = targets_of([[0.5, 0.5, 0.5, 0.25]], [1], words=2)
    ignored = Targets(
        boxes=crowd.boxes[:, :0], labels=crowd.labels[:, :0], ignore_boxes=crowd.boxes, ignore_labels=crowd.labels,
        annotated=crowd.annotated, assumed_negative=crowd.assumed_negative,
    )  # fmt: skip
    several = targets_of([[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 0.5]], [0, 1], words=2)
    draw_train_batch(batch_of([ignored, several]), ("cell", "crowd"), tmp_path / "batch.jpg")
    assert drawn == [
        [Mark(box=(4.0, 12.0, 12.0, 20.0), name="crowd", dashed=True)],
        [Mark(box=(0.0, 0.0, 8.0, 32.0), name="cell"), Mark(box=(4.0, 8.0, 12.0, 24.0), name="crowd")],
    ]
    with Image.open(tmp_path / "batch.jpg") as sheet:
        assert sheet.height > 300, "small images are enlarged"


def test_what_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    draw_train_batch(batch_of([targets_of([], [], words=1)]), ("cell",), tmp_path / "file" / "batch.jpg")
    assert "cannot be written" in caplog.text


def test_val_images_are_the_same_ones_every_time_and_of_every_dataset(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe, model = load_recipe("nano", tiny_run.recipe), METR.from_pretrained(tiny_run.folder, device="cpu")
    joint = open_joint(tiny_run.data)
    runner = EvaluationRunner(
        joint.vocabulary, model.embed(joint.vocabulary), joint.evaluation(), model.resize, recipe.evaluation_loader
    )
    first, second = (ValImages(runner, recipe.inference) for _ in range(2))
    chosen = [[(one.dataset, one.record.image_id) for one in sheet.samples] for sheet in (first, second)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == VAL_IMAGES
    assert sorted(row for row, _ in chosen[0]) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert all(len(one.record.boxes) for one in first.samples), "with objects, where there are such"
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first.draw(model.network, 5, tmp_path / "sheet.jpg")
    assert torch.equal(torch.get_rng_state(), state)
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.width > 4 * 300


def test_images_change_nothing_of_a_run_and_can_be_switched_off(tiny_run: TinyRun, tmp_path: Path) -> None:
    for wanted in (True, False):
        overrides = [f"train.loop.images={wanted}", "train.loop.steps=2", "train.loop.evaluate_every=1"]
        run = tmp_path / str(wanted)
        train(tiny_run.data, run, load_recipe("nano", tiny_run.recipe, overrides))
        assert [(run / name).is_file() for name in ("train_batch.jpg", "val_images.jpg")] == [wanted, wanted]
    drawn, plain = (METR.from_pretrained(tmp_path / str(one) / "last").checkpoint.weights for one in (True, False))
    assert all(torch.equal(drawn[key], plain[key]) for key in plain)
