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

_ROWS = tl.constexpr(16)
"""Queries of one program."""
_HEAD = tl.constexpr(7)
"""Numbers in `facts` before those of the levels: queries, tokens, heads, levels, channels, and in the buffer of all
gradients where those of the places and those of the weights begin."""


@triton.jit
@no_type_check
def _corner(x: Any, y: Any, there: Any, start: Any, height: Any, width: Any, corner: tl.constexpr) -> Any:
    """A corner of the cell around each place: its token, whether it exists, and its bilinear weights along x and y."""
    left = tl.floor(x)
    top = tl.floor(y)
    column = left + corner % 2
    row = top + corner // 2
    inside = there & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    # places may be anywhere, or not numbers at all: only those inside become indices
    token = start + tl.where(inside, row, 0.0).to(tl.int64) * width + tl.where(inside, column, 0.0).to(tl.int64)
    near_x = x - left if corner % 2 else 1.0 - (x - left)
    near_y = y - top if corner // 2 else 1.0 - (y - top)
    return token, inside, near_x, near_y


@triton.jit
@no_type_check
def _sum_kernel(
    value: Any, places: Any, weights: Any, facts: Any, out: Any, POINTS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Weighted sums of samples for some queries of one head of one image."""
    queries, tokens, heads = tl.load(facts), tl.load(facts + 1), tl.load(facts + 2)
    levels, channels = tl.load(facts + 3), tl.load(facts + 4)
    query = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    there = query < queries
    image = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    channel = tl.arange(0, BLOCK)
    used = channel < channels
    row = (image * queries + query) * heads + head
    total = tl.zeros([_ROWS, BLOCK], dtype=tl.float32)
    for level in range(levels):
        of_level = facts + _HEAD + 3 * level
        start, height, width = tl.load(of_level), tl.load(of_level + 1), tl.load(of_level + 2)
        for point in range(POINTS):
            place = (row * levels + level) * POINTS + point
            x = tl.load(places + 2 * place, mask=there, other=0.0) * width.to(tl.float32) - 0.5
            y = tl.load(places + 2 * place + 1, mask=there, other=0.0) * height.to(tl.float32) - 0.5
            weight = tl.load(weights + place, mask=there, other=0.0).to(tl.float32)
            for corner in tl.static_range(4):
                token, inside, near_x, near_y = _corner(x, y, there, start, height, width, corner)
                cell = ((image * tokens + token) * heads + head) * channels
                mask = inside[:, None] & used[None, :]
                seen = tl.load(value + cell[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
                total += tl.where(inside, weight * near_x * near_y, 0.0)[:, None] * seen
    tl.store(out + row[:, None] * channels + channel[None, :], total, mask=there[:, None] & used[None, :])


@triton.jit
@no_type_check
def _gradient_kernel(
    value: Any,
    places: Any,
    weights: Any,
    facts: Any,
    grad: Any,
    grads: Any,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The gradients of values, places and weights, in one buffer, for some queries of one head of one image."""
    queries, tokens, heads = tl.load(facts), tl.load(facts + 1), tl.load(facts + 2)
    levels, channels = tl.load(facts + 3), tl.load(facts + 4)
    grad_places, grad_weights = grads + tl.load(facts + 5), grads + tl.load(facts + 6)
    query = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    there = query < queries
    image = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    channel = tl.arange(0, BLOCK)
    used = channel < channels
    row = (image * queries + query) * heads + head
    wanted = there[:, None] & used[None, :]
    given = tl.load(grad + row[:, None] * channels + channel[None, :], mask=wanted, other=0.0).to(tl.float32)
    for level in range(levels):
        of_level = facts + _HEAD + 3 * level
        start, height, width = tl.load(of_level), tl.load(of_level + 1), tl.load(of_level + 2)
        for point in range(POINTS):
            place = (row * levels + level) * POINTS + point
            x = tl.load(places + 2 * place, mask=there, other=0.0) * width.to(tl.float32) - 0.5
            y = tl.load(places + 2 * place + 1, mask=there, other=0.0) * height.to(tl.float32) - 0.5
            weight = tl.load(weights + place, mask=there, other=0.0).to(tl.float32)
            of_weight = tl.zeros([_ROWS], dtype=tl.float32)
            of_x = tl.zeros([_ROWS], dtype=tl.float32)
            of_y = tl.zeros([_ROWS], dtype=tl.float32)
            for corner in tl.static_range(4):
                token, inside, near_x, near_y = _corner(x, y, there, start, height, width, corner)
                cell = ((image * tokens + token) * heads + head) * channels
                mask = inside[:, None] & used[None, :]
                seen = tl.load(value + cell[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
                product = tl.where(inside, tl.sum(seen * given, axis=1), 0.0)
                of_weight += tl.where(inside, near_x * near_y, 0.0) * product
                # a step along x moves weight from the left corners to the right ones
                of_x += (2 * (corner % 2) - 1) * tl.where(inside, near_y, 0.0) * product
                of_y += (2 * (corner // 2) - 1) * tl.where(inside, near_x, 0.0) * product
                share = tl.where(inside, weight * near_x * near_y, 0.0)
                tl.atomic_add(grads + cell[:, None] + channel[None, :], share[:, None] * given, mask=mask)
            tl.store(grad_weights + place, of_weight, mask=there)
            tl.store(grad_places + 2 * place, of_x * weight * width.to(tl.float32), mask=there)
            tl.store(grad_places + 2 * place + 1, of_y * weight * height.to(tl.float32), mask=there)


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
    _launch(_sum_kernel, (value, places, weights, _facts(value, places, sides), out))
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
    parts = (value, places, weights)
    grads = torch.zeros(sum(one.numel() for one in parts), dtype=torch.float32, device=value.device)
    _launch(_gradient_kernel, (*parts, _facts(value, places, sides), grad.contiguous(), grads))
    # copies: what an operator returns shares no memory
    rows = torch.split(grads, [one.numel() for one in parts])
    of_value, of_places, of_weights = (
        row.view_as(one).to(one.dtype, copy=True) for row, one in zip(rows, parts, strict=True)
    )
    return of_value, of_places, of_weights


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


def _facts(value: Tensor, places: Tensor, sides: Sequence[int]) -> Tensor:
    """What the kernels read besides tensors, on the device; the host does not wait for the copy."""
    _, queries, heads, levels, *_ = places.shape
    shapes = list(zip(sides[::2], sides[1::2], strict=True))
    starts = accumulate((height * width for height, width in shapes[:-1]), initial=0)
    numbers = [queries, value.shape[1], heads, levels, value.shape[2] // heads]
    numbers += [value.numel(), value.numel() + places.numel()]
    for start, (height, width) in zip(starts, shapes, strict=True):
        numbers += [start, height, width]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu").to(value.device, non_blocking=True)


def _launch(kernel: Any, tensors: Sequence[Tensor]) -> None:
    value, places = tensors[:2]
    images, queries, heads, _, points, _ = places.shape
    if value.numel() and places.numel():
        grid = (triton.cdiv(queries, _ROWS.value), images * heads)
        kernel[grid](*tensors, POINTS=points, BLOCK=triton.next_power_of_2(value.shape[2] // heads))
