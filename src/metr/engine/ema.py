"""The exponential moving average of the weights: what is evaluated and saved."""

import copy
import math

import torch
from torch import Tensor, nn

from metr.engine.config import EmaConfig


class Ema:
    """A copy of a network whose weights follow the original's slowly; buffers are copied as they are.

    Args:
        network: The network that will be trained.
        config: Decay and its warm-up.
    """

    def __init__(self, network: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    def decay(self, step: int) -> float:
        """The share of the old average that is kept in step `step`, counted from 1: small at first."""
        return self.config.decay * (1 - math.exp(-step / self.config.tau))

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Moves the average towards the weights that step `step` (counted from 1) left in `network`."""
        averages: list[Tensor] = [parameter.data for parameter in self.network.parameters()]
        weights: list[Tensor] = [parameter.data for parameter in network.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay(step))
        copies = list(self.network.buffers())
        if copies:
            torch._foreach_copy_(copies, list(network.buffers()))
