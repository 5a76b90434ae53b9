"""Conditional DETR becomes METR and finds the same, before any training, and back again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_cases import NAMES, SIDE, normalised, random_images, save_folder, stir, stirred

from metr.boxes import clip
from metr.conversion.export import build, colours_of
from metr.conversion.targets import find_target
from metr.conversion.transfer import from_detector, import_detector, to_detector
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

from small import TEXT_WIDTH, small_config, targets_of
from tiny import write_text_model

LABELS = (*NAMES, "bear", "otter")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextEncoderConfig:
    folder = tmp_path_factory.mktemp("text")
    write_text_model(folder)
    return TextEncoderConfig(source=str(folder), templates=("{}",))


def conditional() -> DetectorConfig:
    """A METR with Conditional DETR's layers and learned places."""
    values = small_config(encoder="plain", denoising=0).model_dump()
    values["queries"] |= {"places": "learned", "layout": "places", "content": "none", "point_layers": 2}
    values["decoder"] |= {"positions": "learned", "extents": False, "refine": "none"}
    return DetectorConfig.model_validate(values)


def written(folder: Path) -> Any:
    network = stirred(conditional())
    model = stir(build(find_target("conditional_detr"), network, LABELS, seed=3)).eval()
    save_folder(model, "conditional_detr", network, folder)
    return model


def same_answers(model: METR, theirs: Any, padded: bool, back: bool) -> None:
    """METR's boxes and logits are the detector's; with `back` also those of what METR becomes."""
    images = random_images()
    padding = torch.zeros(2, *images.shape[2:], dtype=torch.bool)
    if padded:
        padding[1, :, SIDE:], padding[1, 32:] = True, True
        images = images.where(~padding.unsqueeze(1), model.network.backbone.mean)
    pixels = {"pixel_values": normalised(model.network, images), "pixel_mask": (~padding).long()}
    wanted = theirs(**pixels)
    memory, seen = model.network.encode(images, padding).tokens, None
    seen = (~model.network.encode(images, padding).padding_mask).unsqueeze(-1)
    torch.testing.assert_close(memory * seen, wanted.encoder_last_hidden_state * seen, atol=1e-4, rtol=1e-4)
    output = model.network(images, padding, model.embed(LABELS), limits=model.predictor(LABELS).limits)
    logits, boxes = output.logits[-1].reshape(2, len(LABELS), -1), output.boxes[-1].reshape(2, len(LABELS), -1, 4)
    torch.testing.assert_close(boxes[:, 0], wanted.pred_boxes, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits.transpose(1, 2), wanted.logits, atol=1e-3, rtol=0)
    if back:
        again = to_detector(model, "conditional_detr", LABELS)
        assert again.report.notes == ()
        assert again.report.afresh == ()
        found = again.model(**pixels)
        torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-3, rtol=0)


@torch.no_grad()
def test_conditional_detr(tmp_path: Path, text: TextEncoderConfig) -> None:
    theirs = written(tmp_path / "theirs")
    ours, report = import_detector(tmp_path / "theirs", text=text, device="cpu")
    assert report.start == ""
    assert report.left_over == ()
    assert all(key.startswith("category_extraction.") for key in report.afresh)
    ours.save_pretrained(tmp_path / "ours")
    same_answers(METR.from_pretrained(tmp_path / "ours", device="cpu"), theirs, padded=True, back=True)


@torch.no_grad()
def test_the_published_size(tmp_path: Path, text: TextEncoderConfig) -> None:
    """ResNet-50, six layers, 300 queries, with random weights."""
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(out_features=["stage4"])
    torch.manual_seed(0)
    config = ConditionalDetrConfig(backbone_config=backbone, id2label=dict(enumerate(LABELS)))
    theirs = stir(ConditionalDetrForObjectDetection(config), by=0.01).eval()
    theirs.save_pretrained(tmp_path)
    colours = colours_of(stirred(conditional()))
    find_target("conditional_detr").image_processor(ResizeConfig(size=SIDE), colours).save_pretrained(tmp_path)
    ours, report = import_detector(tmp_path, text=text, device="cpu")
    assert report.left_over == ()
    same_answers(ours, theirs, padded=False, back=False)


@torch.no_grad()
def test_it_detects_what_the_detector_detects(tmp_path: Path, text: TextEncoderConfig) -> None:
    from transformers import AutoImageProcessor

    theirs = written(tmp_path)
    ours = from_detector(tmp_path, text=text, device="cpu")
    image = (torch.rand(90, 110, 3) * 255).byte().numpy()
    found = ours.predictor(config=InferenceConfig(postprocess=PostprocessConfig(nms_iou=None))).detect(image)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    answer = theirs(**processor(image, return_tensors="pt"))
    (wanted,) = processor.post_process_object_detection(answer, threshold=0.0, target_sizes=[(90, 110)], top_k=40)
    number = len(wanted["scores"])
    assert number == 40
    torch.testing.assert_close(found.scores[:number], wanted["scores"], atol=1e-4, rtol=0)
    assert [ours.names[label] for label in found.labels[:number]] == [LABELS[label] for label in wanted["labels"]]
    torch.testing.assert_close(found.boxes[:number], clip(wanted["boxes"], 90.0, 110.0), atol=0.05, rtol=0)


def test_it_trains_from_scratch() -> None:
    torch.manual_seed(0)
    network, criterion = Detector(conditional(), TEXT_WIDTH), SetCriterion(CriterionConfig())
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
    assert totals[-1] < totals[0]
    assert [name for name, one in network.named_parameters() if one.requires_grad and one.grad is None] == []


def test_layers_that_normalise_what_they_pass_on_are_refused(tmp_path: Path, text: TextEncoderConfig) -> None:
    model = written(tmp_path)
    model.config.auxiliary_loss = True
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="auxiliary_loss = False, found True"):
        from_detector(tmp_path, text=text, device="cpu")
