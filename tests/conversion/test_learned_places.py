"""Detectors whose queries have learned places become METR: they find the same, before any training, and back again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_cases import NAMES, SIDE, alike, normalised, random_images, save_folder, stir, stirred, texts
from torch import Tensor

from metr.boxes import clip
from metr.conversion.adoption import from_detector, import_detector
from metr.conversion.export import build, colours_of, transfer
from metr.conversion.targets import find_target
from metr.conversion.transfer import to_detector
from metr.data.config import ResizeConfig
from metr.errors import ModelError
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.model import METR
from metr.models.config import DetectorConfig
from metr.models.detector import Detector
from metr.structures import Targets
from metr.text.encoder import TextEncoderConfig

from small import TEXT_WIDTH, targets_of
from tiny import write_text_model

LABELS = (*NAMES, "bear", "otter")
REFINE = ("each", "none")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextEncoderConfig:
    folder = tmp_path_factory.mktemp("text")
    write_text_model(folder)
    return TextEncoderConfig(source=str(folder), templates=("{}",))


def learned(refine: str, **changes: Any) -> DetectorConfig:
    """A METR with Deformable DETR's layers and learned places."""
    values = alike("deformable_detr").model_dump()
    values["queries"] |= {"places": "learned", "layout": "places", "content": "learned_only"}
    values["decoder"] |= {"positions": "learned", "first_samples": "cells", "refine": refine, "predictors": "layer"}
    values["denoising"] |= {"number": 0}
    for part, options in changes.items():
        values[part] |= options
    return DetectorConfig.model_validate(values)


def written(refine: str, folder: Path) -> Any:
    """A one-stage Deformable DETR with weights of its own in a folder."""
    network = stirred(learned(refine))
    model = stir(build(find_target("deformable_detr"), network, LABELS, seed=3)).eval()
    assert not model.config.two_stage
    assert model.config.with_box_refine == (refine == "each")
    save_folder(model, "deformable_detr", network, folder)
    return model


