"""DETR becomes METR and finds the same, before any training, and back again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_cases import NAMES, save_folder, stir, stirred, texts
from single_scale_cases import FACTS, LABELS, as_published, same_answers, trains, written
from torch import Tensor

from metr.boxes import clip
from metr.conversion.adoption import from_detector, import_detector
from metr.conversion.export import transfer
from metr.conversion.targets import find_target
from metr.conversion.transfer import to_detector
from metr.errors import ModelError
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.model import METR
from metr.models.config import DetectorConfig
from metr.models.heads import ClassifierHead
from metr.text.encoder import TextEncoderConfig

from small import TEXT_WIDTH, small_config, softmax_config
from tiny import write_text_model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextEncoderConfig:
    folder = tmp_path_factory.mktemp("text")
    write_text_model(folder)
    return TextEncoderConfig(source=str(folder), templates=("{}",))


def plain(rivals: int = 6, **changes: dict[str, Any]) -> DetectorConfig:
    """A METR with DETR's layers."""
    values = softmax_config().model_dump()
    for part, options in {"similarity": {"rivals": rivals}, **changes}.items():
        values[part] |= options
    return DetectorConfig.model_validate(values)


def in_softmax(logits: Tensor) -> Tensor:
    """The logits of the probabilities that a softmax gives, for all columns."""
    others = [logits[..., [n for n in range(logits.shape[-1]) if n != k]] for k in range(logits.shape[-1])]
    return torch.stack([logits[..., k] - rest.logsumexp(-1) for k, rest in enumerate(others)], dim=-1)


@torch.no_grad()
def test_detr(tmp_path: Path, text: TextEncoderConfig) -> None:
    theirs = written("detr", plain(), tmp_path / "theirs")
    ours, report = import_detector(tmp_path / "theirs", text=text, device="cpu")
    assert (report.start, report.left_over) == ("", ())
    assert all(key.startswith("category_extraction.") for key in report.afresh)
    ours.save_pretrained(tmp_path / "ours")
    model = METR.from_pretrained(tmp_path / "ours", device="cpu")
    same_answers(model, theirs, lambda logits: in_softmax(logits)[..., :-1], again="detr")
    # fewer names, each as it was
    image = (torch.rand(80, 90, 3) * 255).byte().numpy()
    every = InferenceConfig(postprocess=PostprocessConfig(nms_iou=None))
    alone, all_ = (model.predictor(names, config=every).detect(image) for names in (("otter",), None))
    wanted = all_.scores[all_.labels == model.names.index("otter")]
    torch.testing.assert_close(alone.scores[: len(wanted)], wanted, atol=1e-6, rtol=0)
    fewer = to_detector(model, "detr", ["otter", "bear"]).report.notes
    assert fewer == ("a label competes with the other labels and one 'no object'; in this METR with 6 rivals",)


@pytest.mark.slow
def test_the_published_layout(tmp_path: Path, text: TextEncoderConfig) -> None:
    """Names of weights, configuration and sizes as published, with random weights; labels without a name compete."""
    theirs = as_published("detr", tmp_path)
    ours, report = import_detector(tmp_path, text=text, device="cpu")
    assert report.left_over == ()
    assert (ours.resize.size, ours.resize.longest) == (800, 1333)
    kept = sorted(FACTS["detr"]["labels"])
    same_answers(ours, theirs, lambda logits: in_softmax(logits)[..., kept])
    assert len(ours.network.decoder.similarity.rivals.text) == 92


@torch.no_grad()
def test_it_detects_what_the_detector_detects(tmp_path: Path, text: TextEncoderConfig) -> None:
    """DETR says the best name of each query, METR all of them."""
    from transformers import AutoImageProcessor

    theirs = written("detr", plain(), tmp_path)
    theirs.class_labels_classifier.weight.data.mul_(3)
    save_folder(theirs, "detr", stirred(plain()), tmp_path)
    ours = from_detector(tmp_path, text=text, device="cpu")
    image = (torch.rand(90, 110, 3) * 255).byte().numpy()
    found = ours.predictor(config=InferenceConfig(postprocess=PostprocessConfig(nms_iou=None))).detect(image)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    answer = theirs(**processor(image, return_tensors="pt"))
    (wanted,) = processor.post_process_object_detection(answer, threshold=0.0, target_sizes=[(90, 110)])
    boxes = clip(wanted["boxes"], 90.0, 110.0)
    assert len(boxes) == 24
    said = list(zip((ours.names[label] for label in found.labels), found.scores.tolist(), strict=True))
    for label, score in zip(wanted["labels"].tolist(), wanted["scores"].tolist(), strict=True):
        assert any(name == LABELS[label] and abs(own - score) < 1e-4 for name, own in said), (LABELS[label], score)
    assert torch.cdist(boxes, found.boxes).amin(1).max() < 0.1


