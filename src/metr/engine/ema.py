"""The exponential moving average of the weights: what is evaluated and saved."""

import copy
import math

import torch
from torch import Tensor, nn

from metr.engine.config import EmaConfig


class Ema:
    """A copy of a network whose weights follow the original's slowly; buffers are copied as they are.

    Args:
        network: The network that will be trained, on its device: its parameters and buffers must stay the same tensors.
        config: Decay and its warm-up.
    """

    def __init__(self, network: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        # Kept, because collecting them takes as long as averaging them.
        self._weights, self._averages = _weights(network), _weights(self.network)
        self._buffers = Buffers(network, self.network)

    def decay(self, step: int) -> float:
        """The share of the old average that is kept in step `step`, counted from 1: small at first."""
        return self.config.decay * (1 - math.exp(-step / self.config.tau))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights that step `step` (counted from 1) left in the network."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay(step))


class Buffers:
    """The buffers of a network, such as running statistics, as the last good step left them."""

    def __init__(self, network: nn.Module) -> None:
        self._live = list(network.buffers())
        self._kept = [buffer.clone() for buffer in self._live]
