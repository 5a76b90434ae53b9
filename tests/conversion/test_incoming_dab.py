"""DAB-DETR becomes METR and finds the same, before any training, and back again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_cases import NAMES, stirred, texts
from single_scale_cases import FACTS, LABELS, as_published, same_answers, trains, written

from metr.boxes import clip
from metr.conversion.adoption import from_detector, import_detector
from metr.conversion.export import transfer
from metr.conversion.targets import find_target
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


def boxes(content: str = "patterns", **changes: dict[str, Any]) -> DetectorConfig:
    """A METR with DAB-DETR's layers and learned boxes."""
    values = small_config(encoder="plain", denoising=6).model_dump()
    own = {"activation": "prelu", "temperature": 20}
    values["encoder"] |= own | {"position_scale": True}
    values["decoder"] |= own | {"smallest_side": 1e-6, "box_margin": 1e-5}
    values["queries"] |= {"places": "learned_boxes", "layout": "places", "content": content}
    values["queries"] |= {"patterns": 3} if content == "patterns" else {}
    for part, options in changes.items():
        values[part] |= options
    return DetectorConfig.model_validate(values)


@torch.no_grad()
def test_dab_detr(tmp_path: Path, text: TextEncoderConfig) -> None:
    theirs = written("dab_detr", boxes(), tmp_path / "theirs")
    assert (theirs.config.num_patterns, theirs.config.num_queries) == (3, 8)
    ours, report = import_detector(tmp_path / "theirs", text=text, device="cpu")
    assert (report.start, report.left_over) == ("", ())
    assert all(key.startswith(("category_extraction.", "denoising.")) for key in report.afresh)
    ours.save_pretrained(tmp_path / "ours")
    model = METR.from_pretrained(tmp_path / "ours", device="cpu")
    same_answers(model, theirs, lambda logits: logits, again="dab_detr")


@pytest.mark.slow
def test_the_published_layout(tmp_path: Path, text: TextEncoderConfig) -> None:
    """Names of weights, configuration and sizes as published, with random weights."""
    theirs = as_published("dab_detr", tmp_path)
    ours, report = import_detector(tmp_path, text=text, device="cpu")
    assert report.left_over == ()
    assert (ours.resize.size, ours.resize.longest) == (800, 1333)
    kept = sorted(FACTS["dab_detr"]["labels"])
    same_answers(ours, theirs, lambda logits: logits[..., kept])


@torch.no_grad()
def test_it_detects_what_the_detector_detects(tmp_path: Path, text: TextEncoderConfig) -> None:
    from transformers import AutoImageProcessor

    theirs = written("dab_detr", boxes("none"), tmp_path)
    assert theirs.config.num_patterns == 0
    ours = from_detector(tmp_path, text=text, device="cpu")
    image = (torch.rand(90, 110, 3) * 255).byte().numpy()
    found = ours.predictor(config=InferenceConfig(postprocess=PostprocessConfig(nms_iou=None))).detect(image)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    answer = theirs(**processor(image, return_tensors="pt"))
    (wanted,) = processor.post_process_object_detection(answer, threshold=0.0, target_sizes=[(90, 110)], top_k=40)
    torch.testing.assert_close(found.scores[:40], wanted["scores"], atol=1e-4, rtol=0)
    assert [ours.names[label] for label in found.labels[:40]] == [LABELS[label] for label in wanted["labels"]]
    torch.testing.assert_close(found.boxes[:40], clip(wanted["boxes"], 90.0, 110.0), atol=0.05, rtol=0)


def test_it_trains_from_scratch() -> None:
    trains(boxes())


@torch.no_grad()
def test_what_metr_has_not_changes_nothing_there() -> None:
    """One of the two activations without slopes, and contents of each query: what is told, and what is made."""
    config = boxes("learned_only", encoder={"activation": "relu", "position_scale": False, "temperature": 7})
    done = transfer(find_target("dab_detr"), stirred(config), NAMES, texts())
    assert (done.model.config.activation_function, done.model.config.num_patterns) == ("prelu", 1)
    assert done.model.model.encoder.layers[0].activation_fn.weight.item() == 0
    assert done.model.model.decoder.layers[0].mlp.activation_fn.weight.item() != 0
    told = " ".join(done.report.notes)
    assert "it has decoder.temperature 7; this METR has 20" in told
    assert "this METR's have each their own" in told
    rest = transfer(find_target("conditional_detr"), stirred(config), NAMES, texts()).report
    assert "with learned boxes: only the backbone moves" in " ".join(rest.notes)


@pytest.mark.parametrize(
    ("option", "value"),
    [("keep_query_pos", True), ("normalize_before", True), ("temperature_width", 30), ("activation_function", "gelu")],
)
def test_what_metr_has_no_counterpart_of_is_named(option: str, value: object) -> None:
    from transformers import DabDetrConfig

    config = DabDetrConfig(**{option: value})
    target = find_target("dab_detr")
    assert target.adopt is not None
    with pytest.raises(ModelError, match=f"METR needs {option} = .*, found {value!r}"):
        target.adopt(config, boxes().backbone, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": {"patterns": 5}}, "number 24 is not divisible by 5 patterns"),
        ({"queries": {"content": "none"}}, "patterns is for content 'patterns'; otherwise leave it at 1"),
        ({"queries": {"places": "proposed"}}, "'patterns' is for queries.places 'learned' and 'learned_boxes'"),
        ({"queries": {"places": "learned"}}, "found 'learned' and 'sine'"),
        ({"queries": {"layout": "uniform"}}, "'learned_boxes' needs queries.layout 'places', found 'uniform'"),
        ({"queries": {"point_layers": 2}}, "point_layers is for places 'learned'; otherwise leave it at 1"),
        ({"decoder": {"positions": "learned"}}, "found 'learned_boxes' and 'learned'"),
        ({"decoder": {"extents": False}}, "smallest_side is for extents; without them leave it at 0.001"),
        ({"decoder": {"kind": "deformable"}}, "temperature is for kind 'conditional' and 'plain'; with 'deformable'"),
        ({"decoder": {"activation": "swiglu"}}, "activation 'swiglu' is for kind 'distribution'"),
        ({"encoder": {"kind": "deformable"}}, "activation is for kind 'plain'; with 'deformable' leave it at 'relu'"),
    ],
)
def test_options_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boxes(**changes)
