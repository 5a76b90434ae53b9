"""`metr transfer`: a folder that transformers loads as it is, a checkpoint of another's folder, and mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from metr.checkpoint import DetectionDefaults
from metr.conversion import distillation
from metr.conversion.transfer import transfer
from metr.errors import CheckpointError
from metr.model import METR

from tiny import CommandLine, TinyRun


def ordinary(folder: Path) -> int:
    """The permissions that a new file has here."""
    (folder / "sample").touch()
    return (folder / "sample").stat().st_mode & 0o777


def test_to_rt_detr_and_back(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = metr("transfer", tiny_run.folder, "--to", "rt-detr", "-o", out, "--names", "fish, newt")
    assert ended.code == 0, ended.words
    assert "copied" in ended.words
    assert "counted in cells" in ended.words
    assert (
        "It is a start for training, no detector yet: its classification head was computed from the names"
        in ended.words
    )
    assert '"newt" was not trained; nearest: ' in ended.words
    assert 'never trained: "newt"' in ended.words
    assert "Trainer(model, steps, batch, images, processing_class=processor)" in ended.words
    for path in out.iterdir():
        assert path.stat().st_mode & 0o777 == ordinary(tmp_path), path
    model = AutoModelForObjectDetection.from_pretrained(out)
    assert model.config.id2label == {0: "fish", 1: "newt"}
    processor = AutoImageProcessor.from_pretrained(out)
    assert dict(processor.size) == {"height": 64, "width": 64}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))
    with torch.no_grad():
        answer = model(**processor(images=image, return_tensors="pt"))
    (found,) = processor.post_process_object_detection(answer, threshold=0.0, target_sizes=[(50, 80)])
    assert len(found["scores"]) == 24
    report = json.loads((out / "transfer.json").read_text())
    assert "no image was seen" in report["start"]
    assert report["counts"]["copied"] == len(report["copied"]) > 100
    # written again over itself, and taken back
    assert metr("transfer", tiny_run.folder, "--to", "rt_detr", "-o", out).code == 0
    assert len(AutoModelForObjectDetection.from_pretrained(out).config.id2label) == 10
    # but not over what was trained or put there
    for name in ("config.json", "notes.txt"):
        (out / name).write_text((out / name).read_text() + " " if (out / name).exists() else "mine")
        ended = metr("transfer", tiny_run.folder, "--to", "rt_detr", "-o", out)
        assert (ended.code, name in ended.words) == (1, True), ended.words
        assert "so it is not overwritten" in ended.words
    assert (out / "notes.txt").read_text() == "mine"
    text = ["--text", tiny_run.text_model]
    back = metr("transfer", "--from", out, "-o", tmp_path / "back", "--names", tiny_run.datasets[0], *text)
    assert back.code == 0, back.words
    assert "It finds what RT-DETR finds, before any training" in back.out
    assert f"go on with: metr finetune DATA --from {tmp_path / 'back'} -o RUN" in back.out
    assert set(METR.from_pretrained(tmp_path / "back", device="cpu").names) == {"fish", "frog", "leaf", "turtle"}


def test_it_is_fitted_to_images(
    metr: CommandLine,
    tiny_run: TinyRun,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the dataset whose names it gets, or photos; one that cannot be read is left out and told."""
    for least in ("_SURE", "_LEAST_SCORE"):  # this METR has learnt next to nothing
        monkeypatch.setattr(distillation, least, 0.0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    (photos / "broken.png").write_bytes(b"no image")
    given = ["--names", "fish, frog", "--images", photos]
    for more, number in ((["--names", tiny_run.datasets[0]], 0), (given, 3)):
        taught = ["--steps", 0] if number else ["--steps", 2]
        ended = metr("transfer", tiny_run.folder, "--to", "rt_detr", "-o", tmp_path / "out", *more, *taught)
        assert ended.code == 0, ended.words
        assert ("taught in 2 steps" in ended.words) == (number == 0)
        assert ("stays with METR" in ended.words) == (number > 0)
        report = json.loads((tmp_path / "out/transfer.json").read_text())
        images = report["fitted to images"]
        assert f"it was fitted to {images} images" in ended.words
        assert "no detector yet" not in ended.words
        assert images == number if number else images > 3
    assert "3 images to fit to are few" in ended.words
    assert "left out of the fit" in caplog.text
    assert "broken.png: not an image" in caplog.text
    empty = tmp_path / "empty"
    empty.mkdir()
    for place, message in ((empty, "no image"), (tmp_path / "nowhere", "no such image or folder")):
        ended = metr("transfer", tiny_run.folder, "--to", "rt_detr", "-o", tmp_path / "other", "--images", place)
        assert (ended.code, message in ended.words) == (1, True), ended.words
        assert not (tmp_path / "other").exists()


def test_a_fine_tuned_checkpoint_gives_its_default_names(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    trained = METR.from_pretrained(tiny_run.folder, device="cpu")
    tuned = replace(trained.checkpoint, detection=DetectionDefaults(names=("cup", "leaf")))
    METR(trained.network, tuned).save_pretrained(tmp_path / "tuned")
    for more, number in (([], 2), (["--names", "all"], 10)):
        ended = metr("transfer", tmp_path / "tuned", "--to", "rt_detr", "-o", tmp_path / "out", *more)
        assert ended.code == 0, ended.words
        labels = json.loads((tmp_path / "out/config.json").read_text())["id2label"]
        assert len(labels) == number


def test_another_family_is_told_of(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    ended = metr("transfer", tiny_run.folder, "--to", "deformable_detr", "-o", tmp_path / "out")
    assert ended.code == 0, ended.words
    assert "only the backbone moves" in ended.words
    assert "all but its backbone starts afresh" in ended.words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--to", "rt_dter"], "no detector 'rt_dter'"),
        (["RUN"], "expected RUN and --to"),
        (["--to", "rt_detr"], "expected RUN and --to"),
        (["RUN", "--to", "rt_detr", "--from", "RUN"], "expected --from alone"),
        (["RUN", "--to", "rt_detr", "--text", "x"], "goes with --from only"),
        (["RUN", "--to", "rt_detr", "--names", ""], "expected names or a dataset"),
        (["RUN", "--to", "rt_detr", "--names", "a,,b"], "a name is empty"),
        (["RUN", "--to", "rt_detr", "--names", "no/such/folder"], "no such dataset"),
        (["RUN", "--to", "rt_detr", "--names", "no_such_file.yaml"], "no_such_file.yaml: no such dataset"),
        (["RUN", "--to", "rt_detr", "--names", "no_such_file.ZIP"], "no_such_file.ZIP: no such dataset"),
        (["--from", "no/such/folder"], "no such checkpoint, folder or file here, and no name on the hub either"),
        (["--from", "RUN"], "is a METR already"),
        (["--from", "RUN", "--images", "."], "goes with --to only"),
        (["--from", "RUN", "--steps", "5"], "goes with --to only"),
        (["RUN", "--to", "rt_detr", "--steps", "5"], "no images to teach the detector on"),
        (["RUN", "--to", "rt_detr", "--images", ""], "expected a folder or images"),
        (["RUN", "--to", "deformable_detr", "--images", "."], "has no part that images of this METR fit"),
        (["RUN", "--to", "d_fine", "--images", "."], "differs more than a fit makes up for"),
    ],
)
def test_mistakes(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, arguments: list[str], message: str) -> None:
    words = [str(tiny_run.best) if word == "RUN" else word for word in arguments]
    ended = metr("transfer", *words, "-o", tmp_path / "out")
    assert ended.code == 1
    assert message in ended.words
    assert "Traceback" not in ended.words
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_other_things(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    ended = metr("transfer", tiny_run.folder, "--to", "rt_detr", "-o", tmp_path)
    assert ended.code == 1
    assert "not overwritten" in ended.words
    assert (tmp_path / "letter.txt").exists()


def test_a_folder_that_holds_other_things_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    for out in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(CheckpointError, match=rf"{out}: exists and is not a folder with transfer.json"):
            transfer(tmp_path / "nowhere", "rt_detr", out)


@pytest.mark.parametrize("out", [".", "/"])
def test_the_current_folder_is_not_replaced(
    out: str, metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = metr("transfer", tiny_run.folder, "--to", "rt_detr", "-o", out, "--names", "fish, frog")
    assert ended.code == 1
    assert "whose place nothing can take" in ended.words
    ended = metr("detect", out, tiny_run.unseen[0], "-o", tmp_path / "found")
    assert ended.code == 1
    assert "expected a checkpoint" in ended.words


def test_a_detector_in_the_current_folder(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_run.best)
    ended = metr("detect", ".", tiny_run.unseen[0], "-o", tmp_path / "found")
    assert ended.code == 0, ended.words
