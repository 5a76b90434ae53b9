"""A backbone gets the weights of its own pretraining back, whole or in part, and everything else stays."""

import copy
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch import Tensor

from metr.checkpoint import load_checkpoint
from metr.config import read_yaml
from metr.data.joint import open_joint
from metr.errors import ConfigError, ModelError
from metr.model import METR
from metr.models.backbones.efficientnet_lite import packaged_weights
from metr.models.config import BackboneConfig
from metr.models.detector import Detector
from metr.training.config import load_recipe
from metr.training.finetune import finetune, finetune_plan
from metr.training.finetune_recipe import described, finetune_recipe
from metr.training.resumed_recipe import SETTINGS
from metr.training.start import advised_backbone, described_start, restore_backbone, start_recipe
from metr.training.train import plan, train

from small import small_config
from tiny import CommandLine, TinyRun

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints/metr-nano"
KEY = "train.pretrained_backbone"
NOTHING_LEARNT = ("train.optimizer.learning_rate=1e-12", "train.ema.enabled=false", "train.loop.device=cpu")
NOTHING_LEARNT += ("train.loop.steps=1", "train.loop.curves=false", "train.loop.images=false", "loader.workers=0")
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def network_with(backbone: BackboneConfig) -> Detector:
    """A small detector whose backbone's weights were all moved, as training does."""
    torch.manual_seed(0)
    network = Detector(small_config().model_copy(update={"backbone": backbone}), 8)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.add_(0.25)
    return network


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_imagenets_weights_come_back_by_their_share_and_nothing_else_moves(share: float) -> None:
    network = network_with(BackboneConfig(name="efficientnet_lite0", pretrained=False))
    before, random = state(network), torch.random.get_rng_state()
    restore_backbone(network, share)
    assert torch.equal(torch.random.get_rng_state(), random)
    imagenet = packaged_weights()
    for key, value in network.state_dict().items():
        own = imagenet.get(key.removeprefix("backbone.trunk."))
        if own is None or not value.is_floating_point():
            assert torch.equal(value, before[key]), key
        else:
            expected = (1 - share) * before[key] + share * own
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("ResNet", RESNET),
        ("Dinov2", {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56}),
    ],
)
def test_a_backbone_of_transformers_keeps_what_was_made_beside_it(
    kind: str, values: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**values, out_indices=[1, 2, 3, 4])
    stored = getattr(transformers, f"{kind}Backbone")(config)
    stored.save_pretrained(tmp_path / "own")
    network = network_with(BackboneConfig(name=str(tmp_path / "own"), freeze_stages=0))
    before = state(network)
    restore_backbone(network, 1.0)
    own = {f"backbone.network.{key}": value for key, value in stored.state_dict().items()}
    moved = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert moved <= own.keys()
    for key in moved:
        torch.testing.assert_close(network.state_dict()[key], own[key], msg=key)
    trained = {key for key, value in network.named_parameters() if key in own and value.requires_grad}
    assert trained <= moved
    beside = {key for key in before if key.startswith("backbone.pyramid")}
    assert bool(beside) == (kind == "Dinov2")
    assert not beside & moved


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            BackboneConfig(name="efficientnet_lite0", pretrained=False, options={"width": 0.5}),
            "for width 1 and depth 1",
        ),
        (BackboneConfig(name="resnet", pretrained=False, freeze_stages=0, options=RESNET), "no backbone 'resnet'"),
    ],
)
def test_a_backbone_without_pretrained_weights_is_refused_and_stays(config: BackboneConfig, why: str) -> None:
    network = network_with(config)
    before = state(network)
    restore_backbone(network, 0.0)
    with pytest.raises(ConfigError, match=f"{KEY}: the pretrained weights of the backbone .* cannot be had: .*{why}"):
        restore_backbone(network, 0.5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.fixture(scope="module")
def trained(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose backbone began with the weights of a folder and left them, and that folder."""
    home = tmp_path_factory.mktemp("trained")
    torch.manual_seed(1)
    config = transformers.ResNetConfig(**RESNET, out_indices=[2, 3, 4])
    transformers.ResNetBackbone(config).save_pretrained(home / "own")
    tree = read_yaml(tiny_run.recipe)
    tree["model"]["backbone"] = {"name": str(home / "own"), "freeze_stages": 0, "freeze_batch_norm": True}
    tree["train"]["optimizer"] = {"learning_rate": 0.1, "clip_norm": 0.0}
    tree["train"]["schedule"] = {"warmup_steps": 0}
    train(tiny_run.data[:1], home / "run", load_recipe("nano", changes=tree))
    return home / "run", home / "own"


def convolutions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The kernels of a backbone, which nothing but training changes."""
    return {key: value for key, value in weights.items() if key.endswith("convolution.weight")}


@pytest.mark.parametrize("verb", ["finetune", "train"])
def test_training_begins_with_them(verb: str, trained: tuple[Path, Path], tiny_run: TinyRun, tmp_path: Path) -> None:
    run, own = trained
    overrides = [*NOTHING_LEARNT, f"{KEY}=1"]
    if verb == "finetune":
        finetune(tiny_run.data[1:2], run, tmp_path / "out", overrides=overrides, compare=False)
    else:
        train(tiny_run.data[1:2], tmp_path / "out", start=run, overrides=overrides)
    made, before = load_checkpoint(tmp_path / "out"), load_checkpoint(run)
    pretrained = transformers.ResNetBackbone.from_pretrained(own).state_dict()
    kernels = convolutions({key.removeprefix("backbone.network."): value for key, value in made.weights.items()})
    checked = kernels.keys() & pretrained.keys()
    assert len(checked) > 4
    for key in checked:
        torch.testing.assert_close(kernels[key], pretrained[key], atol=1e-5, rtol=1e-5, msg=key)
        assert not torch.allclose(before.weights[f"backbone.network.{key}"], pretrained[key], atol=1e-3), key
    rest = [key for key in before.weights if not key.startswith("backbone.") and "running" not in key]
    for key in rest:
        if made.weights[key].is_floating_point():
            torch.testing.assert_close(made.weights[key], before.weights[key], atol=1e-5, rtol=1e-5, msg=key)
    assert not made.model.backbone.pretrained, "a checkpoint builds its backbone without the folder"


def test_it_is_said_aloud(trained: tuple[Path, Path]) -> None:
    model = METR.from_pretrained(trained[0], device="cpu")
    recipe = finetune_recipe(model.checkpoint, 20, overrides=[f"{KEY}=0.5"])
    assert ", 50% of the backbone's original weights, " in described(recipe, 20)
    assert "original weights" not in described(finetune_recipe(model.checkpoint, 20), 20)
    recipe = start_recipe(model.checkpoint, overrides=[f"{KEY}=1"])
    assert "its own network (100% of the backbone's original weights) and normal" in described_start(model, recipe)
    assert "its own network and normalisation" in described_start(model, start_recipe(model.checkpoint))


def test_it_is_advised_for_new_names_on_few_images_where_imagenets_weights_are_at_hand(
    trained: tuple[Path, Path], tiny_run: TinyRun
) -> None:
    shipped = METR.from_pretrained(SHIPPED, device="cpu")
    new = open_joint([str(listed(tiny_run, trained[0].parent, {"fish": "trout"}))])
    known = open_joint([str(listed(tiny_run, trained[0].parent, {"leaf": "king"}))])
    recipe = finetune_recipe(shipped.checkpoint, 4)
    config = shipped.checkpoint.model
    narrow = config.model_copy(update={"backbone": config.backbone.model_copy(update={"options": {"width": 0.5}})})
    assert "--pretrained-backbone 1 is worth a try" in advised_backbone(shipped, new, recipe)
    for nothing in (
        advised_backbone(shipped, known, recipe),
        advised_backbone(shipped, new, finetune_recipe(shipped.checkpoint, 4, overrides=[f"{KEY}=0.5"])),
        advised_backbone(METR.from_pretrained(trained[0], device="cpu"), new, recipe),
        advised_backbone(METR(shipped.network, replace(shipped.checkpoint, model=narrow)), new, recipe),
    ):
        assert nothing == ""


def test_the_plan_advises_it_where_nothing_old_is_to_be_kept(tiny_run: TinyRun, tmp_path: Path) -> None:
    new, advice = str(listed(tiny_run, tmp_path, {"fish": "trout"})), "--pretrained-backbone 1 is worth a try"
    assert told(finetune_plan(new, SHIPPED)).count(advice) == 1
    assert finetune_recipe(load_checkpoint(SHIPPED), 4).train.pretrained_backbone == 0, "it is a choice"
    assert advice not in told(finetune_plan(new, SHIPPED, rehearse=(tiny_run.data[1],)))
    assert advice not in told(finetune_plan(new, SHIPPED, rehearse_evaluate=(tiny_run.data[1],)))
    assert advice not in told(finetune_plan(new, SHIPPED, overrides=[f"{KEY}=1"]))


def told(page: Any) -> str:
    """A page in one line of single spaces."""
    paper = io.StringIO()
    Console(file=paper, width=200).print(page)
    return " ".join(paper.getvalue().split())


def listed(run: TinyRun, place: Path, renames: dict[str, str]) -> Path:
    """The pond with other names."""
    path = place / "renamed.yaml"
    path.write_text(json.dumps({"datasets": [{"name": "new", "path": str(run.datasets[0]), "renames": renames}]}))
    return path


def test_what_cannot_be_had_is_refused_before_anything_is_done(tiny_run: TinyRun, tmp_path: Path) -> None:
    for act in (
        lambda: finetune(tiny_run.data[:1], tiny_run.folder, tmp_path / "out", overrides=[f"{KEY}=1"]),
        lambda: finetune_plan(tiny_run.data[:1], tiny_run.folder, overrides=[f"{KEY}=1"]),
        lambda: train(tiny_run.data[:1], tmp_path / "out", start=tiny_run.folder, overrides=[f"{KEY}=1"]),
        lambda: plan(tiny_run.data[:1], start=tiny_run.folder, overrides=[f"{KEY}=1"]),
    ):
        with pytest.raises(ConfigError, match="the pretrained weights of the backbone resnet cannot be had"):
            act()
    for act in (
        lambda: train(tiny_run.data[:1], tmp_path / "out", tiny_run.recipe, overrides=[f"{KEY}=1"]),
        lambda: plan(tiny_run.data[:1], tiny_run.recipe, overrides=[f"{KEY}=1"]),
    ):
        with pytest.raises(ConfigError, match="is about the backbone of a detector to begin with, and none is named"):
            act()
    assert not (tmp_path / "out/state").exists()


@pytest.mark.parametrize("share", ["1.5", "-0.1", "half"])
def test_a_share_is_a_share(share: str, tiny_run: TinyRun) -> None:
    with pytest.raises(ConfigError, match="pretrained_backbone"):
        finetune_plan(tiny_run.data[:1], tiny_run.folder, overrides=[f"{KEY}={share}"])


@pytest.mark.parametrize("verb", ["finetune", "train"])
def test_where_the_weights_of_a_new_network_come_from_is_refused(verb: str, trained: tuple[Path, Path]) -> None:
    checkpoint = METR.from_pretrained(trained[0], device="cpu").checkpoint

    def recipe(*overrides: str) -> Any:
        return (
            finetune_recipe(checkpoint, 20, overrides=overrides)
            if verb == "finetune"
            else start_recipe(checkpoint, overrides=overrides)
        )

    for one in ("model.backbone.pretrained=true", "model.backbone.revision=abc"):
        with pytest.raises(ConfigError, match=f"{one.replace('true', 'True')} has no effect: the weights are those of"):
            recipe(one)
    assert recipe("model.backbone.pretrained=false") == recipe()
    assert recipe("model.backbone.revision=abc", f"{KEY}=1").model.backbone.revision == "abc", "it says which weights"
    # a whole configuration is read as it is: that of the pretraining says where its weights came from
    whole = copy.deepcopy(recipe().model_dump(mode="json"))
    whole["model"]["backbone"]["pretrained"] = True
    if verb == "train":
        assert start_recipe(checkpoint, type(recipe()).checked(whole)).model.backbone.pretrained


def test_a_resumed_run_keeps_its_beginning(
    trained: tuple[Path, Path], tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, olds = tmp_path / "out", list[tuple[Path, str]]()
    finetune(tiny_run.data[1:2], trained[0], out, overrides=[*NOTHING_LEARNT, f"{KEY}=1"], compare=False)
    with pytest.raises(ConfigError, match=rf"begun with {KEY} 1\.0, now 0\.5"):
        finetune(None, None, out, overrides=["train.loop.steps=2", f"{KEY}=0.5"], resume=True)
    first = load_checkpoint(out).weights
    # a version that did not have the setting began with the detector's weights
    for kept in (out / "config.yaml", out / "state" / SETTINGS):
        olds.append((kept, kept.read_text()))
        without = re.sub(r'(?m)^.*pretrained_backbone"?:.*\n', "", kept.read_text())
        assert without != kept.read_text()
        kept.write_text(without)
    with pytest.raises(ConfigError, match=rf"begun with {KEY} 0\.0, now 1\.0"):
        finetune(None, None, out, overrides=["train.loop.steps=2", f"{KEY}=1"], resume=True)
    for kept, before in olds:
        kept.write_text(before)

    def gone(_: object) -> None:
        raise ModelError("the hub is out of reach")

    monkeypatch.setattr("metr.training.start.build_backbone", gone)  # the saved weights are all that it needs
    finetune(None, None, out, overrides=["train.loop.steps=2"], resume=True)
    for key, value in convolutions(load_checkpoint(out).weights).items():
        torch.testing.assert_close(value, first[key], atol=1e-5, rtol=1e-5, msg=key)


def test_the_command_has_an_option_for_it(
    trained: tuple[Path, Path], tiny_run: TinyRun, metr: CommandLine, tmp_path: Path
) -> None:
    asked = ("finetune", tiny_run.data[1], "--from", str(trained[0]), "-o", str(tmp_path / "out"), "--dry-run")
    ended = metr(*asked, "--pretrained-backbone", "1")
    assert ended.code == 0
    assert "100% of the backbone's original weights" in ended.words
    ended = metr(*asked, "--pretrained-backbone", "2")
    assert ended.code == 1
    assert "input should be less than or equal to 1, found 2" in ended.words.lower()
