"""Samples by rows (CPUs) equal samples by grids (accelerators), and so do their gradients."""

import pytest
import torch
from torch import Tensor

from metr.layers.deformable_attention import corner_cells, sample_grids, sample_levels, sample_rows

SHAPES = ((5, 7), (3, 4), (2, 2), (1, 1))
HEADS, WIDTH, POINTS = 2, 6, 3
TOKENS = sum(h * w for h, w in SHAPES)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Values, places in and around the image, weights."""
    value = torch.randn(2, TOKENS, WIDTH, dtype=dtype)
    places = 1.6 * torch.rand(2, 5, HEADS, len(SHAPES), POINTS, 2, dtype=dtype) - 0.3
    weights = torch.randn(2, 5, HEADS, len(SHAPES), POINTS, dtype=dtype)
    return value, places, weights


def test_rows_equal_grids_and_so_do_the_gradients() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    by_rows, by_grids = sample_rows(*leaves, SHAPES), sample_grids(*leaves, SHAPES)
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
    assert torch.autograd.gradcheck(lambda *given: sample_rows(*given, SHAPES), leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_each_gradient_comes_alone_too(wanted: int) -> None:
    """Frozen parts ask for some gradients only."""
    given = list(inputs())
    given[wanted].requires_grad_()
    (ours,) = torch.autograd.grad(sample_rows(*given, SHAPES).square().sum(), given[wanted])
    (theirs,) = torch.autograd.grad(sample_grids(*given, SHAPES).square().sum(), given[wanted])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_numbers(mode: type) -> None:
    value, places, weights = inputs(torch.float32)
    with mode():
        alone = sample_levels(value, places, weights, SHAPES)
    torch.testing.assert_close(alone, sample_grids(value, places, weights, SHAPES), atol=1e-5, rtol=1e-5)


def test_value_keeps_its_precision_and_places_keep_theirs() -> None:
    value, places, weights = inputs(torch.float32)
    sampled = sample_levels(value.bfloat16(), places, weights.bfloat16(), SHAPES)
    assert sampled.dtype == torch.bfloat16
    exact = sample_levels(value.bfloat16().float(), places, weights.bfloat16().float(), SHAPES)
    torch.testing.assert_close(sampled, exact.bfloat16())


def test_shares_of_the_corners_sum_to_the_weight_inside_and_to_nothing_outside() -> None:
    inside = torch.full((1, 1, HEADS, len(SHAPES), 1, 2), 0.5)
    weights = torch.rand(1, 1, HEADS, len(SHAPES), 1)
    for places, total in ((inside, weights.squeeze(-1)), (inside + 2, torch.zeros(1, 1, HEADS, len(SHAPES)))):
        cells, shares = corner_cells(places, weights, SHAPES)
        torch.testing.assert_close(shares.unflatten(-1, (4, len(SHAPES))).sum(-2), total)
        assert int(cells.min()) >= 0
        assert int(cells.max()) < TOKENS


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e30, -1e30])
def test_places_gone_astray_break_nothing(odd: float) -> None:
    """The criterion deals with answers that are not finite; indices stay inside the table."""
    value, places, weights = inputs(torch.float32)
    places[0, 0] = odd
    sampled = sample_rows(value, places, weights, SHAPES)
    torch.testing.assert_close(sampled[1], sample_grids(value, places, weights, SHAPES)[1], atol=1e-5, rtol=1e-5)
