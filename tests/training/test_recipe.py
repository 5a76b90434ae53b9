"""Recipes: the sizes are what they are said to be, and every value can be overridden by its name."""

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from metr.checkpoint import load_checkpoint, save_checkpoint
from metr.data.config import AugmentationConfig, LoaderConfig, ResizeConfig, SubsetConfig
from metr.demo.run import demo_recipe
from metr.errors import CheckpointError, ConfigError
from metr.training.config import (
    SIZES,
    EmaConfig,
    LoopConfig,
    OptimizerConfig,
    PseudoLabelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    changed_lines,
    load_recipe,
)
from metr.training.finetune_data import FinetuneOptions
from small_runs import make_description

RECIPES = resources.files("metr") / "recipes"


def leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        # the options of a backbone are one value: another network has other ones
        if isinstance(value, dict) and value and key != "options":
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def assignment(key: str, value: object) -> str:
    written = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return f"{key}={written}"


DEFAULTS = dict(leaves(RunConfig().model_dump(mode="json")))
# numbers whose neighbours are not allowed
NARROW = {
    "model.encoder.levels": 6,
    "model.queries.floor": 7,
    "model.backbone.freeze_stages": 2,
    "model.categories.shortlist": 64,
    "augmentation.crop_aspect": 2.0,
    "model.backbone.adapter": 16,
    "model.decoder.position_layers": 3,
    "model.queries.point_layers": 2,
    "model.queries.patterns": 3,
}
# numbers that mean something only beside other settings
COMPANY = {
    "model.backbone.adapter": ["model.backbone.layers=[2,4,6]", "model.backbone.adapter=8"],
    "augmentation.mosaic.until": ["augmentation.mosaic.probability=0.5"],
    "augmentation.resize.longest": ["augmentation.resize.mode=fit"],
    "criterion.matchability_gamma": ["criterion.classification=matchability"],
    "criterion.weights.one_to_many": ["model.queries.one_to_many.number=60"],
    "model.encoder.norm_eps": ["model.encoder.kind=projector", "model.backbone.strides=[16]"],
    "model.encoder.points": ["model.encoder.kind=deformable", "model.encoder.positions=scaled"],
    "model.queries.floor": ["model.queries.layout=budget"],
    "model.queries.one_to_many.repeats": ["model.queries.one_to_many.number=60"],
    **{
        f"train.pseudo_labels.{name}": ["unannotated=pseudo_label"]
        for name in ("absent_below", "object_above", "objects", "present_above", "same_object")
    },
    "model.decoder.position_layers": ["model.decoder.positions=plain"],
    "model.queries.point_layers": [
        "model.queries.places=learned",
        "model.queries.layout=places",
        "model.queries.content=none",
        "model.queries.attention=image",
        "model.decoder.positions=learned",
        "model.denoising.number=0",
    ],
    "model.queries.patterns": [
        "model.queries.places=learned_boxes",
        "model.queries.layout=places",
        "model.queries.content=patterns",
    ],
    "model.similarity.rivals": [
        "model.similarity.form=classifier",
        "model.similarity.token=refined",
        "model.similarity.factor=1",
        "model.similarity.objectness=false",
        "model.queries.places=learned",
        "model.queries.layout=places",
        "model.queries.content=none",
        "model.decoder.kind=plain",
        "model.decoder.positions=learned",
        "model.denoising.number=0",
    ],
    "model.encoder.temperature": ["model.encoder.kind=plain"],
    "model.decoder.temperature": ["model.decoder.kind=conditional"],
    "model.decoder.smallest_side": ["model.decoder.kind=conditional"],
}
FOLLOWING = (
    "train.schedule.warmup_steps",
    "train.ema.decay",
    "train.ema.tau",
    "train.loop.evaluate_every",
    "train.loop.checkpoint_every",
)
NUMBERS = {key: value for key, value in DEFAULTS.items() if type(value) in {int, float}}


