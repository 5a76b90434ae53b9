"""Attention against PyTorch's own module with the same weights."""

import torch
from torch import Tensor, nn

from metr.layers.attention import Attention

WIDTH, HEADS = 24, 4


def both() -> tuple[Attention, nn.MultiheadAttention]:
    """The two modules with the same random weights."""
    ours, theirs = Attention(WIDTH, HEADS), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        for index, linear in enumerate((ours.query, ours.key, ours.value)):
            linear.weight.copy_(theirs.in_proj_weight.chunk(3)[index])
            linear.bias.copy_(theirs.in_proj_bias.chunk(3)[index])
        ours.out.load_state_dict(theirs.out_proj.state_dict())
    return ours, theirs


def tokens(queries: int = 5, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(2, n, WIDTH, requires_grad=True) for n in (queries, keys, keys))
    return query, key, value


def same(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Answers and their gradients agree."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_equals_pytorchs_without_a_mask() -> None:
    ours, theirs = both()
    inputs = tokens()
    same(ours(*inputs), theirs(*inputs)[0], inputs)


def test_equals_pytorchs_with_padded_keys() -> None:
    ours, theirs = both()
    inputs = tokens()
    padded = torch.zeros(2, 7, dtype=torch.bool)
    padded[0, 5:], padded[1, 2:] = True, True
    same(ours(*inputs, ~padded.unsqueeze(1)), theirs(*inputs, key_padding_mask=padded)[0], inputs)


def test_equals_pytorchs_with_a_mask_of_its_own_for_every_query() -> None:
    ours, theirs = both()
    inputs = tokens()
    allowed = torch.rand(2, 5, 7) > 0.5
    allowed[..., 0] = True
    forbidden = (~allowed).repeat_interleave(HEADS, dim=0)
    same(ours(*inputs, allowed), theirs(*inputs, attn_mask=forbidden)[0], inputs)


def test_a_query_that_may_look_at_nothing_gathers_nothing() -> None:
    ours, _ = both()
    inputs = tokens()
    allowed = torch.ones(2, 5, 7, dtype=torch.bool)
    allowed[1, 3] = False
    gathered = ours(*inputs, allowed)
    torch.testing.assert_close(gathered[1, 3], ours.out.bias)
    gathered.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in inputs)


def test_groups_do_not_hear_each_other() -> None:
    ours, _ = both()
    query, _, _ = tokens(6, 6)
    group = torch.tensor([0, 0, 1, 1, 1, 2])
    allowed = (group.unsqueeze(0) == group.unsqueeze(1)).expand(2, -1, -1)
    whole = ours(query, query, query, allowed)
    for number in range(3):
        alone = query[:, group == number]
        torch.testing.assert_close(whole[:, group == number], ours(alone, alone, alone), atol=1e-6, rtol=1e-5)


def test_low_precision_stays_close() -> None:
    ours, _ = both()
    inputs = tokens()
    exact = ours(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = ours(*inputs)
    assert (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()