def answers(model: METR, images: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [b q v] and boxes [b q 4] of every query for the labels."""
    output = model.network(images, padding, model.embed(LABELS), limits=model.predictor(LABELS).limits)
    logits, boxes = output.logits[-1], output.boxes[-1]
    logits = logits.reshape(len(logits), len(LABELS), -1).transpose(1, 2)
    return logits, boxes.reshape(len(boxes), len(LABELS), -1, 4)[:, 0]


@pytest.mark.parametrize("refine", REFINE)
@torch.no_grad()
def test_deformable_detr_of_one_stage(refine: str, tmp_path: Path, text: TextEncoderConfig) -> None:
    """From its folder to METR, saved and loaded, and back; with an image that is padded."""
    theirs = written(refine, tmp_path / "theirs")
    ours, report = import_detector(tmp_path / "theirs", text=text, device="cpu")
    assert report.start == "", "it is a detector already"
    assert report.left_over == ()
    assert all(key.startswith("category_extraction.") for key in report.afresh)
    ours.save_pretrained(tmp_path / "ours")
    ours = METR.from_pretrained(tmp_path / "ours", device="cpu")
    images = random_images()
    padding = torch.zeros(2, *images.shape[2:], dtype=torch.bool)
    padding[1, :, SIDE:], padding[1, 32:] = True, True
    pixels = normalised(ours.network, images).masked_fill(padding.unsqueeze(1), 0.0)
    wanted = theirs(pixels, pixel_mask=(~padding).long())
    memory = ours.network.encode(images.where(~padding.unsqueeze(1), ours.network.backbone.mean), padding)
    seen = (~memory.padding_mask).unsqueeze(-1)
    theirs_memory = wanted.encoder_last_hidden_state
    torch.testing.assert_close(memory.tokens * seen, theirs_memory * seen, atol=1e-4, rtol=1e-4)
    logits, boxes = answers(ours, images.where(~padding.unsqueeze(1), ours.network.backbone.mean), padding)
    torch.testing.assert_close(boxes, wanted.pred_boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, wanted.logits, atol=1e-3, rtol=0)
    again = to_detector(ours, "deformable_detr", LABELS)
    found = again.model(pixels, pixel_mask=(~padding).long())
    torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-3, rtol=0)
    assert again.report.notes == ()
    assert again.report.afresh == ()


@torch.no_grad()
def test_it_detects_what_one_stage_detects(tmp_path: Path, text: TextEncoderConfig) -> None:
    """Boxes, names, scores and their order, each by its own pipeline."""
    from transformers import AutoImageProcessor

    theirs = written("each", tmp_path)
    ours = from_detector(tmp_path, text=text, device="cpu")
    image = (torch.rand(90, 110, 3) * 255).byte().numpy()
    every = InferenceConfig(postprocess=PostprocessConfig(nms_iou=None))
    found = ours.predictor(config=every).detect(image)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    answer = theirs(**processor(image, return_tensors="pt"))
    (wanted,) = processor.post_process_object_detection(answer, threshold=0.0, target_sizes=[(90, 110)], top_k=40)
    number = len(wanted["scores"])
    assert number == 40
    torch.testing.assert_close(found.scores[:number], wanted["scores"], atol=1e-4, rtol=0)
    assert [ours.names[label] for label in found.labels[:number]] == [LABELS[label] for label in wanted["labels"]]
    torch.testing.assert_close(found.boxes[:number], clip(wanted["boxes"], 90.0, 110.0), atol=0.05, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("refine", [True, False])
@torch.no_grad()
def test_the_published_size(refine: bool, tmp_path: Path, text: TextEncoderConfig) -> None:
    """ResNet-50, six layers, 300 queries, with random weights."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    labels = dict(enumerate(LABELS))
    backbone = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = DeformableDetrConfig(backbone_config=backbone, with_box_refine=refine, id2label=labels)
    torch.manual_seed(0)
    theirs = stir(DeformableDetrForObjectDetection(config), by=0.01).eval()
    theirs.save_pretrained(tmp_path)
    colours = colours_of(stirred(learned("each")))
    find_target("deformable_detr").image_processor(ResizeConfig(size=SIDE), colours).save_pretrained(tmp_path)
    ours, report = import_detector(tmp_path, text=text, device="cpu")
    assert report.left_over == ()
    images = random_images(number=1)
    wanted = theirs(normalised(ours.network, images))
    assert wanted.logits.std() > 0.01
    logits, boxes = answers(ours, images, torch.zeros(1, *images.shape[2:], dtype=torch.bool))
    torch.testing.assert_close(boxes, wanted.pred_boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, wanted.logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("refine", REFINE)
def test_it_trains_from_scratch(refine: str) -> None:
    """Every weight gets a gradient, proposals have no losses, and a few steps lower the loss."""
    torch.manual_seed(0)
    network, criterion = Detector(learned(refine), TEXT_WIDTH), SetCriterion(CriterionConfig())
    images, words = torch.rand(2, 3, SIDE, SIDE), torch.nn.functional.normalize(torch.randn(3, TEXT_WIDTH), dim=-1)
    boxes = ([[0.3, 0.4, 0.2, 0.3]], [[0.6, 0.5, 0.4, 0.4]])
    targets = Targets.stack([targets_of(box, [row], words=3) for row, box in enumerate(boxes)])
    optimizer, totals = torch.optim.AdamW(network.parameters(), lr=1e-3), []
    for _ in range(6):
        optimizer.zero_grad()
        losses, _ = criterion(network(images, torch.zeros(2, SIDE, SIDE, dtype=torch.bool), words, targets), targets)
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert not any(name.startswith("proposals") for name in losses.terms)
    assert totals[-1] < totals[0]
    without = [name for name, one in network.named_parameters() if one.requires_grad and one.grad is None]
    assert without == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoising": {"number": 6}}, "needs denoising.number 0, found 6"),
        ({"queries": {"layout": "uniform"}}, "needs queries.layout 'places', found 'uniform'"),
        ({"queries": {"content": "place_only"}}, "needs queries.content 'learned_only' or 'none', found 'place_only'"),
        ({"queries": {"places": "proposed"}}, "found 'proposed' and 'learned'"),
        ({"decoder": {"positions": "sine"}}, "found 'learned' and 'sine'"),
        ({"decoder": {"kind": "distribution"}}, "'learned' is for decoder.kind 'deformable', 'conditional' and"),
    ],
)
def test_options_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learned("each", **changes)


def test_other_detectors_get_the_backbone() -> None:
    report = transfer(find_target("rt_detr"), stirred(learned("each")), NAMES, texts()).report
    told = " ".join(report.notes)
    assert "with learned places: only the backbone moves" in told
    assert "model.queries.places=proposed" in told


def test_what_is_not_understood_is_refused(tmp_path: Path, text: TextEncoderConfig) -> None:
    written("each", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"activation_function": "gelu"}))
    with pytest.raises(ModelError, match="activation_function = 'relu', found 'gelu'"):
        from_detector(tmp_path, text=text, device="cpu")
