"""Deformable attention against its definition, place by place, and against transformers' module."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrEncoder,
    DeformableDetrMultiscaleDeformableAttention,
)

from metr.layers.deformable_attention import DeformableAttention, corner_cells, sample_grids, sample_levels, sample_rows

WIDTH, HEADS, POINTS = 16, 4, 3
SHAPES = ((5, 7), (3, 4), (2, 2))
TOKENS = sum(h * w for h, w in SHAPES)


def bilinear(level: Tensor, place: Tensor) -> Tensor:
    """The value of a map [h w c] at (x, y) in 0..1; a cell's value sits at its centre, outside is zero."""
    height, width = level.shape[:2]
    column, row = place[0] * width - 0.5, place[1] * height - 0.5
    total = torch.zeros(level.shape[2], dtype=level.dtype)
    above, left = math.floor(row.item()), math.floor(column.item())
    for j in (above, above + 1):
        for i in (left, left + 1):
            if 0 <= j < height and 0 <= i < width:
                total = total + (1 - (row - j).abs()) * (1 - (column - i).abs()) * level[j, i]
    return total


def slow(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """What every query gathers, one head, level and point after the other."""
    batch, queries, heads, levels, points, _ = places.shape
    share = value.shape[2] // heads
    maps = value.split([h * w for h, w in SHAPES], dim=1)

    def gathered(b: int, q: int, m: int) -> Tensor:
        total = torch.zeros(share, dtype=value.dtype)
        for n in range(levels):
            level = maps[n][b].view(*SHAPES[n], -1)[..., m * share : (m + 1) * share]
            for p in range(points):
                total = total + weights[b, q, m, n, p] * bilinear(level, places[b, q, m, n, p])
        return total

    rows = [torch.cat([gathered(b, q, m) for m in range(heads)]) for b in range(batch) for q in range(queries)]
    return torch.stack(rows).view(batch, queries, -1)


@pytest.mark.parametrize("sample", [sample_levels, sample_grids, sample_rows])
def test_samples_equal_the_definition(sample: Callable[..., Tensor]) -> None:
    """Places lie inside, across the border and outside; gradients of all three inputs agree."""
    value = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    places = (1.4 * torch.rand(2, 4, HEADS, 3, POINTS, 2, dtype=torch.float64) - 0.2).requires_grad_()
    weights = torch.randn(2, 4, HEADS, 3, POINTS, dtype=torch.float64, requires_grad=True)
    inputs = (value, places, weights)
    found, expected = sample(*inputs, SHAPES), slow(*inputs)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    gradients = (torch.autograd.grad(answer, inputs, direction) for answer in (found, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sample", [sample_grids, sample_rows])
def test_samples_at_centres_are_the_cells_themselves(sample: Callable[..., Tensor]) -> None:
    value = torch.randn(1, TOKENS, WIDTH)
    places = torch.full((1, 1, HEADS, 3, 1, 2), -1.0)
    places[..., 1, 0, :] = torch.tensor([(2 + 0.5) / 4, (1 + 0.5) / 3])
    weights = torch.ones(1, 1, HEADS, 3, 1)
    cell = value[0, 5 * 7 + 1 * 4 + 2]
    torch.testing.assert_close(sample(value, places, weights, SHAPES)[0, 0], cell)


@pytest.mark.parametrize("sample", [sample_grids, sample_rows])
def test_places_far_away_give_nothing(sample: Callable[..., Tensor]) -> None:
    value = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    weights = torch.ones(1, 1, HEADS, 3, 1)
    for far in (-50.0, 50.0, 1e9, -1e9):
        places = torch.full((1, 1, HEADS, 3, 1, 2), far, requires_grad=True)
        found = sample(value, places, weights, SHAPES)
        assert not found.any()
        (gradient,) = torch.autograd.grad(found.sum(), places)
        assert not gradient.any()


def theirs_of(ours: DeformableAttention) -> DeformableDetrMultiscaleDeformableAttention:
    """Transformers' module with our weights."""
    config = DeformableDetrConfig(d_model=WIDTH, num_feature_levels=len(SHAPES))
    theirs = DeformableDetrMultiscaleDeformableAttention(config, num_heads=HEADS, n_points=POINTS)
    theirs.sampling_offsets.load_state_dict(ours.offsets.state_dict())
    theirs.attention_weights.load_state_dict(ours.weights.state_dict())
    theirs.value_proj.load_state_dict(ours.value.state_dict())
    theirs.output_proj.load_state_dict(ours.out.state_dict())
    return theirs


def random_module() -> DeformableAttention:
    module = DeformableAttention(WIDTH, HEADS, len(SHAPES), POINTS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def padding() -> Tensor:
    """The first image whole, of the second the right column of every level padding."""
    levels = []
    for height, width in SHAPES:
        level = torch.zeros(2, height, width, dtype=torch.bool)
        level[1, :, -1] = True
        levels.append(level.flatten(1))
    return torch.cat(levels, dim=1)


@pytest.mark.parametrize("numbers", [2, 4])
def test_equals_transformers_module(numbers: int) -> None:
    ours = random_module()
    theirs = theirs_of(ours)
    query = torch.randn(2, 6, WIDTH, requires_grad=True)
    tokens = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    reference = torch.rand(2, 6, len(SHAPES), numbers, requires_grad=True)
    answer = ours(query, reference, tokens, padding(), SHAPES)
    expected, _ = theirs(
        hidden_states=query,
        attention_mask=~padding(),
        encoder_hidden_states=tokens,
        reference_points=reference,
        spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=list(SHAPES),
    )
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(answer)
    own = (query, tokens, reference, ours.offsets.weight, ours.weights.bias, ours.value.weight, ours.out.bias)
    other = (
        query,
        tokens,
        reference,
        theirs.sampling_offsets.weight,
        theirs.attention_weights.bias,
        theirs.value_proj.weight,
        theirs.output_proj.bias,
    )
    for a, b in zip(
        torch.autograd.grad(answer, own, direction), torch.autograd.grad(expected, other, direction), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_starts_as_deformable_detr_does() -> None:
    config = DeformableDetrConfig(
        d_model=WIDTH,
        num_feature_levels=len(SHAPES),
        encoder_layers=1,
        encoder_attention_heads=HEADS,
        encoder_n_points=POINTS,
        encoder_ffn_dim=8,
    )
    theirs = DeformableDetrEncoder(config).layers[0].self_attn
    ours = DeformableAttention(WIDTH, HEADS, len(SHAPES), POINTS)
    torch.testing.assert_close(ours.offsets.bias, theirs.sampling_offsets.bias)
    for linear in (ours.offsets, ours.weights):
        assert not linear.weight.any()
    assert not ours.weights.bias.any()


def test_what_padding_holds_does_not_matter() -> None:
    module = random_module()
    query, reference = torch.randn(2, 6, WIDTH), torch.rand(2, 6, len(SHAPES), 4)
    tokens = torch.randn(2, TOKENS, WIDTH)
    mask = padding()
    other = torch.where(mask.unsqueeze(-1), 100 * torch.randn(2, TOKENS, WIDTH), tokens)
    plain = module(query, reference, tokens, mask, SHAPES)
    assert torch.equal(plain, module(query, reference, other, mask, SHAPES))
    assert not torch.allclose(plain[1], module(query, reference, other, torch.zeros_like(mask), SHAPES)[1])


def test_padding_counts_as_zero_even_where_the_value_has_a_bias() -> None:
    module = random_module()
    nothing = torch.ones(1, TOKENS, dtype=torch.bool)
    gathered = module(torch.randn(1, 2, WIDTH), torch.rand(1, 2, 3, 4), torch.randn(1, TOKENS, WIDTH), nothing, SHAPES)
    torch.testing.assert_close(gathered, module.out.bias.expand(1, 2, -1))


def test_low_precision_keeps_its_places() -> None:
    """Under autocast each of 512 cells is still found: places rounded to bfloat16 would hit its neighbours."""
    cells = 512
    module = DeformableAttention(8, 1, 1, 1)
    with torch.no_grad():
        module.offsets.bias.zero_()
        for linear in (module.value, module.out):
            linear.weight.copy_(torch.eye(8))
    tokens = (torch.randint(0, 2, (1, cells, 8)) * 2 - 1).float()
    centre = (torch.arange(cells) + 0.5) / cells
    point = torch.stack([centre, torch.full_like(centre, 0.5)], dim=-1).view(1, cells, 1, 2)
    mask = torch.zeros(1, cells, dtype=torch.bool)
    for reference in (point, torch.cat([point, torch.full_like(point, 0.1)], dim=-1)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = module(torch.randn(1, cells, 8), reference, tokens, mask, ((1, cells),))
        torch.testing.assert_close(found.float(), tokens, atol=1e-2, rtol=0)


GRID_SHAPES = ((5, 7), (3, 4), (2, 2), (1, 1))
GRID_HEADS, GRID_WIDTH, GRID_POINTS = 2, 6, 3
GRID_TOKENS = sum(h * w for h, w in GRID_SHAPES)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Values, places in and around the image, weights."""
    value = torch.randn(2, GRID_TOKENS, GRID_WIDTH, dtype=dtype)
    places = 1.6 * torch.rand(2, 5, GRID_HEADS, len(GRID_SHAPES), GRID_POINTS, 2, dtype=dtype) - 0.3
    weights = torch.randn(2, 5, GRID_HEADS, len(GRID_SHAPES), GRID_POINTS, dtype=dtype)
    return value, places, weights


def test_rows_equal_grids_and_so_do_the_gradients() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    by_rows, by_grids = sample_rows(*leaves, GRID_SHAPES), sample_grids(*leaves, GRID_SHAPES)
    torch.testing.assert_close(by_rows, by_grids)
    direction = torch.randn_like(by_rows)
    for ours, theirs in zip(
        torch.autograd.grad(by_rows, leaves, direction), torch.autograd.grad(by_grids, leaves, direction), strict=True
    ):
        assert ours.abs().sum() > 0
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_those_of_finite_differences() -> None:
    value, places, weights = inputs()
    few = (value[:1], places[:1, :2], weights[:1, :2])
    leaves = [tensor.clone().requires_grad_() for tensor in few]
    assert torch.autograd.gradcheck(lambda *given: sample_rows(*given, GRID_SHAPES), leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_each_gradient_comes_alone_too(wanted: int) -> None:
    """Frozen parts ask for some gradients only."""
    given = list(inputs())
    given[wanted].requires_grad_()
    (ours,) = torch.autograd.grad(sample_rows(*given, GRID_SHAPES).square().sum(), given[wanted])
    (theirs,) = torch.autograd.grad(sample_grids(*given, GRID_SHAPES).square().sum(), given[wanted])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_numbers(mode: type) -> None:
    value, places, weights = inputs(torch.float32)
    with mode():
        alone = sample_levels(value, places, weights, GRID_SHAPES)
    torch.testing.assert_close(alone, sample_grids(value, places, weights, GRID_SHAPES), atol=1e-5, rtol=1e-5)


def test_value_keeps_its_precision_and_places_keep_theirs() -> None:
    value, places, weights = inputs(torch.float32)
    sampled = sample_levels(value.bfloat16(), places, weights.bfloat16(), GRID_SHAPES)
    assert sampled.dtype == torch.bfloat16
    exact = sample_levels(value.bfloat16().float(), places, weights.bfloat16().float(), GRID_SHAPES)
    torch.testing.assert_close(sampled, exact.bfloat16())


def test_shares_of_the_corners_sum_to_the_weight_inside_and_to_nothing_outside() -> None:
    inside = torch.full((1, 1, GRID_HEADS, len(GRID_SHAPES), 1, 2), 0.5)
    weights = torch.rand(1, 1, GRID_HEADS, len(GRID_SHAPES), 1)
    for places, total in (
        (inside, weights.reshape(GRID_HEADS, len(GRID_SHAPES)).T),
        (inside + 2, torch.zeros(len(GRID_SHAPES), GRID_HEADS)),
    ):
        cells, shares = corner_cells(places, weights, GRID_SHAPES)
        torch.testing.assert_close(shares.unflatten(0, (4, len(GRID_SHAPES))).sum(0), total)
        assert int(cells.min()) >= 0
        assert int(cells.max()) < GRID_TOKENS


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e30, -1e30])
def test_places_gone_astray_break_nothing(odd: float) -> None:
    """The criterion deals with answers that are not finite; indices stay inside the table."""
    value, places, weights = inputs(torch.float32)
    places[0, 0] = odd
    sampled = sample_rows(value, places, weights, GRID_SHAPES)
    torch.testing.assert_close(sampled[1], sample_grids(value, places, weights, GRID_SHAPES)[1], atol=1e-5, rtol=1e-5)
