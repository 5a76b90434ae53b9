"""Old datasets in a fine-tuning: what is known of their images, and what was fitted to their names."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from metr.checkpoint import load_checkpoint
from metr.training.finetune import finetune, finetune_plan
from metr.training.train import plan

from tiny import TinyRun

SHORT = ("train.loop.device=cpu", "train.loop.steps=2", "train.loop.curves=false", "loader.workers=0")
SHORT += ("loader.batch_size=2", "train.loop.log_every=1", "train.loop.evaluate_every=0", "train.loop.images=false")


def lake(run: TinyRun, place: Path) -> str:
    """A new dataset: the meadow with other names."""
    names = {"butterfly": "moth", "leaf": "reed", "mushroom": "rush", "snail": "newt"}
    (place / "lake.yaml").write_text(
        json.dumps({"datasets": [{"name": "lake", "path": str(run.datasets[2]), "renames": names}]})
    )
    return str(place / "lake.yaml")


@pytest.fixture
def trained_on_all(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A checkpoint whose training took all seven images of the pond, as older ones have recorded it."""
    folder = tmp_path / "all"
    shutil.copytree(tiny_run.best, folder)
    config = json.loads((folder / "config.json").read_text())
    config["training"]["data"]["pond"] |= {"splits": {"train": 7, "val": 3}, "trained_on": 7}
    del config["training"]["data"]["pond"]["held_out"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def pond(tiny_run: TinyRun, tmp_path: Path) -> str:
    """The pond without a val split: a fifth of its seven images is held out."""
    entry = {"name": "pond", "path": str(tiny_run.datasets[0]), "splits": {"train": ["train", "val"], "test": "val"}}
    (tmp_path / "pond.yaml").write_text(json.dumps({"datasets": [entry]}))
    return str(tmp_path / "pond.yaml")


def test_a_comparison_on_images_of_training_says_so(
    trained_on_all: Path, pond: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    said = Console(width=400, file=StringIO(), record=True)
    data, options = [lake(tiny_run, tmp_path)], {"overrides": SHORT, "rehearse": [pond]}
    finetune(data, trained_on_all, tmp_path / "run", console=said, **options)
    words = " ".join(said.export_text().split())
    fact = "pond: the checkpoint was trained on 7 images of pond, this image of val among them"
    assert words.count(fact) == 2, "before training, and below the table"
    assert f"warning: {fact}: AP there says how well it knows these" in words
    assert "What to try: a datasets file with splits: {train: train, val: test}" in words
    told = json.loads((tmp_path / "run/comparison.json").read_text())
    for when in ("before", "after"):
        assert [bool(one["seen"]) for one in told[when]["datasets"]] == [False, True]
    assert load_checkpoint(tmp_path / "run").training["data"]["pond"]["held_out"] is True


def test_plans_tell_of_images_of_training(trained_on_all: Path, pond: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    for page in (
        finetune_plan([lake(tiny_run, tmp_path)], trained_on_all, rehearse_evaluate=[pond], overrides=SHORT),
        finetune_plan([pond], trained_on_all, overrides=SHORT),
        plan([pond], start=str(trained_on_all), overrides=SHORT),
    ):
        said = Console(width=400, file=StringIO(), record=True)
        said.print(page)
        assert "warning: pond: the checkpoint was trained on 7 images of pond" in said.export_text()
    clean = Console(width=400, file=StringIO(), record=True)
    clean.print(finetune_plan([pond], tiny_run.folder, overrides=SHORT))
    assert "warning: pond" not in clean.export_text()
