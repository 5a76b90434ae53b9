"""Videos: frames stream through, objects keep their numbers, and both files are whole."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from metr.errors import ConfigError, DataError
from metr.inference.image_paths import as_videos
from metr.inference.postprocess import ScoreThresholds
from metr.inference.predictor import Prediction
from metr.inference.video import detect_video
from metr.structures import Detections

from drawn_cells import Cell, drawn
from tiny import CommandLine, TinyRun

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints" / "metr-nano"


def write_video(path: Path, frames: list[np.ndarray], rate: float = 20.0) -> Path:
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height))
    for one in frames:
        writer.write(cv2.cvtColor(one, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def moving_cells(step: int) -> list[Cell]:
    """Three cells: one crosses the image, one goes up, one stands still."""
    return [Cell(60 + 8 * step, 80, 46), Cell(380, 350 - 4 * step, 46), Cell(130, 320, 75, white=True)]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class FindsBright:
    """Finds the bright square of a frame."""

    names = ("lamp",)
    batch_size = 4

    def __init__(self) -> None:
        self.largest = 0

    def detect_many(self, images: Any) -> Iterator[Prediction]:
        images = list(images)
        self.largest = max(self.largest, len(images))
        for index, image in enumerate(images):
            rows, columns = np.nonzero(image.mean(2) > 128)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            found = Detections(
                boxes=torch.tensor([box], dtype=torch.float32),
                scores=torch.tensor([0.9]),
                labels=torch.tensor([0]),
                names=self.names,
            )
            yield Prediction(source=f"image {index}", size=image.shape[:2], detections=found)


def lamp(step: int) -> np.ndarray:
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    image[10:30, step % 40 : step % 40 + 20] = 255
    return image


def test_every_frame_has_a_line_and_a_drawing(tmp_path: Path) -> None:
    source = write_video(tmp_path / "lamp.mp4", [lamp(step) for step in range(30)])
    detector = FindsBright()
    report = detect_video(detector, source, tmp_path / "out", tracked=True)
    assert (report.frames, report.objects) == (30, 1)
    assert detector.largest == 4
    lines = lines_of(tmp_path / "out/lamp.jsonl")
    assert [line["frame"] for line in lines] == list(range(30))
    assert lines[10]["seconds"] == pytest.approx(0.5)
    for step, line in enumerate(lines):
        (one,) = line["detections"]
        assert one == {"name": "lamp", "score": 0.9, "box": one["box"], "id": 1}
        assert one["box"] == pytest.approx([step, 10, step + 20, 30], abs=1.5)
    capture = cv2.VideoCapture(str(tmp_path / "out/lamp.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 30
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(20)
    assert capture.read()[1].shape == (480, 640, 3)
    capture.release()
    assert detect_video(FindsBright(), source, tmp_path / "out", frames=7).frames == 7
    assert "id" not in lines_of(tmp_path / "out/lamp.jsonl")[0]["detections"][0]


def test_a_call_that_is_broken_off_leaves_whole_files(tmp_path: Path) -> None:
    class Stops(FindsBright):
        def detect_many(self, images: Any) -> Iterator[Prediction]:
            if self.largest:
                raise KeyboardInterrupt
            return super().detect_many(images)

    source = write_video(tmp_path / "lamp.mp4", [lamp(step) for step in range(30)])
    with pytest.raises(KeyboardInterrupt):
        detect_video(Stops(), source, tmp_path / "out")
    assert len(lines_of(tmp_path / "out/lamp.jsonl")) == 4
    capture = cv2.VideoCapture(str(tmp_path / "out/lamp.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 4
    capture.release()


def test_a_file_that_is_no_video_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.mp4").write_text("no video")
    with pytest.raises(DataError, match="not a video that OpenCV reads"):
        detect_video(FindsBright(), tmp_path / "notes.mp4", tmp_path / "out")
    assert capfd.readouterr() == ("", "")  # FFmpeg is quiet


def test_mistakes_are_told(tmp_path: Path, tiny_run: TinyRun, metr: CommandLine) -> None:
    (tmp_path / "notes.mp4").write_text("no video")
    source = write_video(tmp_path / "lamp.mp4", [lamp(0)])
    with pytest.raises(DataError, match="would take the place"):
        detect_video(FindsBright(), source, tmp_path)
    assert as_videos(["a.jpg", tmp_path]) is None
    assert as_videos([source, "camera:1"]) == [str(source), "camera:1"]
    for given, error in ((["camera:x"], ConfigError), ([source, "a.jpg"], ConfigError), (["a.mp4"], DataError)):
        with pytest.raises(error):
            as_videos(given)
    ended = metr("detect", tiny_run.folder, source, "-o", tmp_path / "out", "--save", "csv")
    assert "goes with images only" in ended.words
    ended = metr("detect", tiny_run.folder, tmp_path / "notes.mp4", "-o", tmp_path / "out", "--device", "cpu")
    assert ended.code == 1
    assert "not a video" in ended.words


@pytest.mark.slow
def test_cells_of_a_video_keep_their_numbers(tmp_path: Path, metr: CommandLine) -> None:
    frames = [np.asarray(drawn(moving_cells(step), 480, 400, seed=step)) for step in range(40)]
    source = write_video(tmp_path / "cells.mp4", frames)
    named = ["--categories", "RBC, WBC", "--track", "--device", "cpu"]
    ended = metr("detect", SHIPPED, source, "-o", tmp_path / "out", *named)
    assert ended.code == 0
    assert "40 frames" in ended.words
    lines = lines_of(tmp_path / "out/cells.jsonl")
    numbers: list[list[int | None]] = [[], [], []]
    for step, line in enumerate(lines):
        for row, cell in enumerate(moving_cells(step)):
            for one in line["detections"]:
                x1, y1, x2, y2 = one["box"]
                near = abs((x1 + x2) / 2 - cell.x) < 15 and abs((y1 + y2) / 2 - cell.y) < 15
                if one["name"] == cell.name and near:
                    numbers[row].append(one["id"])
    for ids in numbers:
        assert len(ids) >= 36
        assert len({*ids}) == 1, Counter(ids)
    assert len({ids[0] for ids in numbers}) == 3


MEMORY = """
import resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from test_video import FindsBright, detect_video, lamp, write_video
# back and forth, so that it is one object
steps = [step % 80 if step % 80 < 40 else 80 - step % 80 for step in range(5000)]
source = write_video(Path(sys.argv[1]), [lamp(min(step, 39)) for step in steps])
peaks = []
for frames in (500, 5000):
    report = detect_video(FindsBright(), source, Path(sys.argv[2]), tracked=True, frames=frames)
    assert (report.frames, report.objects) == (frames, 1), report
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(*peaks)
"""


@pytest.mark.slow
def test_five_thousand_frames_take_no_more_memory_than_five_hundred(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "lamp.mp4"), str(tmp_path / "out")]
    here = Path(__file__).parent
    command += [str(here), str(here.parent)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert ran.returncode == 0, ran.stderr
    few, many = map(int, ran.stdout.split())
    assert many - few < 35  # MB: the frames alone, if they were kept, would take 41


def test_names_have_their_own_thresholds(tmp_path: Path) -> None:
    source = write_video(tmp_path / "lamp.mp4", [lamp(step) for step in range(3)])
    thresholds = ScoreThresholds(names={"lamp": 0.95})
    for tracked in (False, True):
        report = detect_video(FindsBright(), source, tmp_path / "out", thresholds=thresholds, tracked=tracked)
        assert report.objects == 0
        assert [line["detections"] for line in lines_of(report.lines)] == [[], [], []]
