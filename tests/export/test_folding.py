"""The function that is exported answers as the network does, before any exporter sees it."""

import pytest
import torch
from export_cases import FAMILIES, FIT, STRETCH, predictor_of
from torch import nn

from metr.errors import ModelError
from metr.export.folding import folded
from metr.export.graph import NOT_FOUND, ExportedDetector, example_inputs, interface_of, padded_names
from metr.inference.postprocess import candidates

from small import small_config


@pytest.mark.parametrize("resize", [STRETCH, FIT], ids=["stretch", "fit"])
@pytest.mark.parametrize("open_names", [None, 9], ids=["fixed", "open"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_function_answers_as_the_network(family, open_names, resize) -> None:
    predictor = predictor_of(FAMILIES[family], resize)
    interface = interface_of(predictor, "uint8", open_names)
    graph = ExportedDetector(predictor, interface).eval()
    given = dict(zip(interface.inputs, example_inputs(interface), strict=True))
    if open_names:
        rows = padded_names(predictor.text, predictor.limits.presence.tolist(), open_names)
        given |= dict(zip(("text", "presence"), rows, strict=True))
    with torch.inference_mode():
        boxes, scores, labels = graph(*given.values())
        pixels = given["images"].float() / 255
        mask = torch.zeros(len(pixels), *pixels.shape[-2:], dtype=torch.bool)
        for row, (height, width) in zip(mask, given.get("sizes", torch.empty(0, 2)).tolist(), strict=False):
            row[height:], row[:, width:] = True, True
        answer = predictor.network(pixels, mask, predictor.text, limits=predictor.limits)
        their_boxes, their_scores, their_labels, keep = candidates(answer, 0.25)
    for image in range(len(pixels)):
        order = their_scores[image].masked_fill(~keep[image], NOT_FOUND).argsort(descending=True, stable=True)
        real = order[: int(keep[image].sum())]
        found = scores[image] > NOT_FOUND
        assert int(found.sum()) == len(real) > 0
        torch.testing.assert_close(scores[image][found], their_scores[image][real], atol=1e-5, rtol=0)
        torch.testing.assert_close(boxes[image][found], their_boxes[image][real], atol=1e-4, rtol=0)
        assert torch.equal(labels[image][found], their_labels[image][real])


@pytest.mark.parametrize("family", ["shipped", "projector", "frozen resnet", "efficientnet", "distribution"])
def test_no_norm_of_a_convolution_is_left(family) -> None:
    network = folded(predictor_of(FAMILIES[family]).network)
    left = [name for name, module in network.encoder.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert not left
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_names_that_see_each_other_cannot_be_an_input() -> None:
    config = small_config()
    categories = config.categories.model_copy(update={"self_attention": True})
    predictor = predictor_of(config.model_copy(update={"categories": categories}))
    ExportedDetector(predictor, interface_of(predictor, "uint8"))
    with pytest.raises(ModelError, match="attend to each other"):
        ExportedDetector(predictor, interface_of(predictor, "uint8", 9))


def test_a_shortlist_leaves_rows_that_are_no_names_out() -> None:
    config = small_config()
    categories = config.categories.model_copy(update={"shortlist": 7})
    predictor = predictor_of(config.model_copy(update={"categories": categories}))
    interface = interface_of(predictor, "float32", 40)
    graph = ExportedDetector(predictor, interface).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        _, scores, labels = graph(images, *padded_names(predictor.text, predictor.limits.presence.tolist(), 40))
        _, plain, _ = ExportedDetector(predictor, interface_of(predictor, "float32")).eval()(images)
    assert int(labels[scores > NOT_FOUND].max()) < 6
    torch.testing.assert_close(scores[scores > NOT_FOUND], plain[plain > NOT_FOUND], atol=1e-5, rtol=0)
