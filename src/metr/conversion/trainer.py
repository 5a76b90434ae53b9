"""METR's datasets for transformers' Trainer: images with the detector's labels, batches, and METR's COCO numbers."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metr.boxes import clip
from metr.conversion.targets import NAMES
from metr.data.datasets_file import DatasetSource
from metr.data.images import exif_oriented, read_annotated, read_image
from metr.data.joint import open_joint
from metr.data.records import TRAIN, VAL, ImageRecord
from metr.errors import DataError
from metr.evaluation.coco import MAX_DETECTIONS, CocoResult, evaluate_detections
from metr.inference.postprocess import ImageId
from metr.models.backbones.registered import EfficientNetLiteConfig
from metr.structures import Detections
from metr.text.same_names import known_aliases, listed

__all__ = ["how_to_go_on", "keep_aliases", "trainer_batch", "trainer_images", "trainer_result"]

_GO_ON = """go on with transformers' Trainer; DATA is a dataset with names of the detector (--names DATA):
  from functools import partial
  from metr.conversion.transfer import trainer_batch, trainer_images, trainer_result
  from transformers import AutoImageProcessor, AutoModelForObjectDetection, Trainer, TrainingArguments
{register}  steps = TrainingArguments("{out}-training", max_steps=500, learning_rate=2e-4)
  model = AutoModelForObjectDetection.from_pretrained("{out}").to(steps.device)
  processor = AutoImageProcessor.from_pretrained("{out}")
  batch, images = partial(trainer_batch, processor), trainer_images("DATA", model)
  print("AP on val before training:", trainer_result("DATA", model, processor).ap)
  Trainer(model, steps, batch, images, processing_class=processor).train()
  model.save_pretrained("{out}-trained"), processor.save_pretrained("{out}-trained")
  print("AP on val:", trainer_result("DATA", model, processor).ap)"""
_REGISTER = """  import metr
  metr.register()  # each program that loads the detector needs METR and this line
"""

ALIASES = "metr_aliases"
"""The key of a detector's configuration that keeps which other names of datasets mean one of its labels."""

# of an object, as transformers' image processors read it
_COCO = ("category_id", "bbox", "area", "iscrowd")
_BATCH = 8


def how_to_go_on(model: Any, out: Path) -> str:
    """What a user does with a detector of transformers that was written to the folder `out`."""
    registered = model.config.backbone_config.model_type == EfficientNetLiteConfig.model_type
    return _GO_ON.format(out=out, register=_REGISTER if registered else "")


def keep_aliases(model: Any, aliases: Mapping[str, str]) -> None:
    """Writes into a detector's configuration which names of datasets fine-tuning took as one of its labels.

    `save_pretrained` keeps them, so that the dataset of fine-tuning fits the detector under its own names.
    """
    labels = set(model.config.label2id)
    kept = {name: label for name, label in aliases.items() if label in labels and name not in labels}
    if kept:
        setattr(model.config, ALIASES, kept)


def trainer_images(data: str | Path, model: Any, split: str = TRAIN) -> list[ImageRecord]:
    """The images of datasets as transformers' Trainer may take them, with the labels that the detector has by name.

    A name that fine-tuning took as another (`--same-names yes`) has the label of that one.

    Args:
        data: One dataset, or a file that lists some, as an argument of a command.
        model: A detector of transformers; its configuration names its labels.
        split: Which images.

    Raises:
        DataError: a dataset has a name that is no label of the detector, or lacks the split.
    """
    found = []
    for source in open_joint([str(data)]).sources:
        labels = np.array([model.config.label2id[name] for name in _labels(source, data, model)], dtype=np.int64)
        records = source.split(split)
        found += [replace(one, labels=labels[one.labels]) for one in (records[row] for row in range(len(records)))]
    return found


