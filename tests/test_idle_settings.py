"""Settings without effect beside others are refused where they are set, and read where they are stored."""

import json
from pathlib import Path
from typing import Any

import pytest

from metr.checkpoint import CONFIG, load_checkpoint
from metr.config import Tree, as_yaml, leaves, merge, parse_overrides
from metr.errors import ConfigError
from metr.idle_settings import _NEEDS
from metr.inference.config import inference_config
from metr.models.config import DetectorConfig
from metr.training.config import SIZES, RunConfig, load_recipe, packaged
from metr.training.finetune_recipe import finetune_recipe
from metr.training.start import start_recipe

CHECKOUT = Path(__file__).resolve().parents[1]
CHECKPOINTS = sorted(path.parent for path in (CHECKOUT / "checkpoints").glob(f"*/{CONFIG}"))
IDLE = [
    (["model.denoising.flips=false", "model.denoising.flip_noise=0.5"], "model.denoising.flips true, found False"),
    (["model.denoising.number=0", "model.denoising.groups=7"], "model.denoising.number above 0, found 0"),
    (["model.denoising.number=50", "criterion.weights.denoising=0"], "criterion.weights.denoising above 0, found 0"),
    (["model.queries.one_to_many.repeats=3"], "model.queries.one_to_many.number above 0, found 0"),
    (["criterion.weights.one_to_many=0.5"], "model.queries.one_to_many.number above 0, found 0"),
    (
        ["model.queries.one_to_many.number=60", "criterion.weights.one_to_many=0"],
        "criterion.weights.one_to_many above 0, found 0",
    ),
    (["augmentation.mosaic.until=0.3"], "augmentation.mosaic.probability above 0, found 0.0"),
    (["augmentation.mosaic.scale=[0.6,1]"], "augmentation.mosaic.probability above 0, found 0.0"),
    (["augmentation.crop=0", "augmentation.crop_aspect=2"], "augmentation.crop above 0, found 0"),
    (["augmentation.zoom_out=0", "augmentation.zoom_out_ratio=3"], "augmentation.zoom_out above 0, found 0"),
    (["augmentation.colour=0", "augmentation.hue=0.1"], "augmentation.colour above 0, found 0"),
    (["augmentation.resize.longest=900"], "augmentation.resize.mode 'fit', found stretch"),
    (["criterion.matchability_gamma=3"], "criterion.classification 'matchability', found quality"),
    (["criterion.classification=focal", "criterion.quality_alpha=0.5"], "criterion.classification 'quality', found"),
    (["train.ema.enabled=false", "train.ema.batch_norm_images=10"], "train.ema.enabled true, found False"),
    (["train.schedule.kind=constant", "train.schedule.floor=0.1"], "train.schedule.kind 'cosine' or 'flat_cosine'"),
    (["train.loop.evaluate_every=0", "train.loop.patience=3"], "train.loop.evaluate_every above 0, found 0"),
    (["train.pseudo_labels.objects=3"], "unannotated 'pseudo_label', found negative"),
]


@pytest.mark.parametrize(("settings", "told"), IDLE, ids=lambda one: one[-1] if isinstance(one, list) else "")
def test_a_setting_without_effect_is_refused(settings: list[str], told: str, tmp_path: Path) -> None:
    idle = next(one for one in reversed(settings) if not one.endswith("=0"))
    key = idle.partition("=")[0]
    with pytest.raises(ConfigError) as refused:
        load_recipe("nano", overrides=settings)
    assert f"{key}=" in str(refused.value)
    assert f"has no effect: it needs {told}" in str(refused.value)
    assert f"or leave {key} out" in str(refused.value)
    with pytest.raises(ConfigError, match="has no effect"):
        load_recipe("nano", changes=parse_overrides(settings))
    # stored values are read all the same, and may stay when something else is set
    stored = RunConfig.checked(merge(packaged("nano"), parse_overrides(settings)))
    assert load_recipe("nano", stored, ["train.loop.log_every=7"]).train.loop.log_every == 7
    assert load_recipe("nano", stored, [idle]) == stored, "as it is anyway"


