"""New names are told apart, and the tokens of known ones stay."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from metr.models.category_extraction import decorrelate_names


def alike(projection: nn.Linear, text: Tensor) -> float:
    """The largest cosine of two tokens, as category extraction sees them."""
    tokens = normalize(layer_norm(projection(text), (projection.out_features,)), dim=-1)
    return (tokens @ tokens.T).fill_diagonal_(-1).max().item()


def names(count: int, spread: float, seed: int) -> Tensor:
    """Embeddings of one field: they all point one way, and differ a little."""
    generator = torch.Generator().manual_seed(seed)
    base, own = torch.randn(1, 48, generator=generator), torch.randn(count, 48, generator=generator)
    return normalize(base + spread * own, dim=-1)


@pytest.mark.trains
@pytest.mark.parametrize("count", [2, 9, 40])
def test_new_tokens_part_and_known_ones_stay(count: int) -> None:
    projection, known, new = nn.Linear(48, 24), names(12, 1.0, 0), names(count, 0.2, 1)
    before = projection(known)
    likeness = alike(projection, new)
    assert likeness > 0.9
    decorrelate_names(projection, known, new)
    torch.testing.assert_close(projection(known), before, atol=1e-4, rtol=0)
    assert alike(projection, new) < likeness - 0.02
    out = (projection(new) - projection(new).mean(0)).norm(dim=1).mean()
    usual = (before - before.mean(0)).norm(dim=1).mean()
    assert out < 1.5 * usual, "not further out than known names are"


def test_where_there_is_no_room_nothing_changes() -> None:
    many = normalize(torch.randn(60, 48), dim=-1)
    for known, new in ((many, names(5, 0.2, 1)), (many[:10], many[:1]), (many[:10], many[:4])):
        projection = nn.Linear(48, 24)
        weight, bias = projection.weight.clone(), projection.bias.clone()
        decorrelate_names(projection, known, new)
        torch.testing.assert_close(projection.weight, weight, atol=1e-5, rtol=0)
        torch.testing.assert_close(projection.bias, bias, atol=1e-5, rtol=0)
