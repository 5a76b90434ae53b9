"""Sine encodings against transformers' and against numbers computed by hand."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrSinePositionEmbedding

from metr.layers.position_encoding import box_encoding, grid_encoding, sine_encoding


def by_hand(value: float, size: int, temperature: float) -> list[float]:
    """Pairs (sin, cos) of the value, each pair at the frequency of its own."""
    numbers = []
    for pair in range(size // 2):
        angle = value / temperature ** (2 * pair / size)
        numbers += [math.sin(angle), math.cos(angle)]
    return numbers


@pytest.mark.parametrize(("size", "temperature"), [(2, 20.0), (6, 20.0), (8, 10_000.0)])
def test_numbers_of_a_value(size: int, temperature: float) -> None:
    values = [0.0, 0.3, 2.0, -5.0]
    expected = torch.tensor([by_hand(value, size, temperature) for value in values])
    encoded = sine_encoding(torch.tensor(values), size, temperature)
    assert encoded.shape == (4, size)
    torch.testing.assert_close(encoded, expected, atol=1e-6, rtol=0)


def mask() -> Tensor:
    """Two images padded to 6 x 8: one whole, one of 4 x 5 cells."""
    padded = torch.zeros(2, 6, 8, dtype=torch.bool)
    padded[1, 4:], padded[1, :, 5:] = True, True
    return padded


@pytest.mark.parametrize("temperature", [20.0, 10_000.0])
def test_grid_equals_transformers_but_for_their_half_cell(temperature: float) -> None:
    """They count cells from 0.5, we from 1 as DINO does: counts shifted by half a cell give the same numbers."""
    theirs = DeformableDetrSinePositionEmbedding(8, temperature=int(temperature), normalize=False)
    inside = ~mask()
    raw = theirs(torch.Size([2, 16, 6, 8]), torch.device("cpu"), torch.float32, mask=inside)
    # without normalisation theirs are the bare counts: ours are those of counts / last * 2 pi
    rows, columns = inside.cumsum(1).float(), inside.cumsum(2).float()
    counted = torch.cat([sine_encoding(part, 8, temperature) for part in (rows, columns)], dim=-1)
    torch.testing.assert_close(counted.permute(0, 3, 1, 2), raw, atol=1e-5, rtol=0)

    normalised = DeformableDetrSinePositionEmbedding(8, temperature=int(temperature), normalize=True)
    expected = normalised(torch.Size([2, 16, 6, 8]), torch.device("cpu"), torch.float32, mask=inside)
    shifted = []
    for axis, count in ((1, rows), (2, columns)):
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        shifted.append(sine_encoding((count - 0.5) / (last + 1e-6) * 2 * math.pi, 8, temperature))
    torch.testing.assert_close(torch.cat(shifted, dim=-1).permute(0, 3, 1, 2), expected, atol=1e-5, rtol=0)


def test_grid_by_hand() -> None:
    encoded = grid_encoding(mask(), 12, 20.0)
    assert encoded.shape == (2, 6, 8, 12)
    for image, height, width in ((0, 6, 8), (1, 4, 5)):
        for row, column in ((0, 0), (2, 4), (height - 1, width - 1)):
            y, x = (row + 1) / height * 2 * math.pi, (column + 1) / width * 2 * math.pi
            expected = torch.tensor(by_hand(y, 6, 20.0) + by_hand(x, 6, 20.0))
            torch.testing.assert_close(encoded[image, row, column], expected, atol=1e-5, rtol=0)


def test_padding_changes_nothing_inside() -> None:
    alone = grid_encoding(torch.zeros(1, 4, 5, dtype=torch.bool), 16)
    torch.testing.assert_close(grid_encoding(mask(), 16)[1:, :4, :5], alone)


def test_padding_alone_stays_finite() -> None:
    assert grid_encoding(torch.ones(1, 4, 5, dtype=torch.bool), 16).isfinite().all()


def test_box_by_hand() -> None:
    """y, x, w, h in this order, width / 2 numbers each."""
    x, y, w, h = 0.2, 0.7, 0.1, 0.4
    encoded = box_encoding(torch.tensor([[x, y, w, h]]), 12)
    expected = [number for part in (y, x, w, h) for number in by_hand(2 * math.pi * part, 6, 10_000.0)]
    torch.testing.assert_close(encoded, torch.tensor([expected]), atol=1e-5, rtol=0)


def test_encodings_are_float32_whatever_comes_in() -> None:
    """In bfloat16 neighbouring cells of a fine level would get the same place."""
    assert box_encoding(torch.rand(3, 4), 8).dtype == torch.float32
    assert sine_encoding(torch.rand(3).bfloat16(), 8, 20.0).dtype == torch.float32
