"""Category extraction and class-specific queries, written out once more."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from metr.models.category_extraction import CategoryExtraction, decorrelate_names, whitening_projection
from metr.models.config import CategoryConfig, QueryConfig
from metr.models.encoders.pyramid import flatten
from metr.models.proposals import ClassQueries
from metr.structures import Categories, Memory, Proposals

from small import TEXT_WIDTH, small_detector

WIDTH, TEXT, WORDS = 16, 10, 5


def memory_of() -> Memory:
    mask = torch.zeros(2, 32, 48, dtype=torch.bool)
    mask[1, 20:] = True
    return flatten([torch.randn(2, WIDTH, 4, 6), torch.randn(2, WIDTH, 2, 3)], mask)


@pytest.mark.parametrize("self_attention", [False, True])
def test_every_block_looks_at_the_image_and_answers(self_attention: bool) -> None:
    config = CategoryConfig(blocks=3, heads=4, feed_forward=12, self_attention=self_attention)
    module, memory, text = CategoryExtraction(TEXT, WIDTH, config), memory_of(), torch.randn(WORDS, TEXT)
    found = module(memory, text)
    projected = module.norm(module.projection(text))
    torch.testing.assert_close(found.text, projected)
    for image in range(2):
        seen = memory.tokens[image : image + 1, ~memory.padding_mask[image]]
        tokens = projected.unsqueeze(0)
        for number, block in enumerate(module.blocks):
            if self_attention:
                tokens = block.among_norm(tokens + block.among(tokens, tokens, tokens))
            tokens = block.feed_forward(block.norm(tokens + block.attention(tokens, seen, seen)))
            product = (module.presence.feature(tokens[0]) * projected).sum(-1)
            expected = product / WIDTH**0.5 + module.presence.bias
            torch.testing.assert_close(found.presence_logits[number, image], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.tokens[image], tokens[0], atol=1e-5, rtol=1e-5)
    assert found.ids.tolist() == [list(range(WORDS))] * 2
    assert found.valid.all()


def queries_of(**values: str) -> tuple[ClassQueries, Proposals, torch.Tensor, Categories]:
    categories = Categories(
        presence_logits=torch.randn(1, 2, WORDS),
        text=torch.randn(WORDS, WIDTH),
        tokens=torch.randn(2, WORDS, WIDTH),
        ids=torch.tensor([[1, 3], [0, 4]]),
        valid=torch.ones(2, 2, dtype=torch.bool),
    )
    proposals = Proposals(
        logits=torch.randn(2, 3),
        boxes=torch.rand(2, 3, 4, requires_grad=True),
        place=torch.zeros(2, 3, dtype=torch.long),
        slot=torch.tensor([[0, 0, 1], [0, 1, 0]]),
        rank=torch.tensor([[0, 1, 0], [0, 0, 0]]),
        valid=torch.tensor([[True, True, True], [True, True, False]]),
    )
    module = ClassQueries(WIDTH, QueryConfig(number=6, ceiling=5, **values))
    return module, proposals, torch.randn(2, 3, WIDTH, requires_grad=True), categories


@pytest.mark.parametrize("content", ["learned", "place"])
def test_content_is_a_learned_query_by_rank_plus_the_refined_token(content: str) -> None:
    module, proposals, features, categories = queries_of(content=content)
    queries = module(proposals, features, categories)
    for image in range(2):
        for query in range(3):
            word = categories.ids[image, proposals.slot[image, query]]
            expected = module.learned.weight[proposals.rank[image, query]] + categories.tokens[image, word]
            if module.place is not None:
                expected = expected + module.place(features[image, query])
            torch.testing.assert_close(queries.content[image, query], expected, atol=1e-6, rtol=1e-5)
    assert (module.place is not None) == (content == "place")


def test_nothing_flows_back_into_where_a_query_starts() -> None:
    module, proposals, features, categories = queries_of(content="place")
    queries = module(proposals, features, categories)
    assert torch.equal(queries.reference_boxes, proposals.boxes)
    assert not queries.reference_boxes.requires_grad
    assert torch.autograd.grad(queries.content.sum(), features, allow_unused=True) == (None,)


def test_a_query_hears_its_category_or_all_of_its_image() -> None:
    for attention, groups in (("group", [[0, 0, 1], [0, 1, -1]]), ("image", [[0, 0, 0], [0, 0, -1]])):
        module, proposals, features, categories = queries_of(attention=attention)
        assert module(proposals, features, categories).group.tolist() == groups


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


def largest_cosine(projection: nn.Linear, text: Tensor) -> float:
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
    likeness = largest_cosine(projection, new)
    assert likeness > 0.9
    decorrelate_names(projection, known, new)
    torch.testing.assert_close(projection(known), before, atol=1e-4, rtol=0)
    assert largest_cosine(projection, new) < likeness - 0.02
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
