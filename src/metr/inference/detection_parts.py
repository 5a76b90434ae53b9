"""A folder of detections in numbered parts: a part is written whole or not at all, however its process ends.

The folder holds `run.json` (what the answers rest on), `images.parquet` (the images in order, a row group a part) and
`detections-00000.parquet` and so on, one a part, in the form of `SCHEMA`. At the end `failed.jsonl` lists the images
without an answer. A part whose file is there is complete, so a run that ended early goes on with the others.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from pyarrow import parquet
from torch import nn

from metr.errors import MetrError
from metr.inference.predictor import Predictor
from metr.models.detector import Detector
from metr.run_directory import replaced_file
from metr.serialization import write_json
from metr.structures import Detections

__all__ = ["FAILED", "IMAGES", "RUN", "SCHEMA", "Journal", "PartsFolder", "Row", "answers_rest_on", "taken"]

RUN, IMAGES, FAILED = "run.json", "images.parquet", "failed.jsonl"
SCHEMA = pa.schema(
    [
        ("image", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        ("scores", pa.list_(pa.float32())),
        ("categories", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)
"""One row an image: its path; width and height in pixels; and for each detection, best first, the box (x1, y1, x2, y2
in pixels), score and category. `error` is null, or the reason why there is no answer; then the others are null."""
_FORMAT = "metr detections in parts"
_LOCK = ".lock"
# images of a part unless told otherwise: at most this many, and fewer where there would be less than 64 parts
_PART, _PARTS = 1000, 64
_LEAST_PART = 16
# attempts that end at the same image, and those that end before any image, until no other is made
_DEATHS_OF_AN_IMAGE, _DEATHS_OF_A_PART = 2, 5


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found in one image, or why nothing could be; `size` is (height, width) in pixels."""

    image: str
    size: tuple[int, int] | None = None
    detections: Detections | None = None
    error: str | None = None


