"""What is fitted to images where queries of METR have no exact counterpart."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion_cases import NAMES, alike, random_images, stirred, texts
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from metr.conversion.classifier import Linear, layer_classifier, least_squares, name_tokens
from metr.conversion.export import transfer
from metr.conversion.image_fits import ImageFits, can_fit, fit_to_images, normed_start
from metr.conversion.targets import find_target
from metr.conversion.transfer import trainer_result
from metr.conversion.transfer import transfer as transfer_folder
from metr.evaluation.runner import evaluate
from metr.model import METR
from metr.models.config import SimilarityConfig
from metr.models.detector import Detector
from metr.models.proposals import anchor_boxes

NANO = Path(__file__).resolve().parents[2] / "checkpoints" / "metr-nano"


def by_name(**changes: object) -> Detector:
    """A network whose queries contain their place, their name and their rank."""
    config = alike("rt_detr")
    queries = config.queries.model_copy(update={"content": "place"})
    return stirred(config.model_copy(update={"queries": queries, **changes}))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for seed in range(6):
        images = random_images(seed=seed, width=64)
        yield images, torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.bool)


def test_rows_count_by_their_weights() -> None:
    """Against numpy, whose rows are scaled by the roots of the weights."""
    inputs, wanted, weights = torch.randn(60, 5), torch.randn(60, 3), torch.rand(60) + 0.1
    found = least_squares(inputs, wanted, weights)
    rows, root = np.c_[inputs.numpy(), np.ones(60)], weights.sqrt().numpy()[:, None]
    expected = np.linalg.lstsq(rows * root, wanted.numpy() * root, rcond=None)[0]
    np.testing.assert_allclose(found.weight.numpy(), expected[:-1].T, atol=2e-3)
    np.testing.assert_allclose(found.bias.numpy(), expected[-1], atol=2e-3)


@torch.no_grad()
def places(network: Detector) -> tuple[Tensor, Tensor]:
    """Tokens of the memory, and the features of these places."""
    memory = network.encode(*next(batches()))
    _, usable = anchor_boxes(memory)
    return memory.tokens[usable], network.proposals.features(memory, usable)[usable]


@torch.no_grad()
def test_contents_with_the_direction_of_features_are_met_exactly() -> None:
    network = by_name()
    tokens, features = places(network)
    content = Linear(weight=1.7 * torch.eye(32), bias=torch.randn(32))
    start = normed_start(network, ImageFits(features=features, content=content, heads=(), images=1))
    normed = torch.nn.functional.layer_norm(start.layer(tokens), (32,), start.scale, start.shift)
    torch.testing.assert_close(normed, content(features), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(start.back(normed), features, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_other_contents_keep_their_direction() -> None:
    network = by_name()
    tokens, features = places(network)
    content = Linear(weight=torch.randn(32, 32) / 6 + torch.eye(32), bias=torch.randn(32))
    start = normed_start(network, ImageFits(features=features, content=content, heads=(), images=1))
    normed = torch.nn.functional.layer_norm(start.layer(tokens), (32,), start.scale, start.shift)
    constant = content(network.proposals.norm.bias)
    found, wanted = normed - constant, content(features) - constant
    assert torch.cosine_similarity(found, wanted, dim=1).min() > 0.9
    lengths = found.norm(dim=1) / wanted.norm(dim=1)
    assert lengths.std() / lengths.mean() < 0.15


@torch.no_grad()
def test_linear_heads_are_found() -> None:
    """A METR whose heads are linear already has them found again, whatever its queries contain."""
    decoder = alike("rt_detr").decoder.model_copy(update={"predictors": "layer"})
    network = by_name(similarity=SimilarityConfig(form="classifier"), decoder=decoder)
    fits = fit_to_images(network, texts(), batches)
    assert fits.images == 12
    assert len(fits.heads) == 2
    for layer, head in enumerate(fits.heads):
        exact = layer_classifier(network, texts(), name_tokens(network, texts()), layer)
        features = torch.nn.functional.layer_norm(torch.randn(200, 32), (32,))
        found, wanted = head(features), exact(features)
        assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("target", ["rt_detr", "d_fine", "deimv2"])
@torch.no_grad()
def test_every_tensor_has_a_place(target: str) -> None:
    """What was fitted goes where the detector reads it, and the detector answers with it."""
    config = alike(target)
    network = stirred(config.model_copy(update={"queries": config.queries.model_copy(update={"content": "place"})}))
    assert can_fit(network.config)
    fits = fit_to_images(network, texts(), batches)
    found = find_target(target)
    done = transfer(found, network, NAMES, texts(), fits=fits)
    parts = {moved.key for moved in done.report.reshaped if moved.how == "fitted to 12 images"}
    layers = {f"model.decoder.class_embed.{n}.{part}" for n in range(2) for part in ("weight", "bias")}
    heads = {f"model.enc_{part}" for part in ("score_head.weight", "score_head.bias")}
    starts = {f"model.enc_output.{n}.{part}" for n in range(2) for part in ("weight", "bias")}
    boxes = {f"model.enc_bbox_head.layers.0.{part}" for part in ("weight", "bias")}
    assert parts == layers | heads | starts | boxes
    torch.testing.assert_close(done.model.model.enc_output[1].bias, fits.content(network.proposals.norm.bias))
    answer = done.model(pixel_values=random_images(width=64))
    assert answer.logits.isfinite().all()


def test_a_metr_by_place_needs_none() -> None:
    config = alike("rt_detr")
    queries = config.queries.model_copy(update={"layout": "places", "content": "place_only"})
    assert not can_fit(config.model_copy(update={"queries": queries}))


@pytest.mark.slow
def test_a_fitted_detector_finds_what_the_shipped_metr_finds(shared: Path, tmp_path: Path) -> None:
    data = str(shared / "data" / "chess_pieces")
    model = METR.from_pretrained(NANO, device="cpu")
    own = evaluate(model, data, device="cpu").datasets[0].own.coco.ap
    found = {}
    for way, names in (("fitted", data), ("not", list(model.vocabulary.datasets["chess_pieces"]))):
        transfer_folder(model, "rt_detr", tmp_path / way, names=names, steps=0)
        detector = AutoModelForObjectDetection.from_pretrained(tmp_path / way)
        found[way] = trainer_result(data, detector, AutoImageProcessor.from_pretrained(tmp_path / way)).ap
    assert found["fitted"] > 0.7 * own, (found, own)
    assert found["fitted"] > found["not"] + 10
