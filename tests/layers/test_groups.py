"""Attention group by group gives what attention with a mask gives, and so do its gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from metr.layers.attention import Attention, PlacedSelfAttention
from metr.layers.groups import QueryGroups, query_groups

WIDTH, HEADS = 24, 4


def uniform(images: int) -> Tensor:
    """Twenty groups of three."""
    return torch.arange(60).div(3, rounding_mode="floor").expand(images, -1)


def ragged(images: int) -> Tensor:
    """Groups of 1 to 60 in any order, others in each image; the largest one is that of queries that are none."""
    rows = [torch.cat([torch.full((60,), -1), torch.randint(0, 40, (160,), dtype=torch.int64)]) for _ in range(images)]
    return torch.stack([row[torch.randperm(len(row))] for row in rows])


@pytest.mark.parametrize("make", [uniform, ragged])
def test_it_equals_a_mask(make: object) -> None:
    torch.manual_seed(0)
    groups = query_groups(make(3))  # type: ignore[operator]
    assert groups.layout is not None
    masked = replace(groups, layout=None)
    content, position, direction = (torch.randn(3, groups.numbers.shape[1], WIDTH) for _ in range(3))
    for attention in (Attention(WIDTH, HEADS), PlacedSelfAttention(WIDTH, HEADS)):
        leaves = [content.clone().requires_grad_(), position.clone().requires_grad_()]

        def call(how: QueryGroups) -> Tensor:
            if isinstance(attention, Attention):  # noqa: B023
                return attention(leaves[0] + leaves[1], leaves[1], leaves[0], how)  # type: ignore[no-any-return]  # noqa: B023
            return attention(*leaves, how)  # type: ignore[no-any-return]  # noqa: B023

        answers = [call(how) for how in (groups, masked)]
        torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-4)
        wanted = [*leaves, *(one for one in attention.parameters() if one.requires_grad)]
        for one, other in zip(*(torch.autograd.grad(each, wanted, direction) for each in answers), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(call(groups).float(), answers[0], atol=0.05, rtol=0.05)


def test_a_layout_has_each_query_once() -> None:
    torch.manual_seed(1)
    groups = query_groups(ragged(4))
    assert groups.layout is not None
    assert len(groups.layout.rows) >= 2
    flat = torch.cat([rows.queries.flatten() for rows in groups.layout.rows])
    assert torch.equal(flat[groups.layout.cells], torch.arange(groups.numbers.numel()))
    numbers = groups.numbers.flatten()
    for rows in groups.layout.rows:
        kept, image = rows.bias[:, 0, 0] == 0, rows.queries // groups.numbers.shape[1]
        for row, inside, where in zip(rows.queries, kept, image, strict=True):
            assert len({(int(n), int(i)) for n, i in zip(numbers[row[inside]], where[inside], strict=True)}) == 1


def test_a_mask_is_used_where_groups_save_nothing() -> None:
    assert query_groups(torch.zeros(2, 30, dtype=torch.int64)).layout is None
    assert query_groups(torch.zeros(2, 0, dtype=torch.int64)).layout is None
    assert query_groups(torch.arange(30, device="meta").expand(2, -1)).layout is None
    assert query_groups(torch.arange(30).expand(2, -1)).layout is not None
    assert query_groups(uniform(2)).mask.sum() == 2 * 60 * 3
