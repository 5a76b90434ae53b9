"""Deformable sampling as one Triton kernel forwards and one backwards. Import it only where Triton is installed.

The plain way (`sample_grids`) writes every sample to memory before it sums them. Here a program takes some queries of
one head, walks over all levels and points, and keeps the sums in registers. Sums are float32 whatever the precision of
the values. The gradient of the values is added up by atomic additions in float32, so its last bits may differ from run
to run, as those of `grid_sample` do.

PyTorch sees two operators, `metr::sample_levels` and its gradient, which torch.compile takes as they are.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

_QUERIES = 16
"""Queries of one program."""


@triton.jit
@no_type_check
def _corner(place_x, place_y, there, start, height, width, DX: tl.constexpr, DY: tl.constexpr):
    """A corner of the cell around each place: its token, whether it exists, and its bilinear weights along x and y."""
    left = tl.floor(place_x)
    top = tl.floor(place_y)
    ahead_x = place_x - left
    ahead_y = place_y - top
    column = left + DX
    row = top + DY
    inside = there & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    # places may be anywhere, or not numbers at all: only those inside become indices
    token = start + tl.where(inside, row, 0.0).to(tl.int32) * width + tl.where(inside, column, 0.0).to(tl.int32)
    near_x = ahead_x if DX else 1.0 - ahead_x
    near_y = ahead_y if DY else 1.0 - ahead_y
    return token, inside, near_x, near_y


@triton.jit
@no_type_check
def _sum_kernel(
    value, places, weights, facts, out, queries, tokens, heads,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Weighted sums of samples for ROWS queries of one head of one image."""
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = query < queries
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    channel = tl.arange(0, BLOCK)
    used = channel < CHANNELS
    row = (image * queries + query) * heads + head
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for level in range(LEVELS):
        start = tl.load(facts + 3 * level)
        height = tl.load(facts + 3 * level + 1)
        width = tl.load(facts + 3 * level + 2)
        for point in range(POINTS):
            place = row * (LEVELS * POINTS) + level * POINTS + point
            x = tl.load(places + 2 * place, mask=there, other=0.0) * width - 0.5
            y = tl.load(places + 2 * place + 1, mask=there, other=0.0) * height - 0.5
            weight = tl.load(weights + place, mask=there, other=0.0).to(tl.float32)
            for corner in tl.static_range(4):
                token, inside, near_x, near_y = _corner(x, y, there, start, height, width, corner % 2, corner // 2)
                cell = ((image * tokens + token) * heads + head) * CHANNELS
                mask = inside[:, None] & used[None, :]
                seen = tl.load(value + cell[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
                total += tl.where(inside, weight * near_x * near_y, 0.0)[:, None] * seen
    tl.store(out + row[:, None] * CHANNELS + channel[None, :], total, mask=there[:, None] & used[None, :])


@triton.jit
@no_type_check
def _gradient_kernel(
    value, places, weights, facts, grad, grad_value, grad_places, grad_weights, queries, tokens, heads,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of values, places and weights, for ROWS queries of one head of one image."""
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = query < queries
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    channel = tl.arange(0, BLOCK)
    used = channel < CHANNELS
    row = (image * queries + query) * heads + head
    wanted = there[:, None] & used[None, :]
    given = tl.load(grad + row[:, None] * CHANNELS + channel[None, :], mask=wanted, other=0.0).to(tl.float32)
    for level in range(LEVELS):
        start = tl.load(facts + 3 * level)
        height = tl.load(facts + 3 * level + 1)
        width = tl.load(facts + 3 * level + 2)
        for point in range(POINTS):
            place = row * (LEVELS * POINTS) + level * POINTS + point
            x = tl.load(places + 2 * place, mask=there, other=0.0) * width - 0.5
            y = tl.load(places + 2 * place + 1, mask=there, other=0.0) * height - 0.5
            weight = tl.load(weights + place, mask=there, other=0.0).to(tl.float32)
            of_weight = tl.zeros([ROWS], dtype=tl.float32)
            of_x = tl.zeros([ROWS], dtype=tl.float32)
            of_y = tl.zeros([ROWS], dtype=tl.float32)
            for corner in tl.static_range(4):
                token, inside, near_x, near_y = _corner(x, y, there, start, height, width, corner % 2, corner // 2)
                cell = ((image * tokens + token) * heads + head) * CHANNELS
                mask = inside[:, None] & used[None, :]
                seen = tl.load(value + cell[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
                product = tl.where(inside, tl.sum(seen * given, axis=1), 0.0)
                of_weight += tl.where(inside, near_x * near_y, 0.0) * product
                # a step along x moves weight from the left corners to the right ones
                of_x += (2 * (corner % 2) - 1) * tl.where(inside, near_y, 0.0) * product
                of_y += (2 * (corner // 2) - 1) * tl.where(inside, near_x, 0.0) * product
                share = tl.where(inside, weight * near_x * near_y, 0.0)
                tl.atomic_add(grad_value + cell[:, None] + channel[None, :], share[:, None] * given, mask=mask)
            tl.store(grad_weights + place, of_weight, mask=there)
            tl.store(grad_places + 2 * place, of_x * weight * width, mask=there)
            tl.store(grad_places + 2 * place + 1, of_y * weight * height, mask=there)


@torch.library.custom_op("metr::sample_levels", mutates_args=())
def sample_fused(value: Tensor, places: Tensor, weights: Tensor, sides: Sequence[int]) -> Tensor:
    """`deformable_attention.sample_levels` in one kernel.

    Args:
        value: Tokens [b s d] in float32, bfloat16 or float16, the precision of the result.
        places: [b q m l p 2], float32.
        weights: [b q m l p].
        sides: Height and width of each level, one after the other.
    """
    value, places, weights = value.contiguous(), places.contiguous(), weights.contiguous()
    out = value.new_empty(value.shape[0], places.shape[1], value.shape[2])
    _launch(_sum_kernel, (value, places, weights, _facts(sides, value.device), out))
    return out


@sample_fused.register_fake
def _(value: Tensor, places: Tensor, _weights: Tensor, _sides: Sequence[int]) -> Tensor:
    return value.new_empty(value.shape[0], places.shape[1], value.shape[2])


@torch.library.custom_op("metr::sample_levels_gradient", mutates_args=())
def sample_fused_gradient(
    grad: Tensor, value: Tensor, places: Tensor, weights: Tensor, sides: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the values, the places and the weights."""
    value, places, weights = value.contiguous(), places.contiguous(), weights.contiguous()
    grad_value = torch.zeros_like(value, dtype=torch.float32)
    grad_places, grad_weights = torch.empty_like(places), torch.empty_like(weights)
    inputs = (value, places, weights, _facts(sides, value.device), grad.contiguous())
    _launch(_gradient_kernel, (*inputs, grad_value, grad_places, grad_weights))
    return grad_value.to(value.dtype, copy=False), grad_places, grad_weights


@sample_fused_gradient.register_fake
def _(
    _grad: Tensor, value: Tensor, places: Tensor, weights: Tensor, _sides: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    kinds = (value, places, weights)
    grad_value, grad_places, grad_weights = (one.new_empty(one.shape) for one in kinds)
    return grad_value, grad_places, grad_weights


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Sequence[int]], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:3])
    ctx.sides = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    grad_value, grad_places, grad_weights = sample_fused_gradient(grad, *ctx.saved_tensors, ctx.sides)
    return grad_value, grad_places, grad_weights, None


sample_fused.register_autograd(_backward, setup_context=_keep)


def _facts(sides: Sequence[int], device: torch.device) -> Tensor:
    """What the kernels read of the levels, on the device; the host does not wait for the copy."""
    shapes = list(zip(sides[::2], sides[1::2], strict=True))
    starts = accumulate((height * width for height, width in shapes[:-1]), initial=0)
    rows = [(start, height, width) for start, (height, width) in zip(starts, shapes, strict=True)]
    return torch.tensor(rows, dtype=torch.int32, device="cpu").to(device, non_blocking=True)


def _launch(kernel: Any, tensors: Sequence[Tensor]) -> None:
    value, places = tensors[:2]
    images, queries, heads, levels, points, _ = places.shape
    channels = value.shape[2] // heads
    if not value.numel() or not places.numel():
        return
    grid = (triton.cdiv(queries, _QUERIES), images * heads)
    sizes = {"LEVELS": levels, "POINTS": points, "CHANNELS": channels}
    block = triton.next_power_of_2(channels)
    kernel[grid](*tensors, queries, value.shape[1], heads, **sizes, BLOCK=block, ROWS=_QUERIES)
