"""Detection in videos and from cameras: frames stream through, into an annotated video and a line of JSON each."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Int, UInt8
from rich.console import Console
from rich.progress import track as shown_progress
from torch import Tensor

from metr.errors import DataError, MetrError, counted
from metr.inference.config import Labels
from metr.inference.draw import Mark, Style, draw, palette
from metr.inference.image_paths import CAMERA
from metr.inference.postprocess import ScoreThresholds
from metr.inference.predictor import Prediction
from metr.inference.tracking import Tracker
from metr.run_directory import explained_disk_errors
from metr.structures import Detections

__all__ = ["Detector", "VideoReport", "detect_video"]

# what is wrong with a file is told by an error, not by FFmpeg as well; OpenCV reads this once, at the first video
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

_CAMERAS = "another number, or close the program that uses it; a video file works as well"
# frames a second where a video or a camera does not say
_RATE = 25.0
# the longer side, in pixels, below which frames are enlarged before they are drawn on
_LEAST_SIDE = 640


@runtime_checkable
class Detector(Protocol):
    """What frames are given to: a `Predictor` or a `TiledPredictor`."""

    names: tuple[str, ...]

    @property
    def batch_size(self) -> int:
        """Maximum number of images per step."""
        ...

    def detect_many(self, images: Any) -> Iterator[Prediction]:
        """The detections of each image, in order."""
        ...


@dataclass(frozen=True, kw_only=True)
class VideoReport:
    """What was written: `video` is annotated, `lines` has a line of JSON a frame; `objects` are the numbered ones."""

    frames: int
    objects: int
    video: Path
    lines: Path
    seconds: float


def detect_video(
    predictor: Detector,
    source: str | Path,
    out: Path,
    *,
    thresholds: ScoreThresholds | None = None,
    labels: Labels = "names",
    tracked: bool = False,
    frames: int | None = None,
    console: Console | None = None,
) -> VideoReport:
    """Detects objects in every frame of a video or of a camera; never more than a few batches are in memory.

    `out/NAME.mp4` is the video with boxes. `out/NAME.jsonl` has a line for each frame, written as soon as it is
    done: `frame` (from 0), `seconds`, and `detections` (`name`, `score`, `box` as x1, y1, x2, y2 in pixels, and `id` if
    objects are tracked: the same for an object in all frames, null until it is seen twice). Both are whole, however the
    call ends.

    Args:
        predictor: Decides the names. Weak detections, if it gives them, help to track.
        source: A video file, or `camera:0`; a camera is read until the program is interrupted.
        out: The folder to write; made if missing.
        thresholds: The score from which detections are written and drawn.
        labels: What is written at each drawn box.
        tracked: Whether objects are numbered.
        frames: At most so many frames.
        console: Where progress and a summary are shown.

    Raises:
        DataError: the video cannot be read, has no frame, or would be overwritten.
    """
    console, live = console or Console(quiet=True), str(source).startswith(CAMERA)
    name = str(source).replace(":", "-") if live else Path(source).stem
    target, lines = out / f"{name}.mp4", out / f"{name}.jsonl"
    if not live and target.exists() and target.resolve() == Path(source).resolve():
        raise DataError("the annotated video would take the place of this one", where=target, hint="another -o")
    with explained_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    began, done = time.monotonic(), 0
    with ExitStack() as stack:
        video = stack.enter_context(_opened(source))
        file = stack.enter_context(lines.open("w", encoding="utf-8"))
        writer = stack.enter_context(_Writer(target, video.rate))
        numbering = _Numbering(thresholds or ScoreThresholds(), video.rate if tracked else None)
        style = Style(labels=labels, colours=palette(predictor.names))
        read = islice(video.frames(), frames)
        ahead = shown_progress(
            read, "detecting", total=video.count, console=console, transient=True, disable=not console.is_terminal
        )
        while some := list(islice(ahead, 1 if live else predictor.batch_size)):
            for image, prediction in zip(some, predictor.detect_many(some), strict=True):
                assert prediction.detections is not None
                found, numbers = numbering.of(prediction.detections)
                file.write(json.dumps(_line(done, video.rate, found, numbers)) + "\n")
                file.flush()
                writer.write(_drawn(image, found, numbers, style))
                done += 1
        if done == 0:
            raise DataError("a video without a frame that can be read", where=source, hint="open it in a player")
    report = VideoReport(
        frames=done, objects=numbering.objects, video=target, lines=lines, seconds=time.monotonic() - began
    )
    _tell(report, source, tracked, console)
    return report


def _tell(report: VideoReport, source: str | Path, tracked: bool, console: Console) -> None:
    objects = f", {counted(report.objects, 'object')}" if tracked else ""
    speed = f"{report.frames / max(report.seconds, 1e-9):.1f} a second"
    what = f"{source}: {counted(report.frames, 'frame')} ({speed}){objects}; {report.video} and {report.lines}"
    console.print(what, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class _Video:
    """A video that is open; `rate` are frames a second, `count` is how many it says that it has."""

    capture: Any
    rate: float
    count: int | None

    def frames(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The frames as RGB, turned as players turn them, each read when it is needed."""
        while True:
            read, frame = self.capture.read()
            if not read:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


