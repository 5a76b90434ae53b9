"""Optimization: AdamW and its parameter groups, the learning rate schedule, the EMA, frozen parts."""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn, optim
from torch.nn.modules.batchnorm import _BatchNorm

from metr.errors import ModelError
from metr.training.config import EmaConfig, Freeze, OptimizerConfig, ScheduleConfig

BACKBONE, ENCODER = "backbone", "encoder"
# the devices on which torch has a fused AdamW
_FUSED = frozenset({"cpu", "cuda", "mps", "xpu"})
_NOT_DECAYED = (nn.Embedding, nn.LayerNorm, nn.RMSNorm)


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> optim.AdamW:
    """AdamW over the trainable parameters of a network, in `parameter_groups`; see `freeze_without_rate`.

    The fused implementation is by far the quickest on CPUs and GPUs alike; a device without it gets torch's own choice.
    """
    groups = parameter_groups(network, config)
    fused = groups[0]["params"][0].device.type in _FUSED
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.epsilon}
    return optim.AdamW(groups, **settings, fused=True) if fused else optim.AdamW(groups, **settings)


def freeze_without_rate(network: nn.Module, config: OptimizerConfig) -> None:
    """Freezes the backbone if its learning rate is 0."""
    if not config.backbone_multiplier:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not name.startswith(f"{BACKBONE}."))


def parameter_groups(network: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters by part (the submodule `backbone`, or the rest), by depth and by whether they decay.

    Only with a `layer_decay` below 1 do depths have groups of their own; the encoder is then a part of its own too.

    Returns:
        Groups as torch's optimizers take them, the highest rate of a part last. Besides `params`, `lr` and
        `weight_decay`, each has its `part`, "backbone", "encoder" or "rest", and `initial_lr`, the peak of its
        learning rate.

    Raises:
        ModelError: nothing in the network can be trained.
    """
    by_depth = config.layer_decay < 1
    depths = depths_below_top(network) if by_depth else {}
    parts = {BACKBONE, ENCODER} if by_depth else {BACKBONE}
    members: dict[tuple[str, int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter, decays in _trainable(network):
        part = name.partition(".")[0]
        members[part if part in parts else "rest", -depths.get(id(parameter), 0), decays].append(parameter)
    if not members:
        raise ModelError("no parameter of the network can be trained", hint="unfreeze a part of it")
    groups = []
    for (part, height, decays), parameters in sorted(members.items()):
        rate = config.learning_rate * (config.backbone_multiplier if part == BACKBONE else 1.0)
        rate *= config.layer_decay**-height
        decay = config.weight_decay if decays else 0.0
        groups.append({"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay, "part": part})
    return groups


def step_if(optimizer: optim.Optimizer, finite: Bool[Tensor, ""]) -> None:
    """Makes the optimizer's step if `finite`, a truth value on the device.

    The host does not wait for that value: a fused optimizer leaves weights and state alone where the device says so.
    Otherwise, and for parameters that are sharded over processes, it does wait.
    """
    first = optimizer.param_groups[0]["params"][0]
    if optimizer.defaults.get("fused") and not hasattr(first, "to_local"):
        flagged: Any = optimizer
        flagged.found_inf = (~finite).to(torch.float32)  # where gradient scalers put it, too
        optimizer.step()
        flagged.found_inf = None
    elif bool(finite):
        optimizer.step()


def set_learning_rates(optimizer: optim.Optimizer, factor: float) -> dict[str, float]:
    """Sets every group to `factor` of its peak rate. Returns the rates by part; the highest if it has depths."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def _trainable(network: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, parameter, and whether it decays: only matrices and kernels called `weight` do, but no embeddings."""
    seen: set[int] = set()
    for module_name, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_weight = parameter.ndim >= 2 and name.endswith("weight")
            full_name = f"{module_name}.{name}" if module_name else name
            yield full_name, parameter, is_weight and not isinstance(module, _NOT_DECAYED)


def learning_rate_factor(step: int, steps: int, config: ScheduleConfig) -> float:
    """The learning rate of one step as a fraction of its peak.

    Args:
        step: The number of the step, from 0 on.
        steps: All steps of the training.
        config: Warm-up, shape and floor.

    Returns:
        A number in 0..1: rising to 1 in the last step of the warm-up, `floor` in the last step of a cosine. Where an
        earlier training made part of the schedule, it rises to what that part has left.
    """
    warmup = min(config.warmup_steps, steps)
    risen = min((step + 1) / warmup, 1.0) if warmup else 1.0
    if config.kind == "constant":
        return risen
    step, steps = step + config.done, steps + config.done
    start = warmup if config.kind == "cosine" else max(warmup, round(config.flat_fraction * steps))
    if step < start:
        return risen
    fraction = min((step - start + 1) / (steps - start), 1.0)
    return risen * (config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * fraction)))


