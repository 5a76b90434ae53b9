"""Checkpoints: written, read back in another process, damaged in every way."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metr.checkpoint import (
    Checkpoint,
    DetectionDefaults,
    find_checkpoint,
    found_nothing,
    load_checkpoint,
    save_checkpoint,
)
from metr.errors import CheckpointError
from metr.models.detector import Detector
from metr.serialization import load_weights
from small_runs import make_description

from small import TEXT_WIDTH, small_config, small_detector


def make_checkpoint() -> Checkpoint:
    description = make_description()
    weights = small_detector(description.model).state_dict()
    return replace(description, weights=weights, training={"step": 12, "metrics": {"AP": 3.5}})


@pytest.mark.parametrize(
    ("metrics", "nothing"),
    [
        ({"AP": 0.0, "AP50": 0.3, "AP pond": 0.04, "AP joint vocabulary": 0.0, "cross-dataset confusion": 49.0}, True),
        ({"AP": 0.05, "AP pond": 0.1, "AP desk": 0.0}, False),
        ({"AP joint vocabulary": 0.0}, True),
        ({"loss": 0.0}, False),
        ({}, False),
        ({"AP": "none"}, False),
    ],
)
def test_whether_an_evaluation_found_nothing(metrics: dict[str, Any], nothing: bool) -> None:
    assert found_nothing(metrics) == nothing


def test_round_trip(tmp_path: Path) -> None:
    saved = make_checkpoint()
    save_checkpoint(tmp_path / "best", saved)
    loaded = load_checkpoint(tmp_path / "best")
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "config.json", "model.safetensors", "text_embeddings.safetensors", "vocabulary.json",
    ]  # fmt: skip
    assert loaded.model == saved.model
    assert loaded.vocabulary == saved.vocabulary
    assert torch.equal(loaded.text_embeddings, saved.text_embeddings)
    assert (loaded.text_encoder, loaded.preprocessing) == (saved.text_encoder, saved.preprocessing)
    assert loaded.training == saved.training
    assert loaded.text_width == TEXT_WIDTH
    assert loaded.weights.keys() == saved.weights.keys()
    assert all(torch.equal(loaded.weights[key], saved.weights[key]) for key in saved.weights)


def test_what_detection_does_by_default_is_kept(tmp_path: Path) -> None:
    saved = make_checkpoint()
    first, second = saved.vocabulary.names[:2]
    defaults = DetectionDefaults(names=(first,), thresholds={second: 0.4})
    save_checkpoint(tmp_path / "best", replace(saved, detection=defaults))
    assert load_checkpoint(tmp_path / "best").detection == defaults


def test_a_checkpoint_without_detection_defaults_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_checkpoint())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["detection"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(tmp_path).detection == DetectionDefaults()


def test_who_may_read_the_folder_may_read_its_tensors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best", make_checkpoint())
    assert len({path.stat().st_mode for path in (tmp_path / "best").iterdir()}) == 1


def test_half_precision_on_disk(tmp_path: Path) -> None:
    saved = make_checkpoint()
    save_checkpoint(tmp_path / "full", saved)
    save_checkpoint(tmp_path / "half", saved, dtype=torch.float16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = load_checkpoint(tmp_path / "half")
    kinds = {key: value.dtype for key, value in loaded.weights.items()}
    for key, value in saved.weights.items():
        assert kinds[key] == (torch.float16 if value.is_floating_point() else value.dtype)
    assert loaded.text_embeddings.dtype == torch.float32
    network = Detector(loaded.model, loaded.text_width)
    load_weights(network, loaded.weights)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


@pytest.mark.slow
def test_another_process_detects_the_same_offline(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    save_checkpoint(tmp_path / "best", checkpoint)
    script = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from metr.checkpoint import load_checkpoint
from metr.serialization import load_weights
from metr.models.detector import Detector
checkpoint = load_checkpoint(Path(sys.argv[1]))
network = Detector(checkpoint.model, checkpoint.text_width).eval()
load_weights(network, checkpoint.weights)
images = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
with torch.no_grad():
    output = network(images, torch.zeros(1, 64, 64, dtype=torch.bool), checkpoint.text_embeddings)
save_file({"logits": output.logits, "boxes": output.boxes}, sys.argv[2])
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "best"), str(tmp_path / "out")], check=True, env=environment
    )
    from safetensors.torch import load_file

    network = small_detector(checkpoint.model).eval()
    images = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    with torch.no_grad():
        output = network(images, torch.zeros(1, 64, 64, dtype=torch.bool), checkpoint.text_embeddings)
    answers = load_file(tmp_path / "out")
    torch.testing.assert_close(answers["logits"], output.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(answers["boxes"], output.boxes, atol=1e-5, rtol=0)


def test_a_run_means_its_best_checkpoint_else_its_last(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    save_checkpoint(tmp_path / "last", checkpoint)
    assert find_checkpoint(tmp_path) == tmp_path / "last"
    save_checkpoint(tmp_path / "best", checkpoint)
    assert find_checkpoint(tmp_path) == tmp_path / "best"
    assert find_checkpoint(tmp_path / "last") == tmp_path / "last"
    (tmp_path / "best").rename(tmp_path / ".best.previous")
    assert find_checkpoint(tmp_path) == tmp_path / ".best.previous", "a crash between two renames"


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make_checkpoint())
    other = Detector(small_config().model_copy(update={"width": 64}), TEXT_WIDTH)
    with pytest.raises(CheckpointError) as caught:
        load_weights(other, load_checkpoint(tmp_path).weights, where=tmp_path)
    message = str(caught.value)
    assert "of another shape" in message
    assert "expected" in message
    assert "try: the checkpoint is of another size" in message


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "torn weights": (lambda folder: truncate(folder / "model.safetensors"), "not readable as safetensors"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not readable as safetensors"),
    "no vocabulary": (lambda folder: (folder / "vocabulary.json").unlink(), "vocabulary.json: no such file"),
    "torn json": (lambda folder: truncate(folder / "vocabulary.json"), "not readable as JSON"),
    "binary json": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "not readable as JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "expected keys and values, found a list"),
    "unannotated": (lambda folder: edit_config(folder, format="other"), "not a METR checkpoint"),
    "future": (lambda folder: edit_config(folder, format_version=2), "format version 2; .*up to 1\n  try: update metr"),
    "no version": (lambda folder: edit_config(folder, format_version=None), "format version None"),
    "no model": (lambda folder: edit_config(folder, model=None), "expected 'model' to be a dict, found None"),
    "unknown key": (lambda folder: edit_config(folder, model={"widht": 64}), "unknown key 'widht'\n.*'width'"),
    "text width": (lambda folder: edit_config(folder, text_width=99), r"expected 'embeddings' of shape \[4, 99\]"),
    "unknown default": (lambda folder: edit_config(folder, detection={"nmas": []}), "unknown key 'nmas'"),
    "no defaults": (lambda folder: edit_config(folder, detection=[1]), "expected keys and values, found "),
    "strange names": (lambda folder: edit_config(folder, detection={"names": ["yeti"]}), r"lacks: \['yeti'\]"),
    "threshold": (lambda folder: edit_config(folder, detection={"thresholds": {"yeti": 2}}), "less than or equal to 1"),
    "torn embeddings": (lambda folder: truncate(folder / "text_embeddings.safetensors"), "not readable as safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_message(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path / "run", make_checkpoint())
    harm, message = DAMAGES[damage]
    harm(tmp_path / "run")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "run")
    assert str(tmp_path) in str(caught.value)
    assert caught.value.hint


def test_a_missing_or_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"expected a checkpoint \(config.json and model.safetensors\)"):
        load_checkpoint(tmp_path)


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    table = torch.randn(3, 4)
    save_checkpoint(tmp_path, replace(make_description(), weights={"a": table, "b": table, "part": table[1:].t()}))
    loaded = load_checkpoint(tmp_path).weights
    assert torch.equal(loaded["a"], loaded["b"])
    assert torch.equal(loaded["part"], table[1:].t())
