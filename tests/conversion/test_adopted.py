"""A METR that adopts a detector finds what the detector finds, before any training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_cases import (
    NAMES,
    PROJECTING,
    SIDE,
    adapted,
    alike,
    normalised,
    random_images,
    save_folder,
    stir,
    stirred,
    texts,
)
from torch import Tensor

from metr.boxes import clip
from metr.conversion.adoption import from_detector, import_detector
from metr.conversion.class_heads import ClassHeads, solve
from metr.conversion.classifier import Linear
from metr.conversion.export import build
from metr.conversion.targets import find_target
from metr.conversion.transfer import to_detector
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.model import METR
from metr.structures import DetectorOutput
from metr.text.encoder import TextEncoderConfig

from tiny import write_text_model

EXACT = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", *PROJECTING)
LABELS = (*NAMES, "bear", "otter")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextEncoderConfig:
    folder = tmp_path_factory.mktemp("text")
    write_text_model(folder)
    return TextEncoderConfig(source=str(folder), templates=("{}",))


def written(name: str, folder: Path, labels: tuple[str, ...] = LABELS, **encoder: object) -> Any:
    """A detector of transformers with weights of its own, in a folder; its encoder may have other options."""
    network = stirred(alike(name, **encoder))
    model = stir(build(find_target(name), network, labels, seed=3)).eval()
    save_folder(model, name, network, folder)
    return model


def answers(model: METR, images: Tensor, names: tuple[str, ...]) -> DetectorOutput:
    """What METR's network gives for images that are not padded."""
    padding = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
    predictor = model.predictor(names)
    return model.network(images, padding, model.embed(names), limits=predictor.limits)


def by_label(output: DetectorOutput, labels: int) -> tuple[Tensor, Tensor]:
    """Logits [b p v] and boxes [b p 4] of the last layer by place, from METR's pairs of slot and place."""
    logits, boxes = output.logits[-1], output.boxes[-1]
    logits = logits.reshape(len(logits), labels, -1)
    return logits.transpose(1, 2), boxes.reshape(len(boxes), labels, -1, 4)[:, 0]


# in RT-DETR-R101 and D-FINE-X the encoder is wider than the decoder
WIDER: dict[str, object] = {"width": 48}
LITE: dict[str, object] = {"kind": "lite", "positions": "scaled"}


@pytest.mark.parametrize(
    ("name", "encoder"),
    [*((name, {}) for name in EXACT), ("rt_detr", WIDER), ("d_fine", WIDER), ("deimv2", WIDER), ("deimv2", LITE)],
)
@torch.no_grad()
def test_the_same_places_boxes_and_logits(
    name: str, encoder: dict[str, object], tmp_path: Path, text: TextEncoderConfig
) -> None:
    theirs = written(name, tmp_path, **encoder)
    if encoder:
        assert (theirs.config.encoder_hidden_dim == 48) == (encoder == WIDER)
    ours, report = import_detector(tmp_path, text=text, device="cpu")
    # transformers' RF-DETR mixes up rows and columns where an image is not square
    images = random_images(width=SIDE if name == "rf_detr" else SIDE + 32)
    wanted = theirs(normalised(ours.network, images))
    logits, boxes = by_label(answers(ours, images, LABELS), len(LABELS))
    torch.testing.assert_close(boxes, wanted.pred_boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, wanted.logits, atol=1e-3, rtol=0)
    assert report.start == "", "it is a detector already"
    for key in report.afresh:
        assert key.startswith(("category_extraction.", "denoising.")), key
    for key in report.left_over:
        assert "denoising" in key or key.endswith(("num_batches_tracked", "points_scale")), key


@torch.no_grad()
def test_a_vision_transformer_with_an_adapter(tmp_path: Path, text: TextEncoderConfig) -> None:
    """DEIMv2 with DINOv3, from its folder to METR, saved and loaded, and back."""
    config = alike("deimv2", fusion_convolutions=False, positions="none").model_copy(update={"backbone": adapted()})
    network = stirred(config)
    theirs = stir(build(find_target("deimv2"), network, LABELS, seed=3)).eval()
    save_folder(theirs, "deimv2", network, tmp_path / "theirs")
    ours, report = import_detector(tmp_path / "theirs", text=text, device="cpu")
    ours.save_pretrained(tmp_path / "ours")
    ours = METR.from_pretrained(tmp_path / "ours", device="cpu")
    pixels = normalised(ours.network, images := random_images())
    wanted = theirs(pixels)
    logits, boxes = by_label(answers(ours, images, LABELS), len(LABELS))
    torch.testing.assert_close(boxes, wanted.pred_boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, wanted.logits, atol=1e-3, rtol=0)
    for key in report.afresh:
        assert key.startswith(("category_extraction.", "denoising.")), key
    for key in report.left_over:
        assert "denoising" in key or key.endswith(("num_batches_tracked", "points_scale")), key
    found = to_detector(ours, "deimv2", LABELS).model(pixels)
    torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-3, rtol=0)


