"""What `metr detect --save` writes beside drawings and results."""

import csv
import shutil
from pathlib import Path

import numpy as np
import torch

from metr.data.datasets_file import open_dataset, parse_data_arguments
from metr.data.images import read_image
from metr.inference.predictor import Prediction
from metr.inference.saving import SavedForms, as_folder
from metr.structures import Detections

from tiny import CommandLine, TinyRun


def predicted(path: Path, boxes: list[list[float]], labels: list[int]) -> Prediction:
    height, width = read_image(path).shape[:2]
    scores = torch.linspace(0.9, 0.5, len(boxes))
    found = Detections(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=scores,
        labels=torch.tensor(labels, dtype=torch.int64),
        names=("fish", "a/b: \u202e?"),
    )
    return Prediction(source=str(path), size=(height, width), detections=found)


def test_crops_are_the_boxes(tiny_run: TinyRun, tmp_path: Path) -> None:
    image = read_image(tiny_run.unseen[0])
    height, width = image.shape[:2]
    found = predicted(tiny_run.unseen[0], [[10.4, 5.6, 60.2, 40.9], [width - 0.4, height - 0.2, width, height]], [0, 1])
    with SavedForms(tmp_path, found.detections.names, ["crops"]) as saved:  # type: ignore[union-attr]
        saved.add(image, found, "a")
    crop = read_image(tmp_path / "crops/fish/a-1.jpg")
    assert crop.shape == (36, 51, 3)
    assert np.abs(crop.astype(int) - image[5:41, 10:61]).mean() < 10
    assert read_image(tmp_path / "crops/a_b_ __/a-2.jpg").shape == (1, 1, 3)
    assert as_folder("..") == "_"
    assert as_folder(" . ") == "_"


def test_datasets_can_be_read_again(tiny_run: TinyRun, tmp_path: Path) -> None:
    predictions = [
        predicted(tiny_run.unseen[0], [[10.5, 5.5, 60.25, 40.75], [1, 2, 30, 40]], [0, 1]),
        predicted(tiny_run.unseen[1], [], []),
        predicted(tiny_run.unseen[2], [[0, 0, 20, 20]], [1]),
    ]
    names = ("fish", "cup")
    with SavedForms(tmp_path, names, ["coco", "yolo"]) as saved:
        for one in predictions:
            saved.add(read_image(Path(one.source)), one, Path(one.source).stem)
    for form in ("coco", "yolo"):
        source = open_dataset(parse_data_arguments([str(tmp_path / form)])[0])
        assert source.categories == names
        read = source.splits["train"]
        records = {read[index].path.name: read[index] for index in range(len(read))}
        assert len(records) >= 2
        for one in predictions:
            assert one.detections is not None
            if len(one.detections):
                record = records[Path(one.source).name]
                np.testing.assert_allclose(record.boxes, one.detections.boxes, atol=0.01)
                assert record.labels.tolist() == one.detections.labels.tolist()


def test_the_command_writes_all_forms(tiny_run: TinyRun, metr: CommandLine, tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    (folder / "more").mkdir(parents=True)
    shutil.copy(tiny_run.unseen[0], folder / "a.jpg")
    shutil.copy(tiny_run.unseen[1], folder / "more/a.jpg")
    forms = [word for form in ("crops", "csv", "coco", "yolo") for word in ("--save", form)]
    detect = ["detect", tiny_run.folder, folder, "--threshold", "0.0", "--device", "cpu"]
    assert metr(*detect, "-o", out, *forms).code == 0
    rows = list(csv.DictReader((out / "detections.csv").read_text(encoding="utf-8").splitlines()))
    assert {row["file_name"] for row in rows} == {str(folder / "a.jpg"), str(folder / "more/a.jpg")}
    assert {*rows[0]} == {"file_name", "width", "height", "name", "score", "x1", "y1", "x2", "y2"}
    crops = list((out / "crops").rglob("*.jpg"))
    assert len(crops) == len(rows)
    assert {path.name.rpartition("-")[0] for path in crops} == {"a", "a-2"}
    again = metr(*detect, "-o", out, "--save", "coco")
    assert again.code == 1
    assert "there is something of an earlier call" in again.words
    assert "did you mean 'crops'" in metr(*detect, "-o", out, "--save", "crop").words
    assert metr(*detect, "-o", tmp_path / "flat", "--no-recursive").code == 0
    assert [path.name for path in (tmp_path / "flat").glob("*.jpg")] == ["a.jpg"]
    assert metr(*detect, "-o", tmp_path / "tiled", "--tiles", "100").code == 0
    assert "no use" in metr(*detect, "--engine", "ray", "--tiles", "100").words
    assert "goes with videos" in metr(*detect, "--track").words