def still_copy(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without gradients."""
    return copy.deepcopy(network).eval().requires_grad_(False)


class Ema:
    """A copy of a network whose weights, and running statistics of batch norms, follow the original's slowly.

    Statistics of the newest batches alone would be those of few images. Other buffers are copied as they are.

    Args:
        network: The network to follow, already on its device: its parameters and buffers are looked up once only,
            because that takes as long as averaging them.
        config: Decay and its warm-up.
        average: A copy of the network, which becomes the average; made here by default.
    """

    def __init__(self, network: nn.Module, config: EmaConfig, average: nn.Module | None = None) -> None:
        self.config = config
        self.network = still_copy(network) if average is None else average
        self._followed: list[list[Tensor]] = [[*network.parameters()], _running_statistics(network)]
        self._averages: list[list[Tensor]] = [[*self.network.parameters()], _running_statistics(self.network)]
        self._buffers, self._copies = _other_buffers(network), _other_buffers(self.network)

    def decay(self, step: int) -> float:
        """The fraction of the old average that step `step`, counted from 1, keeps: small at first."""
        return self.config.decay * (1 - math.exp(-step / self.config.tau))

    @torch.no_grad()
    def update(self, step: int, made: Bool[Tensor, ""] | None = None) -> None:
        """Moves the average towards the weights that step `step`, counted from 1, left in the network.

        With `made`, a truth value on the device, it does so only if that is true, and the host does not wait for it.
        """
        for averages, followed in zip(self._averages, self._followed, strict=True):
            if not averages:
                continue
            if made is None:
                torch._foreach_lerp_(averages, followed, 1 - self.decay(step))
            else:
                moves = torch._foreach_sub(followed, averages)
                torch._foreach_mul_(moves, made * (1 - self.decay(step)))
                torch._foreach_add_(averages, moves)
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)


def _running_statistics(network: nn.Module) -> list[Tensor]:
    """Running means and variances of all batch norms."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    return [kept for norm in norms for kept in (norm.running_mean, norm.running_var) if kept is not None]


def _other_buffers(network: nn.Module) -> list[Tensor]:
    """Buffers that are no running statistics."""
    statistics = {id(kept) for kept in _running_statistics(network)}
    return [buffer for buffer in network.buffers() if id(buffer) not in statistics]


class KeptBuffers:
    """A copy of a network's buffers, such as running statistics, to undo what a skipped step did to them.

    Args:
        network: Already on its device, as for `Ema`.
    """

    def __init__(self, network: nn.Module) -> None:
        # one row of numbers for all buffers of a kind: a few operations, however many buffers there are
        kinds: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in network.buffers():
            kinds[buffer.dtype].append(buffer)
        self._buffers = list(kinds.values())
        self._kept = [_row(buffers) for buffers in self._buffers]

    def keep(self) -> None:
        """Copies the buffers as they are now."""
        self._kept = [_row(buffers) for buffers in self._buffers]

    def keep_if(self, made: Bool[Tensor, ""]) -> None:
        """Copies the buffers if `made`, a truth value on the device, is true; else puts the last copy back.

        The host does not wait for that value.
        """
        for place, buffers in enumerate(self._buffers):
            self._kept[place] = torch.where(made, _row(buffers), self._kept[place])
            parts = torch.split(self._kept[place], [buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(one) for part, one in zip(parts, buffers, strict=True)])


def _row(buffers: Sequence[Tensor]) -> Tensor:
    """All numbers of the buffers, one after the other."""
    return torch.cat([buffer.detach().flatten() for buffer in buffers])


def freeze(network: nn.Module, what: Freeze) -> tuple[nn.Module, ...]:
    """Freezes parts of a detector, and returns them.

    Their parameters need no gradient, and they are in evaluation mode, so that no batch statistic moves. After
    `network.train()` the caller has to put them into evaluation mode again.

    Args:
        network: With submodules `backbone` and `encoder`, as far as they are to be frozen.
        what: "none"; "half", the stem and the first half of the backbone's stages; "backbone"; or "encoder", which is
            backbone and encoder.

    Raises:
        ModelError: the network has no such part, or the backbone's stages cannot be told apart.
    """
    frozen = _parts(network, what)
    for module in frozen:
        module.requires_grad_(False)
        module.eval()
    return frozen


def backbone_stages(backbone: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """The modules of a backbone by stage: the stem (all that comes before the stages), then each stage.

    The stages are the outermost list of modules that holds most weights; what comes after it joins the last stage.
    A backbone without such a list is one stage.
    """
    lists = {
        path: module
        for path, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    if not lists:
        return ((backbone,),)
    path = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].state_dict().values()))
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    parent = backbone
    for step in path.split("."):
        names, children = zip(*parent.named_children(), strict=True)
        place = names.index(step)
        before += children[:place]
        after += children[place + 1 :]
        parent = children[place]
    stages = [(stage,) for stage in parent.children()]
    return (tuple(before), *stages[:-1], (*stages[-1], *after))


def depths_below_top(network: nn.Module) -> dict[int, int]:
    """How far below the top each parameter of backbone and encoder lies, by its `id`.

    The encoder lies 1 below what follows it (which is not listed), the backbone's last stage 2, its stem deepest.
    """
    depths: dict[int, int] = {}
    children = dict(network.named_children())
    if ENCODER in children:
        depths |= {id(parameter): 1 for parameter in children[ENCODER].parameters()}
    if BACKBONE in children:
        stages = backbone_stages(children[BACKBONE])
        # parameters outside every stage lie as deep as the stem
        depths |= {id(parameter): len(stages) + 1 for parameter in children[BACKBONE].parameters()}
        for depth, stage in enumerate(reversed(stages), 2):
            depths |= {id(parameter): depth for module in stage for parameter in module.parameters()}
    return depths


def _parts(network: nn.Module, what: Freeze) -> tuple[nn.Module, ...]:
    if what == "none":
        return ()
    children = dict(network.named_children())
    names = (BACKBONE, ENCODER) if what == "encoder" else (BACKBONE,)
    for name in names:
        if name not in children:
            raise ModelError(f"the network has no {name} to freeze", where="train.freeze", hint="train.freeze=none")
    if what != "half":
        return tuple(children[name] for name in names)
    stages = backbone_stages(children[BACKBONE])
    if len(stages) < 3:
        what_failed = "cannot tell the stages of this backbone apart"
        raise ModelError(what_failed, where="train.freeze", hint="freeze the whole backbone, or none")
    # the stem, then half of the stages, rounded down: up to stride 8 in the usual backbones
    first = stages[: 1 + (len(stages) - 1) // 2]
    return tuple(module for stage in first for module in stage)