def at(config: RunConfig, key: str) -> object:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_a_document_of_known_keys(size: str) -> None:
    text = (RECIPES / f"{size}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f"--size {size}" in text
    config = load_recipe(size)
    for key, value in leaves(yaml.safe_load(text)):
        stored = at(config, key)
        assert (list(stored) if isinstance(stored, tuple) else stored) == value


def test_the_sizes_are_what_is_promised() -> None:
    nano, small, base, vit = (load_recipe(size) for size in SIZES)
    assert [one.model.backbone.name for one in (nano, small, base)] == ["efficientnet_lite0", "resnet18", "resnet50"]
    assert (vit.model.encoder.kind, vit.model.backbone.layers) == ("projector", (3, 6, 9, 12))
    assert (vit.augmentation.resize.size % 28, vit.loader.multiple) == (0, 28)
    assert (nano.model.encoder.kind, nano.model.width, nano.model.decoder.layers) == ("hybrid", 128, 3)
    assert nano.augmentation.resize.size == 320
    assert (base.model.encoder.kind, base.model.width) == ("deformable", 256)
    assert (base.model.encoder.layers, base.model.decoder.layers) == (6, 6)


def test_nano_is_the_default_and_needs_no_network() -> None:
    assert load_recipe() == load_recipe("nano")
    assert load_recipe().text.source == "bundled:minilm"


def test_every_value_can_be_overridden_by_its_name() -> None:
    everything = [assignment(key, value) for key, value in DEFAULTS.items()]
    assert load_recipe("base", overrides=everything) == RunConfig()


@pytest.mark.parametrize("key", sorted(NUMBERS))
def test_every_number_can_be_overridden_alone(key: str) -> None:
    company = COMPANY.get(key, [])
    base, value = load_recipe("nano", overrides=company), NUMBERS[key]
    changed = NARROW.get(key, value / 2 if isinstance(value, float) else value + 8)
    config = load_recipe("nano", overrides=[*company, assignment(key, changed)])
    assert at(config, key) == changed
    follow = set(FOLLOWING) if key == "train.loop.steps" else set()
    others = {name for name, _ in leaves(base.model_dump(mode="json"))} - {key} - follow
    assert all(at(config, name) == at(base, name) for name in others)


@pytest.mark.parametrize("key", ["model.width", "train.loop.steps", "augmentation.resize.size", "unannotated"])
def test_a_typo_names_the_key_and_the_near_one(key: str) -> None:
    section, _, last = key.rpartition(".")
    typo = f"{section}.{last}x".removeprefix(".")
    with pytest.raises(ConfigError) as caught:
        load_recipe("nano", overrides=[f"{typo}=1"])
    assert str(caught.value).startswith(f"recipe nano and --set: unknown key {typo!r}\n")
    assert repr(last) in str(caught.value).partition("did you mean")[2]


@pytest.mark.parametrize("size", ["nanno", "large", ""])
def test_an_unknown_size(size: str) -> None:
    with pytest.raises(ConfigError, match=f"--size: unknown size '{size}'\n  try: (did you mean 'nano'|one of 'base')"):
        load_recipe(size)


def test_a_file_lies_over_the_size_and_overrides_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {width: 64, queries: {number: 50}}\ntrain: {loop: {steps: 7}}\n", encoding="utf-8")
    config = load_recipe("nano", file, ["model.width=96", "train.optimizer.learning_rate=1e-5"])
    assert (config.model.width, config.model.queries.number, config.train.loop.steps) == (96, 50, 7)
    assert config.train.optimizer.learning_rate == 1e-5
    assert config.model.decoder == load_recipe("nano").model.decoder


def test_a_typo_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {loop: {step: 7}}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_recipe("nano", file)
    message = str(caught.value)
    assert message == f"recipe nano with {file}: unknown key 'train.loop.step'\n  try: did you mean 'steps'?"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such configuration file"):
        load_recipe("nano", tmp_path / "none.yaml")


def test_the_demo_is_nano_made_shorter() -> None:
    demo, nano = demo_recipe(), load_recipe("nano")
    assert demo.model.backbone == nano.model.backbone
    assert demo.text == nano.text
    assert demo.train.loop.steps < nano.train.loop.steps
    assert demo.augmentation.resize.size <= 320
    assert demo_recipe(("train.loop.steps=3",)).train.loop.steps == 3


RENAMED = [
    ("foreign", "ignore", "'foreign' is called 'unannotated' now"),
    ("foreign", "teacher", "'foreign' is called 'unannotated' now, and its value 'teacher' is called 'pseudo_label'"),
    ("unannotated", "assume_absent", "'assume_absent' is called 'negative' now"),
    ("unannotated", "teacher", "'teacher' is called 'pseudo_label' now"),
    ("model.agreement.factor", 4.0, "'model.agreement' is called 'model.similarity' now"),
    ("train.teacher.objects", 5, "'train.teacher' is called 'train.pseudo_labels' now"),
    ("train.schedule.flat_share", 0.5, "'train.schedule.flat_share' is called 'train.schedule.flat_fraction' now"),
    (
        "model.categories.foreign_slots",
        2,
        "'model.categories.foreign_slots' is called 'model.categories.negative_slots' now",
    ),
    ("train.loop.names", 500, "'train.loop.names' is called 'train.loop.vocabulary_sample' now"),
    ("train.loop.tensorboard", True, "'train.loop.tensorboard' is called 'train.loop.trackers' now"),
    ("loader.hardness.every", 9, "'loader.hardness' was removed; 'loader.mixture' is proportional, sqrt, equal, or a"),
    (
        "loader.mixture",
        "hardness",
        "'hardness' was removed; 'mixture' is proportional, sqrt, equal, or a weight",
    ),
]


@pytest.mark.parametrize(("key", "value", "hint"), RENAMED)
def test_a_key_or_value_of_old_is_refused_with_its_new_name(tmp_path: Path, key: str, value: object, hint: str) -> None:
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    for given in ({"overrides": [assignment(key, value)]}, {"config": file}):
        with pytest.raises(ConfigError) as caught:
            load_recipe("nano", **given)
        assert f"\n  try: {hint}" in str(caught.value)


def test_old_keys_of_fine_tuning_are_refused_with_their_new_names() -> None:
    for config in (SubsetConfig, FinetuneOptions):
        with pytest.raises(ConfigError, match="unknown key 'share'\n  try: 'share' is called 'fraction' now"):
            config.checked({"share": 0.5})


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("agreement", "'agreement' is called 'similarity' now"),
        ("categories.foreign_slots", "'categories.foreign_slots' is called 'categories.negative_slots' now"),
    ],
)
def test_an_old_key_of_a_checkpoint_is_refused_with_its_new_name(tmp_path: Path, key: str, hint: str) -> None:
    save_checkpoint(tmp_path / "old", make_description())
    path = tmp_path / "old" / "config.json"
    values = json.loads(path.read_text())
    section, _, last = key.rpartition(".")
    (values["model"][section] if section else values["model"])[last] = {}
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"config.json \(model\): unknown key '{key}'\n  try: {hint}"):
        load_checkpoint(tmp_path / "old")


