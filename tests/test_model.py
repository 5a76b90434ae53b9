"""METR as its users hold it: loaded from a folder alone, asked for any names, saved again."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from metr.checkpoint import DetectionDefaults
from metr.data.images import read_image
from metr.errors import CheckpointError, ConfigError, DataError
from metr.inference.config import InferenceConfig, PostprocessConfig, inference_config
from metr.model import METR
from metr.structures import Detections
from metr.text.encoder import TextEncoder, TextEncoderConfig
from metr.text.same_names import in_another_case
from metr.text.vocabulary import Vocabulary

from tiny import NAMES, TinyRun, tiny_run, write_text_model

__all__ = ["tiny_run"]

ALL_NAMES = tuple(dict.fromkeys(name for names in NAMES.values() for name in names))
ANOTHER_PROCESS = """
import json, sys
from metr import METR
model = METR.from_pretrained(sys.argv[1], device="cpu")
trained = model.detect(sys.argv[2], threshold=0.0)
new = model.detect(sys.argv[2], json.loads(sys.argv[3]), threshold=0.0)
plain = lambda one: {"boxes": one.boxes.tolist(), "scores": one.scores.tolist(), "labels": one.labels.tolist()}
print(json.dumps({"names": model.names, "trained": plain(trained), "new": plain(new)}))
"""


@pytest.fixture(scope="module")
def model(tiny_run: TinyRun) -> METR:
    return METR.from_pretrained(tiny_run.folder, device="cpu")


def same(found: Detections, expected: Detections, **tolerance: float) -> None:
    assert found.names == expected.names
    torch.testing.assert_close(found.scores, expected.scores, **tolerance)
    torch.testing.assert_close(found.boxes, expected.boxes, **tolerance)
    assert found.labels.tolist() == expected.labels.tolist()


def moved(run: TinyRun, place: Path) -> Path:
    """The checkpoint folder alone."""
    return Path(shutil.copytree(run.best, place / "elsewhere"))


def test_a_detector_that_has_learnt_nothing_says_so_once(model: METR, caplog: pytest.LogCaptureFixture) -> None:
    """Its checkpoint knows the AP of the evaluation that it was saved after."""
    for value, told in ((0.0, 1), (12.5, 0)):
        caplog.clear()
        training = {**model.checkpoint.training, "step": 60, "metrics": {"AP": value, "AP pond": value}}
        one = METR(model.network, replace(model.checkpoint, training=training))
        for _ in range(2):
            one.predictor(list(ALL_NAMES[:2]))
        assert caplog.text.count("has learnt next to nothing: AP was 0 on val after step 60") == told


def test_it_knows_every_name_of_every_dataset(model: METR) -> None:
    assert model.names == ALL_NAMES
    assert model.vocabulary.datasets == NAMES
    assert model.checkpoint.training["step"] == 3
    assert model.checkpoint.training["unannotated"] == "negative"
    assert not model.network.training


def test_a_run_folder_means_its_best_checkpoint(model: METR, tiny_run: TinyRun, tmp_path: Path) -> None:
    alone = METR.from_pretrained(str(moved(tiny_run, tmp_path)))
    same(
        alone.detect(tiny_run.unseen[0], threshold=0.0), model.detect(tiny_run.unseen[0], threshold=0.0), rtol=0, atol=0
    )


def test_default_names_are_those_of_training(model: METR, tiny_run: TinyRun) -> None:
    same(model.detect(tiny_run.unseen[0]), model.detect(tiny_run.unseen[0], list(model.names)))
    assert model.detect(tiny_run.unseen[0]).names == model.names


def test_embeddings_of_training_need_no_text_encoder(
    model: METR, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("the text encoder was asked")

    monkeypatch.setattr(METR, "_text_encoder", refused)
    trained = model.embed(["leaf", "book"])
    torch.testing.assert_close(trained[0], model.checkpoint.text_embeddings[model.names.index("leaf")])
    with pytest.raises(AssertionError, match="was asked"):
        model.embed(["leaf", "zebra"])


def test_new_names_are_embedded_as_training_would(model: METR, tiny_run: TinyRun) -> None:
    encoder = TextEncoder(TextEncoderConfig(source=str(tiny_run.text_model), templates=("{}", "a {}")))
    names = ["zebra", "leaf", "traffic cone"]
    torch.testing.assert_close(model.embed(names), encoder.embed(names))
    found = model.detect(tiny_run.unseen[0], names, threshold=0.0)
    assert found.names == tuple(names)
    assert len(found) > 0


def test_a_prompt_is_embedded_instead_of_the_name(model: METR) -> None:
    prompted = model.embed(Vocabulary.of(["leaf", "WBC", "RBC"], {"WBC": "white blood cell", "leaf": "autumn leaf"}))
    plain = model.embed(["autumn leaf", "white blood cell", "RBC"])
    torch.testing.assert_close(prompted, plain)
    assert not torch.allclose(prompted[0], model.embed(["leaf"])[0])


def test_the_order_of_names_changes_labels_alone(model: METR, tiny_run: TinyRun) -> None:
    names = ["zebra", "leaf", "book"]
    found = model.detect(tiny_run.unseen[1], names, threshold=0.0)
    turned = model.detect(tiny_run.unseen[1], names[::-1], threshold=0.0)
    torch.testing.assert_close(found.scores, turned.scores)
    for row, name in enumerate(names):
        here, there = found.scores[found.labels == row], turned.scores[turned.labels == 2 - row]
        assert turned.names[2 - row] == name
        torch.testing.assert_close(here, there)


def test_a_list_gives_what_each_image_gives_alone(model: METR, tiny_run: TinyRun) -> None:
    first = read_image(tiny_run.unseen[0])
    images = [*tiny_run.unseen, first.transpose(1, 0, 2).copy(), Image.fromarray(first), str(tiny_run.unseen[0])]
    together = model.detect(images, threshold=0.0)
    assert len(together) == len(images)
    for found, image in zip(together, images, strict=True):
        same(found, model.detect(image, threshold=0.0), rtol=1e-4, atol=1e-4)
    same(together[-1], together[0])
    assert model.detect([]) == []


def test_boxes_lie_in_the_image_and_scores_fall(model: METR, tiny_run: TinyRun) -> None:
    found = model.detect(tiny_run.unseen[0], threshold=0.0)
    height, width = read_image(tiny_run.unseen[0]).shape[:2]
    assert found.boxes.min() >= 0
    assert (found.boxes <= torch.tensor([width, height, width, height])).all()
    assert (found.scores.diff() <= 0).all()
    assert 0 <= found.scores.min() <= found.scores.max() <= 1


def test_the_threshold_is_the_least_score(model: METR, tiny_run: TinyRun) -> None:
    everything = model.detect(tiny_run.unseen[0], threshold=0.0)
    middle = float(everything.scores.median())
    some = model.detect(tiny_run.unseen[0], threshold=middle)
    assert len(some) == int((everything.scores >= middle).sum())
    none = model.detect(tiny_run.unseen[0], threshold=1.0)
    assert (tuple(none.boxes.shape), len(none), tuple(none.labels.shape)) == ((0, 4), 0, (0,))


def test_a_predictor_takes_settings_of_ones_own(model: METR, tiny_run: TinyRun) -> None:
    config = InferenceConfig(postprocess=PostprocessConfig(max_detections=3))
    assert len(model.predictor(["leaf"], config).detect(tiny_run.unseen[0])) == 3


def test_saved_again_it_is_the_same(model: METR, tiny_run: TinyRun, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "again")
    assert "README.md" not in {path.name for path in (tmp_path / "again").iterdir()}  # `metr.save` writes a card
    again = METR.from_pretrained(tmp_path / "again")
    same(
        again.detect(tiny_run.unseen[0], threshold=0.0), model.detect(tiny_run.unseen[0], threshold=0.0), rtol=0, atol=0
    )
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (tiny_run.best / "config.json").read_text()
    )
    again.save_pretrained(tmp_path / "again")  # in its own place


def test_half_precision_halves_the_file_and_hardly_changes_answers(
    model: METR, tiny_run: TinyRun, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    stored = load_file(tmp_path / "half/model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    full, half = (path / "model.safetensors" for path in (tiny_run.best, tmp_path / "half"))
    assert half.stat().st_size < 0.6 * full.stat().st_size
    again = METR.from_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in again.network.parameters()} == {torch.float32}
    text = model.embed(model.names)
    images, padding = torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    with torch.inference_mode():
        outputs = [one.network(images, padding, text).categories.presence_logits for one in (again, model)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.02, atol=0.02)


def test_another_text_encoder_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    write_text_model(tmp_path / "text", seed=1)
    folder = moved(tiny_run, tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values["text_encoder"]["source"] = str(tmp_path / "text")
    (folder / "config.json").write_text(json.dumps(values))
    changed = METR.from_pretrained(folder)
    assert changed.detect(tiny_run.unseen[0]).names == ALL_NAMES  # names of training do not need it
    with pytest.raises(CheckpointError, match="not the text encoder of training: expected bert sha256:"):
        changed.detect(tiny_run.unseen[0], ["zebra"])


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("bicycle", r"expected a list of names, found the text 'bicycle'\n  try: \['bicycle'\]"),
        (["leaf", " leaf"], "given twice: 'leaf'"),
        (["leaf", ""], "a name is empty"),
        ([], "expected at least one name"),
    ],
)
def test_names_that_cannot_be_asked_for(model: METR, tiny_run: TinyRun, names: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        model.detect(tiny_run.unseen[0], names)


def test_images_that_cannot_be_read(model: METR, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DataError, match=r"nowhere\.jpg: no such image"):
        model.detect(tmp_path / "nowhere.jpg")
    with pytest.raises(DataError, match=r"empty\.jpg: an empty file"):
        model.detect([tiny_run.unseen[0], tmp_path / "empty.jpg"])
    with pytest.raises(ConfigError, match="threshold"):
        model.detect(tiny_run.unseen[0], threshold=30.0)


def test_a_device_that_is_not_there(tiny_run: TinyRun) -> None:
    with pytest.raises(ConfigError, match="device: no device 'cuda:77'"):
        METR.from_pretrained(tiny_run.folder, device="cuda:77")


def test_neither_a_folder_nor_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def offline(name: str, **_: object) -> str:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match="user/nothing: no network"):
        METR.from_pretrained("user/nothing")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        METR.from_pretrained(tmp_path / "nothing")
    assert asked == ["user/nothing"]


def test_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch, tiny_run: TinyRun) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tiny_run.best))
    assert METR.from_pretrained("user/detector").names == ALL_NAMES


@pytest.mark.slow
def test_the_folder_alone_works_in_another_process_offline(model: METR, tiny_run: TinyRun, tmp_path: Path) -> None:
    folder, names = moved(tiny_run, tmp_path), ["zebra", "frog"]
    offline = {"HF_HUB_OFFLINE": "1", "METR_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS, str(folder), str(tiny_run.unseen[0]), json.dumps(names)],
        cwd=tmp_path,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert tuple(told["names"]) == ALL_NAMES
    for key, found in (
        ("trained", model.detect(tiny_run.unseen[0], threshold=0.0)),
        ("new", model.detect(tiny_run.unseen[0], names, threshold=0.0)),
    ):
        torch.testing.assert_close(torch.tensor(told[key]["scores"]), found.scores)
        torch.testing.assert_close(torch.tensor(told[key]["boxes"]), found.boxes)
        assert told[key]["labels"] == found.labels.tolist()


def test_names_that_were_not_trained_are_told_once(tiny_run: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    model = METR.from_pretrained(tiny_run.folder, device="cpu")
    model.detect(tiny_run.unseen[0], ["leaf", "book"])
    assert "not trained" not in caplog.text
    caplog.clear()  # a run of three steps has learnt nothing, which is told too
    model.detect(tiny_run.unseen[0], ["leaf", "Books"])
    assert '"Books" was not trained; nearest: "book" ' in caplog.text
    assert "for better results" in caplog.text
    caplog.clear()
    model.detect(tiny_run.unseen[1], ["leaf", "Books"])
    model.embed(["zebra"], tell=False)
    assert caplog.text == ""
    model.embed(Vocabulary.of(["leaf"], {"leaf": "autumn leaf"}))
    assert '"leaf" as "autumn leaf" was not trained; nearest: "leaf" ' in caplog.text


def test_default_names_and_aliases(tiny_run: TinyRun, tmp_path: Path) -> None:
    trained = METR.from_pretrained(tiny_run.folder, device="cpu")
    assert trained.default_names == trained.names
    detection = DetectionDefaults(names=("cup", "leaf"), aliases={"mug": "cup"})
    METR(trained.network, replace(trained.checkpoint, detection=detection)).save_pretrained(tmp_path / "own")
    model = METR.from_pretrained(tmp_path / "own", device="cpu")
    assert model.checkpoint.detection == detection
    assert model.default_names == model.detect(tiny_run.unseen[0]).names == model.predictor().names == ("cup", "leaf")
    assert model.names == ALL_NAMES
    assert torch.equal(model.embed(["mug"]), model.embed(["cup"])), "another name for the same"
    values = json.loads((tmp_path / "own/config.json").read_text())
    values["detection"]["aliases"] = {"mug": "goblet"}
    (tmp_path / "own/config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="goblet"):
        METR.from_pretrained(tmp_path / "own")


def test_an_alias_has_the_threshold_and_the_limits_of_its_name(tiny_run: TinyRun) -> None:
    loaded = METR.from_pretrained(tiny_run.best, device="cpu")
    checkpoint = loaded.checkpoint
    detection = DetectionDefaults(aliases={"mug": "cup"}, thresholds={"cup": 0.6}, calibration={"cup": (2.0, 0.5)})
    model = METR(loaded.network, replace(checkpoint, detection=detection))
    assert model.thresholds().names == {"cup": 0.6, "mug": 0.6}
    assert model.thresholds(0.2).names == {}
    assert model.predictor(["mug"]).config.postprocess.calibration == {"cup": (2.0, 0.5), "mug": (2.0, 0.5)}
    for given, asked, holds in (("CUP", ["cup"], "cup"), ("cup", ["Cup"], "Cup"), ("Mug", ["MUG", "cup"], "MUG")):
        own = inference_config([f"inference.postprocess.calibration.{given}=[1,5]"])
        assert model.predictor(asked, own).config.postprocess.calibration[holds] == (1, 5), given
    slots = checkpoint.model.categories.kept
    many = [f"untrained {number}" for number in range(slots)]
    predictor = model.predictor(["mug", *many])
    assert predictor.limits is not None
    least = predictor.limits.presence.tolist()
    assert least[0] == pytest.approx(checkpoint.model.categories.threshold)
    assert least[1] == pytest.approx(0.02)


def test_a_trained_name_in_another_case_is_that_name(tiny_run: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    loaded = METR.from_pretrained(tiny_run.best, device="cpu")
    detection = DetectionDefaults(thresholds={"cup": 0.01, "leaf": 0.02})
    model = METR(loaded.network, replace(loaded.checkpoint, detection=detection))
    caplog.set_level(logging.INFO)
    found, expected = (
        model.detect(tiny_run.unseen[1], ["CUP", "leaf"]),
        model.detect(tiny_run.unseen[1], ["cup", "leaf"]),
    )
    assert found.names == ("CUP", "leaf")
    assert len(found.labels)
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.labels, expected.labels)
    assert caplog.text.count('"CUP" is taken as "cup"') == 1
    assert "was not trained" not in caplog.text
    assert model.thresholds(names=["CUP", "Zebra"]).names == {"CUP": 0.01, "cup": 0.01, "leaf": 0.02}
    # where both are asked for, or two are the same but for the case, each is itself
    assert in_another_case(["CUP", "cup"], ["cup"]) == in_another_case(["CUP", "Cup"], ["cup"]) == {}
    assert in_another_case(["rbc"], ["RBC", "Rbc"]) == in_another_case(["zebra"], ["RBC"]) == {}
    assert in_another_case(["rbc", "Wbc"], ["RBC", "WBC"]) == {"rbc": "RBC", "Wbc": "WBC"}


def test_a_start_says_that_it_was_not_trained(tiny_run: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    trained = METR.from_pretrained(tiny_run.folder, device="cpu")
    start = METR(trained.network, replace(trained.checkpoint, training={"started from": "RT-DETR, folder"}))
    start.detect(tiny_run.unseen[0])
    assert "no detector yet: it has weights of RT-DETR, folder and saw no image; metr finetune trains it" in caplog.text
