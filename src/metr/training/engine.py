"""How the processes of a run train one network together: the engine, which `train.parallel` chooses."""

import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn, optim

from metr.errors import MetrError
from metr.training.config import Parallel
from metr.training.optimization import still_copy

_logger = logging.getLogger(__name__)


class Engine:
    """Every process keeps the whole network, and gradients are averaged (DDP). Also the engine of a single process.

    All processes must make the same calls in the same order.

    Args:
        accelerator: Knows the processes.
        network: On its device, with everything frozen that is to be.
        averaged: Whether a copy of the network is wanted for the average of its weights.

    Attributes:
        network: What a training step calls.
        average: The copy, in evaluation mode and without gradients, or None.
    """

    network: nn.Module
    average: nn.Module | None

    def __init__(self, accelerator: Accelerator, network: nn.Module, averaged: bool) -> None:
        self.accelerator = accelerator
        # No placement: the network is on its device, and to place it again could replace its buffers.
        self.network = accelerator.prepare(network, device_placement=[False])
        self.average = still_copy(network) if averaged else None

    def exchanging_gradients(self, wanted: bool) -> AbstractContextManager[None]:
        """Lets processes exchange gradients only if `wanted`: in the backward pass of a step's last batch."""
        return nullcontext() if wanted else self.accelerator.no_sync(self.network)

    def clip_gradient(self, optimizer: optim.Optimizer, limit: float) -> Float[Tensor, ""]:
        """Clips the gradient in place to a Euclidean norm of `limit` (0: not at all).

        Returns the norm before that, on the device.
        """
        return nn.utils.clip_grad_norm_(parameters_of(optimizer), limit or math.inf)

    def gathered(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The whole tensors, where this process has only a part of each. Only the main process gets them."""
        return tensors

    def own_part(self, own: Tensor, whole: Tensor) -> Tensor:
        """What this process keeps of a whole tensor: as much as of `own`, a tensor of the same shape."""
        del own
        return whole

    def whole_network(self, network: nn.Module) -> nn.Module:
        """`network`, or a copy of it, that each process can call as often as it likes, without the others."""
        return network


def build_engine(kind: Parallel, accelerator: Accelerator, network: nn.Module, averaged: bool) -> Engine:
    """The engine of a run. The arguments are those of `Engine`.

    Raises:
        MetrError: this torch cannot shard, or the network cannot be sharded.
    """
    if kind == "ddp":
        return Engine(accelerator, network, averaged)
    if accelerator.num_processes == 1:
        _logger.info("train.parallel=fsdp: this is the only process, so there is nothing to shard")
        return Engine(accelerator, network, averaged)
    try:
        from metr.training.sharding import ShardedEngine  # it takes a second to import
    except ImportError as error:
        what = f"this torch cannot shard a network ({error})"
        hint = "install torch 2.11 or newer, built with torch.distributed; or train.parallel=ddp"
        raise MetrError(what, where="train.parallel", hint=hint) from None
    return ShardedEngine(accelerator, network, averaged)


def parameters_of(optimizer: optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that an optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
