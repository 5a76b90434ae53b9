"""AdamW with parameter groups: what lies deeper may learn slower; norms, biases and embeddings do not decay."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn, optim

from metr.errors import ModelError
from metr.training.config import OptimizerConfig
from metr.training.freezing import BACKBONE, ENCODER, depths_below_top

_NOT_DECAYED = (nn.Embedding, nn.LayerNorm, nn.RMSNorm)


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> optim.AdamW:
    """AdamW over the trainable parameters of a network, in `parameter_groups`; a backbone with rate 0 is frozen.

    The fused implementation is by far the quickest on CPUs and GPUs alike.
    """
    if not config.backbone_multiplier:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not name.startswith(f"{BACKBONE}."))
    groups = parameter_groups(network, config)
    return optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


def parameter_groups(network: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters by part (the submodule `backbone`, or the rest), by depth and by whether they decay.

    Depths are told apart with a `layer_decay` below 1 only; the encoder is then a part of its own.

    Returns:
        Groups as torch's optimizers take them, the highest rate of a part last. Besides `params`, `lr` and
        `weight_decay`, each has its `part`, "backbone", "encoder" or "rest", and `initial_lr`, the height of its
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


def set_learning_rates(optimizer: optim.Optimizer, factor: float) -> dict[str, float]:
    """Sets every group to `factor` of its height, and gives the rates by part: of several depths the highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return {group["part"]: group["lr"] for group in optimizer.param_groups}


def _trainable(network: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, parameter, and whether it decays: matrices and kernels called `weight` do, bare tables do not."""
    seen: set[int] = set()
    for module_name, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_weight = parameter.ndim >= 2 and name.endswith("weight")
            full_name = f"{module_name}.{name}" if module_name else name
            yield full_name, parameter, is_weight and not isinstance(module, _NOT_DECAYED)
