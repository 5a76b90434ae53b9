"""Other forms of what was found in image files: cut-out objects, a table, and datasets to correct and train on."""

import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from jaxtyping import UInt8

from metr.boxes import area
from metr.data.records import TRAIN, ImageRecord
from metr.inference.config import Form
from metr.inference.draw import save_image
from metr.inference.predictor import Prediction
from metr.run_directory import explained_disk_errors

__all__ = ["SAVED_TABLE", "SavedForms"]

SAVED_TABLE = "detections.csv"
_COLUMNS = ("file_name", "width", "height", "name", "score", "x1", "y1", "x2", "y2")
# letters that have a meaning in paths, or none in those of some system
_NOT_IN_PATHS = '<>:"/\\|?*'


class SavedForms:
    """Writes confident detections in other forms into a folder, as a context manager.

    Crops and table grow with every image; datasets are written at the end, if nothing failed. They hold the images as
    hard links where the file system can.

    Args:
        out: The folder.
        names: The names that are looked for.
        forms: What to write.
    """

    def __init__(self, out: Path, names: Sequence[str], forms: Sequence[Form] = ()) -> None:
        self.out, self.names, self.forms = out, tuple(names), tuple(forms)
        self._records: list[ImageRecord] = []
        self._table: TextIO | None = None
        self._rows: Any = None

    def __enter__(self) -> "SavedForms":
        if "csv" in self.forms:
            with explained_disk_errors(self.out / SAVED_TABLE):
                self._table = (self.out / SAVED_TABLE).open("w", encoding="utf-8", newline="")
                self._rows = csv.writer(self._table)
                self._rows.writerow(_COLUMNS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._table is not None:
            self._table.close()
        if kind is None:
            self._write_datasets()

    def add(self, image: UInt8[np.ndarray, "h w 3"], found: Prediction, stem: str) -> None:
        """Writes the detections of the next image.

        Args:
            image: RGB.
            found: What is confident of its detections.
            stem: By which its crops are called.
        """
        if self._table is not None:
            with explained_disk_errors(self.out / SAVED_TABLE):
                self._rows.writerows(_rows(found))
                self._table.flush()
        if "crops" in self.forms:
            self._save_crops(image, found, stem)
        if {"coco", "yolo"} & {*self.forms}:
            self._records.append(_record(found))

    def _save_crops(self, image: UInt8[np.ndarray, "h w 3"], found: Prediction, stem: str) -> None:
        assert found.detections is not None
        height, width = image.shape[:2]
        rows = zip(found.detections.boxes.tolist(), found.detections.labels.tolist(), strict=True)
        for number, (box, label) in enumerate(rows, 1):
            left, top = (int(side) for side in np.floor(box[:2]).clip(0, (width - 1, height - 1)))
            right, bottom = (int(side) for side in np.ceil(box[2:]).clip((left + 1, top + 1), (width, height)))
            folder = self.out / "crops" / as_folder(self.names[label])
            save_image(image[top:bottom, left:right], folder / f"{stem}-{number}.jpg")

    def _write_datasets(self) -> None:
        if not self._records:
            return
        from metr.data.datasets_file import DatasetConfig, DatasetSource
        from metr.data.export import write_coco, write_yolo
        from metr.data.index.annotation_index import AnnotationIndex, LabelMap, write_index

        with tempfile.TemporaryDirectory() as place:
            index = Path(place, f"{TRAIN}.arrow")
            write_index(index, self._records, root=Path(Path.cwd().anchor))
            found = AnnotationIndex(index, LabelMap.identity(self.names), name="detections", split=TRAIN)
            source = DatasetSource(
                name="detections",
                format="index",
                root=Path(place),
                config=DatasetConfig(name="detections", path=place),
                categories=self.names,
                splits={TRAIN: found},
            )
            for form, write in (("coco", write_coco), ("yolo", write_yolo)):
                if form in self.forms:
                    write(source, self.out / form)


def as_folder(name: str) -> str:
    """A name as that of a folder, on any system."""
    plain = "".join("_" if letter in _NOT_IN_PATHS or not letter.isprintable() else letter for letter in name)
    return plain.strip(". ")[:100] or "_"


def _rows(found: Prediction) -> list[list[object]]:
    assert found.detections is not None
    assert found.size is not None
    height, width = found.size
    one = found.detections
    rows = zip(one.boxes.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True)
    return [
        [found.source, width, height, one.names[label], round(score, 5), *(round(side, 2) for side in box)]
        for box, score, label in rows
    ]


def _record(found: Prediction) -> ImageRecord:
    """What was found in an image file as annotations of it."""
    assert found.detections is not None
    assert found.size is not None
    boxes = found.detections.boxes.double()
    return ImageRecord(
        image_id=found.source,
        path=Path(found.source).absolute(),
        width=found.size[1],
        height=found.size[0],
        boxes=boxes.numpy(),
        labels=found.detections.labels.numpy(),
        areas=area(boxes).numpy(),
        ignore=np.zeros(len(boxes), dtype=bool),
    )
