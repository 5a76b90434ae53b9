"""Labels for images that have none, for people to correct in an annotation tool."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metr.completion.boxes import box_rows
from metr.completion.journal import ToDetect
from metr.completion.thresholds import Found, NameThreshold
from metr.data.datasets_file import DatasetConfig
from metr.data.export import MemorySource, Placement
from metr.data.export_tools import WRITERS, write_label_studio
from metr.data.records import TRAIN, ImageRecord, InMemoryAnnotations
from metr.errors import ConfigError, did_you_mean
from metr.inference.image_paths import expanded_paths

FORMATS = ("coco", "yolo", "voc", "labelme", "cvat", "label_studio", "csv")
"""The formats of labels for new images."""


@dataclass(frozen=True, kw_only=True)
class PreLabels:
    """A folder of images without labels, and the format in which they get some."""

    folder: Path
    format: str = "coco"
    placement: Placement = "link"

    @property
    def name(self) -> str:
        """What the dataset of these images is called."""
        return self.folder.resolve().name


def check_format(name: str) -> None:
    """Checks that labels for new images can be written so.

    Raises:
        ConfigError: they cannot.
    """
    if name not in FORMATS:
        raise ConfigError(f"no format {name!r} to write", where="--format", hint=did_you_mean(name, FORMATS))


def new_images(new: PreLabels, out: Path) -> list[ToDetect]:
    """The images of the folder and of those below it.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    check_format(new.format)
    paths = expanded_paths([new.folder], out)
    return [ToDetect(key=f"new {path.relative_to(new.folder).as_posix()}", record=_empty(path)) for path in paths]


def _empty(path: Path, size: tuple[int, int] = (1, 1)) -> ImageRecord:
    return ImageRecord(
        image_id=path.name,
        path=path,
        height=size[0],
        width=size[1],
        boxes=np.zeros((0, 4), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int64),
        areas=np.zeros(0, dtype=np.float32),
        ignore=np.zeros(0, dtype=bool),
    )


def write_prelabels(
    new: PreLabels,
    images: Sequence[ToDetect],
    found: Mapping[str, Found | None],
    names: Sequence[str],
    sure: Mapping[str, NameThreshold],
    out: Path,
    model_version: str,
) -> list[dict[str, Any]]:
    """Writes the detections that are sure, and gives their rows of `completed.json`. What cannot be read is left out.

    Label Studio gets them as predictions with `model_version`, which it shows beside annotations of people.

    Raises:
        DataError: the folder cannot be written, or lies in that of the images.
    """
    kept = [name for name in names if sure[name].threshold is not None]
    records = tuple(
        _labelled(one.record.path, detections, names, kept, sure)
        for one in images
        if (detections := found[one.key]) is not None
    )
    split = InMemoryAnnotations(name=new.name, split=TRAIN, categories=tuple(kept), records=records)
    source = MemorySource(
        name=new.name,
        root=new.folder.resolve(),
        config=DatasetConfig(name=new.name, path=new.folder),
        categories=tuple(kept),
        splits={TRAIN: split},
    )
    if new.format == "label_studio":
        write_label_studio(source, out, new.placement, model_version=model_version)
    else:
        WRITERS[new.format](source, out, new.placement)
    rows: list[dict[str, Any]] = []
    for record in records:
        image = record.path.relative_to(new.folder)
        rows += box_rows(new.name, TRAIN, image, record, [kept[label] for label in record.labels.tolist()])
    return rows


def _labelled(
    path: Path, found: Found, names: Sequence[str], kept: Sequence[str], sure: Mapping[str, NameThreshold]
) -> ImageRecord:
    least = np.array([1.1 if (value := sure[name].threshold) is None else value for name in names])
    height, width = found.size
    boxes = np.clip(found.boxes, 0, np.array([width, height] * 2))
    sides = boxes[:, 2:] - boxes[:, :2]
    chosen = (found.scores >= least[found.labels]) & (sides >= 1).all(axis=1)
    rows = np.array([kept.index(name) if name in kept else -1 for name in names], dtype=np.int64)
    record = _empty(path, found.size)
    return ImageRecord(
        image_id=record.image_id,
        path=path,
        height=height,
        width=width,
        boxes=boxes[chosen].astype(np.float32),
        labels=rows[found.labels[chosen]],
        areas=(sides[:, 0] * sides[:, 1])[chosen].astype(np.float32),
        ignore=np.zeros(int(chosen.sum()), dtype=bool),
        scores=found.scores[chosen].astype(np.float32),
    )
