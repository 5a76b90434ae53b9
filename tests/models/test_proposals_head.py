"""Proposals: anchors against their formulas, choices against a sort of all pairs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from metr.models.config import QueryConfig, SimilarityConfig
from metr.models.encoders.pyramid import flatten
from metr.models.proposals import ProposalHead, anchor_logits, share_out, take_pairs
from metr.structures import Categories, Memory, Proposals

WIDTH, WORDS = 16, 6
SHAPES = ((8, 12), (4, 6), (2, 3))
LAYOUTS = ["budget", "uniform", "shared"]


def memory_of(batch: int = 2, shapes: tuple[tuple[int, int], ...] = SHAPES) -> Memory:
    """Random memory of images of 64 x 96 pixels; the second is 44 x 60 and padded."""
    mask = torch.zeros(batch, 64, 96, dtype=torch.bool)
    mask[1:, 44:], mask[1:, :, 60:] = True, True
    return flatten([torch.randn(batch, WIDTH, *shape) for shape in shapes], mask)


def categories_of(batch: int = 2, kept: int = 4) -> Categories:
    """Random tokens; the second image has one empty slot."""
    ids = torch.stack([torch.randperm(WORDS)[:kept].sort().values for _ in range(batch)])
    valid = torch.ones(batch, kept, dtype=torch.bool)
    valid[1:, -1] = False
    return Categories(
        presence_logits=torch.randn(2, batch, WORDS),
        text=torch.randn(WORDS, WIDTH),
        tokens=torch.randn(batch, WORDS, WIDTH),
        ids=ids.masked_fill(~valid, 0),
        valid=valid,
    )


def head_of(**values: Any) -> ProposalHead:
    similarity = values.pop("similarity", None)
    config = QueryConfig(**{"layout": "uniform", "number": 24, "floor": 2, "ceiling": 10} | values)
    head = ProposalHead(WIDTH, config, 0.01, WIDTH, similarity)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head


# Anchors


def test_anchors_follow_their_formulas() -> None:
    """Centre (index + 0.5) / valid cells; sides 0.05 * 2^level; unusable where padded or outside (0.01, 0.99)."""
    shapes = (*SHAPES, (1, 2), (1, 1), (1, 1))
    memory = memory_of(shapes=shapes)
    logits, usable = anchor_logits(memory)
    place = 0
    for level, (height, width) in enumerate(shapes):
        side = 0.05 * 2**level
        mask = memory.padding_mask[:, place : place + height * width].view(-1, height, width)
        for image in range(2):
            columns, rows = int((~mask[image, 0]).sum()), int((~mask[image, :, 0]).sum())
            for row in range(height):
                for column in range(width):
                    numbers = [(column + 0.5) / columns, (row + 0.5) / rows, side, side]
                    fits = not mask[image, row, column] and all(0.01 < number < 0.99 for number in numbers)
                    here = place + row * width + column
                    assert bool(usable[image, here]) == fits, (image, level, row, column)
                    if fits:
                        torch.testing.assert_close(logits[image, here].sigmoid(), torch.tensor(numbers))
                    else:
                        assert logits[image, here].isposinf().all()
        place += height * width
    assert not usable[:, -1].any()  # 0.05 * 2^5 is wider than the image


def test_centres_near_the_border_of_a_fine_level_are_unusable() -> None:
    memory = flatten([torch.randn(1, WIDTH, 2, 100)], torch.zeros(1, 16, 800, dtype=torch.bool))
    _, usable = anchor_logits(memory)
    assert usable.view(2, 100)[0].tolist() == [0.01 < (x + 0.5) / 100 < 0.99 for x in range(100)]


# Scores


def test_scores_equal_the_plain_linear_layer() -> None:
    head, memory, categories = head_of(), memory_of(), categories_of()
    features = head.features(memory, anchor_logits(memory)[1])
    found = head.scores(features, categories.tokens)
    projected = head.category(features)
    for word in range(WORDS):
        plain = (projected * categories.tokens[:, None, word]).sum(-1) / WIDTH**0.5 + head.bias
        torch.testing.assert_close(found[..., word], plain, atol=1e-5, rtol=1e-5)


def test_places_that_cannot_hold_a_box_know_nothing() -> None:
    head, memory = head_of(), memory_of()
    usable = anchor_logits(memory)[1]
    features = head.features(memory, usable)
    nothing = head.norm(head.feature.bias)
    assert (~usable).any()
    torch.testing.assert_close(features[~usable], nothing.expand(int((~usable).sum()), -1))
    torch.testing.assert_close(features[usable], head.norm(head.feature(memory.tokens))[usable])


# Choices


def all_scores(head: ProposalHead, memory: Memory, categories: Categories) -> tuple[Tensor, Tensor]:
    """The logit of every usable place for every word [b s v], and which are usable."""
    usable = anchor_logits(memory)[1]
    return head.scores(head.features(memory, usable), categories.tokens), usable


def orders(head: ProposalHead, memory: Memory, categories: Categories, image: int) -> list[list[tuple[float, int]]]:
    """The usable places of each slot, best first, by the scores that the layout ranks by."""
    scores, usable = all_scores(head, memory, categories)
    places = usable[image].nonzero().flatten().tolist()
    tables = []
    for word in categories.ids[image].tolist():
        judged = scores[image].amax(-1) if head.config.layout == "shared" else scores[image, :, word]
        tables.append(sorted(((judged[place].item(), place) for place in places), reverse=True))
    return tables


def expected_pairs(head: ProposalHead, memory: Memory, categories: Categories, image: int) -> set[tuple[int, int]]:
    """The (slot, place) pairs of one image, found by sorting."""
    config, tables = head.config, orders(head, memory, categories, image)
    slots = categories.valid[image].nonzero().flatten().tolist()
    if config.layout == "budget":
        ranked = [(slot, rank, logit, place) for slot in slots for rank, (logit, place) in enumerate(tables[slot])]
        ranked = [pair for pair in ranked if pair[1] < config.ceiling]
        ranked.sort(key=lambda pair: (pair[1] >= config.floor, -pair[2]))
        return {(slot, place) for slot, _, _, place in ranked[: config.number]}
    sharers = len(tables) if config.layout == "shared" else len(slots)
    share = min(config.number // sharers, config.ceiling)
    return {(slot, place) for slot in slots for _, place in tables[slot][:share]}


def pairs(proposals: Proposals, image: int) -> set[tuple[int, int]]:
    valid = proposals.valid[image]
    found = list(zip(proposals.slot[image, valid].tolist(), proposals.place[image, valid].tolist(), strict=True))
    assert len(found) == len(set(found)), "a place serves a category once"
    return set(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("number", "floor", "ceiling"), [(24, 2, 10), (24, 0, 24), (8, 2, 8), (400, 3, 200)])
@torch.no_grad()
def test_choices_equal_a_sort_of_all_pairs(layout: str, number: int, floor: int, ceiling: int) -> None:
    head = head_of(layout=layout, number=number, floor=floor, ceiling=ceiling)
    memory, categories = memory_of(), categories_of()
    proposals, _ = head(memory, categories)
    for image in range(2):
        assert pairs(proposals, image) == expected_pairs(head, memory, categories, image)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_answers_are_those_of_the_chosen_pairs(layout: str) -> None:
    head, memory, categories = head_of(layout=layout), memory_of(), categories_of()
    proposals, features = head(memory, categories)
    scores, usable = all_scores(head, memory, categories)
    anchors, known = anchor_logits(memory)[0], head.features(memory, usable)
    for image in range(2):
        tables = orders(head, memory, categories, image)
        for query in proposals.valid[image].nonzero().flatten().tolist():
            slot, place, rank = (int(x[image, query]) for x in (proposals.slot, proposals.place, proposals.rank))
            assert usable[image, place]
            assert tables[slot][rank][1] == place
            logit = scores[image, place, categories.ids[image, slot]]
            torch.testing.assert_close(proposals.logits[image, query], logit, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(features[image, query], known[image, place])
            box = (head.box.change(known[image, place]) + anchors[image, place]).sigmoid()
            torch.testing.assert_close(proposals.boxes[image, query], box)


@torch.no_grad()
def test_logits_are_scaled_similaritys_with_the_text_and_objectness() -> None:
    similarity = SimilarityConfig(token="text", factor=3, objectness=True)
    head, memory, categories = head_of(similarity=similarity), memory_of(), categories_of()
    assert head.objectness is not None
    proposals, features = head(memory, categories)
    text = categories.text[categories.ids.gather(1, proposals.slot)]
    expected = 3 / WIDTH**0.5 * (head.category(features) * text).sum(-1) + head.bias
    torch.testing.assert_close(proposals.logits, expected + features @ head.objectness.weight[0])
    _, usable = anchor_logits(memory)
    every = head.scores(head.features(memory, usable), categories.text[categories.ids])
    chosen = every.gather(1, proposals.place.unsqueeze(2).expand(-1, -1, every.shape[2]))
    chosen = chosen.gather(2, proposals.slot.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(proposals.logits[proposals.valid], chosen[proposals.valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_ranks_stay_below_the_ceiling_and_slots_are_valid(layout: str) -> None:
    head = head_of(layout=layout, number=60, ceiling=7)
    memory, categories = memory_of(), categories_of()
    proposals, _ = head(memory, categories)
    assert int(proposals.rank.max()) < 7
    assert proposals.slot.shape[1] <= 60
    assert categories.valid.gather(1, proposals.slot)[proposals.valid].all()
    # valid queries come first, ordered by slot and rank
    key = (proposals.slot * 7 + proposals.rank).masked_fill(~proposals.valid, 10**6)
    assert torch.equal(key, key.sort(dim=1).values)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_without_any_usable_place_no_query_is_valid_and_all_is_finite(layout: str) -> None:
    mask = torch.ones(1, 64, 96, dtype=torch.bool)
    mask[:, :1, :1] = False
    memory = flatten([torch.randn(1, WIDTH, 1, 1)] * 5 + [torch.randn(1, WIDTH, 1, 1)], mask)
    blind = Memory(
        tokens=memory.tokens,
        padding_mask=torch.ones_like(memory.padding_mask),
        level_shapes=memory.level_shapes,
        valid_ratios=memory.valid_ratios,
    )
    proposals, _ = head_of(layout=layout)(blind, categories_of(batch=1))
    assert not proposals.valid.any()
    assert proposals.boxes.isfinite().all()
    assert proposals.logits.isfinite().all()


def test_gradients_of_unusable_places_are_finite() -> None:
    head, memory, categories = head_of(number=400, ceiling=200), memory_of(), categories_of()
    proposals, _ = head(memory, categories)
    assert not proposals.valid.all()
    (proposals.boxes.sum() + proposals.logits.sum()).backward()
    gradients = [parameter.grad for parameter in head.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_sharing_out_does_not_depend_on_the_rest_of_the_batch() -> None:
    best = torch.randn(1, 3, 6).sort(dim=-1, descending=True).values
    valid = torch.ones(1, 3, dtype=torch.bool)
    config = QueryConfig(layout="budget", number=4, floor=2, ceiling=6)
    alone = take_pairs(share_out(best, valid, config), 4)
    beside = torch.cat([best, torch.full_like(best, 1e9)])
    together = take_pairs(share_out(beside, valid.expand(2, -1), config), 4)
    for ours, theirs in zip(alone, together, strict=True):
        assert torch.equal(ours[0], theirs[0])


def test_what_is_left_of_a_small_budget_goes_to_the_best() -> None:
    """Floors of 3 x 4 do not fit into 7: each has 2 places, and the likeliest category the one that is left."""
    for top in range(3):
        best = -torch.arange(4.0).expand(1, 3, 4).clone()
        best[0, top] += 5
        config = QueryConfig(layout="budget", number=7, floor=4, ceiling=4)
        slot, _, valid = take_pairs(share_out(best, torch.ones(1, 3, dtype=torch.bool), config), 7)
        assert valid.all()
        assert slot[0].bincount(minlength=3).tolist() == [3 if k == top else 2 for k in range(3)]


def test_fewer_queries_than_categories_go_to_the_best() -> None:
    best = torch.tensor([[[0.0], [3.0], [1.0], [2.0]]])
    for layout in ("uniform", "budget"):
        config = QueryConfig(layout=layout, number=2, floor=1, ceiling=1)
        slot, _, valid = take_pairs(share_out(best, torch.ones(1, 4, dtype=torch.bool), config), 2)
        assert valid.all()
        assert slot[0].tolist() == [1, 3], layout
