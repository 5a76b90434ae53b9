"""Sine encodings of places and boxes. Sines and cosines alternate, frequency by frequency (DINO's layout)."""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def sine_encoding(values: Float[Tensor, "*n"], size: int, temperature: float) -> Float[Tensor, "*n c"]:
    """`size` numbers for each value (in radians): its sine and cosine at size / 2 decreasing frequencies.

    Number i encodes the value / temperature^(2 floor(i / 2) / size), as in Attention Is All You Need.
    """
    index = torch.arange(size, device=values.device, dtype=torch.float32)
    divisor = temperature ** (2 * (index // 2) / size)
    angles = values.float().unsqueeze(-1) / divisor
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


def grid_encoding(
    padding_mask: Bool[Tensor, "b h w"], width: int, temperature: float = 20.0, *, first: float = 1.0
) -> Float[Tensor, "b h w d"]:
    """The encoded place of each cell in its image: y, then x.

    Cells that are not padding are counted along each axis, from `first` on (1 in DINO; 0.5, the cell's centre, in
    Deformable DETR). The count is divided by the number of cells and multiplied by 2 pi, so padding changes nothing.
    """
    inside = (~padding_mask).float()
    halves = []
    for axis in (1, 2):
        count = inside.cumsum(axis)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        scaled = (count + (first - 1)) / (last + 1e-6) * (2 * math.pi)
        halves.append(sine_encoding(scaled, width // 2, temperature))
    return torch.cat(halves, dim=-1)


def counted_encoding(padding_mask: Bool[Tensor, "b h w"], width: int) -> Float[Tensor, "b h w d"]:
    """Rows and columns counted from 0, not scaled (RT-DETR): sines of y, cosines of y, sines of x, cosines of x."""
    images, height, columns = padding_mask.shape  # len() would tie an exported network to one batch size
    y, x = (torch.arange(n, device=padding_mask.device, dtype=torch.float32) for n in (height, columns))
    rows, places = (
        rearrange(sine_encoding(axis, width // 2, 10_000.0), "n (c two) -> n (two c)", two=2) for axis in (y, x)
    )
    grid = torch.cat([rows[:, None].expand(-1, columns, -1), places[None].expand(height, -1, -1)], dim=-1)
    return grid.expand(images, -1, -1, -1)


def box_encoding(boxes: Float[Tensor, "*n 4"], width: int) -> Float[Tensor, "*n c"]:
    """The encoding of cxcywh boxes in 0..1: y, x, w, h with width / 2 numbers each (DAB-DETR, DINO)."""
    x, y, w, h = (boxes * (2 * math.pi)).unbind(-1)
    return torch.cat([sine_encoding(part, width // 2, 10_000.0) for part in (y, x, w, h)], dim=-1)
