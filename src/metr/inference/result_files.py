"""The files that detection in many images writes: COCO results at the end, and until then a line for each image."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console

from metr.boxes import xyxy_to_xywh
from metr.inference.postprocess import Row, write_coco_results
from metr.inference.predictor import Prediction
from metr.run_directory import explained_disk_errors, replaced_file
from metr.serialization import write_json
from metr.structures import Detections

RESULTS, IMAGES, PARTIAL = "detections.json", "images.json", "detections.partial.jsonl"
# seconds after which what was written is forced to the disk, where a loss of power does not reach it
_TO_DISK = 1.0


class ResultFiles:
    """Keeps the results of many images in a folder, as a context manager.

    `detections.partial.jsonl` gets one line of JSON for each image as soon as it is done: `file_name`, and either
    `height`, `width` and `detections` (`category`, `bbox` as x, y, width, height in pixels, `score`) or `issue`. When
    the block ends, however it does, `detections.json` and `images.json` take its place. Only a process that is killed
    or a machine that stops leaves it behind; the next call in that folder says so and keeps it under another name.

    Args:
        folder: The folder; made if it is missing.
        names: The names that are looked for.
        images: Number of images to come.
        console: Where it is said what an earlier call left behind, and how far this one came if it is broken off.

    Attributes:
        done: The predictions so far.
    """

    def __init__(self, folder: Path, names: Sequence[str], images: int, console: Console) -> None:
        self.folder, self.names, self.images = folder, tuple(names), images
        self.done: list[Prediction] = []
        self._console = console
        self._file: TextIO | None = None
        self._forced = time.monotonic()

    def __enter__(self) -> "ResultFiles":
        with explained_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / PARTIAL
        if partial.exists() and (kept := _set_aside(partial)) is not None:
            count = "one image" if (lines := _lines(kept)) == 1 else f"{lines} images"
            what = f"an earlier call in {self.folder} was cut off after {count}"
            self._say(f"{what}; what it found, a line an image, is kept in {kept}")
        if (self.folder / RESULTS).exists():
            what = "what is called alike is replaced, other drawings, crops and labels stay"
            self._say(f"{self.folder} holds the results of an earlier call: {what}")
        self._file = partial.open("w", encoding="utf-8")
        return self

    def add(self, prediction: Prediction) -> None:
        """Keeps the result of the next image."""
        assert self._file is not None, "used as a context manager"
        self.done.append(prediction)
        with explained_disk_errors(self.folder / PARTIAL):
            self._file.write(json.dumps(_record(prediction)) + "\n")
            self._file.flush()
            if time.monotonic() - self._forced > _TO_DISK:
                os.fsync(self._file.fileno())
                self._forced = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None, "used as a context manager"
        with explained_disk_errors(self.folder / PARTIAL):
            self._file.close()
        self._write_coco()
        (self.folder / PARTIAL).unlink(missing_ok=True)
        if kind is not None and self.done:
            count = f"{len(self.done)} of {self.images} images are done"
            self._say(f"{count}: {RESULTS} and {IMAGES} in {self.folder} hold what was found in them")

    def _write_coco(self) -> None:
        """Writes all results in COCO's form; ids count from 1 in the order of images and names."""
        numbered = list(enumerate(self.done, 1))
        found: dict[int | str, Detections] = {n: one.detections for n, one in numbered if one.detections is not None}
        images = [
            {"id": number, "file_name": one.source, "height": one.size[0], "width": one.size[1]}
            for number, one in numbered
            if one.size is not None
        ]
        ids = {name: number for number, name in enumerate(self.names, 1)}
        categories = [{"id": number, "name": name} for name, number in ids.items()]
        key = {"images": images, "categories": categories, "annotations": []}
        with replaced_file(self.folder / IMAGES) as fresh:
            write_json(fresh, key)
        with replaced_file(self.folder / RESULTS) as fresh:
            write_coco_results(fresh, found, ids)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _record(prediction: Prediction) -> Row:
    """What is known of one image, as plain values."""
    found, size = prediction.detections, prediction.size
    if found is None or size is None:
        return {"file_name": prediction.source, "issue": "" if prediction.issue is None else prediction.issue.detail}
    boxes = xyxy_to_xywh(found.boxes.double()).tolist()
    rows = [
        {"category": found.names[label], "bbox": [round(side, 2) for side in box], "score": round(score, 5)}
        for box, score, label in zip(boxes, found.scores.tolist(), found.labels.tolist(), strict=True)
    ]
    return {"file_name": prediction.source, "height": size[0], "width": size[1], "detections": rows}


def _set_aside(partial: Path) -> Path | None:
    """Moves what a call left behind that was cut off, under a free name; None if there is not a whole line in it."""
    if not _lines(partial):
        return None
    number = 1
    while (kept := partial.with_name(f"{partial.stem}-{number}{partial.suffix}")).exists():
        number += 1
    partial.replace(kept)
    return kept


def _lines(path: Path) -> int:
    """Number of whole lines; one that was cut short does not count."""
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)
