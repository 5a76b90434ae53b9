"""The verb detect: drawn images, and what was found as COCO has it."""

import json
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core.coco import COCO
from PIL import Image
from rich.console import Console

from metr.boxes import xywh_to_xyxy
from metr.data.images import read_image
from metr.data.joint import open_joint
from metr.errors import DataError
from metr.evaluation.coco import evaluate_detections
from metr.evaluation.runner import evaluate
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.inference.detect_files import detect_files
from metr.inference.postprocess import ScoreThresholds
from metr.inference.predictor import Predictor
from metr.model import METR
from metr.structures import Detections

from tiny import TinyRun


def predictor(run: TinyRun, threshold: float = 0.3, names: list[str] | None = None) -> Predictor:
    config = InferenceConfig(postprocess=PostprocessConfig(score_threshold=threshold))
    return METR.from_pretrained(run.folder, device="cpu").predictor(names, config)


@pytest.fixture
def images(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A folder of two images, one in a subfolder, and a text."""
    (tmp_path / "images/more").mkdir(parents=True)
    shutil.copy(tiny_run.unseen[0], tmp_path / "images/a.jpg")
    shutil.copy(tiny_run.unseen[1], tmp_path / "images/more/a.JPG")
    (tmp_path / "images/notes.txt").write_text("no image")
    return tmp_path / "images"


def test_results_are_coco_results_and_their_key(tiny_run: TinyRun, images: Path, tmp_path: Path) -> None:
    out, names = tmp_path / "made/out", ["penguin", "leaf"]
    detect_files(predictor(tiny_run, 0.0, names), [images], out)
    truth = COCO(str(out / "images.json"))
    loaded = truth.loadRes(str(out / "detections.json"))
    assert [category["name"] for category in truth.loadCats(truth.getCatIds())] == names
    model = METR.from_pretrained(tiny_run.folder, device="cpu")
    for image in truth.loadImgs(truth.getImgIds()):
        path = Path(image["file_name"])
        assert read_image(path).shape[:2] == (image["height"], image["width"])
        rows = loaded.loadAnns(loaded.getAnnIds(imgIds=[image["id"]]))
        expected = model.predictor(names).detect(path)
        boxes = xywh_to_xyxy(torch.tensor([row["bbox"] for row in rows]))
        torch.testing.assert_close(boxes, expected.boxes, rtol=0, atol=0.02)
        assert [row["category_id"] - 1 for row in rows] == expected.labels.tolist()
        assert [row["score"] for row in rows] == pytest.approx(expected.scores.tolist(), abs=1e-4)
    rows = json.loads((out / "detections.json").read_text())
    assert isinstance(rows, list)
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score"}


def test_every_image_is_drawn_under_a_name_of_its_own(tiny_run: TinyRun, images: Path, tmp_path: Path) -> None:
    done = detect_files(predictor(tiny_run, 0.0), [images], tmp_path / "out", thresholds=ScoreThresholds(default=0.0))
    assert [Path(one.source).name for one in done] == ["a.jpg", "a.JPG"]
    for name, original in (("a.jpg", "a.jpg"), ("a-2.jpg", "more/a.JPG")):
        drawn, plain = read_image(tmp_path / "out" / name), read_image(images / original)
        # a small image is enlarged, so that labels can be read
        height, width = plain.shape[:2]
        assert drawn.shape == (round(height * 640 / max(height, width)), round(width * 640 / max(height, width)), 3)
        smooth = np.asarray(Image.fromarray(plain).resize(drawn.shape[1::-1], Image.Resampling.LANCZOS))
        assert (np.abs(drawn.astype(int) - smooth).max(axis=2) > 60).mean() > 0.01


def test_nothing_found_is_no_issue(tiny_run: TinyRun, images: Path, tmp_path: Path) -> None:
    (one,) = detect_files(predictor(tiny_run, 1.0), [images / "a.jpg"], tmp_path / "out")
    assert one.detections is not None
    assert len(one.detections) == 0
    assert json.loads((tmp_path / "out/detections.json").read_text()) == []
    assert len(json.loads((tmp_path / "out/images.json").read_text())["images"]) == 1
    assert (tmp_path / "out/a.jpg").is_file()


def test_what_was_drawn_before_is_not_looked_at(tiny_run: TinyRun, images: Path) -> None:
    for _ in range(2):
        done = detect_files(predictor(tiny_run), [images], images / "out")
    assert len(done) == 2


def test_a_image_is_never_drawn_over(tiny_run: TinyRun, images: Path) -> None:
    before = (images / "a.jpg").read_bytes()
    with pytest.raises(DataError, match=r"a\.jpg: a drawing would take the place of this image"):
        detect_files(predictor(tiny_run), [images], images)
    with pytest.raises(DataError, match="take the place"):
        detect_files(predictor(tiny_run), [images / "a.jpg"], images / "more/..")
    assert (images / "a.jpg").read_bytes() == before


def test_a_broken_image_is_skipped_and_listed(tiny_run: TinyRun, images: Path, tmp_path: Path) -> None:
    (images / "b.png").touch()
    console = Console(record=True, width=80, quiet=False, file=(tmp_path / "said").open("w", encoding="utf-8"))
    done = detect_files(predictor(tiny_run), [images], tmp_path / "out", console=console)
    console.file.close()
    assert [one.issue is None for one in done] == [True, False, True]
    said = (tmp_path / "said").read_text()
    assert f"skipped {images / 'b.png'}: an empty file (0 bytes), not an image\n" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a-2.jpg",
        "a.jpg",
        "detections.json",
        "images.json",
    ]
    # ids count the images as they were given: 2 is the broken one
    assert [one["id"] for one in json.loads((tmp_path / "out/images.json").read_text())["images"]] == [1, 3]


def test_many_images_are_summed_up(tiny_run: TinyRun, tmp_path: Path) -> None:
    for number in range(22):
        shutil.copy(tiny_run.unseen[0], tmp_path / f"{number:02}.jpg")
    with (tmp_path / "said").open("w", encoding="utf-8") as said:
        detect_files(predictor(tiny_run), [tmp_path], tmp_path / "out", console=Console(file=said, width=80))
    text = (tmp_path / "said").read_text()
    assert "19.jpg: " in text
    assert "20.jpg: " not in text
    assert "and 2 more" in text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("nowhere.jpg", "no such image or folder"),
        ("texts", "no image in this folder"),
        ("broken.jpg", "the image could not be read"),
    ],
)
def test_without_a_image_there_is_an_error(tiny_run: TinyRun, tmp_path: Path, given: str, told: str) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    with pytest.raises(DataError, match=told) as caught:
        detect_files(predictor(tiny_run), [tmp_path / given], tmp_path / "out")
    assert str(tmp_path / given) in str(caught.value)


def test_the_json_has_the_average_precision_of_an_evaluation(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Whatever is drawn: the JSON holds all that the protocol counts."""
    model, data = METR.from_pretrained(tiny_run.folder, device="cpu"), tiny_run.data[:1]
    (annotations,) = open_joint(data).evaluation().values()
    records = [annotations[index] for index in range(len(annotations))]
    names = list(annotations.categories)
    out = tmp_path / "out"
    detect_files(model.predictor(names), [record.path for record in records], out, thresholds=model.thresholds())
    truth = COCO(str(out / "images.json"))
    loaded = truth.loadRes(str(out / "detections.json"))
    found = {}
    for number, record in enumerate(records, 1):
        rows = loaded.loadAnns(loaded.getAnnIds(imgIds=[number]))
        found[record.image_id] = Detections(
            boxes=xywh_to_xyxy(torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)),
            scores=torch.tensor([row["score"] for row in rows]),
            labels=torch.tensor([row["category_id"] - 1 for row in rows], dtype=torch.int64),
            names=tuple(names),
        )
    (expected,) = evaluate(model, data, device="cpu").datasets
    assert expected.own is not None
    # the JSON rounds boxes to hundredths of a pixel
    assert evaluate_detections(annotations, found).ap == pytest.approx(expected.own.coco.ap, abs=0.5)