@pytest.mark.parametrize(
    "config",
    [
        RunConfig, TrainConfig, OptimizerConfig, ScheduleConfig, EmaConfig, PseudoLabelConfig, LoopConfig,
        LoaderConfig, AugmentationConfig, ResizeConfig, SubsetConfig, FinetuneOptions,
    ],
)  # fmt: skip
def test_every_field_is_documented(config: type[Any]) -> None:
    assert [name for name, field in config.model_fields.items() if not field.description] == []


def test_a_whole_configuration_takes_the_place_of_the_sizes(tmp_path: Path) -> None:
    small = load_recipe("small")
    assert load_recipe("nano", small) == small
    assert load_recipe("nano", small, ["model.width=64"]).model.width == 64


def test_what_differs_from_a_recipe_is_a_line_each() -> None:
    nano = load_recipe("nano")
    assert changed_lines(nano, nano) == []
    changed = load_recipe("nano", overrides=["train.loop.steps=7", "loader.mixture={a: 1}", "loader.workers=0"])
    assert changed_lines(nano, changed) == [
        "loader.workers: null -> 0",
        "loader.mixture: sqrt -> {a: 1.0}",
        "train.schedule.warmup_steps: 200 -> 1",
        "train.ema.decay: 0.9995 -> 0.285714",
        "train.ema.tau: 300.0 -> 0.21",
        "train.loop.steps: 10000 -> 7",
        "train.loop.log_every: 20 -> 1",
        "train.loop.evaluate_every: 1000 -> 10",
        "train.loop.checkpoint_every: 500 -> 20",
    ]


