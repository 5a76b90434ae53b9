"""Boxes against pixels counted one by one, and where they have no area."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metr import boxes as geometry

GRID = 12

corners = st.tuples(*[st.integers(0, GRID)] * 4)


def box_of(numbers: tuple[int, int, int, int]) -> Tensor:
    x0, y0, x1, y1 = numbers
    return torch.tensor([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)], dtype=torch.float64)


def cells(box: Tensor) -> Tensor:
    """Which unit cells of the grid lie inside a box of whole numbers."""
    x0, y0, x1, y1 = (int(x) for x in box)
    inside = torch.zeros(GRID, GRID, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    return inside


def hull(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([torch.minimum(a[:2], b[:2]), torch.maximum(a[2:], b[2:])])


@settings(max_examples=150, deadline=None)
@given(corners, corners)
def test_overlaps_equal_counted_cells(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> None:
    a, b = box_of(first), box_of(second)
    both, either = int((cells(a) & cells(b)).sum()), int((cells(a) | cells(b)).sum())
    outer, own = int(cells(hull(a, b)).sum()), int(cells(a).sum())
    iou = both / either if either else 0.0
    giou = iou - ((outer - either) / outer if outer else 0.0)
    assert float(geometry.area(a)) == own
    assert float(geometry.paired_iou(a[None], b[None])) == pytest.approx(iou)
    assert float(geometry.paired_giou(a[None], b[None])) == pytest.approx(giou)
    assert float(geometry.pairwise_coverage(a[None], b[None])) == pytest.approx(both / own if own else 0.0)


def random_corners(*shape: int) -> Tensor:
    low = torch.rand(*shape, 2)
    return torch.cat([low, low + 0.01 + torch.rand(*shape, 2)], dim=-1)


def test_pairwise_is_every_pair() -> None:
    a, b = random_corners(2, 5), random_corners(2, 7)
    table = geometry.pairwise_iou(a, b)
    assert table.shape == (2, 5, 7)
    for image in range(2):
        for i in range(5):
            torch.testing.assert_close(table[image, i], geometry.paired_iou(a[image, i].expand(7, 4), b[image]))


def test_coverage_is_the_share_of_the_first() -> None:
    small = torch.tensor([[2.0, 2.0, 4.0, 4.0], [8.0, 0.0, 12.0, 2.0]])
    large = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    torch.testing.assert_close(geometry.pairwise_coverage(small, large), torch.tensor([[1.0], [0.5]]))
    torch.testing.assert_close(geometry.pairwise_coverage(large, small), torch.tensor([[0.04, 0.04]]))
    assert geometry.pairwise_coverage(small, large[:0]).shape == (2, 0)


CONVERSIONS: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
    (geometry.cxcywh_to_xyxy, geometry.xyxy_to_cxcywh),
    (geometry.xywh_to_xyxy, geometry.xyxy_to_xywh),
]


@pytest.mark.parametrize(("there", "back"), CONVERSIONS)
def test_conversions_come_back(there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
    boxes = torch.rand(3, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(back(there(boxes)), boxes, atol=1e-12, rtol=0)


def test_conversions_of_one_box_by_hand() -> None:
    expected = torch.tensor([2.0, 3.0, 8.0, 13.0])
    assert torch.equal(geometry.cxcywh_to_xyxy(torch.tensor([5.0, 8.0, 6.0, 10.0])), expected)
    assert torch.equal(geometry.xywh_to_xyxy(torch.tensor([2.0, 3.0, 6.0, 10.0])), expected)
    assert torch.equal(geometry.xyxy_to_cxcywh(expected), torch.tensor([5.0, 8.0, 6.0, 10.0]))
    assert torch.equal(geometry.xyxy_to_xywh(expected), torch.tensor([2.0, 3.0, 6.0, 10.0]))


DEGENERATE = {
    "points": ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]),
    "two points": ([0.2, 0.2, 0.2, 0.2], [0.5, 0.7, 0.5, 0.7]),
    "point inside": ([0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.8, 0.8]),
    "line inside": ([0.5, 0.3, 0.5, 0.6], [0.2, 0.2, 0.8, 0.8]),
    "lines across": ([0.5, 0.2, 0.5, 0.8], [0.2, 0.5, 0.8, 0.5]),
    "swapped corners": ([0.6, 0.6, 0.3, 0.3], [0.2, 0.2, 0.8, 0.8]),
    "tiny": ([0.5, 0.5, 0.5 + 1e-7, 0.5 + 1e-7], [0.2, 0.2, 0.2 + 1e-7, 0.2 + 1e-7]),
    "touching": ([0.2, 0.2, 0.5, 0.5], [0.5, 0.2, 0.8, 0.5]),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("measure", [geometry.paired_iou, geometry.paired_giou, geometry.pairwise_coverage])
def test_degenerate_boxes_stay_finite(measure: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    a, b = (torch.tensor([box], requires_grad=True) for box in DEGENERATE[name])
    value = measure(a, b)
    value.sum().backward()
    assert -1 <= value.item() <= 1
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


@pytest.mark.parametrize("target", [[0.5, 0.3, 0.5, 0.6], [0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.8, 0.8]])
def test_gradients_of_giou_stay_small_where_the_prediction_has_an_area(target: list[float]) -> None:
    """Annotations may be lines or points; the network's boxes never are."""
    predicted = torch.tensor([[0.45, 0.4, 0.452, 0.402]], requires_grad=True)
    geometry.paired_giou(predicted, torch.tensor([target])).sum().backward()
    assert predicted.grad is not None
    assert predicted.grad.abs().max() < 1e4