@pytest.mark.parametrize(
    "settings",
    [
        ["model.denoising.flips=false"],
        ["model.denoising.flips=false", "model.denoising.flip_noise=0.2"],
        ["model.denoising.number=0", "criterion.weights.denoising=0"],
        ["model.queries.one_to_many.number=60", "model.queries.one_to_many.repeats=3"],
        ["criterion.weights.one_to_many=0"],
        ["augmentation.mosaic.probability=0.5", "augmentation.mosaic.until=0.3"],
        ["augmentation.mosaic.until=0.8"],
        ["criterion.classification=matchability", "criterion.matchability_gamma=3"],
        ["train.ema.enabled=false"],
        ["train.loop.steps=50", "train.ema.enabled=false"],
    ],
)
def test_a_setting_with_an_effect_or_as_it_is_by_default_is_not(settings: list[str]) -> None:
    load_recipe("nano", overrides=settings)


def test_a_later_layer_switches_off_what_an_earlier_one_configures(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("augmentation: {mosaic: {probability: 0.5, until: 0.3}}")
    recipe = load_recipe("nano", own, ["augmentation.mosaic.probability=0"])
    assert (recipe.augmentation.mosaic.probability, recipe.augmentation.mosaic.until) == (0, 0.3)
    own.write_text("augmentation: {mosaic: {probability: 0}}")
    with pytest.raises(ConfigError, match=r"(?s)own\.yaml.*mosaic\.until=0\.3 has no effect"):
        load_recipe("nano", own, ["augmentation.mosaic.until=0.3"])


def test_the_configuration_of_a_run_is_a_recipe_whatever_it_holds(tmp_path: Path) -> None:
    idle = {"criterion": {"matchability_gamma": 3.0}, "augmentation": {"mosaic": {"until": 0.3}}}
    saved = RunConfig.checked(merge(packaged("nano"), idle))
    (tmp_path / "config.yaml").write_text(as_yaml(saved))
    assert load_recipe("base", tmp_path / "config.yaml") == saved
    assert load_recipe("base", tmp_path / "config.yaml", ["augmentation.mosaic.until=0.3"]) == saved
    with pytest.raises(ConfigError, match=r"mosaic\.until=0\.2 has no effect"):
        load_recipe("base", tmp_path / "config.yaml", ["augmentation.mosaic.until=0.2"])


def test_settings_of_detection() -> None:
    with pytest.raises(ConfigError, match=r"--set: inference\.postprocess\.nms_across_names=True has no effect"):
        inference_config(["inference.postprocess.nms_iou=null", "inference.postprocess.nms_across_names=true"])
    with pytest.raises(ConfigError, match=r"untrained_threshold=0\.1 has no effect.*presence_threshold null"):
        inference_config(["inference.selection.presence_threshold=0.2", "inference.selection.untrained_threshold=0.1"])
    inference_config(["inference.postprocess.nms_across_names=true"])


def test_every_setting_that_is_told_exists() -> None:
    known = leaves(RunConfig().model_dump(mode="json")).keys()
    for need in _NEEDS:
        assert need.other in known
        for key in need.keys:
            assert any(map(need.concerns, known)), key
            assert key.endswith(".") or key in known, key


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.name)
def test_shipped_checkpoints_and_such_as_hold_idle_values_begin_a_training(folder: Path) -> None:
    shipped = load_checkpoint(folder)
    values = json.loads((folder / CONFIG).read_text())
    idle: Tree = {
        "model": {"denoising": {"flips": False, "flip_noise": 0.5}, "queries": {"one_to_many": {"repeats": 3}}}
    }
    model = DetectorConfig.checked(merge(values["model"], idle["model"]))
    more: dict[str, Any] = merge(shipped.training["recipe"], {"criterion": {"matchability_gamma": 3.0}})
    old = type(shipped)(**{**vars(shipped), "model": model, "training": {**shipped.training, "recipe": more}})
    for checkpoint in (shipped, old):
        for make in (lambda one: finetune_recipe(one, 100), start_recipe):
            assert make(checkpoint).model == checkpoint.model


@pytest.mark.parametrize("size", SIZES)
def test_what_a_recipe_holds_may_be_given_again(size: str) -> None:
    assert load_recipe(size, changes=packaged(size)) == load_recipe(size)
