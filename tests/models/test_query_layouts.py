"""Sharing the queries out among categories."""

import torch

from metr.models.config import QueryConfig
from metr.models.proposals import share_out, take_pairs


def counts(layout: str, best: torch.Tensor, valid: torch.Tensor, number: int, floor: int = 0) -> list[list[int]]:
    """How many queries each slot of each image gets."""
    config = QueryConfig(layout=layout, number=number, floor=floor, ceiling=best.shape[2])
    slot, _, taken = take_pairs(share_out(best, valid, config), number)
    return [[int((taken[b] & (slot[b] == k)).sum()) for k in range(best.shape[1])] for b in range(len(best))]


def falling(*tops: float, ranks: int = 10) -> torch.Tensor:
    """One image whose slots' logits fall by 1 a rank from these tops."""
    return torch.tensor(tops)[None, :, None] - torch.arange(ranks)


def test_uniform_gives_each_kept_category_the_same() -> None:
    best = falling(5.0, 0.0, -3.0)
    assert counts("uniform", best, torch.tensor([[True, True, True]]), 12) == [[4, 4, 4]]
    assert counts("uniform", best, torch.tensor([[True, False, True]]), 12) == [[6, 0, 6]]
    assert counts("uniform", best, torch.tensor([[True, False, False]]), 12) == [[10, 0, 0]]


def test_budget_follows_the_logits_above_the_floor() -> None:
    best = falling(5.0, 0.0, -3.0)
    assert counts("budget", best, torch.tensor([[True, True, True]]), 9) == [[7, 2, 0]]
    rows = counts("budget", best, torch.tensor([[True, True, True]]), 9, floor=1)[0]
    assert sum(rows) == 9
    assert min(rows) >= 1
    assert rows[0] > rows[1] >= rows[2]


def test_budget_too_small_for_every_floor_is_shared_evenly() -> None:
    best = falling(5.0, 0.0, -3.0)
    assert counts("budget", best, torch.tensor([[True, True, True]]), 6, floor=4) == [[2, 2, 2]]


def test_budget_equals_brute_force() -> None:
    best = torch.randn(4, 5, 8).sort(dim=-1, descending=True).values
    valid = torch.rand(4, 5) > 0.3
    valid[:, 0] = True
    config = QueryConfig(layout="budget", number=17, floor=2, ceiling=8)
    slot, rank, taken = take_pairs(share_out(best, valid, config), 17)
    for b in range(4):
        pairs = [(k, c) for k in range(5) for c in range(8) if valid[b, k]]
        pairs.sort(key=lambda p: (p[1] >= 2, p[1] if p[1] < 2 else 0, -float(best[b, p[0], p[1]])))
        expected = set(pairs[:17])
        found = {(int(k), int(c)) for k, c, t in zip(slot[b], rank[b], taken[b], strict=True) if t}
        floors = {(k, c) for k, c in expected if c < 2}
        assert floors <= found
        assert len(found) == len(expected)
        assert {p for p in found if p[1] >= 2} == {p for p in expected if p[1] >= 2}


def test_unusable_places_are_never_taken() -> None:
    best = falling(5.0, 0.0)
    best[:, :, 3:] = -torch.inf
    for layout in ("budget", "uniform"):
        assert counts(layout, best, torch.tensor([[True, True]]), 12) == [[3, 3]]
