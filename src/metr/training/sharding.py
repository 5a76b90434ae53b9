"""Sharding (FSDP2 of torch): each process keeps a part of every weight, gradient and moment of the optimizer."""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, distributed, nn, optim
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.export import register_dataclass

from metr.errors import ModelError
from metr.structures import Categories, DenoisingOutput, DenoisingPlan, DetectorOutput, Memory, Proposals
from metr.training.engine import Engine, parameters_of
from metr.training.optimization import BACKBONE, backbone_stages, still_copy

# Autocast alone decides the precision of the arithmetic, as it does with DDP. Gradients are added up in float32.
_PRECISION = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
_BUCKET = 2**24  # numbers that are gathered at once
_TINY = 1e-6  # as in torch's clip_grad_norm_
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
# the structures that a block takes or gives, in which torch has to find the tensors
_STRUCTURES = (Memory, Categories, Proposals, DenoisingPlan, DenoisingOutput, DetectorOutput)


class ShardedEngine(Engine):
    """Each process keeps a part of every weight, and gathers the weights of one block while the block computes.

    Evaluation and checkpoints use whole weights: see `whole_network` and `gathered`. The average of the weights is
    sharded like the network.
    """

    def __init__(self, accelerator: Accelerator, network: nn.Module, averaged: bool) -> None:
        self.accelerator = accelerator
        _register_structures()
        # The outputs of a network may be views. Nothing changes them in place, which is what torch warns of.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        _copy_from_main_process(network)
        self._skeleton = _without_weights(network)
        self.average = still_copy(network) if averaged else None
        device = next(network.parameters()).device
        mesh = init_device_mesh(device.type, (accelerator.num_processes,))
        shard(network, mesh)
        if self.average is not None:
            shard(self.average, mesh)
        self.network = network

    def exchanging_gradients(self, wanted: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged in each backward pass: to keep them until the last, they would have to be whole."""
        del wanted
        return nullcontext()

    def clip_gradient(self, optimizer: optim.Optimizer, limit: float) -> Float[Tensor, ""]:
        """As in `Engine`. The norm is that of the whole gradient, made of those of all parts in one exchange."""
        gradients = [each.grad.to_local() for each in parameters_of(optimizer) if isinstance(each.grad, DTensor)]
        total = nn.utils.get_total_norm(gradients).double().square()
        distributed.all_reduce(total)
        norm = total.sqrt().float()
        if limit:
            torch._foreach_mul_(gradients, (limit / (norm + _TINY)).clamp(max=1.0))
        return norm

    def gathered(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The whole tensors on the CPU of the main process; an empty mapping in the others."""
        kept = {}
        for name, whole in whole_tensors(tensors):
            if self.accelerator.is_main_process:
                kept[name] = whole.cpu()
        return kept

    def own_part(self, own: Tensor, whole: Tensor) -> Tensor:
        """As in `Engine`. Nothing is exchanged: every process has read the whole tensor."""
        if not isinstance(own, DTensor) or own.shape != whole.shape:
            return whole
        whole = whole.to(own.device, own.dtype)
        return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)

    def whole_network(self, network: nn.Module) -> nn.Module:
        """A copy with whole weights, in evaluation mode. It is as large as the network, in every process."""
        plain = copy.deepcopy(self._skeleton)
        plain.load_state_dict(dict(whole_tensors(network.state_dict())), assign=True)
        return plain.eval().requires_grad_(False)


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a network in place, block by block; what is in no block is one more.

    Every block gives its weights up after its forward pass, that of the whole network included. Otherwise a network
    that is called without a backward pass, as the average is, would go on computing with the weights of that call.

    Raises:
        ModelError: torch cannot shard a weight of the network.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()
    try:
        for block in (*blocks(network), network):
            fully_shard(block, mesh=mesh, mp_policy=_PRECISION, reshard_after_forward=True)
    except (ValueError, NotImplementedError) as error:
        what = f"this network cannot be sharded: {error}"
        raise ModelError(what, where="train.parallel", hint="train.parallel=ddp, or another backbone") from error


def blocks(network: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: backbone stages, and the members of other parts' module lists.

    In a detector the latter are encoder layers and fusions, blocks of category extraction, and decoder layers.
    """
    found: list[nn.Module] = []
    for name, part in network.named_children():
        if name == BACKBONE:
            _, *stages = backbone_stages(part)
            found += [module for stage in stages for module in stage]
        else:
            found += [member for child in part.children() if isinstance(child, nn.ModuleList) for member in child]
    return [block for block in found if not isinstance(block, _CONTAINERS) and any(True for _ in block.parameters())]


def whole_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The name and a copy of the whole of each tensor, those that are not sharded first.

    All processes must go through all of them together. Besides what the caller keeps there are never more than three
    buckets of whole tensors in memory.
    """
    bucket: dict[str, DTensor] = {}
    yield from ((name, tensor.detach().clone()) for name, tensor in tensors.items() if not isinstance(tensor, DTensor))
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            continue
        full = sum(each.numel() for each in bucket.values()) + tensor.numel() > _BUCKET
        if bucket and (full or tensor.dtype != next(iter(bucket.values())).dtype):
            yield from _exchanged(bucket)
            bucket = {}
        bucket[name] = tensor
    if bucket:
        yield from _exchanged(bucket)


def _exchanged(bucket: Mapping[str, DTensor]) -> Iterator[tuple[str, Tensor]]:
    """The name and the whole of each sharded tensor of one type, in one exchange: hundreds would take seconds."""
    rows = [_padded_part(tensor).flatten() for tensor in bucket.values()]
    own = torch.cat(rows)
    every = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, own)
    parts = torch.split(torch.stack(every), [len(row) for row in rows], dim=1)
    for (name, tensor), part in zip(bucket.items(), parts, strict=True):
        yield name, part.reshape(-1, *tensor.shape[1:])[: tensor.shape[0]].clone()


def _padded_part(tensor: DTensor) -> Tensor:
    """The rows of this process. The last processes may have fewer than the first, or none; zeros make up for it."""
    part: Tensor = tensor.to_local().detach()
    missing = math.ceil(tensor.shape[0] / tensor.device_mesh.size()) - part.shape[0]
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])])


def _copy_from_main_process(network: nn.Module) -> None:
    """Gives all processes the weights and statistics of the main process, as DDP does."""
    for tensor in (*network.parameters(), *network.buffers()):
        shared = tensor.data.contiguous()
        distributed.broadcast(shared, src=0)
        tensor.data = shared


def _without_weights(network: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device, so that it needs no memory."""
    meta = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, dict(meta))


@cache
def _register_structures() -> None:
    """Lets torch find the tensors in what blocks take and give. A process may do so once."""
    for structure in _STRUCTURES:
        register_dataclass(structure)