@torch.no_grad()
def test_deformable_detr_of_two_stages(tmp_path: Path, text: TextEncoderConfig) -> None:
    """Queries keep the position of their first box, and places are chosen by the first label's score."""
    theirs = written("deformable_detr", tmp_path)
    ours, report = import_detector(tmp_path, text=text, device="cpu")
    pixels = normalised(ours.network, images := random_images())
    wanted = theirs(pixels)
    logits, boxes = by_label(answers(ours, images, LABELS), len(LABELS))
    torch.testing.assert_close(boxes, wanted.pred_boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, wanted.logits, atol=1e-3, rtol=0)
    assert report.start == "", "it is a detector already"
    for key in report.afresh:
        assert key.startswith(("category_extraction.", "denoising.")), key
    assert report.left_over == ()
    again = to_detector(ours, "deformable_detr", LABELS)
    found = again.model(pixels)
    torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-3, rtol=0)
    assert again.report.notes == ()


@torch.no_grad()
def test_what_differs_is_said_wherever_a_detector_is_taken_over(
    tmp_path: Path, text: TextEncoderConfig, caplog: pytest.LogCaptureFixture
) -> None:
    written("rt_detr", tmp_path / "theirs")
    from_detector(tmp_path / "theirs", text=text, device="cpu")
    assert "not all is found" not in caplog.text
    file = tmp_path / "theirs" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": {"height": 64, "width": 96}}))
    from_detector(tmp_path / "theirs", text=text, device="cpu")
    assert "not all is found as RT-DETR finds it: its images have 64 x 96 pixels, here 96 x 96" in caplog.text


def test_it_detects_what_the_detector_detects(tmp_path: Path, text: TextEncoderConfig) -> None:
    """Boxes, names, scores and their order, each by its own pipeline: files of METR, an image that is resized."""
    from transformers import AutoImageProcessor

    theirs = written("rt_detr", tmp_path / "theirs")
    from_detector(tmp_path / "theirs", text=text, device="cpu").save_pretrained(tmp_path / "ours")
    ours = METR.from_pretrained(tmp_path / "ours", device="cpu")
    image = (torch.rand(90, 110, 3) * 255).byte().numpy()
    every = InferenceConfig(postprocess=PostprocessConfig(nms_iou=None))
    found = ours.predictor(config=every).detect(image)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    answer = theirs(**processor(image, return_tensors="pt"))
    (wanted,) = processor.post_process_object_detection(answer, threshold=0.0, target_sizes=[(90, 110)])
    number = len(wanted["scores"])
    assert number == 9
    torch.testing.assert_close(found.scores[:number], wanted["scores"], atol=1e-4, rtol=0)
    assert [ours.names[label] for label in found.labels[:number]] == [LABELS[label] for label in wanted["labels"]]
    inside = clip(wanted["boxes"], 90.0, 110.0)
    torch.testing.assert_close(found.boxes[:number], inside, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ["rt_detr", "d_fine", "deimv2", *PROJECTING])
@torch.no_grad()
def test_and_back_again_it_is_the_detector(name: str, tmp_path: Path, text: TextEncoderConfig) -> None:
    theirs = written(name, tmp_path)
    ours = from_detector(tmp_path, text=text, device="cpu")
    again = to_detector(ours, name, LABELS)
    assert again.report.afresh == () or name in ("d_fine", "deimv2")
    pixels = normalised(ours.network, random_images(width=SIDE))
    wanted, found = theirs(pixels), again.model(pixels)
    torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-3, rtol=0)


def test_class_heads_are_met_exactly_up_to_the_size_of_an_embedding() -> None:
    width, size = 7, texts().shape[1]
    for labels in (1, 5, size):
        text = torch.nn.functional.normalize(torch.randn(labels, size), dim=-1)
        heads = {"head": Linear(weight=torch.randn(labels, width), bias=torch.randn(labels))}
        solved = solve(ClassHeads(names=(), heads=heads, sources={"head": ("w", "b")}), text)
        assert solved.error < 1e-5
        assert solved.rank == labels
    text = torch.nn.functional.normalize(torch.randn(2 * size, size), dim=-1)
    heads = {"head": Linear(weight=torch.randn(2 * size, width), bias=torch.randn(2 * size))}
    solved = solve(ClassHeads(names=(), heads=heads, sources={"head": ("w", "b")}), text)
    assert solved.error > 0.1, "more labels than directions: the error is told"
    assert solved.rank == size + 1


@torch.no_grad()
def test_a_name_between_two_labels_gets_a_classifier_between_theirs(tmp_path: Path, text: TextEncoderConfig) -> None:
    written("rt_detr", tmp_path)
    ours = from_detector(tmp_path, text=text, device="cpu")
    head = ours.network.proposals.classifier
    assert head is not None
    first, second = ours.embed(("bear", "otter"))
    between = head.weight((first + second) / 2)
    torch.testing.assert_close(between, (head.weight(first) + head.weight(second)) / 2, atol=1e-4, rtol=1e-3)


def test_labels_without_names_take_the_names_that_are_given(tmp_path: Path, text: TextEncoderConfig) -> None:
    from metr.errors import ConfigError

    written("rt_detr", tmp_path, tuple(f"LABEL_{n}" for n in range(3)))
    ours = from_detector(tmp_path, ["bear", "otter", "seal"], text=text, device="cpu")
    assert ours.names == ("bear", "otter", "seal")
    with pytest.raises(ConfigError, match="expected 3 names"):
        from_detector(tmp_path, ["bear"], text=text, device="cpu")
