"""Category extraction and class-specific queries, written out once more."""

import pytest
import torch

from metr.models.category_extraction import CategoryExtraction
from metr.models.config import CategoryConfig, QueryConfig
from metr.models.encoders.pyramid import flatten
from metr.models.proposals import ClassQueries
from metr.structures import Categories, Memory, Proposals

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
