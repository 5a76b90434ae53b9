"""What was found in each image so far, on the disk: a completion that was stopped goes on where it was."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from metr.completion.thresholds import LEAST_SCORE, Found
from metr.data.images import ImageSource, read_image
from metr.data.records import ImageRecord
from metr.errors import DataError
from metr.inference.predictor import Prediction, Predictor
from metr.model import METR
from metr.run_directory import explained_disk_errors
from metr.writable import check_folder_to_write

JOURNAL = "completing.partial.jsonl"


@dataclass(frozen=True, kw_only=True)
class ToDetect:
    """An image to detect in, under a key of its own."""

    key: str
    record: ImageRecord


class Journal:
    """The detections of images by their keys, a line of JSON each; the first line tells of the task.

    Args:
        folder: The folder that is written in the end; made if it is missing.
        task: What is done: the same task goes on, another one is refused.

    Raises:
        DataError: the folder holds something else than this unfinished task.
    """

    def __init__(self, folder: Path, task: Mapping[str, Any]) -> None:
        self.path = folder / JOURNAL
        self._found: dict[str, Found | None] = {}
        head = json.dumps(task, sort_keys=True)
        with explained_disk_errors(folder):
            check_out(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._resume(head)
            else:
                self.path.write_text(head + "\n", encoding="utf-8")

    @property
    def done(self) -> int:
        """The number of images so far."""
        return len(self._found)

    def _resume(self, head: str) -> None:
        """Reads what an earlier call left; a line that it did not finish is dropped."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.decode(errors="replace").splitlines()
        if not lines or lines[0] != head:
            what = "holds an unfinished completion of other data, names or settings, or by another detector"
            hint = "name another folder, or remove this one"
            raise DataError(what, where=self.path.parent, hint=hint)
        for line in lines[1:]:
            item = json.loads(line)
            self._found[item["image"]] = _found(item)
        if len(whole) < len(data):
            self.path.write_bytes(whole)

    def __getitem__(self, key: str) -> Found | None:
        """What was found in an image; None where it could not be read."""
        return self._found[key]

    def detect(self, predictor: Predictor, images: Sequence[ToDetect], console: Console) -> None:
        """Detects in the images that are not done yet, under a progress bar if there is a terminal."""
        left = [one for one in {one.key: one for one in images}.values() if one.key not in self._found]
        if not left:
            return
        shown = track(
            predictor.detect_many(_sources(left)),
            "detecting",
            len(left),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        with explained_disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            for one, prediction in zip(left, shown, strict=True):
                item = {"image": one.key, **_row(prediction)}
                if why := item.get("issue"):
                    told = f"skipped {prediction.source}: {why}"
                    console.print(told, style="yellow", markup=False, highlight=False, soft_wrap=True)
                file.write(json.dumps(item) + "\n")
                file.flush()
                self._found[one.key] = _found(item)

    def close(self) -> None:
        """Removes the file: the task is done."""
        self.path.unlink(missing_ok=True)


def check_out(folder: Path) -> None:
    """Checks that a folder is not there, empty, or holds an unfinished completion.

    Raises:
        DataError: it is a file, or holds something else.
        CheckpointError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError("is a file", where=folder, hint="name a folder")
    if folder.is_dir() and not (folder / JOURNAL).exists() and any(folder.iterdir()):
        hint = "name another folder, or remove what is there"
        raise DataError("the folder is not empty", where=folder, hint=hint)
    check_folder_to_write(folder)


def _sources(images: Sequence[ToDetect]) -> Iterator[ImageSource]:
    """The images as a predictor takes them; one of a shard that cannot be read fails there, by its name."""
    for one in images:
        if one.record.source is None:
            yield one.record.path
            continue
        try:
            yield read_image(one.record.path, one.record.source)
        except DataError:
            yield one.record.path


def _row(prediction: Prediction) -> dict[str, Any]:
    found = prediction.detections
    if found is None or prediction.size is None:
        return {"issue": "" if prediction.issue is None else prediction.issue.detail}
    kept = found.scores >= LEAST_SCORE
    columns = (found.boxes[kept].double().tolist(), found.scores[kept].tolist(), found.labels[kept].tolist())
    rows = [
        [*(round(side, 2) for side in box), round(score, 5), label] for box, score, label in zip(*columns, strict=True)
    ]
    return {"size": list(prediction.size), "found": rows}


def _found(item: Mapping[str, Any]) -> Found | None:
    if "size" not in item:
        return None
    rows = np.array(item["found"], dtype=np.float64).reshape(-1, 6)
    height, width = item["size"]
    return Found(size=(height, width), boxes=rows[:, :4], scores=rows[:, 4], labels=rows[:, 5].astype(np.int64))


def fingerprint(model: METR) -> str:
    """A digest of the weights of a network, and of nothing else."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def key_of(dataset: str, root: Path, record: ImageRecord) -> str:
    """The key of an image of a dataset: the same wherever the dataset lies."""
    path = os.path.relpath(record.path, root) if record.source is None else f"{record.path} {record.image_id}"
    return f"{dataset}/{Path(path).as_posix()}".encode(errors="backslashreplace").decode()
