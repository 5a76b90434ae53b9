"""Attention against PyTorch's own module with the same weights."""

import math

import pytest
import torch
from torch import Tensor, nn

from metr.layers.attention import Attention, ConditionalAttention, PlacedSelfAttention

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


PLACED_WIDTH, PLACED_HEADS = 16, 4


def stirred(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def inputs(*numbers: int) -> list[Tensor]:
    return [torch.randn(2, number, PLACED_WIDTH) for number in numbers]


def weighted(scores: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ values


@torch.no_grad()
def test_self_attention_adds_projected_positions() -> None:
    attention = stirred(PlacedSelfAttention(PLACED_WIDTH, PLACED_HEADS))
    content, position = inputs(5, 5)
    allowed = torch.rand(2, 5, 5) < 0.6
    allowed |= torch.eye(5, dtype=torch.bool)
    query = attention.query_content(content) + attention.query_position(position)
    key = attention.key_content(content) + attention.key_position(position)
    size, heads = PLACED_WIDTH // PLACED_HEADS, []
    for head in range(PLACED_HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = query[..., part] @ key[..., part].mT / math.sqrt(size)
        heads.append(weighted(scores, attention.value(content)[..., part], allowed))
    expected = attention.out(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(content, position, allowed), expected, atol=1e-5, rtol=1e-5)
    everyone = torch.ones(2, 5, 5, dtype=torch.bool)
    torch.testing.assert_close(attention(content, position), attention(content, position, everyone))


@pytest.mark.parametrize("joins", [True, False])
@torch.no_grad()
def test_cross_attention_adds_what_content_and_place_say(joins: bool) -> None:
    """Each head's score is content . content + place . place; a first layer's content knows the position as well."""
    attention = stirred(ConditionalAttention(PLACED_WIDTH, PLACED_HEADS, joins_position=joins))
    content, position, place, tokens, places = inputs(5, 5, 5, 7, 7)
    allowed = torch.rand(2, 1, 7) < 0.6
    allowed[..., 0] = True
    query, key = attention.query_content(content), attention.key_content(tokens)
    if joins:
        query, key = query + attention.query_position(position), key + attention.key_place(places)
    size, heads = PLACED_WIDTH // PLACED_HEADS, []
    for head in range(PLACED_HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = query[..., part] @ key[..., part].mT
        scores = scores + attention.query_place(place)[..., part] @ attention.key_place(places)[..., part].mT
        heads.append(weighted(scores / math.sqrt(2 * size), attention.value(tokens)[..., part], allowed))
    expected = attention.out(torch.cat(heads, dim=-1))
    answer = attention(content, position, place, tokens, places, allowed)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_new_layer_looks_where_its_query_is() -> None:
    """Content apart, the nearest token has the highest score in every head's sum."""
    from metr.layers.position_encoding import box_encoding

    attention = ConditionalAttention(PLACED_WIDTH, PLACED_HEADS, joins_position=False)
    points = torch.rand(1, 6, 2)
    places = box_encoding(torch.cat([points, points], dim=-1), PLACED_WIDTH)[..., :PLACED_WIDTH]
    scores = attention.query_place(places) @ attention.key_place(places).mT
    assert torch.equal(scores[0].argmax(-1), torch.arange(6))