def following(config: RunConfig) -> dict[str, object]:
    return {key: at(config, key) for key in FOLLOWING}


def test_warm_up_average_and_intervals_follow_the_number_of_steps() -> None:
    short = load_recipe("nano", overrides=["train.loop.steps=600"])
    assert following(short) == {
        "train.schedule.warmup_steps": 12,
        "train.ema.decay": pytest.approx(1 - 1 / 120, abs=1e-6),
        "train.ema.tau": 18,
        "train.loop.evaluate_every": 60,
        "train.loop.checkpoint_every": 30,
    }
    long = load_recipe("nano", overrides=["train.loop.steps=40000"])
    assert following(long) == {
        "train.schedule.warmup_steps": 800,
        "train.ema.decay": pytest.approx(1 - 1 / 8000, abs=1e-6),
        "train.ema.tau": 1200,
        "train.loop.evaluate_every": 4000,
        "train.loop.checkpoint_every": 500,
    }, "what a crash loses is not more than before"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps", [1, 2, 7, 60, 1000, 10**7])
def test_a_run_of_any_length_is_not_all_warm_up(size: str, steps: int) -> None:
    config = load_recipe(size, overrides=[f"train.loop.steps={steps}"])
    recipe, loop = load_recipe(size).train, config.train.loop
    assert 1 <= config.train.schedule.warmup_steps <= 1 + 0.03 * steps
    covered = 1 / (1 - config.train.ema.decay)
    assert 1 <= covered <= 1 + 0.3 * steps
    assert config.train.ema.tau <= covered
    assert loop.evaluate_every >= 10, "evaluations do not take longer than training"
    assert min(steps // 10, 5) <= steps // loop.evaluate_every <= 25
    assert 20 <= loop.checkpoint_every <= recipe.loop.checkpoint_every


def test_what_is_given_does_not_follow(tmp_path: Path) -> None:
    recipe = load_recipe("nano")
    for key in FOLLOWING:
        config = load_recipe("nano", overrides=["train.loop.steps=600", assignment(key, at(recipe, key))])
        assert at(config, key) == at(recipe, key)
        assert all(at(config, other) != at(recipe, other) for other in set(FOLLOWING) - {key})
    (tmp_path / "mine.yaml").write_text("train: {loop: {steps: 600, evaluate_every: 0}, ema: {decay: 0.5}}")
    config = load_recipe("nano", tmp_path / "mine.yaml")
    assert (config.train.loop.evaluate_every, config.train.ema.decay, config.train.ema.tau) == (0, 0.5, 18)
    # zero stays zero: no evaluation on the way, no warm-up, no average
    none = load_recipe("nano", overrides=["train.loop.evaluate_every=0", "train.schedule.warmup_steps=0"])
    short = load_recipe("nano", none, ["train.loop.steps=60", "train.ema.decay=0"])
    assert (short.train.loop.evaluate_every, short.train.schedule.warmup_steps) == (0, 0)


@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_at_its_own_number_of_steps_is_as_it_is_written(size: str) -> None:
    tree = yaml.safe_load((RECIPES / f"{size}.yaml").read_text(encoding="utf-8"))
    steps = tree["train"]["loop"]["steps"]
    assert load_recipe(size) == load_recipe(size, overrides=[f"train.loop.steps={steps}"]) == RunConfig.checked(tree)


def test_the_demo_can_be_shortened_too() -> None:
    demo = demo_recipe(("train.loop.steps=45",))
    assert (demo.train.schedule.warmup_steps, demo.train.ema.decay, demo.train.ema.tau) == (3, 0.9, 3)


def test_a_sharded_network_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match="compile"):
        load_recipe("nano", overrides=["train.parallel=fsdp", "train.loop.compile=true"])
