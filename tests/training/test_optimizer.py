"""Parameter groups, and AdamW against torch's plain one."""

import copy

import pytest
import torch
from torch import nn

from metr.errors import ModelError
from metr.training.config import OptimizerConfig
from metr.training.freezing import backbone_stages
from metr.training.optimizer import build_optimizer, parameter_groups, set_learning_rates

from small import small_detector


class Parts(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm((2, 8))
        self.names = nn.Embedding(5, 8)
        self.level_embedding = nn.Parameter(torch.randn(3, 8))
        self.head = nn.Linear(8, 4)
        self.tied = self.head
        self.backbone_like = nn.Linear(2, 2, bias=False)


def groups_by_name(network: nn.Module, config: OptimizerConfig) -> dict[str, tuple[str, float, float]]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(parameter)]: (group["part"], group["lr"], group["weight_decay"])
        for group in parameter_groups(network, config)
        for parameter in group["params"]
    }


def test_each_parameter_is_in_the_right_group_once() -> None:
    network = Parts()
    network.backbone[0].requires_grad_(False)
    config = OptimizerConfig(learning_rate=1e-3, backbone_multiplier=0.2, weight_decay=0.05)
    decayed, plain = ("rest", 1e-3, 0.05), ("rest", 1e-3, 0.0)
    backbone, backbone_plain = ("backbone", pytest.approx(2e-4), 0.05), ("backbone", pytest.approx(2e-4), 0.0)
    assert groups_by_name(network, config) == {
        "backbone.1.weight": backbone_plain,
        "backbone.1.bias": backbone_plain,
        "backbone.2.weight": backbone,
        "backbone.2.bias": backbone_plain,
        "attention.in_proj_weight": decayed,
        "attention.in_proj_bias": plain,
        "attention.out_proj.weight": decayed,
        "attention.out_proj.bias": plain,
        "norm.weight": plain,
        "norm.bias": plain,
        "names.weight": plain,
        "level_embedding": plain,
        "head.weight": decayed,
        "head.bias": plain,
        "backbone_like.weight": decayed,
    }
    total = sum(len(group["params"]) for group in parameter_groups(network, config))
    assert total == 15, "tied parameters count once"


@pytest.mark.trains
def test_steps_equal_torchs_plain_implementation() -> None:
    network = Parts()
    other = copy.deepcopy(network)
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, betas=(0.8, 0.9))
    ours = build_optimizer(network, config)
    groups = [{**group, "params": list(group["params"])} for group in parameter_groups(other, config)]
    plain = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-8, foreach=False, fused=False)
    for step in range(4):
        for net, optimizer in ((network, ours), (other, plain)):
            torch.manual_seed(step)
            for parameter in net.parameters():
                parameter.grad = torch.randn_like(parameter)
            set_learning_rates(optimizer, 1 / (step + 1))
            optimizer.step()
    for ours_now, plain_now in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours_now, plain_now, atol=1e-6, rtol=1e-5)


def test_rates_follow_the_schedule_from_their_heights() -> None:
    optimizer = build_optimizer(Parts(), OptimizerConfig(learning_rate=1e-3, backbone_multiplier=0.1))
    for factor in (0.5, 0.5, 0.25):
        rates = set_learning_rates(optimizer, factor)
        assert rates == {"backbone": pytest.approx(factor * 1e-4), "rest": pytest.approx(factor * 1e-3)}
        assert {group["part"]: group["lr"] for group in optimizer.param_groups} == rates


def test_a_backbone_without_a_rate_is_frozen() -> None:
    network = Parts()
    optimizer = build_optimizer(network, OptimizerConfig(backbone_multiplier=0))
    assert not any(parameter.requires_grad for parameter in network.backbone.parameters())
    assert network.backbone_like.weight.requires_grad
    assert {group["part"] for group in optimizer.param_groups} == {"rest"}


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ModelError, match="no parameter of the network can be trained"):
        build_optimizer(Parts().requires_grad_(False), OptimizerConfig())


def test_rates_fall_with_depth() -> None:
    network = small_detector()
    config = OptimizerConfig(learning_rate=1e-3, backbone_multiplier=0.5, layer_decay=0.5)
    of = {name: (part, rate) for name, (part, rate, _) in groups_by_name(network, config).items()}
    stages = len(backbone_stages(network.backbone)) - 1
    for name, (part, rate) in of.items():
        if name.startswith("backbone.network.encoder.stages."):
            below = stages + 1 - int(name.split(".")[4])
            assert (part, rate) == ("backbone", pytest.approx(1e-3 * 0.5 * 0.5**below)), name
        elif name.startswith("backbone."):
            assert (part, rate) == ("backbone", pytest.approx(1e-3 * 0.5 * 0.5 ** (stages + 2))), name
        elif name.startswith("encoder."):
            assert (part, rate) == ("encoder", pytest.approx(5e-4)), name
        else:
            assert (part, rate) == ("rest", 1e-3), name
    assert {part for part, _ in of.values()} == {"backbone", "encoder", "rest"}
    # what is logged is the highest rate of each part
    rates = set_learning_rates(build_optimizer(network, config), 0.1)
    assert rates == {
        "backbone": pytest.approx(1e-4 * 0.5 * 0.25),
        "encoder": pytest.approx(5e-5),
        "rest": pytest.approx(1e-4),
    }
    plain = groups_by_name(network, config.model_copy(update={"layer_decay": 1.0}))
    assert {part for part, *_ in plain.values()} == {"backbone", "rest"}
