"""Conditional DETR becomes METR and finds the same, before any training, and back again."""

from pathlib import Path

import pytest
import torch
from single_scale_cases import FACTS, LABELS, as_published, same_answers, trains, written

from metr.boxes import clip
from metr.conversion.adoption import from_detector, import_detector
from metr.errors import ModelError
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.model import METR
from metr.models.config import DetectorConfig
from metr.text.encoder import TextEncoderConfig

from small import small_config
from tiny import write_text_model


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


@torch.no_grad()
def test_conditional_detr(tmp_path: Path, text: TextEncoderConfig) -> None:
    theirs = written("conditional_detr", conditional(), tmp_path / "theirs")
    ours, report = import_detector(tmp_path / "theirs", text=text, device="cpu")
    assert report.start == ""
    assert report.left_over == ()
    assert all(key.startswith("category_extraction.") for key in report.afresh)
    ours.save_pretrained(tmp_path / "ours")
    model = METR.from_pretrained(tmp_path / "ours", device="cpu")
    same_answers(model, theirs, lambda logits: logits, again="conditional_detr")


@pytest.mark.slow
def test_the_published_layout(tmp_path: Path, text: TextEncoderConfig) -> None:
    """Names of weights, configuration and sizes as published, with random weights."""
    theirs = as_published("conditional_detr", tmp_path)
    ours, report = import_detector(tmp_path, text=text, device="cpu")
    assert report.left_over == ()
    assert (ours.resize.size, ours.resize.longest) == (800, 1333)
    kept = sorted(FACTS["conditional_detr"]["labels"])
    same_answers(ours, theirs, lambda logits: logits[..., kept])


@torch.no_grad()
def test_it_detects_what_the_detector_detects(tmp_path: Path, text: TextEncoderConfig) -> None:
    from transformers import AutoImageProcessor

    theirs = written("conditional_detr", conditional(), tmp_path)
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
    trains(conditional())


def test_layers_that_normalise_what_they_pass_on_are_refused(tmp_path: Path, text: TextEncoderConfig) -> None:
    model = written("conditional_detr", conditional(), tmp_path)
    model.config.auxiliary_loss = True
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="auxiliary_loss = False, found True"):
        from_detector(tmp_path, text=text, device="cpu")
