"""Statistics of the averaged network's batch norms, from training images ("precise" batch norm, Wu and Johnson, 2021).

The average of the weights has no batches of its own: its batch norms would keep the running statistics of the network
that is trained, whose features are others.
"""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metr.models.detector import Detector
from metr.structures import Batch

Statistics = dict[str, tuple[Float[Tensor, "c"], Float[Tensor, "c"]]]
"""Mean and unbiased variance of each channel, by the name of the batch norm."""


def learned_batch_norms(network: nn.Module) -> tuple[str, ...]:
    """The names of the batch norms that follow the batches: those in training mode that keep running statistics.

    Frozen ones are in evaluation mode, or constants and no batch norms any more.
    """
    return tuple(
        name
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    )


@torch.no_grad()
def estimated_statistics(
    network: Detector, names: Iterable[str], batches: Iterable[Batch], accelerator: Accelerator
) -> Statistics:
    """Mean and variance of what enters each batch norm, over all cells of all batches of all processes.

    Meanwhile these norms normalise by the statistics of each batch, as in training; all else is in evaluation mode. All
    processes must call this together, with as many batches.

    Args:
        network: In evaluation mode; afterwards it is again, and its own statistics are unchanged.
        names: Of batch norms inside backbone and encoder.
        batches: At least one, on the network's device.
        accelerator: Knows the processes.
    """
    norms = {name: network.get_submodule(name) for name in names}
    kept = {name: {key: value.clone() for key, value in norm.state_dict().items()} for name, norm in norms.items()}
    sums = {name: torch.zeros(1, dtype=torch.float64) for name in norms}

    def count(name: str, features: Tensor) -> None:
        """Adds the number of values a channel, their sums, and the sums of their squares."""
        variance, mean = torch.var_mean(features.float(), dim=(0, *range(2, features.ndim)), correction=0)
        variance, mean = variance.cpu().double(), mean.cpu().double()
        number = torch.tensor([features.numel() / features.shape[1]], dtype=torch.float64)
        sums[name] = sums[name] + torch.cat([number, number * mean, number * (variance + mean**2)])

    handles = [
        norm.register_forward_pre_hook(lambda _, inputs, name=name: count(name, inputs[0]))
        for name, norm in norms.items()
    ]
    try:
        for norm in norms.values():
            norm.train()
        for batch in batches:
            network.encode(batch.images, batch.padding_mask)
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            norm.eval().load_state_dict(kept[name])
    return {name: _mean_and_variance(row) for name, row in _over_processes(sums, accelerator).items()}


@torch.no_grad()
def take_statistics(network: nn.Module, statistics: Statistics) -> None:
    """Writes statistics into a network's batch norms, in place."""
    for name, (mean, variance) in statistics.items():
        norm = network.get_submodule(name)
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def _over_processes(sums: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """The sums over all processes, in one exchange."""
    if accelerator.num_processes == 1:
        return sums
    flat: Tensor = accelerator.reduce(torch.cat(list(sums.values())).to(accelerator.device), "sum")
    return dict(zip(sums, torch.split(flat.cpu(), [len(row) for row in sums.values()]), strict=True))


def _mean_and_variance(row: Float[Tensor, "n"]) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"]]:
    number, total, squares = row[0], *row[1:].chunk(2)
    mean = total / number
    return mean.float(), ((squares - total * mean) / (number - 1).clamp(min=1)).clamp(min=0).float()