def test_giou_pulls_boxes_together_that_do_not_meet() -> None:
    """Where boxes do not overlap IoU says nothing; generalised IoU still falls with the distance."""
    box = torch.tensor([[0.7, 0.7, 0.9, 0.9]])
    near = torch.tensor([[0.5, 0.5, 0.6, 0.6]], requires_grad=True)
    far = torch.tensor([[0.0, 0.0, 0.1, 0.1]])
    assert geometry.paired_iou(near, box).item() == geometry.paired_iou(far, box).item() == 0
    assert geometry.paired_giou(near, box).item() > geometry.paired_giou(far, box).item() > -1
    geometry.paired_giou(near, box).sum().backward()
    assert near.grad is not None
    assert (near.grad[0, 2:] > 0).all()


def test_giou_equals_iou_of_boxes_that_fill_their_hull() -> None:
    a, b = torch.tensor([[0.0, 0.0, 1.0, 2.0]]), torch.tensor([[0.5, 0.0, 3.0, 2.0]])
    torch.testing.assert_close(geometry.paired_giou(a, b), geometry.paired_iou(a, b))
    torch.testing.assert_close(geometry.paired_giou(a, a), torch.ones(1))


def test_clip_cuts_at_the_border() -> None:
    boxes = torch.tensor([[-3.0, -2.0, 700.0, 500.0], [10.0, 20.0, 30.0, 40.0], [650.0, 10.0, 700.0, 20.0]])
    expected = torch.tensor([[0.0, 0.0, 640.0, 480.0], [10.0, 20.0, 30.0, 40.0], [640.0, 10.0, 640.0, 20.0]])
    clipped = geometry.clip(boxes, height=480.0, width=640.0)
    assert torch.equal(clipped, expected)
    assert geometry.area(clipped)[2] == 0


def test_boxes_around_points() -> None:
    points = torch.tensor([[[2.0, 10.0], [7.0, 3.0], [12.0, 23.0]]])
    assert torch.equal(geometry.points_to_xyxy(points), torch.tensor([[2.0, 3.0, 12.0, 23.0]]))


def test_points_turn_clockwise_as_an_image_is_seen() -> None:
    """The point to the right of the pivot goes below it, where y is larger."""
    moved = geometry.turned(torch.tensor([[3.0, 1.0], [1.0, 1.0]]), 90.0, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(moved, torch.tensor([[1.0, 3.0], [1.0, 1.0]]))


@pytest.mark.parametrize("degrees", [0.0, 30.0, 90.0, 117.0, -45.0])
def test_boxes_around_ellipses_equal_those_around_many_of_their_points(degrees: float) -> None:
    centre, radii = torch.tensor([10.0, 20.0], dtype=torch.float64), torch.tensor([5.0, 3.0], dtype=torch.float64)
    angle = torch.linspace(0, 2 * torch.pi, 10_000, dtype=torch.float64)
    line = centre + radii * torch.stack([angle.cos(), angle.sin()], dim=-1)
    expected = geometry.points_to_xyxy(geometry.turned(line, degrees, centre))
    torch.testing.assert_close(geometry.ellipse_to_xyxy(centre, radii, degrees), expected, atol=1e-5, rtol=0)
