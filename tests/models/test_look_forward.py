"""Which layers' refinement the box loss of a layer teaches."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metr.errors import ConfigError
from metr.models.config import DecoderConfig, SimilarityConfig
from metr.models.decoder import LayeredDecoder
from metr.models.heads import BoxHead

from small import TEXT_WIDTH, small_config, small_detector, targets_of

WIDTH, LAYERS = 16, 4


def heads_of(look_forward: str, **options: Any) -> LayeredDecoder:
    """Norm and heads with random weights, the same for all that have the same options."""
    torch.manual_seed(2)
    config = DecoderConfig.checked({"layers": LAYERS, "look_forward": look_forward, **options})
    decoder = LayeredDecoder(WIDTH, WIDTH, config, 0.01, SimilarityConfig())
    for head in decoder.modules():
        if isinstance(head, BoxHead):
            nn.init.normal_(head.change.last.weight, std=0.1)
    return decoder


def by_hand(decoder: LayeredDecoder, contents: list[Tensor], boxes: Tensor) -> list[Tensor]:
    """DINO's boxes: each layer refines a box whose gradient reaches one layer back, in units of the box head."""
    found, known, kept = [], boxes, boxes
    for layer, content in enumerate(contents):
        head = decoder._head(decoder.box, layer)
        found.append(head(decoder.norm(content), head.start(known, decoder.margin)))
        known = head(content, head.start(kept, decoder.margin))
        kept = known.detach()
    return found


@pytest.mark.parametrize("boxes", ["logit", "reparametrised"])
@pytest.mark.parametrize("predictors", ["shared", "layer"])
def test_a_loss_reaches_the_refinement_one_layer_back(predictors: str, boxes: str) -> None:
    start = 0.2 + 0.4 * torch.rand(2, 5, 4)
    contents = [torch.randn(2, 5, WIDTH, requires_grad=True) for _ in range(LAYERS)]
    answers = {}
    for look_forward in ("once", "twice"):
        decoder = heads_of(look_forward, predictors=predictors, boxes=boxes)
        following = seen = start
        found = []
        for layer, content in enumerate(contents):
            _, reported, following, seen = decoder.refined(layer, content, following)
            assert not seen.requires_grad, "what a layer sees has no gradient"
            torch.testing.assert_close(seen, following, rtol=0, atol=0)
            found.append(reported)
        for layer, reported in enumerate(found):
            reached = torch.autograd.grad(reported.sum(), contents, retain_graph=True, allow_unused=True)
            taught = [n for n, gradient in enumerate(reached) if gradient is not None]
            assert taught == ([layer - 1, layer] if look_forward == "twice" and layer else [layer])
        answers[look_forward] = torch.stack(found)
    torch.testing.assert_close(answers["once"], answers["twice"])

    expected = torch.stack(by_hand(decoder, contents, start))
    torch.testing.assert_close(answers["twice"], expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((each * weights).sum(), contents) for each in (answers["twice"], expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("encoder", ["deformable", "plain"])
def test_detection_is_the_same_and_the_first_layer_learns_of_the_second(encoder: str) -> None:
    network = small_detector(small_config(encoder=encoder)).train()
    images, mask, text = torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool), torch.randn(3, TEXT_WIDTH)
    targets = targets_of([[0.4, 0.4, 0.2, 0.3]], [1], words=3)
    outputs, taught = [], []
    for twice in (False, True):
        network.decoder.looks_twice = twice
        torch.manual_seed(5)
        output = network(images, mask, text, targets)
        network.zero_grad()
        output.boxes[1].sum().backward()
        outputs.append(output.boxes.detach())
        taught.append(network.decoder.box.change.last.bias.grad.clone())
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(*taught), "the head is taught twice by the last layer's boxes"


def test_only_where_layers_refine_each_others_boxes() -> None:
    for options in ({"kind": "distribution"}, {"refine": "none"}):
        with pytest.raises(ConfigError, match="look_forward 'twice' is for kind"):
            DecoderConfig.checked({"look_forward": "twice", **options})
