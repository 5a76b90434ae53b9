"""Parameter groups, the learning rate's schedule, the average of the weights, frozen parts."""

import copy
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metr.errors import ModelError
from metr.models.backbones import build_backbone
from metr.models.backbones.base import BackboneConfig
from metr.training.config import EmaConfig, OptimizerConfig, ScheduleConfig
from metr.training.optimization import (
    Ema,
    KeptBuffers,
    backbone_stages,
    build_optimizer,
    depths_below_top,
    freeze,
    freeze_without_rate,
    learning_rate_factor,
    parameter_groups,
    set_learning_rates,
)
from metr.training.parts import Evaluated
from metr.training.trainer import Trainer
from small_runs import make_config, make_parts

from small import small_backbone, small_config, small_detector


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
    network, config = Parts(), OptimizerConfig(backbone_multiplier=0)
    freeze_without_rate(network, config)
    optimizer = build_optimizer(network, config)
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


# the learning rate's schedule


def factors(steps: int, **values: object) -> list[float]:
    config = ScheduleConfig.checked(values)
    return [learning_rate_factor(step, steps, config) for step in range(steps)]


def test_warms_up_linearly_and_ends_at_the_floor() -> None:
    rates = factors(100, kind="cosine", warmup_steps=10, floor=0.1)
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[54] == pytest.approx(0.55), "half way down after half of the 90 steps"
    assert rates[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(rates[9:]))


def test_cosine_is_the_closed_form() -> None:
    rates = factors(50, kind="cosine", warmup_steps=0, floor=0.0)
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * (step + 1) / 50)) for step in range(50)])


def test_flat_cosine_stays_up_until_its_share() -> None:
    rates = factors(100, kind="flat_cosine", warmup_steps=5, flat_fraction=0.6, floor=0.0)
    assert rates[5:60] == [1.0] * 55
    assert rates[60] < 1
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_constant_never_falls() -> None:
    assert factors(20, kind="constant", warmup_steps=2) == [0.5] + [1.0] * 19


@pytest.mark.parametrize("kind", ["cosine", "flat_cosine", "constant"])
@pytest.mark.parametrize("done", [30, 80])
def test_what_an_earlier_training_made_of_a_schedule_is_not_made_again(kind: str, done: int) -> None:
    whole = factors(100, kind=kind, warmup_steps=5, flat_fraction=0.6, floor=0.1)
    rest = factors(100 - done, kind=kind, warmup_steps=5, flat_fraction=0.6, floor=0.1, done=done)
    assert rest[5:] == pytest.approx(whole[done + 5 :])
    assert rest[:5] == pytest.approx([rate * n / 5 for n, rate in enumerate(whole[done : done + 5], 1)])


@pytest.mark.parametrize("kind", ["cosine", "flat_cosine", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 3, 10])
@pytest.mark.parametrize("steps", [1, 3])
def test_short_runs_stay_in_range(kind: str, warmup_steps: int, steps: int) -> None:
    rates = factors(steps, kind=kind, warmup_steps=warmup_steps, flat_fraction=1.0, floor=0.05)
    assert all(0 < rate <= 1 for rate in rates)
    assert warmup_steps < steps or rates[-1] == 1, "a warm-up longer than the run ends with it"


def test_a_step_past_the_end_stays_at_the_floor() -> None:
    config = ScheduleConfig(warmup_steps=0, floor=0.2)
    assert learning_rate_factor(99, 10, config) == pytest.approx(0.2)


# the average of the weights


@pytest.mark.parametrize("made", [None, torch.tensor(True)])
def test_weights_and_running_statistics_follow_the_recurrence(made: Tensor | None) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    network[0].register_buffer("mask", torch.full((3,), -math.inf))
    followed = {key: value for key, value in network.state_dict().items() if key.split(".")[1].startswith(("w", "r"))}
    assert {"0.weight", "1.running_mean", "1.running_var"} < followed.keys()
    ema = Ema(network, EmaConfig(decay=0.9, tau=5))
    expected = {key: value.clone() for key, value in followed.items()}
    for step in range(1, 6):
        with torch.no_grad():
            network[0].weight.add_(torch.randn(4, 3))
            network[0].mask[step % 3] = step
        network(torch.randn(8, 3))
        ema.update(step, made)
        decay = 0.9 * (1 - math.exp(-step / 5))
        expected = {key: decay * expected[key] + (1 - decay) * value for key, value in followed.items()}
    averaged = ema.network.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(averaged[key], value)
    assert not torch.equal(averaged["1.running_mean"], network[1].running_mean)
    assert torch.equal(averaged["0.mask"], network[0].mask), "other buffers are as they are, infinite ones too"
    assert averaged["1.num_batches_tracked"] == 5


def test_a_step_that_was_not_made_moves_no_average() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = Ema(network, EmaConfig(decay=0.9, tau=5))
    before = copy.deepcopy(ema.network.state_dict())
    network[1].running_mean.add_(1)
    ema.update(1, torch.tensor(False))
    assert torch.equal(ema.network[1].running_mean, before["1.running_mean"])


def test_the_decay_warms_up() -> None:
    ema = Ema(nn.Linear(1, 1), EmaConfig(decay=0.999, tau=100))
    decays = [ema.decay(step) for step in (1, 10, 100, 10_000)]
    assert decays == sorted(decays)
    assert decays[0] < 0.01
    assert decays[-1] == pytest.approx(0.999)


def test_the_average_is_a_network_apart() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    ema = Ema(network, EmaConfig())
    assert not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    with torch.no_grad():
        network[0].weight.zero_()
    assert ema.network[0].weight.abs().sum() > 0
    assert network.training
    assert network[0].weight.requires_grad


def test_buffers_are_kept_and_put_back() -> None:
    network = nn.BatchNorm1d(3).train()
    kept = KeptBuffers(network)
    network(torch.randn(4, 3))
    kept.keep()
    good = network.running_mean.clone()
    network(torch.full((4, 3), float("nan")))
    assert network.running_mean.isnan().all()
    kept.keep_if(torch.tensor(False))
    assert torch.equal(network.running_mean, good)
    assert network.num_batches_tracked == 1
    KeptBuffers(nn.Linear(1, 1)).keep_if(torch.tensor(False))


# frozen parts


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
    trainer = Trainer(parts, config, tmp_path / "run", evaluate=lambda _: Evaluated(metrics={"AP": 1.0}))
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
