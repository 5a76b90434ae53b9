"""What an image processor's file says is followed, told, or refused; the numbers are transformers' arithmetic."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metr.conversion.preprocessing import FILE, read_preprocessing
from metr.errors import CheckpointError

FACTS: dict[str, Any] = {
    "image_processor_type": "RfDetrImageProcessor",
    "size": {"height": 96, "width": 96},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
}


def written(folder: Path, **values: Any) -> Path:
    (folder / FILE).write_text(json.dumps({**FACTS, **values}))
    return folder


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False},
        {"do_normalize": False},
        {"image_mean": 0.5, "image_std": 0.5},
    ],
)
def test_colours_are_those_of_the_processor(tmp_path: Path, values: dict[str, Any]) -> None:
    found = read_preprocessing(written(tmp_path, **values))
    facts = {"rescale_factor": 1 / 255, **FACTS, **values}
    pixels = np.array([0.0, 100.0, 255.0])
    expected = pixels * facts["rescale_factor"] if facts.get("do_rescale", True) else pixels
    if facts.get("do_normalize", True):
        expected = (expected - np.array(facts["image_mean"])) / np.array(facts["image_std"])
    np.testing.assert_allclose((pixels / 255 - np.array(found.mean)) / np.array(found.std), expected, rtol=1e-9)
    assert found.differences == ()


def test_the_combined_file_goes_first(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": FACTS, "processor_class": "P"}))
    alone = read_preprocessing(tmp_path)
    assert alone.resize is not None
    assert alone.resize.size == 96
    assert read_preprocessing(written(tmp_path, size={"height": 64, "width": 64})) == alone
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "P"}))
    other = read_preprocessing(tmp_path)
    assert other.resize is not None
    assert other.resize.size == 64
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": [1]}))
    with pytest.raises(CheckpointError, match=r"processor_config\.json: the whole: expected an object"):
        read_preprocessing(tmp_path)


def test_an_rf_detr_without_the_kind_of_its_processor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rf_detr"}))
    facts = {key: value for key, value in FACTS.items() if key != "image_processor_type"}
    (tmp_path / FILE).write_text(json.dumps(facts))
    assert read_preprocessing(tmp_path) == read_preprocessing(written(tmp_path))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"size": {"height": 96, "width": 160}}, "96 x 160 pixels, here 160 x 160"),
        ({"size": {"max_height": 96, "max_width": 160}}, "no counterpart"),
        ({"do_resize": False}, "not resized"),
        ({"resample": 1}, "filter lanczos"),
        ({"resample": [2]}, "filter another one"),
        ({"size": None}, "gives no size"),
        ({"size": {}}, "gives no size"),
        ({"do_center_crop": True, "crop_size": {"height": 64, "width": 64}}, "are cropped"),
        ({"do_pad": True, "pad_size": {"height": 640, "width": 640}}, "padded to"),
    ],
)
def test_what_metr_does_otherwise_is_told(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    (difference,) = read_preprocessing(written(tmp_path, **values)).differences
    assert said in difference


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", None),
        ("image_mean", [0.5]),
        ("image_mean", ["a", "b", "c"]),
        ("image_std", [0.2, 0.0, 0.2]),
        ("image_std", [0.2, float("nan"), 0.2]),
        ("rescale_factor", 0),
        ("rescale_factor", "x"),
        ("size", {"height": -5, "width": 96}),
        ("size", {"height": 128.5, "width": 96}),
        ("size", {"height": 0, "width": 0}),
        ("size", {"shortest_edge": 10**7}),
        ("size", "big"),
    ],
)
def test_values_that_make_no_sense_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=key) as caught:
        read_preprocessing(written(tmp_path, **{key: value}))
    assert FILE in str(caught.value)


def test_one_number_is_both_sides(tmp_path: Path) -> None:
    resize = read_preprocessing(written(tmp_path, size=128)).resize
    assert resize is not None
    assert (resize.mode, resize.size) == ("stretch", 128)