class PartsFolder:
    """The folder as each process sees it; `open` makes it or goes on in it.

    Attributes:
        path: The folder.
        images: How many images there are.
        part_size: Images of a part; the last part may have fewer.
    """

    def __init__(self, path: Path, images: int, part_size: int) -> None:
        self.path, self.images, self.part_size = path, images, part_size

    @classmethod
    def open(
        cls, path: Path, images: Sequence[str], rest_on: Mapping[str, Any], part_size: int | None = None
    ) -> "PartsFolder":
        """The folder of a run: begun if it is new, otherwise checked to be of the same images and settings.

        Args:
            path: The folder, which is `taken`.
            images: Paths or addresses, each once; their order decides the parts.
            rest_on: What the answers rest on; see `answers_rest_on`.
            part_size: Images of a part; by default a thousand, or fewer where there would be less than 64 parts.

        Raises:
            MetrError: the folder is of other images, another detector or other settings, or holds other detections.
        """
        raw = [os.fsencode(image) for image in images]
        digest = hashlib.sha256(b"\0".join(raw)).hexdigest()
        if (path / RUN).exists():
            known = _read_run(path / RUN)
            _refuse_another(path, known, {"images": digest, **rest_on}, raw)
            if part_size not in {None, known["part_size"]}:
                what = f"this folder was begun with parts of {known['part_size']} images, not of {part_size}"
                raise MetrError(what, where=path, hint="leave --part-size out, or name another folder with -o")
            return cls(path, known["count"], known["part_size"])
        if any(path.glob("detections-*.parquet")):
            hint = "name another folder with -o"
            raise MetrError(f"holds detections of a run whose {RUN} is gone", where=path, hint=hint)
        size = part_size or max(_LEAST_PART, min(_PART, -(-len(raw) // _PARTS)))
        with replaced_file(path / IMAGES, flush=True, shared=True) as fresh:
            listed = pa.table({"image": pa.array(raw, pa.binary())})
            parquet.write_table(listed, fresh, row_group_size=size)
        with replaced_file(path / RUN, flush=True, shared=True) as fresh:  # last: with it the folder is a run
            values = {"format": _FORMAT, "count": len(raw), "part_size": size, "images": digest, **rest_on}
            write_json(fresh, values)
        return cls(path, len(raw), size)

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.images // self.part_size)

    def length(self, part: int) -> int:
        """How many images a part has."""
        return min(self.part_size, self.images - part * self.part_size)

    def images_of(self, part: int) -> list[str]:
        """The images of a part, in order."""
        listed = parquet.ParquetFile(self.path / IMAGES).read_row_group(part)
        return [os.fsdecode(image) for image in listed["image"].to_pylist()]

    def is_complete(self, part: int) -> bool:
        """Whether a part's file is there, whole and with a row for each of its images."""
        try:
            return bool(parquet.read_metadata(self.file(part)).num_rows == self.length(part))
        except (OSError, pa.ArrowInvalid):
            return False

    def file(self, part: int) -> Path:
        """Where the detections of a part are."""
        return self.path / f"detections-{part:05}.parquet"

    def journal(self, part: int) -> "Journal":
        """What became of the attempts at a part."""
        return Journal(self.path / f".part-{part:05}.journal")

    def write(self, part: int, rows: Sequence[Row]) -> None:
        """Writes a part, whole or not at all; a second attempt takes the place of the first."""
        with replaced_file(self.file(part), flush=True, shared=True) as fresh:
            parquet.write_table(_table(rows), fresh, compression="zstd")

    def failures(self, part: int) -> list[tuple[str, str]]:
        """The images of a complete part that have no answer, with the reasons."""
        read = parquet.read_table(self.file(part), columns=["image", "error"])
        failed = read.filter(read["error"].is_valid())
        return list(zip(failed["image"].to_pylist(), failed["error"].to_pylist(), strict=True))

    def write_failed(self) -> tuple[int, tuple[str, str] | None]:
        """Writes `failed.jsonl` from all parts: a line an image, with its reason. How many there are, and the first."""
        number, first = 0, None
        with (
            replaced_file(self.path / FAILED, flush=True, shared=True) as fresh,
            fresh.open("w", encoding="utf-8") as file,
        ):
            for part in range(self.parts):
                for image, error in self.failures(part):
                    number, first = number + 1, first or (image, error)
                    file.write(json.dumps({"image": image, "error": error}, ensure_ascii=False) + "\n")
        return number, first


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Keeps other commands out of a folder, and clears what commands that were killed left in it.

    Args:
        folder: Made if it is missing.

    Raises:
        MetrError: another command works in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        what = "another command detects into this folder"
        raise MetrError(what, where=folder, hint="wait for it, or name another folder with -o") from None
    except NotImplementedError:  # a file system without locks
        pass
    try:
        for left in (*folder.glob(".*.new.*"), *folder.glob(".part-*.journal")):
            left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


class Journal:
    """What became of the attempts at one part. It tells an image at which processes die from a process that was killed.

    The first attempt is fast. Later ones take image by image and note each before they touch it, so that the note
    survives the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempts: list[int | None] = []
        """The image at which each earlier attempt ended; None for none."""
        with suppress(FileNotFoundError):
            for line in path.read_text(encoding="ascii").splitlines():
                if line == "begin":
                    self.attempts.append(None)
                elif line.isdecimal() and self.attempts:
                    self.attempts[-1] = int(line)

    @property
    def fatal(self) -> frozenset[int]:
        """Positions of the images, in the part, at which two attempts ended."""
        ended = [image for image in self.attempts if image is not None]
        return frozenset(image for image in ended if ended.count(image) >= _DEATHS_OF_AN_IMAGE)

    @property
    def is_hopeless(self) -> bool:
        """Whether so many attempts ended before they reached an image that another would end as well."""
        return self.attempts.count(None) >= _DEATHS_OF_A_PART

    def begin(self) -> None:
        """Notes that an attempt begins."""
        self._note("begin")

    def at(self, image: int) -> None:
        """Notes the image, by its position in the part, that is touched next."""
        self._note(str(image))

    def close(self) -> None:
        """Forgets all attempts: the part is complete."""
        self.path.unlink(missing_ok=True)

    def _note(self, line: str) -> None:
        with self.path.open("a", encoding="ascii") as file:
            file.write(line + "\n")


def answers_rest_on(predictor: Predictor) -> dict[str, Any]:
    """What decides the answers of a predictor, as plain values: equal ones mean equal answers.

    The size of a batch is left out: an image's answer does not depend on the images beside it.
    """
    limits = predictor.limits
    tensors = {"text": predictor.text}
    if limits is not None:
        tensors |= {"presence": limits.presence, "queries": limits.queries}
    return {
        "detector": _digest({**predictor.network.state_dict(), **tensors}, _configuration(predictor.network)),
        "names": list(predictor.names),
        "resize": predictor.resize.model_dump(mode="json"),
        "inference": predictor.config.model_dump(mode="json", exclude={"batch_size"}),
    }


def _configuration(network: nn.Module) -> Mapping[str, Any]:
    return network.config.model_dump(mode="json") if isinstance(network, Detector) else {}


def _digest(tensors: Mapping[str, torch.Tensor], configuration: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_run(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"not readable as JSON: {error}"
        raise MetrError(what, where=path, hint="name another folder with -o") from None
    known = known if isinstance(known, dict) else {}
    counts = [known.get(key) for key in ("count", "part_size")]
    if known.get("format") != _FORMAT or not all(isinstance(count, int) and count > 0 for count in counts):
        raise MetrError("is not of a detection in parts", where=path, hint="name another folder with -o")
    return known


def _refuse_another(path: Path, known: Mapping[str, Any], wanted: Mapping[str, Any], images: Sequence[bytes]) -> None:
    """Raises a `MetrError` that names the first difference between the run of a folder and the wanted one."""
    key = next((key for key, value in wanted.items() if known.get(key) != value), None)
    if key is None:
        return
    if key == "images":
        what = f"this folder was begun with other images: {_difference(path, images)}"
    elif key == "detector":
        what = "this folder was begun with another detector: its weights or its configuration differ"
    else:
        what = (
            f"this folder was begun with another setting of {key}: {_short(known.get(key))}, now {_short(wanted[key])}"
        )
    hint = "name another folder with -o; the same command as before goes on in this one"
    raise MetrError(what, where=path, hint=hint)


def _difference(path: Path, images: Sequence[bytes]) -> str:
    before = parquet.read_table(path / IMAGES)["image"].to_pylist()
    fresh, gone = set(images).difference(before), set(before).difference(images)
    found = [
        f"{len(some)} {kind}, such as {os.fsdecode(min(some))}"
        for some, kind in ((fresh, "new"), (gone, "gone"))
        if some
    ]
    return "; ".join(found) or "their order differs"


def _short(value: object, most: int = 300) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[:most] + " ..."


def _table(rows: Sequence[Row]) -> pa.Table:
    found = [row.detections for row in rows]
    missing = pa.array([one is None for one in found])
    offsets = pa.array(np.cumsum([0, *(0 if one is None else len(one) for one in found)]), pa.int32())
    kept = [one for one in found if one is not None]
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(one.boxes.float().numpy() for one in kept)])
    scores = np.concatenate([np.zeros(0, np.float32), *(one.scores.float().numpy() for one in kept)])
    categories = [_utf8(one.names[label]) for one in kept for label in one.labels.tolist()]

    def lists(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, values, mask=missing)

    columns = [
        pa.array([_utf8(row.image) for row in rows], pa.string()),
        pa.array([None if row.size is None else row.size[1] for row in rows], pa.int32()),
        pa.array([None if row.size is None else row.size[0] for row in rows], pa.int32()),
        lists(pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1), pa.float32()), 4)),
        lists(pa.array(scores, pa.float32())),
        lists(pa.array(categories, pa.string())),
        pa.array([None if row.error is None else _utf8(row.error) for row in rows], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _utf8(text: str) -> str:
    """A text whose bytes that are not UTF-8, as in some names of files, are written out."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
