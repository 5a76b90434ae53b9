"""The exponential moving average of the weights: what is evaluated and saved."""

import copy
import math

import torch
from torch import Tensor, nn

from metr.training.config import EmaConfig


class Ema:
    """A copy of a network whose weights follow the original's slowly; buffers are copied as they are.

    Args:
        network: The network to follow. It is on its device already, for its parameters and buffers are looked up once:
            that takes as long as averaging them.
        config: Decay and its warm-up.
    """

    def __init__(self, network: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._weights: list[Tensor] = [*network.parameters()]
        self._averages: list[Tensor] = [*self.network.parameters()]
        self._buffers, self._copies = list(network.buffers()), list(self.network.buffers())

    def decay(self, step: int) -> float:
        """The share of the old average that is kept in step `step`, counted from 1: small at first."""
        return self.config.decay * (1 - math.exp(-step / self.config.tau))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights that step `step`, counted from 1, left in the network."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay(step))
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)


class KeptBuffers:
    """The buffers of a network, such as running statistics, as its last good step left them.

    Args:
        network: On its device already, as for `Ema`.
    """

    def __init__(self, network: nn.Module) -> None:
        self._buffers = list(network.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        """Remembers the buffers as they are now."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def restore(self) -> None:
        """Puts back what was rehearsed last: what a step without effect did to them is undone."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