@contextmanager
def _opened(source: str | Path) -> Iterator[_Video]:
    """A video or camera.

    Raises:
        DataError: it cannot be opened.
    """
    text = str(source)
    camera = int(text.removeprefix(CAMERA)) if text.startswith(CAMERA) else None
    capture = cv2.VideoCapture(text if camera is None else camera)
    try:
        if not capture.isOpened():
            what = "not a video that OpenCV reads" if camera is None else "no such camera, or it may not be used"
            raise DataError(what, where=source, hint="open it in a player" if camera is None else _CAMERAS)
        rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        rate = rate if math.isfinite(rate) and 0 < rate <= 1000 else _RATE
        yield _Video(capture=capture, rate=rate, count=int(count) if camera is None and count > 0 else None)
    finally:
        capture.release()


class _Writer:
    """Writes an MP4 whose size is that of the first frame."""

    def __init__(self, path: Path, rate: float) -> None:
        self._path, self._rate = path, rate
        self._writer: Any = None
        self._size = (0, 0)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.release()

    def write(self, image: UInt8[np.ndarray, "h w 3"]) -> None:
        if self._writer is None:
            self._size = (image.shape[1] // 2 * 2, image.shape[0] // 2 * 2)  # codecs want even sides
            self._writer = cv2.VideoWriter(str(self._path), cv2.VideoWriter.fourcc(*"mp4v"), self._rate, self._size)
            if not self._writer.isOpened():
                raise MetrError("cannot be written", where=self._path, hint="check the folder and the room on the disk")
        if image.shape[1::-1] != self._size:
            image = cv2.resize(image, self._size, interpolation=cv2.INTER_AREA)
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


class _Numbering:
    """Which detections of a frame are shown, and the number of each if objects are tracked (`rate` is given)."""

    def __init__(self, thresholds: ScoreThresholds, rate: float | None) -> None:
        self._thresholds = thresholds
        self._tracker = None if rate is None else Tracker(rate)
        self.objects = 0

    def of(self, found: Detections) -> tuple[Detections, list[int | None] | None]:
        shown = self._thresholds.shown(found)
        if self._tracker is None:
            return shown, None
        weak = self._thresholds.model_copy(update={"default": 0.0, "names": {}}).shown(found)
        least = np.array([self._thresholds.names.get(name, self._thresholds.default) for name in weak.names])
        sure = weak.scores.numpy() >= least[weak.labels.numpy()].astype(np.float32)
        numbers = self._tracker.update(weak, sure)
        self.objects = max([self.objects, *(number for number in numbers if number is not None)])
        rows = [row for row, number in enumerate(numbers) if number is not None or sure[row]]
        return _some(weak, weak.labels.new_tensor(rows)), [numbers[row] for row in rows]


def _some(found: Detections, rows: Int[Tensor, "n"]) -> Detections:
    return replace(found, boxes=found.boxes[rows], scores=found.scores[rows], labels=found.labels[rows])


def _line(frame: int, rate: float, found: Detections, numbers: Sequence[int | None] | None) -> dict[str, Any]:
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    detections: list[dict[str, Any]] = [
        {"name": found.names[label], "score": round(score, 5), "box": [round(side, 2) for side in box]}
        for box, score, label in rows
    ]
    for row, number in zip(detections, numbers or (), strict=numbers is not None):
        row["id"] = number
    return {"frame": frame, "seconds": round(frame / rate, 4), "detections": detections}


def _drawn(
    image: UInt8[np.ndarray, "h w 3"], found: Detections, numbers: Sequence[int | None] | None, style: Style
) -> UInt8[np.ndarray, "a b 3"]:
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    marks = []
    for row, (box, score, label) in enumerate(rows):
        number = None if numbers is None else numbers[row]
        name = found.names[label] if number is None else f"{found.names[label]} #{number}"
        marks.append(Mark(box=tuple(box), name=name, score=score))
    return draw(image, marks, max(*image.shape[:2], _LEAST_SIDE), style)
