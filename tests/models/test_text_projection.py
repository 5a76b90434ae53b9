"""The projection's whitened start: names that were nearly one are told apart, and new names keep their likeness."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from metr.models.category_extraction import whitening_projection

from small import TEXT_WIDTH, small_detector


def cosines(vectors: Tensor) -> Tensor:
    unit = normalize(vectors, dim=-1)
    return (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]


def alike(names: int, width: int = 48) -> Tensor:
    """Embeddings in two fields, whose names differ by little."""
    fields = torch.randn(2, width)
    return normalize(fields[torch.arange(names) % 2] + 0.3 * torch.randn(names, width), dim=-1)


@pytest.mark.parametrize(("names", "width"), [(10, 32), (30, 32), (2, 8), (60, 16)])
def test_names_that_were_nearly_one_are_told_apart(names: int, width: int) -> None:
    text = alike(names)
    weight, bias = whitening_projection(text, width, 0.1)
    after = text @ weight.T + bias
    torch.testing.assert_close(after.mean(0), torch.zeros(width), rtol=0, atol=1e-4)
    if names > 2:  # two centred names are opposite
        assert cosines(after).quantile(0.95) < cosines(text).quantile(0.95) - 0.3


def test_without_ridge_every_direction_has_one_variance() -> None:
    text = alike(200, width=24)
    weight, bias = whitening_projection(text, 24, 0.0)
    after = text @ weight.T + bias
    torch.testing.assert_close(after.T @ after / 200, torch.eye(24), rtol=0, atol=1e-3)


def test_new_names_near_an_old_one_stay_near_it() -> None:
    text = alike(12)
    weight, bias = whitening_projection(text, 32, 0.1)
    new = normalize(text + 0.02 * torch.randn_like(text), dim=-1)
    near = normalize(new @ weight.T + bias, dim=-1) @ normalize(text @ weight.T + bias, dim=-1).T
    assert torch.equal(near.argmax(1), torch.arange(12))


def test_a_network_starts_with_it_and_learns_on() -> None:
    detector, text = small_detector(), alike(6, TEXT_WIDTH)
    extraction = detector.category_extraction
    before = cosines(extraction.project(text).tokens)
    extraction.whiten(text, 0.1)
    assert cosines(extraction.project(text).tokens).max() < before.max()
    assert extraction.projection.weight.requires_grad
