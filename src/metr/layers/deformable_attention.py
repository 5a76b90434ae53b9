"""Multi-scale deformable attention (Zhu et al., 2021) in plain PyTorch: nothing to compile, any device.

Its inner loop, weighted bilinear samples from a pyramid of maps, exists three times with the same results. Accelerators
sample maps of pixels (`grid_sample`). CPUs sum rows of a table of tokens (`embedding_bag`): the numbers of a token are
contiguous there, and neither samples nor their gradients are stored one by one. This is several times faster and takes
a fraction of the memory. GPUs with Triton do it in one kernel (`deformable_kernel`), after that has been compared with
`grid_sample` on the GPU.
"""

import logging
import math
import os
import warnings
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int32
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, embedding_bag, grid_sample

from metr.layers.groups import softmax_of_few

LevelShapes = tuple[tuple[int, int], ...]
_logger = logging.getLogger(__name__)
_FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_RIGHT = 1e-4
"""The largest error of the kernel in float32, as a fraction of the largest number, with which it is used."""


class DeformableAttention(nn.Module):
    """Each query samples a few learnt points around its reference, on every level.

    Args:
        width: Size of a token, divisible by `heads`.
        heads: Attention heads.
        levels: Levels of the memory.
        points: Points a head and level.
        projected: Values and output have linear layers. Without them each head samples its part of the memory as it
            is (D-FINE).
    """

    def __init__(self, width: int, heads: int, levels: int, points: int, projected: bool = True) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, width) if projected else nn.Identity()
        self.out = nn.Linear(width, width) if projected else nn.Identity()
        self._start_as_a_star()

    def _start_as_a_star(self) -> None:
        """Initialises the offsets: every head has its own direction, and its points lie at growing distances."""
        nn.init.zeros_(self.offsets.weight)
        # a few numbers on the CPU: on the meta device they would import torch's compiler
        angle = torch.arange(self.heads, device="cpu") * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.points + 1, device="cpu")
        star = torch.einsum("hx,p->hpx", direction, distance.float())
        with torch.no_grad():
            self.offsets.bias.copy_(star.unsqueeze(1).expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for projection in (self.value, self.out):
            if isinstance(projection, nn.Linear):
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Float[Tensor, "b q d"],
        reference: Float[Tensor, "b q l xywh"],
        tokens: Float[Tensor, "b s d"],
        padding_mask: Bool[Tensor, "b s"],
        level_shapes: LevelShapes,
    ) -> Float[Tensor, "b q d"]:
        """The attention output for each query.

        Args:
            query: Content and position of the queries.
            reference: Points (x, y) or boxes (cx, cy, w, h) for each level, in 0..1 of the padded level. Offsets
                count cells from a point, or half box sizes / `points` from a centre.
            tokens: The memory, finest level first, row by row.
            padding_mask: True where a token is padding; there the values are zero.
            level_shapes: (height, width) of each level.
        """
        return self.gather(query, reference, self.values(tokens, padding_mask), level_shapes)

    def values(self, tokens: Float[Tensor, "b s d"], padding_mask: Bool[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        """The tokens' projected values, zero on padding."""
        values: Tensor = self.value(tokens)
        return values.masked_fill(padding_mask.unsqueeze(-1), 0.0)

    def gather(
        self,
        query: Float[Tensor, "b q d"],
        reference: Float[Tensor, "b q l xywh"],
        value: Float[Tensor, "b s d"],
        level_shapes: LevelShapes,
    ) -> Float[Tensor, "b q d"]:
        """`forward` with precomputed `values`."""
        offsets = rearrange(self.offsets(query), "b q (m l p x) -> b q m l p x", m=self.heads, l=self.levels, x=2)
        weights = softmax_of_few(rearrange(self.weights(query), "b q (m n) -> b q m n", m=self.heads))
        weights = rearrange(weights, "b q m (l p) -> b q m l p", l=self.levels)
        places = self._places(offsets, reference, level_shapes)
        gathered: Tensor = self.out(sample_levels(value, places, weights, level_shapes))
        return gathered

    def _places(self, offsets: Tensor, reference: Tensor, level_shapes: LevelShapes) -> Tensor:
        """Sampling places [b q m l p 2] in 0..1 of each padded level, in float32 whatever the network's precision."""
        reference = rearrange(reference.float(), "b q l x -> b q 1 l 1 x")
        if reference.shape[-1] == 4:
            return reference[..., :2] + offsets * (reference[..., 2:] * (0.5 / self.points))
        # from the CPU in a copy that the host does not wait for
        sizes = torch.tensor([(w, h) for h, w in level_shapes], dtype=reference.dtype, device="cpu")
        return reference + offsets / sizes.to(reference.device, non_blocking=True).unsqueeze(1)


def sample_levels(
    value: Float[Tensor, "b s d"],
    places: Float[Tensor, "b q m l p 2"],
    weights: Float[Tensor, "b q m l p"],
    level_shapes: LevelShapes,
) -> Float[Tensor, "b q d"]:
    """Bilinear samples of each head's part of the values at `places`, summed with `weights`. Values outside are zero.

    Args:
        value: Tokens of all levels, finest level first, row by row; every head has an equal part of the width.
        places: (x, y) in 0..1 of the level, for every query, head, level and point.
        weights: The weight of each place.
        level_shapes: (height, width) of each level.
    """
    fusible = value.device.type == "cuda" and value.dtype in _FUSED_TYPES and places.dtype == torch.float32
    if fusible and kernel_is_used():
        return sample_fused(value, places, weights, level_shapes)
    by_rows = torch.compiler.is_exporting() or (value.device.type == "cpu" and not torch.compiler.is_compiling())
    sample = sample_rows if by_rows else sample_grids
    exact = places.dtype
    return sample(value.to(exact), places, weights.to(exact), level_shapes).to(value.dtype)


def sample_fused(
    value: Float[Tensor, "b s d"],
    places: Float[Tensor, "b q m l p 2"],
    weights: Float[Tensor, "b q m l p"],
    level_shapes: LevelShapes,
) -> Float[Tensor, "b q d"]:
    """`sample_levels` in one Triton kernel: for GPUs, and for CPUs where Triton interprets (TRITON_INTERPRET=1)."""
    from metr.layers import deformable_kernel

    sides = [side for shape in level_shapes for side in shape]
    summed: Tensor = deformable_kernel.sample_fused(value, places, weights, sides)
    return summed


def kernel_is_used() -> bool:
    """Whether GPUs sample with the Triton kernel: Triton is installed, and the kernel is right on this GPU.

    The first call compares it with the plain way. METR_TRITON=0 in the environment switches it off.
    """
    return _kernel_is_right()


@cache
def _kernel_is_right() -> bool:
    if os.environ.get("METR_TRITON", "1") == "0" or find_spec("triton") is None:
        return False
    try:
        error = kernel_error(torch.device("cuda"))
    except Exception as failure:  # Triton's compiler fails in many ways, and the plain way always works
        _logger.warning("deformable sampling is slower than it could be: its Triton kernel fails here: %s", failure)
        return False
    if not error <= _RIGHT:
        _logger.warning("deformable sampling is slower than it could be: its Triton kernel is wrong by %.1e", error)
    return error <= _RIGHT


@torch.inference_mode(False)
@torch.enable_grad()
def kernel_error(
    device: torch.device, dtype: torch.dtype = torch.float32, level_shapes: LevelShapes = ((5, 7), (3, 4))
) -> float:
    """How much the sums and gradients of the Triton kernel differ from the plain way's, at most.

    It is a fraction of the largest of the numbers that are compared. No random number is drawn.
    """
    heads, points, queries, width = 2, 2, 19, 24
    tokens, shape = sum(height * wide for height, wide in level_shapes), (2, queries, heads, len(level_shapes), points)
    value = torch.arange(2 * tokens * width, device=device).sin().reshape(2, tokens, width).to(dtype)
    places = torch.arange(2 * math.prod(shape), device=device).cos().reshape(*shape, 2) * 0.8 + 0.5
    weights = torch.arange(math.prod(shape), device=device).cos().reshape(shape)
    answers = []
    for sample, exact in ((sample_fused, False), (sample_grids, True)):
        leaves = [one.detach().clone().requires_grad_() for one in (value, places, weights)]
        out = sample(leaves[0].float() if exact else leaves[0], leaves[1], leaves[2], level_shapes).to(dtype)
        factors = torch.arange(out.numel(), device=device).cos().reshape(out.shape).to(dtype)
        answers.append([out.detach(), *torch.autograd.grad((out * factors).sum(), leaves)])
    errors = [
        (one.float() - other.float()).abs().max() / other.float().abs().max()
        for one, other in zip(*answers, strict=True)
    ]
    return float(torch.stack(errors).max())


def sample_grids(
    value: Float[Tensor, "b s d"],
    places: Float[Tensor, "b q m l p 2"],
    weights: Float[Tensor, "b q m l p"],
    level_shapes: LevelShapes,
) -> Float[Tensor, "b q d"]:
    """`sample_levels` for accelerators: level by level, from maps of pixels."""
    batch, _, heads = weights.shape[:3]
    grids = rearrange(2 * places - 1, "b q m l p x -> l (b m) q p x")
    shares = rearrange(weights, "b q m l p -> l (b m) 1 q p")
    maps = value.split_with_sizes([height * width for height, width in level_shapes], dim=1)
    total = None
    for tokens, grid, share, (height, width) in zip(maps, grids, shares, level_shapes, strict=True):
        image = rearrange(tokens, "b (h w) (m c) -> (b m) c h w", h=height, w=width, m=heads)
        sampled = grid_sample(image, grid, mode="bilinear", align_corners=False)
        part = (sampled * share).sum(-1)
        total = part if total is None else total + part
    assert total is not None
    out: Tensor = rearrange(total, "(b m) c q -> b q (m c)", b=batch)
    return out


def sample_rows(
    value: Float[Tensor, "b s d"],
    places: Float[Tensor, "b q m l p 2"],
    weights: Float[Tensor, "b q m l p"],
    level_shapes: LevelShapes,
) -> Float[Tensor, "b q d"]:
    """`sample_levels` for CPUs: one weighted sum of rows for every query and head, four rows for each place."""
    batch, queries, heads = weights.shape[:3]
    cells, shares = corner_cells(places, weights, level_shapes)
    image = torch.arange(batch, dtype=torch.int32, device=value.device) * value.shape[1]
    head = torch.arange(heads, dtype=torch.int32, device=value.device)
    first = (image[:, None, None] * heads + head).expand(-1, queries, -1)
    rows = cells * heads + first.reshape(-1)
    table = rearrange(value, "b s (m c) -> (b s m) c", m=heads)
    summed = _weighted_row_sums(table, rows.t().contiguous(), shares.t().contiguous())
    return rearrange(summed, "(b q m) c -> b q (m c)", b=batch, q=queries)


def corner_cells(
    places: Float[Tensor, "b q m l p 2"], weights: Float[Tensor, "b q m l p"], level_shapes: LevelShapes
) -> tuple[Int32[Tensor, "n g"], Float[Tensor, "n g"]]:
    """The four cells around each place as indices of tokens, and their factors: weight times bilinear weight.

    Cells outside the level have a factor of zero, and the index of a cell inside. There is a column for each image,
    query and head: processors are quick at long rows, and the places of one query and head are few.
    """
    points = places.shape[4]

    def of_points(numbers: list[int]) -> Int32[Tensor, "lp 1"]:
        return torch.tensor(numbers, dtype=torch.int32, device=places.device).repeat_interleave(points).unsqueeze(1)

    sizes = [height * width for height, width in level_shapes]
    start = of_points(list(accumulate(sizes[:-1], initial=0)))
    height, width = (of_points(list(sides)) for sides in zip(*level_shapes, strict=True))
    x, y = rearrange(places, "b q m l p xy -> xy (l p) (b q m)").contiguous().unbind()
    weight = rearrange(weights, "b q m l p -> (l p) (b q m)").contiguous()
    columns = _neighbours(x * width - 0.5, width)
    rows = [(start + row * width, weight * near) for row, near in _neighbours(y * height - 0.5, height)]
    cells = torch.cat([first + column for first, _ in rows for column, _ in columns])
    shares = torch.cat([high * wide for _, high in rows for _, wide in columns])
    return cells, shares


def _neighbours(
    position: Float[Tensor, "n g"], size: Int32[Tensor, "n 1"]
) -> list[tuple[Int32[Tensor, "n g"], Float[Tensor, "n g"]]]:
    """The cells before and after a position along one axis, and their bilinear weights; zero for cells outside."""
    before = position.detach().floor()
    ahead = position - before
    cells = before.int()
    neighbours = []
    for cell, near in ((cells, 1 - ahead), (cells + 1, ahead)):
        kept = cell.clamp(min=0).minimum(size - 1)
        neighbours.append((kept, near * (kept == cell)))
    return neighbours


def _weighted_row_sums(
    table: Float[Tensor, "t c"], rows: Int32[Tensor, "g n"], shares: Float[Tensor, "g n"]
) -> Float[Tensor, "g c"]:
    """For each of g groups the sum of n rows of the table, each multiplied by its factor in `shares`."""
    if torch.compiler.is_exporting():
        # what every runtime has; their samplers of maps are slower on CPUs
        return (shares.unsqueeze(1) @ embedding(rows, table)).squeeze(1)
    if not torch.is_grad_enabled():
        return embedding_bag(rows, table, mode="sum", per_sample_weights=shares)
    summed: Tensor = _WeightedRowSums.apply(table, rows, shares)  # type: ignore[no-untyped-call]
    return summed


class _WeightedRowSums(torch.autograd.Function):
    """PyTorch's weighted sum with a faster gradient of the table, which is again a sum of rows."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
        """See `_weighted_row_sums`."""
        ctx.save_for_backward(table, rows, shares)
        return embedding_bag(rows, table, mode="sum", per_sample_weights=shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """Gradients of table and shares."""
        table, rows, shares = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_table = _table_gradient(grad, rows, shares, len(table)) if ctx.needs_input_grad[0] else None
        of_shares = _share_gradient(grad, rows, shares, table) if ctx.needs_input_grad[2] else None
        return of_table, None, of_shares


def _table_gradient(
    grad: Float[Tensor, "g c"], rows: Int32[Tensor, "g n"], shares: Float[Tensor, "g n"], number: int
) -> Float[Tensor, "t c"]:
    """The gradient of a row is the weighted sum of the gradients of all groups that use it.

    That is a product with a sparse matrix of groups and rows, transposed. SciPy multiplies it as it is; torch would
    have to sort it first, or store each summand.
    """
    from scipy.sparse import csr_matrix  # here, as detection needs none of it

    ends = np.arange(0, rows.numel() + 1, rows.shape[1], dtype=np.int32)
    entries = (shares.numpy().reshape(-1), rows.numpy().reshape(-1), ends)
    uses = csr_matrix(entries, shape=(len(grad), number), copy=False)
    return torch.from_numpy(uses.T @ grad.numpy())


def _share_gradient(
    grad: Float[Tensor, "g c"], rows: Int32[Tensor, "g n"], shares: Float[Tensor, "g n"], table: Float[Tensor, "t c"]
) -> Float[Tensor, "g n"]:
    """The gradient of a factor is the dot product of its row and the group's gradient: a few cells of a product."""
    ends = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=rows.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # sparse matrices are "in beta"
        size = (len(grad), len(table))
        cells = torch.sparse_csr_tensor(ends, rows.flatten(), shares.flatten(), size, check_invariants=False)
    products: Tensor = torch.sparse.sampled_addmm(cells, grad, table.T, beta=0.0).values()
    return products.view_as(rows)