def trainer_batch(processor: Any, records: Sequence[ImageRecord]) -> dict[str, Any]:
    """Images and their objects as transformers' detectors are trained with them: what a Trainer's collator gives.

    Args:
        processor: The detector's image processor.
        records: Records of a split whose categories are the detector's labels.

    Raises:
        DataError: an image cannot be read.
    """
    images, told = [], []
    for unturned in records:
        image, record, _ = read_annotated(unturned)
        boxes = np.concatenate([record.boxes[:, :2], record.boxes[:, 2:] - record.boxes[:, :2]], axis=1).tolist()
        objects = zip(record.labels.tolist(), boxes, record.areas.tolist(), record.ignore.tolist(), strict=True)
        images.append(image)
        told.append({"image_id": 0, "annotations": [dict(zip(_COCO, one, strict=True)) for one in objects]})
    return {**processor(images, told, return_tensors="pt")}


def trainer_result(
    data: str | Path, model: Any, processor: Any, split: str = VAL, *, clipped: bool = False
) -> CocoResult:
    """METR's COCO numbers of a detector of transformers on a split of one dataset.

    Args:
        data: The dataset, as an argument of a command.
        model: The detector; it is left in evaluation mode.
        processor: Its image processor.
        split: Which images.
        clipped: Clip boxes to the image, as METR does with its own. Transformers leaves them as they are, which costs
            AP where objects are cut by the edge.

    Raises:
        DataError: the dataset has a name that is no label of the detector, or lacks the split; several datasets are
            named; an image cannot be read.
    """
    sources = open_joint([str(data)]).sources
    if len(sources) > 1:
        what = f"expected one dataset, found {len(sources)}: {listed([one.name for one in sources])}"
        raise DataError(what, where=data, hint="name them one by one")
    names, annotations = _labels(sources[0], data, model), exif_oriented(sources[0].split(split))
    alike: defaultdict[tuple[int, int], list[ImageRecord]] = defaultdict(list)
    for record in annotations.records:  # images of one size need no padding, which would change what is found
        alike[record.height, record.width].append(record)
    batches = chain.from_iterable(
        (some[start : start + _BATCH] for start in range(0, len(some), _BATCH)) for some in alike.values()
    )
    found: dict[ImageId, Detections] = {}
    model.eval()
    for records in batches:
        answers = _detected(model, processor, records, clipped=clipped)
        found |= {record.image_id: answer for record, answer in zip(records, answers, strict=True)}
    return evaluate_detections(annotations, found, names)


@torch.no_grad()
def _detected(model: Any, processor: Any, records: Sequence[ImageRecord], *, clipped: bool) -> list[Detections]:
    """What a detector finds in some images, the best first, in pixels of their records."""
    images = [read_image(record.path, record.source) for record in records]
    output = model(**processor(images, return_tensors="pt").to(model.device))
    sizes = [(record.height, record.width) for record in records]
    names = tuple(model.config.id2label[label] for label in range(len(model.config.id2label)))
    answers = []
    processed = processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
    for one, (height, width) in zip(processed, sizes, strict=True):
        scores, order = one["scores"].cpu().sort(descending=True)
        best = order[:MAX_DETECTIONS]
        boxes, labels = one["boxes"].cpu()[best], one["labels"].cpu()[best]
        boxes = clip(boxes, float(height), float(width)) if clipped else boxes
        answers.append(Detections(boxes=boxes, scores=scores[:MAX_DETECTIONS], labels=labels, names=names))
    return answers


def _labels(source: DatasetSource, data: str | Path, model: Any) -> tuple[str, ...]:
    """The detector's label for each category of a dataset.

    Raises:
        DataError: it has none for some of them.
    """
    known = model.config.label2id
    aliases = known_aliases(source.categories, getattr(model.config, ALIASES, {}))
    names = tuple(aliases.get(name, name) for name in source.categories)
    if missing := [name for name in names if name not in known]:
        what = f"the detector has no label for {listed(missing)}; it has {listed(list(known))}"
        kind = getattr(model.config, "model_type", None)
        target = kind if kind in NAMES else "DETECTOR"
        hint = f"give it the names of this dataset: metr transfer RUN --to {target} -o OUT --names {data}"
        raise DataError(what, where=source.name, hint=f"{hint}; or rename categories in a datasets file (renames)")
    return names
