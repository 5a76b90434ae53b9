"""Batch norms whose statistics are those of the batches of all processes together, on CPUs and GPUs alike."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn


class SynchronizedBatchNorm(nn.BatchNorm2d):
    """A batch norm that several processes compute as one process would with all their images.

    torch's `SyncBatchNorm` does the same, but not on CPUs. In evaluation mode, and in a single process, this is
    `nn.BatchNorm2d` to the bit.
    """

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalises each channel. In training all processes must call it together."""
        if not self.training or not _several_processes():
            return super().forward(features)
        dtype, features = features.dtype, features.float()  # autocast must not round the statistics
        mean, variance, count = _statistics(features)
        self._follow(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        shift = -mean * scale
        if self.affine:
            shift = shift + self.bias
        return (features * scale[:, None, None] + shift[:, None, None]).to(dtype)

    @torch.no_grad()
    def _follow(self, mean: Float[Tensor, "c"], variance: Float[Tensor, "c"]) -> None:
        """Moves the running statistics towards those of the batch, in place."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(variance.to(self.running_var), momentum)


def synchronize_batch_norms(network: nn.Module) -> None:
    """Makes every `nn.BatchNorm2d` inside a network a `SynchronizedBatchNorm`.

    Modules, parameters and buffers stay the same objects, so whatever holds one of them goes on to hold the right one.
    """
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SynchronizedBatchNorm


def _statistics(
    features: Float[Tensor, "b c h w"],
) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"], Int[Tensor, ""] | Float[Tensor, ""]]:
    """Mean and variance of each channel, and the number of values in it, over all processes.

    Each process puts its own into a row of a matrix, and the rows of all are added: one exchange, and variances are
    joined without the cancellation of a mean of squares.
    """
    variance, mean = torch.var_mean(features, dim=(0, 2, 3), correction=0)
    count = features.new_full((1,), features.numel() / features.shape[1])
    row = features.new_zeros(distributed.get_world_size())
    row[distributed.get_rank()] = 1
    own = torch.outer(row, torch.cat([count, mean, variance]))
    rows: Tensor = _Sum.apply(own)  # type: ignore[no-untyped-call]
    counts, means, variances = rows[:, :1], *rows[:, 1:].chunk(2, dim=1)
    total = counts.detach().sum()
    weights = counts.detach() / total
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean) ** 2)).sum(0), total


class _Sum(torch.autograd.Function):
    """The sum over all processes. Its gradient is that of the sum of their losses, so it is summed as well."""

    @staticmethod
    def forward(_context: object, values: Tensor) -> Tensor:
        """Values of one shape in all processes."""
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: object, *gradients: Tensor) -> Tensor:
        """The gradient with respect to this process's values."""
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


def _several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
