"""Attention with content and place apart: against what it says in formulas, and who is looked at."""

import math

import pytest
import torch
from torch import Tensor, nn

from metr.layers.attention import ConditionalAttention, PlacedSelfAttention

WIDTH, HEADS = 16, 4


def stirred(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def inputs(*numbers: int) -> list[Tensor]:
    return [torch.randn(2, number, WIDTH) for number in numbers]


def weighted(scores: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ values


@torch.no_grad()
def test_self_attention_adds_projected_positions() -> None:
    attention = stirred(PlacedSelfAttention(WIDTH, HEADS))
    content, position = inputs(5, 5)
    allowed = torch.rand(2, 5, 5) < 0.6
    allowed |= torch.eye(5, dtype=torch.bool)
    query = attention.query_content(content) + attention.query_position(position)
    key = attention.key_content(content) + attention.key_position(position)
    size, heads = WIDTH // HEADS, []
    for head in range(HEADS):
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
    attention = stirred(ConditionalAttention(WIDTH, HEADS, joins_position=joins))
    content, position, place, tokens, places = inputs(5, 5, 5, 7, 7)
    allowed = torch.rand(2, 1, 7) < 0.6
    allowed[..., 0] = True
    query, key = attention.query_content(content), attention.key_content(tokens)
    if joins:
        query, key = query + attention.query_position(position), key + attention.key_place(places)
    size, heads = WIDTH // HEADS, []
    for head in range(HEADS):
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

    attention = ConditionalAttention(WIDTH, HEADS, joins_position=False)
    points = torch.rand(1, 6, 2)
    places = box_encoding(torch.cat([points, points], dim=-1), WIDTH)[..., :WIDTH]
    scores = attention.query_place(places) @ attention.key_place(places).mT
    assert torch.equal(scores[0].argmax(-1), torch.arange(6))
