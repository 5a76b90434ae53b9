"""Frozen parts keep their weights bit by bit, and depths are counted from the top."""

from pathlib import Path

import pytest
import torch
from small_runs import make_config, make_parts
from torch import nn

from metr.errors import ModelError
from metr.models.backbones import build_backbone
from metr.models.backbones.config import BackboneConfig
from metr.training.freezing import backbone_stages, depths_below_top, freeze
from metr.training.trainer import Trainer

from small import small_backbone, small_config, small_detector


def owned(modules: tuple[nn.Module, ...], whole: nn.Module) -> set[str]:
    """The names, in a network, of all parameters in some of its modules."""
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, parameter in whole.named_parameters() if id(parameter) in inside}


@pytest.mark.parametrize(
    ("config", "stages", "list_path"),
    [
        (small_backbone(), 4, "network.encoder.stages"),
        (BackboneConfig(pretrained=False, freeze_stages=0), 7, "trunk.stages"),
        (
            BackboneConfig(
                name="dinov2",
                pretrained=False,
                freeze_stages=0,
                options={"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56},
            ),
            4,
            "network.encoder.layer",
        ),
    ],
    ids=["resnet", "efficientnet_lite0", "plain vision transformer"],
)
def test_stages_are_the_list_with_what_is_before_and_after_it(
    config: BackboneConfig, stages: int, list_path: str
) -> None:
    backbone = build_backbone(config)
    found = backbone_stages(backbone)
    assert len(found) == stages + 1
    names = [owned(each, backbone) for each in found]
    assert set.union(*names) == {name for name, _ in backbone.named_parameters()}
    assert sum(map(len, names)) == len(set.union(*names)), "no parameter is in two stages"
    for number, of_stage in enumerate(names[1:]):
        inside = {name for name in of_stage if name.startswith(f"{list_path}.")}
        assert {name.removeprefix(f"{list_path}.").split(".")[0] for name in inside} == {str(number)}
    assert not any(name.startswith(f"{list_path}.") for name in names[0])


def test_a_backbone_without_a_list_is_one_stage() -> None:
    network = nn.Module()
    network.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    assert backbone_stages(network.backbone) == ((network.backbone,),)
    with pytest.raises(ModelError, match="cannot tell the stages"):
        freeze(network, "half")
    with pytest.raises(ModelError, match="the network has no encoder to freeze"):
        freeze(network, "encoder")
    assert freeze(nn.Linear(2, 2), "none") == ()


def test_depths_count_from_the_top() -> None:
    network = small_detector()
    depths = depths_below_top(network)
    stem, first, *_, last = backbone_stages(network.backbone)
    of = {name: depths.get(id(parameter)) for name, parameter in network.named_parameters()}
    assert {of[name] for name in of if name.startswith("encoder.")} == {1}
    assert {of[f"backbone.{name}"] for name in owned(last, network.backbone)} == {2}
    assert {of[f"backbone.{name}"] for name in owned(first, network.backbone)} == {5}
    assert {of[f"backbone.{name}"] for name in owned(stem, network.backbone)} == {6}
    assert {of[name] for name in of if not name.startswith(("encoder.", "backbone."))} == {None}


@pytest.mark.trains
@pytest.mark.parametrize(
    ("what", "kept"), [("half", ("backbone.",)), ("backbone", ("backbone.",)), ("encoder", ("backbone.", "encoder."))]
)
def test_frozen_weights_and_statistics_stay_bit_by_bit(tmp_path: Path, what: str, kept: tuple[str, ...]) -> None:
    parts = make_parts(tmp_path, encoder="hybrid")
    before = {name: value.clone() for name, value in parts.network.state_dict().items()}
    config = make_config(4, freeze=what, loop={"evaluate_every": 2})
    trainer = Trainer(parts, config, tmp_path / "run", evaluate=lambda _: {"AP": 1.0})
    assert trainer.fit().step == 4
    network = trainer.plain_network
    still = {id(module) for module in trainer._frozen for module in module.modules()}
    assert still
    for module in network.modules():
        assert module.training == (id(module) not in still and not _inside_frozen_backbone(network, module))
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    if what == "half":
        assert frozen == {f"backbone.{name}" for name in owned(_first_half(network.backbone), network.backbone)}
    else:
        assert frozen == {name for name, _ in network.named_parameters() if name.startswith(kept)}
    unmoved = frozen if what == "half" else {name for name in before if name.startswith(kept)}
    for judged in (network, trainer.ema.network):
        now = judged.state_dict()
        for name in unmoved:
            assert torch.equal(now[name], before[name]), name
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(learning & changed) > 0.9 * len(learning)
    assert {group["part"] for group in trainer.optimizer.param_groups} == (
        {"backbone", "rest"} if what == "half" else {"rest"}
    )


def _first_half(backbone: nn.Module) -> tuple[nn.Module, ...]:
    """Of four stages the stem and two."""
    return tuple(module for stage in backbone_stages(backbone)[:3] for module in stage)


def _inside_frozen_backbone(network: nn.Module, module: nn.Module) -> bool:
    """What the backbone's own configuration keeps in evaluation mode."""
    own = {id(inner) for outer in network.backbone._frozen for inner in outer.modules()}
    return id(module) in own


def test_nothing_is_frozen_by_default(tmp_path: Path) -> None:
    trainer = Trainer(make_parts(tmp_path), make_config(1), tmp_path / "run")
    assert trainer._frozen == ()
    assert all(parameter.requires_grad for parameter in trainer.plain_network.parameters())
    assert small_config().backbone.freeze_stages == 0
