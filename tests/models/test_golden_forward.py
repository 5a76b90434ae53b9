"""The authors' published forward pass, reproduced from its weights through the key table."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from metr.conversion.published.dino import AUTHORS
from metr.conversion.table import to_ours, to_theirs
from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.models.config import (
    CategoryConfig,
    DecoderConfig,
    DenoisingConfig,
    DetectorConfig,
    EncoderConfig,
    QueryConfig,
)
from metr.models.detector import Detector
from metr.models.proposals import anchor_logits
from metr.structures import DetectorOutput, Memory

from small import small_backbone, targets_of

CONFIG = DetectorConfig(
    width=256,
    backbone=small_backbone(channels=(16, 24, 32)),
    encoder=EncoderConfig(layers=2, levels=4, feed_forward=64),
    categories=CategoryConfig(blocks=2, feed_forward=64, kept=4),
    queries=QueryConfig(layout="shared", number=28, floor=0, ceiling=7),
    denoising=DenoisingConfig(number=0),
    decoder=DecoderConfig(layers=2, feed_forward=64, padded_positions=True),
)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    """Inputs, weights and outputs of the authors' implementation."""
    return load_file(shared / "golden" / "official_forward.safetensors")


@pytest.fixture(scope="module")
def weights(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("weights/"): v.float() for k, v in golden.items() if k.startswith("weights/")}


@pytest.fixture(scope="module")
def detector(weights: dict[str, Tensor]) -> Detector:
    text = weights["transformer.prompt_indicator.class_prompts"]
    network = Detector(CONFIG, text.shape[1]).eval()
    converted = to_ours(weights, AUTHORS)
    missing, unexpected = network.load_state_dict(converted.state, strict=False)
    assert not unexpected
    assert all(name.startswith("backbone.") for name in missing)
    return network


@pytest.fixture(scope="module")
def memory(golden: dict[str, Tensor], detector: Detector) -> Memory:
    features = [golden[f"input/feature_{i}"] for i in range(3)]
    with torch.no_grad():
        return detector.encoder(features, golden["input/pixel_mask_is_padding"])


@pytest.fixture(scope="module")
def output(golden: dict[str, Tensor], weights: dict[str, Tensor], detector: Detector) -> DetectorOutput:
    features = [golden[f"input/feature_{i}"] for i in range(3)]
    text = weights["transformer.prompt_indicator.class_prompts"]
    with torch.no_grad():
        memory = detector.encoder(features, golden["input/pixel_mask_is_padding"])
        return detector.detect(memory, text)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def close_boxes(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


def test_golden_memory(golden: dict[str, Tensor], memory: Memory) -> None:
    close(memory.tokens, golden["output/memory"])


def test_golden_categories(golden: dict[str, Tensor], output: DetectorOutput) -> None:
    close(output.categories.presence_logits[-1], golden["output/cem_logits"])
    close(output.categories.tokens, golden["output/class_tokens"])
    assert output.categories.ids[0].tolist() == golden["output/selected_categories"].tolist()


def test_golden_presence_losses(golden: dict[str, Tensor], output: DetectorOutput) -> None:
    present = golden["input/present_categories"].bool()
    target = targets_of([[0.5, 0.5, 0.1, 0.1]] * int(present.sum()), present.nonzero().flatten().tolist(), words=12)
    losses = dict(SetCriterion(CriterionConfig())(output, target)[0].items())
    for block, theirs in ((0, golden["output/loss_asl_block0"]), (1, golden["output/loss_asl"])):
        torch.testing.assert_close(losses[f"presence/{block}"], theirs, atol=1e-4, rtol=1e-5)


def test_golden_decoder(golden: dict[str, Tensor], output: DetectorOutput) -> None:
    close(output.logits[-1].view(4, 7), golden["output/pred_logits"])
    close(output.logits[0].view(4, 7), golden["output/aux0_logits"])
    close_boxes(output.boxes[-1].view(4, 7, 4), golden["output/pred_boxes"])
    close_boxes(output.boxes[0].view(4, 7, 4), golden["output/aux0_boxes"])


def test_golden_proposals(
    golden: dict[str, Tensor], detector: Detector, memory: Memory, output: DetectorOutput
) -> None:
    boxes = output.proposals.boxes.view(4, 7, 4)
    close_boxes(boxes, golden["output/encoder_proposal_boxes"].expand(4, -1, -1))
    kept = output.categories.ids[0]
    theirs = golden["output/encoder_proposal_logits"][0]
    close(output.proposals.logits.view(4, 7), theirs[:, kept].T)
    # the authors score each place for the whole vocabulary; the head can do the same
    with torch.no_grad():
        _, usable = anchor_logits(memory)
        scores = detector.proposals.scores(detector.proposals.features(memory, usable), output.categories.tokens)
    places = output.proposals.place.view(4, 7)[0]
    close(scores[0, places], theirs)


def test_the_table_gives_back_what_it_took(weights: dict[str, Tensor]) -> None:
    converted = to_ours(weights, AUTHORS)
    back = to_theirs(converted.state, AUTHORS)
    assert not back.left_over
    assert set(back.state) == set(converted.used)
    for key, tensor in back.state.items():
        torch.testing.assert_close(tensor, weights[key], atol=0, rtol=0)


def test_only_copies_and_the_unused_are_left_over(weights: dict[str, Tensor]) -> None:
    left = to_ours(weights, AUTHORS).left_over
    copies = ("bbox_embed.", "class_embed.", "transformer.decoder.", "transformer.prompt_indicator.classifier_label.1")
    unused = ("label_enc.weight", "transformer.prompt_indicator.class_prompts")
    for key in left:
        assert key in unused or key.startswith(copies)
        if key.startswith(copies):
            kind, _, rest = key.removeprefix("transformer.decoder.").partition(".")
            original = key if kind == "transformer" else f"{kind}.0.{rest.partition('.')[2]}"
            original = original.replace("classifier_label.1", "classifier_label.0")
            torch.testing.assert_close(weights[key], weights[original], atol=0, rtol=0)
