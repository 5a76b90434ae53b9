"""Heads against their formulas."""

import math

import pytest
import torch

from metr.models.config import SimilarityConfig
from metr.models.heads import BoxHead, SimilarityHead, box_logits, similarity_tokens
from metr.structures import Categories


def test_similarity_is_a_scaled_product_plus_a_bias() -> None:
    head = SimilarityHead(16, prior=0.02)
    features, text = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    logits = head(features, text)
    for image in range(3):
        for row in range(5):
            product = head.feature(features[image, row]) @ text[image, row]
            torch.testing.assert_close(logits[image, row], product / 4 + head.bias[0])


def test_similarity_of_one_vocabulary_with_many_images() -> None:
    head = SimilarityHead(16, prior=0.02)
    features, text = torch.randn(3, 5, 16), torch.randn(5, 16)
    torch.testing.assert_close(head(features, text), head(features, text.expand(3, 5, 16)))


@pytest.mark.parametrize("prior", [0.01, 0.3])
def test_similarity_starts_at_its_prior(prior: float) -> None:
    head = SimilarityHead(16, prior)
    logit = head(torch.randn(4, 16), torch.zeros(4, 16))
    torch.testing.assert_close(logit.sigmoid(), torch.full((4,), prior))


def test_boxes_start_by_not_moving() -> None:
    boxes = torch.rand(7, 4) * 0.9 + 0.05
    torch.testing.assert_close(BoxHead(8)(torch.randn(7, 8), box_logits(boxes)), boxes)


def test_boxes_move_in_logit_space() -> None:
    head = BoxHead(8)
    with torch.no_grad():
        head.change.last.bias.copy_(torch.tensor([1.0, -1.0, 0.5, 0.0]))
    start = torch.tensor([[0.2, 0.5, 0.1, 0.4]])
    moved = head(torch.randn(1, 8), box_logits(start))[0]
    for value, change, found in zip((0.2, 0.5, 0.1, 0.4), (1.0, -1.0, 0.5, 0.0), moved.tolist(), strict=True):
        assert found == pytest.approx(1 / (1 + math.exp(-(math.log(value / (1 - value)) + change))), abs=1e-6)


def test_boxes_move_by_their_sides() -> None:
    head = BoxHead(8, "reparametrised")
    start = torch.tensor([[0.2, 0.5, 0.1, 0.4]])
    assert torch.equal(head.start(start), start)
    assert torch.equal(head(torch.randn(1, 8), start), start)
    with torch.no_grad():
        head.change.last.bias.copy_(torch.tensor([1.0, -1.0, 0.5, 0.0]))
    wanted = torch.tensor([[0.2 + 0.1, 0.5 - 0.4, 0.1 * math.exp(0.5), 0.4]])
    torch.testing.assert_close(head(torch.randn(1, 8), start), wanted)


def test_boxes_are_float32_and_finite_wherever_they_start() -> None:
    features = torch.randn(2, 8).bfloat16()
    boxes = BoxHead(8).bfloat16()(features, torch.tensor([[torch.inf] * 4, [-torch.inf] * 4]))
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, torch.tensor([[1.0] * 4, [0.0] * 4]))


def test_box_logits_invert_the_sigmoid() -> None:
    boxes = torch.rand(20, 4) * 0.99 + 0.005
    torch.testing.assert_close(box_logits(boxes).sigmoid(), boxes)


def test_box_logits_stay_inside_their_margin() -> None:
    outside = torch.tensor([[-0.5, 0.0, 1.0, 1.5]])
    edge = math.log(1e-3)
    torch.testing.assert_close(box_logits(outside), torch.tensor([[edge, edge, -edge, -edge]]))


def test_factor_and_objectness_of_an_similarity() -> None:
    plain, sure = SimilarityHead(16, 0.02), SimilarityHead(16, 0.02, SimilarityConfig(factor=4, objectness=True))
    sure.load_state_dict(plain.state_dict(), strict=False)
    features, tokens = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    assert plain.objectness is None
    assert sure.objectness is not None
    similarity = plain(features, tokens) - plain.bias
    torch.testing.assert_close(
        sure(features, tokens), 4 * similarity + features @ sure.objectness.weight[0] + sure.bias
    )


def test_an_similarity_starts_as_it_would_without_its_factor() -> None:
    features, tokens = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    heads = []
    for factor in (1.0, 4.0):
        torch.manual_seed(1)
        heads.append(SimilarityHead(16, 0.02, SimilarityConfig(factor=factor)))
    torch.testing.assert_close(heads[0](features, tokens), heads[1](features, tokens))


def test_what_slots_are_compared_with() -> None:
    tokens, text = torch.randn(2, 4, 16), torch.randn(9, 16)
    shortlist = torch.tensor([[0, 2, 5, 8], [1, 2, 3, 4]])
    categories = Categories(
        presence_logits=torch.zeros(1, 2, 9),
        text=text,
        tokens=tokens,
        ids=torch.tensor([[2, 8], [4, 0]]),
        valid=torch.tensor([[True, True], [True, False]]),
        shortlist=shortlist,
    )
    refined = similarity_tokens(categories, SimilarityConfig())
    torch.testing.assert_close(refined[0], tokens[0, [1, 3]])
    torch.testing.assert_close(refined[1, 0], tokens[1, 3])
    unrefined = similarity_tokens(categories, SimilarityConfig(token="text"))
    torch.testing.assert_close(unrefined[0], text[[2, 8]])
    torch.testing.assert_close(unrefined[1, 0], text[4])
