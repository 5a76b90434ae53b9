"""The Triton kernel against the plain way, in Triton's interpreter on the CPU."""

import pytest
import torch
from torch import Tensor

from metr.layers import deformable_attention
from metr.layers.deformable_attention import LevelShapes, kernel_error, sample_grids

pytest.importorskip("triton", reason="the kernel needs Triton (Linux): pip install triton")
from metr.layers import deformable_kernel

SHAPES: LevelShapes = ((5, 7), (3, 4), (2, 2), (1, 1))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def given(
    shapes: LevelShapes, dtype: torch.dtype, *, queries: int = 19, heads: int = 2, width: int = 16, points: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, places (some of them far outside) and weights of two images."""
    random = torch.Generator().manual_seed(0)
    tokens = sum(height * wide for height, wide in shapes)
    value = torch.randn(2, tokens, width, generator=random).to(dtype)
    places = torch.rand(2, queries, heads, len(shapes), points, 2, generator=random) * 1.6 - 0.3
    weights = torch.rand(2, queries, heads, len(shapes) * points, generator=random).softmax(-1)
    return value, places, weights.reshape(2, queries, heads, len(shapes), points)


def flat(shapes: LevelShapes) -> list[int]:
    return [side for shape in shapes for side in shape]


def answers(inputs: tuple[Tensor, ...], shapes: LevelShapes, *, fused: bool) -> list[Tensor]:
    """The sums, and the gradients of values, places and weights."""
    value, places, weights = (one.clone().requires_grad_() for one in inputs)
    if fused:
        out = deformable_kernel.sample_fused(value, places, weights, flat(shapes))
    else:
        out = sample_grids(value.float(), places, weights, shapes).to(value.dtype)
    factor = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    (out * factor).sum().backward()
    found = [out, value.grad, places.grad, weights.grad]
    assert all(one is not None for one in found)
    return [one.detach() for one in found if one is not None]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("levels", [1, 4])
def test_it_is_the_plain_one(levels: int, dtype: torch.dtype) -> None:
    shapes = SHAPES[:levels]
    inputs = given(shapes, dtype)
    ours, plain = answers(inputs, shapes, fused=True), answers(inputs, shapes, fused=False)
    for name, one, other in zip(("sums", "values", "places", "weights"), ours, plain, strict=True):
        assert one.dtype == other.dtype, name
        scale = other.float().abs().max()
        error = (one.float() - other.float()).abs().max() / scale
        assert error <= TOLERANCE[dtype], f"{name}: {error}"


@pytest.mark.parametrize(
    "sizes",
    [{"width": 6, "heads": 2}, {"width": 24, "heads": 1, "points": 1}, {"queries": 1}, {"queries": 16, "points": 3}],
    ids=str,
)
def test_sizes_that_fill_no_block(sizes: dict[str, int]) -> None:
    inputs = given(SHAPES[:2], torch.float32, **sizes)
    for one, other in zip(
        answers(inputs, SHAPES[:2], fused=True), answers(inputs, SHAPES[:2], fused=False), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, which computes in the interpreter
def test_places_that_are_no_numbers_touch_nothing() -> None:
    value, places, weights = given(SHAPES[:2], torch.float32)
    places[0, 0] = torch.nan
    places[1, 1] = torch.inf
    out, of_value, *_ = answers((value, places, weights), SHAPES[:2], fused=True)
    assert torch.equal(out[0, 0], torch.zeros_like(out[0, 0]))
    assert torch.equal(out[1, 1], torch.zeros_like(out[1, 1]))
    assert of_value.isfinite().all()


def test_rows_that_are_not_contiguous() -> None:
    value, places, weights = given(SHAPES[:2], torch.float32)
    strided = value.transpose(0, 1).contiguous().transpose(0, 1), places, weights.transpose(0, 1).contiguous()
    strided = (strided[0], strided[1], strided[2].transpose(0, 1))
    for one, other in zip(
        answers(strided, SHAPES[:2], fused=True), answers((value, places, weights), SHAPES[:2], fused=True), strict=True
    ):
        assert torch.equal(one, other)


def test_torch_agrees_that_it_is_a_proper_operator() -> None:
    value, places, weights = given(SHAPES[:2], torch.float32, queries=3)
    inputs = (value.requires_grad_(), places.requires_grad_(), weights.requires_grad_(), flat(SHAPES[:2]))
    torch.library.opcheck(deformable_kernel.sample_fused, inputs)


def test_it_compiles_into_one_graph() -> None:
    value, places, weights = given(SHAPES[:2], torch.float32, queries=3)

    def twice(value: Tensor) -> Tensor:
        return deformable_kernel.sample_fused(value * 2, places, weights, flat(SHAPES[:2])) + 1

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (twice, compiled):
        leaf = value.clone().requires_grad_()
        out = run(leaf)
        out.square().sum().backward()
        grads.append((out.detach(), leaf.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_its_own_check_finds_it_right_and_a_wrong_one_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """GPUs use the kernel only after this check."""
    assert kernel_error(torch.device("cpu"), level_shapes=SHAPES[1:3]) < 1e-5
    monkeypatch.delenv("METR_TRITON", raising=False)
    for wrong, message in ((lambda *_: 0.5, "wrong by 5.0e-01"), (lambda *_: 1 / 0, "fails here: division by zero")):
        monkeypatch.setattr(deformable_attention, "kernel_error", wrong)
        deformable_attention._kernel_is_right.cache_clear()
        assert not deformable_attention.kernel_is_used()
        assert message in caplog.text
    monkeypatch.setattr(deformable_attention, "kernel_error", lambda *_: 0.0)
    for switch, used in (("0", False), ("1", True)):
        monkeypatch.setenv("METR_TRITON", switch)
        deformable_attention._kernel_is_right.cache_clear()
        assert deformable_attention.kernel_is_used() is used
    deformable_attention._kernel_is_right.cache_clear()