def test_drawings_and_summary_show_confident_detections_only(tiny_run: TinyRun, images: Path, tmp_path: Path) -> None:
    said = Console(record=True, width=80, file=StringIO())
    chosen = ScoreThresholds(default=1.0, names={"leaf": 0.0})
    detect_files(
        predictor(tiny_run, 0.0, ["leaf", "fish"]), [images], tmp_path / "out", thresholds=chosen, console=said
    )
    text = said.export_text()
    assert " leaf" in text
    assert " fish" not in text
    rows = json.loads((tmp_path / "out/detections.json").read_text())
    assert {row["category_id"] for row in rows} == {1, 2}


KILLED = """
import os, signal, sys
from pathlib import Path
from metr.inference import detect_files as module
from metr.model import METR

write = module.save_image
def killed(image, path):  # as `kill -9` while the third image is drawn
    if len(list(path.parent.glob("*.jpg"))) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(image, path)
module.save_image = killed
run, images, out = map(Path, sys.argv[1:])
module.detect_files(METR.from_pretrained(run, device="cpu").predictor(["penguin"]), [images], out)
"""


def test_a_call_that_is_killed_leaves_what_it_found(tiny_run: TinyRun, images: Path, tmp_path: Path) -> None:
    shutil.copy(images / "a.jpg", images / "b.jpg")
    out, partial = tmp_path / "out", tmp_path / "out/detections.partial.jsonl"
    command = [sys.executable, "-c", KILLED, str(tiny_run.folder), str(images), str(out)]
    assert subprocess.run(command, check=False).returncode == -9
    lines = [json.loads(line) for line in partial.read_text().splitlines()]
    assert [Path(line["file_name"]).name for line in lines] == ["a.jpg", "b.jpg", "a.JPG"], (
        "also the one that was being drawn"
    )

    console = Console(file=StringIO(), width=400)
    done = detect_files(predictor(tiny_run, 0.0, ["penguin"]), [images], out, console=console)
    kept = out / "detections.partial-1.jsonl"
    said = f"an earlier call in {out} was cut off after 3 images; what it found, a line an image, is kept in"
    assert f"{said} {kept}" in console.file.getvalue()  # type: ignore[attr-defined]
    assert not partial.exists(), "this call came to its end"
    for line, prediction in zip([json.loads(line) for line in kept.read_text().splitlines()], done, strict=False):
        found = prediction.detections
        assert found is not None
        assert (line["height"], line["width"]) == prediction.size
        assert [row["category"] for row in line["detections"]] == ["penguin"] * len(line["detections"])
        boxes = xywh_to_xyxy(torch.tensor([row["bbox"] for row in line["detections"]]))
        torch.testing.assert_close(boxes, found.boxes[: len(boxes)], rtol=0, atol=0.02)


