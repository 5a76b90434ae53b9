"""What a person looks at while a run trains: its first batch, and some val images with what is detected in them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from metr.boxes import cxcywh_to_xyxy
from metr.config import Calibration
from metr.data.dataset import DetectionDataset
from metr.data.images import read_annotated
from metr.data.records import ImageRecord, seeded_order
from metr.errors import DataError, MetrError, counted
from metr.evaluation.runner import EvaluationRunner
from metr.inference.config import InferenceConfig, with_calibration
from metr.inference.draw import (
    Mark,
    Style,
    contact_sheet,
    detection_marks,
    draw,
    palette,
    record_marks,
    save_image,
)
from metr.inference.postprocess import ScoreThresholds
from metr.inference.predictor import Predictor
from metr.inference.selection import name_limits
from metr.models.detector import Detector
from metr.structures import NO_OBJECT, Batch, Detections

VAL_IMAGES = 8
"""Val images on the sheet, spread over the datasets."""
_TRAIN_IMAGES = 16  # of a batch, at most
_CELL = 420  # pixels of the longer side of an image on a sheet
_COLUMNS = 4
_LOOKED_AT = 50  # images of a dataset among which some with objects are sought
_BELOW = 10  # detections that are shown where none reaches its threshold
_logger = logging.getLogger(__name__)


def draw_train_batch(batch: Batch, names: Sequence[str], path: Path) -> None:
    """Draws a batch as the network sees it: images after augmentation, boxes of its targets, ignored ones dashed.

    It only reads the batch, and no random number. What cannot be written becomes a warning.

    Args:
        batch: A batch of training.
        names: The name of each row of the vocabulary.
        path: The image to write.
    """
    count = min(len(batch.images), _TRAIN_IMAGES)
    drawn, captions = [], []
    for row in range(count):
        height, width = batch.sizes[row]
        pixels = batch.images[row, :, :height, :width].mul(255).round().clamp(0, 255).byte()
        marks = list(_marks(batch, row, names))
        drawn.append(draw(pixels.permute(1, 2, 0).cpu().numpy(), marks, _CELL))
        captions.append(f"{batch.datasets[row]}, {counted(len(marks), 'box', 'boxes')}: {batch.image_ids[row]}")
    _save(contact_sheet(drawn, captions, _COLUMNS, _CELL), path)


def _marks(batch: Batch, row: int, names: Sequence[str]) -> Iterator[Mark]:
    """The boxes of one image's targets, in its pixels."""
    targets, (height, width) = batch.targets, batch.sizes[row]
    sides = targets.boxes.new_tensor([width, height, width, height])
    kinds = (targets.boxes, targets.labels, False), (targets.ignore_boxes, targets.ignore_labels, True)
    for boxes, labels, ignored in kinds:
        for box, label in zip((cxcywh_to_xyxy(boxes[row]) * sides).tolist(), labels[row].tolist(), strict=True):
            if label != NO_OBJECT:
                yield Mark(box=tuple(box), name=names[label], dashed=ignored)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """A val image on the sheet: the row of its dataset in the runner, and its annotations."""

    dataset: int
    record: ImageRecord


class ValImages:
    """Some val images of a run, the same ones at every evaluation, drawn with annotations and detections.

    Args:
        runner: Evaluates the run; its datasets and its vocabulary are those of the sheet.
        config: Precision and post-processing of the detections.
    """

    def __init__(self, runner: EvaluationRunner, config: InferenceConfig) -> None:
        self.runner, self.config = runner, config
        self.samples = _spread([list(_candidates(row, one)) for row, one in enumerate(runner.datasets)])

    def draw(
        self,
        network: nn.Module,
        step: int,
        path: Path,
        calibration: Mapping[str, Calibration] | None = None,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        """Draws the sheet: annotations at the left, at the right what the network detects with a dataset's own names.

        What cannot be read is left out, and what cannot be written becomes a warning.

        Args:
            network: The network as it is evaluated.
            step: The step that the captions name.
            path: The image to write.
            calibration: Of the scores.
            thresholds: From which scores detection shows a name. What it shows is drawn; where that is nothing, the
                best ones are.
        """
        config = with_calibration(self.config, calibration or {})
        shown = ScoreThresholds(names=dict(thresholds or {}))
        predictors = {row: self._predictor(network, row, config) for row in {one.dataset for one in self.samples}}
        drawn: list[np.ndarray] = []
        captions: list[str] = []
        for sample in self.samples:
            dataset = self.runner.datasets[sample.dataset]
            try:
                image, record, _ = read_annotated(sample.record)
            except DataError:
                continue
            found, caption = _found(predictors[sample.dataset].detect(image), shown)
            truth = record_marks(record, dataset.annotations.categories)
            style = Style(colours=palette(dataset.annotations.categories))
            drawn += [draw(image, truth, _CELL, style), draw(image, found, _CELL, style)]
            captions += [f"{dataset.name}, {counted(len(truth), 'object')}: {record.path.name}"]
            captions += [f"step {step:,}: {caption}"]
        if drawn:
            _save(contact_sheet(drawn, captions, _COLUMNS, _CELL), path)

    def _predictor(self, network: nn.Module, row: int, config: InferenceConfig) -> Predictor:
        """Asks the network for the names of one dataset."""
        runner = self.runner
        names = tuple(dict.fromkeys(name.strip() for name in runner.datasets[row].annotations.categories))
        text = runner.text[[runner.vocabulary.index_of(name) for name in names]]
        resize = runner.datasets[row].transforms.config.resize
        limits = None
        if isinstance(network, Detector):
            limits = name_limits(names, runner.trained, network.config, config.selection)
        return Predictor(network, text, names, resize, config, multiple=runner.loader.multiple, limits=limits)


def _candidates(row: int, dataset: DetectionDataset) -> Iterator[_Sample]:
    """Images of a dataset in an order that only their ids decide; those with objects first."""
    annotations = dataset.annotations
    order = seeded_order([str(number) for number in range(len(annotations))])[:_LOOKED_AT].tolist()
    records = [annotations[number] for number in order]
    for record in sorted(records, key=lambda record: len(record.boxes) == 0):
        yield _Sample(dataset=row, record=record)


def _spread(candidates: Sequence[Sequence[_Sample]]) -> list[_Sample]:
    """The first of each dataset, then the second of each, ... up to the number on the sheet; grouped by dataset."""
    turns = [one[turn] for turn in range(VAL_IMAGES) for one in candidates if turn < len(one)]
    return sorted(turns[:VAL_IMAGES], key=lambda sample: sample.dataset)


def _found(detections: Detections, shown: ScoreThresholds) -> tuple[list[Mark], str]:
    """The detections that are drawn, and how many they are in words."""
    if marks := detection_marks(shown.shown(detections)):
        return marks, counted(len(marks), "detection")
    best = detection_marks(detections, limit=_BELOW)
    return best, f"none that detection shows; the best {len(best)}"


def _save(sheet: np.ndarray, path: Path) -> None:
    try:
        save_image(sheet, path)
    except MetrError as error:  # a run does not end for an image of it
        _logger.warning("%s", error)
