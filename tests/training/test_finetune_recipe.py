"""Defaults by the number of images, and what is laid over what."""

from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest

from metr.checkpoint import Checkpoint
from metr.config import as_yaml, merge
from metr.errors import ConfigError
from metr.text.encoder import TextEncoderConfig
from metr.training.config import RunConfig, TrainConfig, load_recipe
from metr.training.finetune_recipe import (
    RECIPE,
    TABLE,
    Defaults,
    defaults_for,
    described,
    finetune_recipe,
    left_to_finetuning,
)
from small_runs import make_description


def checkpoint(**training: object) -> Checkpoint:
    text = TextEncoderConfig(source="somewhere").model_dump(mode="json") | {"identity": "bert 1"}
    return replace(make_description(), text_encoder=text, training=training)


def test_rows_are_met_and_between_them_nothing_jumps() -> None:
    for row in TABLE:
        assert defaults_for(row.images) == row
    assert defaults_for(0) == defaults_for(7) == TABLE[0]
    assert defaults_for(10**7) == TABLE[-1]
    numbers = [field.name for field in fields(Defaults) if field.name != "images"]
    for lower, upper in pairwise(TABLE):
        for images in (lower.images + 1, round((lower.images * upper.images) ** 0.5), upper.images - 1):
            between = defaults_for(images)
            assert between.images == images
            for name in numbers:
                ends = sorted((getattr(lower, name), getattr(upper, name)))
                assert ends[0] <= getattr(between, name) <= ends[1], (images, name)


@pytest.mark.parametrize("images", [1, 20, 63, 64, 200, 777, 2000, 50_000])
def test_every_row_is_a_configuration(images: int) -> None:
    tree = defaults_for(images).tree(6e-4)
    recipe = RunConfig.checked(tree)
    assert 0 < recipe.train.optimizer.learning_rate <= 6e-4
    assert recipe.train.freeze == "none"
    assert recipe.train.loop.steps > recipe.train.schedule.warmup_steps
    assert recipe.train.loop.steps // recipe.train.loop.evaluate_every >= 5


def test_the_checkpoints_own_comes_before_the_table_and_the_users_after_it(tmp_path: Path) -> None:
    pretraining = load_recipe("base", overrides=["train.optimizer.learning_rate=1e-3"])
    told = {RECIPE: left_to_finetuning(pretraining), "unannotated": "ignore"}
    recipe = finetune_recipe(checkpoint(**told), 200)
    assert recipe.criterion == pretraining.criterion
    assert recipe.loader.batch_size == pretraining.loader.batch_size == 2
    assert recipe.augmentation.sizes == pretraining.augmentation.sizes
    assert recipe.augmentation.resize.size == 32, "the checkpoint's"
    assert recipe.unannotated == "ignore"
    assert recipe.model == make_description().model
    assert recipe.text.source == "somewhere"
    assert recipe.train.optimizer.learning_rate == pytest.approx(TABLE[1].rate * 1e-3)
    assert recipe.train.loop.steps == TABLE[1].steps

    (tmp_path / "mine.yaml").write_text("train: {freeze: half, loop: {steps: 7, patience: 2}}")
    recipe = finetune_recipe(checkpoint(**told), 200, tmp_path / "mine.yaml", ["train.loop.steps=9"])
    assert (recipe.train.freeze, recipe.train.loop.steps, recipe.train.loop.patience) == ("half", 9, 2)
    with pytest.raises(ConfigError, match=r"fine-tuning and --set: unknown key 'train\.freze'"):
        finetune_recipe(checkpoint(), 200, None, ["train.freze=none"])


def test_a_checkpoint_that_tells_nothing_or_nonsense(caplog: pytest.LogCaptureFixture) -> None:
    silent = finetune_recipe(checkpoint(), 20)
    assert silent.loader.batch_size == 8
    assert silent.unannotated == "negative"
    odd = finetune_recipe(checkpoint(**{RECIPE: {"criterion": {"of": "another version"}}}), 20)
    assert odd == silent
    assert "not understood and left out" in caplog.text


def test_it_is_said_aloud() -> None:
    said = described(finetune_recipe(checkpoint(), 200), 200)
    rate = TABLE[1].rate * 6e-4
    assert said.startswith(
        f"200 images: 1,000 steps of 8 at {rate * 1e4:g}e-4 after a warm-up of 50, nothing more frozen"
    )
    assert "evaluated every 100 steps, stops when AP has not risen for 5 evaluations." in said
    own = finetune_recipe(
        checkpoint(), 1, None, ["train.loop.patience=0", "train.freeze=encoder", "train.ema.enabled=0"]
    )
    said = described(own, 1)
    assert said.startswith("1 image: 300 steps")
    assert "backbone and encoder frozen" in said
    assert "stops" not in said
    assert "averaged" not in said


def test_what_is_left_is_part_of_a_configuration() -> None:
    recipe = load_recipe("small")
    left = left_to_finetuning(recipe)
    merged = RunConfig.checked(merge(RunConfig().model_dump(mode="json"), left))
    assert merged.train.optimizer == recipe.train.optimizer
    assert merged.criterion == recipe.criterion
    assert "resize" not in left["augmentation"]
    assert "freeze: none" in as_yaml(TrainConfig())