def test_a_line_that_was_cut_short_and_an_empty_file_are_no_results(
    tiny_run: TinyRun, images: Path, tmp_path: Path
) -> None:
    out, console = tmp_path / "out", Console(file=StringIO(), width=400)
    out.mkdir()
    (out / "detections.partial.jsonl").write_text('{"file_na')
    (out / "detections.partial-1.jsonl").write_text("of a call before\n")
    detect_files(predictor(tiny_run), [images], out, console=console)
    assert "cut off" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert "results of an earlier call" not in console.file.getvalue()  # type: ignore[attr-defined]
    (out / "detections.partial.jsonl").write_text('{"file_name": "a.jpg"}\n{"file_na')
    detect_files(predictor(tiny_run), [images], out, console=console)
    assert "cut off after one image" in console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{out} holds the results of an earlier call" in console.file.getvalue()  # type: ignore[attr-defined]
    assert (out / "detections.partial-1.jsonl").read_text() == "of a call before\n"
    assert (out / "detections.partial-2.jsonl").read_text() == '{"file_name": "a.jpg"}\n{"file_na'


def test_a_call_that_is_broken_off_says_how_far_it_came(
    tiny_run: TinyRun, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(image: np.ndarray, path: Path) -> None:
        if path.name == "a.jpg":
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("metr.inference.detect_files.save_image", full)
    out, console = tmp_path / "out", Console(file=StringIO(), width=400)
    with pytest.raises(OSError, match="No space"):
        detect_files(predictor(tiny_run), [images], out, console=console)
    assert "1 of 2 images are done: detections.json and images.json" in console.file.getvalue()  # type: ignore[attr-defined]
    assert sorted(path.name for path in out.iterdir()) == ["detections.json", "images.json"]
    assert [Path(one["file_name"]).name for one in json.loads((out / "images.json").read_text())["images"]] == [
        "a.jpg"
    ], "found before it could not be drawn"
