"""Heads for fixed names from a METR that compares with the text, by a factor and beside an objectness."""

import torch
from conversion_cases import alike, stir, stirred, texts

from metr.conversion.activation_statistics import ActivationStatistics
from metr.conversion.classifier import classifier, name_tokens, place_classifier
from metr.models.config import SimilarityConfig
from metr.models.heads import SimilarityHead

SIMILARITY = SimilarityConfig(token="text", factor=4, objectness=True)


@torch.no_grad()
def test_a_folded_head_keeps_objectness_whole() -> None:
    head, tokens = stir(SimilarityHead(16, 0.1, SIMILARITY)), torch.randn(3, 16)
    assert head.objectness is not None
    activation_statistics = ActivationStatistics(mean=torch.randn(16) * 0.5, deviation=torch.rand(16) + 0.5)
    given = classifier(head, tokens, activation_statistics)
    features = activation_statistics.mean + activation_statistics.deviation * torch.randn(20_000, 16)
    wanted = head(features.unsqueeze(1).expand(-1, 3, -1), tokens)
    with_one = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    best = torch.linalg.lstsq(with_one, wanted).solution
    assert ((given(features) - wanted).var(0) < 1.05 * (with_one @ best - wanted).var(0) + 1e-6).all()


@torch.no_grad()
def test_places_are_scored_as_the_proposals_score_them() -> None:
    config = alike("rt_detr").model_copy(update={"similarity": SIMILARITY})
    network = stirred(config)
    tokens = name_tokens(network, texts())
    torch.testing.assert_close(tokens, network.category_extraction.project(texts()).tokens)
    features = torch.randn(2, 7, config.width)
    wanted = network.proposals.scores(features, tokens.expand(2, -1, -1))
    torch.testing.assert_close(place_classifier(network, texts(), tokens)(features), wanted, atol=1e-4, rtol=1e-4)