def test_it_trains_from_scratch() -> None:
    trains(plain())


@torch.no_grad()
def test_rivals_are_a_softmax() -> None:
    """For each name that a rival stands for, and for any other, one by one and all at once, however sure they are."""
    torch.manual_seed(0)
    head = stir(ClassifierHead(8, TEXT_WIDTH, 0.01, rivals=5))
    names = torch.nn.functional.normalize(torch.randn(4, TEXT_WIDTH), dim=-1)
    head.rivals.text[:3] = names[:3]
    features = torch.randn(2, 6, 8) * 40
    found = head.all_pairs(features, names.expand(2, -1, -1))
    own, rivals = features @ head.weight(names).T + head.bias(names).T, head.rivals.logits(features)
    for name in range(4):
        others = [row for row in range(5) if row != name or name == 3]
        wanted = (own[..., name] - rivals[..., others].logsumexp(-1)).double()
        torch.testing.assert_close(found[..., name], wanted.float(), atol=1e-4, rtol=1e-5)
        alone = head(features, names[name].expand(2, 6, -1))
        torch.testing.assert_close(alone, found[..., name], atol=1e-4, rtol=1e-5)
    assert found.isfinite().all()
    head.rivals.logits.weight.mul_(1e4)
    assert head.all_pairs(features, names.expand(2, -1, -1)).isfinite().all()


@torch.no_grad()
def test_what_differs_is_told() -> None:
    """Rivals without names, names that do not compete, and other detectors."""
    network = stirred(plain())
    done = transfer(find_target("detr"), network, NAMES, texts())
    assert "in this METR with 6 rivals" in " ".join(done.report.notes)
    classes = done.model.class_labels_classifier
    rivals, mean = network.decoder.similarity.rivals.logits, network.decoder.norm.bias
    torch.testing.assert_close(classes(mean)[-1], rivals(mean).logsumexp(0))
    alone = transfer(find_target("detr"), stirred(plain(0, decoder={"refine": "each"})), NAMES, texts())
    told = " ".join(alone.report.notes)
    assert "its labels compete in a softmax; METR's names do not" in told
    assert "it has decoder.refine 'none'; this METR has 'each'" in told
    assert alone.model.class_labels_classifier.bias[-1] == 0
    other = transfer(find_target("conditional_detr"), network, NAMES, texts()).report
    assert "and a plain one: only the backbone moves" in " ".join(other.notes)
    values = small_config(encoder="plain", denoising=0).model_dump()
    values["queries"] |= {"places": "learned", "layout": "places", "content": "none"}
    values["decoder"] |= {"positions": "learned"}
    rest = transfer(find_target("detr"), stirred(DetectorConfig.model_validate(values)), NAMES, texts()).report
    assert "Train with model.decoder.kind=plain to move more" in " ".join(rest.notes)


@pytest.mark.parametrize(
    ("option", "value"),
    [("auxiliary_loss", True), ("position_embedding_type", "learned"), ("activation_function", "gelu")],
)
def test_what_metr_has_no_counterpart_of_is_named(option: str, value: object) -> None:
    from transformers import DetrConfig

    target = find_target("detr")
    assert target.adopt is not None
    with pytest.raises(ModelError, match=f"METR needs {option} = .*, found {value!r}"):
        target.adopt(DetrConfig(**{option: value}), plain().backbone, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": {"kind": "conditional"}}, "point_layers 0 is for decoder.kind 'plain', not 'conditional'"),
        ({"decoder": {"kind": "conditional"}, "queries": {"point_layers": 2}}, "rivals is for decoder.kind 'plain'"),
        ({"decoder": {"extents": False}}, "extents is for kind 'conditional'; with 'plain' leave it at True"),
        ({"decoder": {"boxes": "reparametrised"}}, "decoder.boxes is for decoder.kind 'deformable'"),
        ({"decoder": {"predictors": "layer"}}, "decoder.predictors 'layer' is for decoder.kind 'deformable'"),
        ({"decoder": {"first_samples": "cells"}}, "first_samples 'cells' is for decoder.kind 'deformable'"),
        ({"decoder": {"positions": "sine"}}, "needs decoder.positions 'learned', found 'sine'"),
        ({"similarity": {"form": "product"}}, "rivals is for form 'classifier'; with 'product' leave it at 0"),
        ({"denoising": {"number": 6}}, "needs denoising.number 0, found 6"),
    ],
)
def test_options_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(**changes)
