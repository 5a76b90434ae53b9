"""transformers' Trainer on METR's images, and METR's evaluation of transformers' detectors.

Images, their order and their augmentation are METR's, draw for draw, whatever is trained: two runs of one seed see
the same.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import cv2
import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from metr.boxes import clip, cxcywh_to_xyxy
from metr.config import Config
from metr.conversion.targets.base import Colours
from metr.data.config import LoaderConfig
from metr.data.dataset import DetectionDataset, Example, Missing, MixedDataset
from metr.data.sampling import MixedSampler, mixture_weights
from metr.errors import DataError
from metr.evaluation.coco import MAX_DETECTIONS, CocoResult, ImageId, evaluate_detections
from metr.hub import quiet
from metr.structures import Detections

TRAINED = "model"
"""The folder of a run in which the trained detector is."""


class TrainerConfig(Config):
    """How transformers' Trainer trains: AdamW, a rise of the rate, then half a cosine."""

    learning_rate: Annotated[float, Field(gt=0)]
    backbone_multiplier: Annotated[float, Field(ge=0)] = 0.5
    """The backbone's share of the rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of matrices and kernels alone."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the rate rises."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Steps."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One training: where it is kept, how long it is, and by what."""

    folder: Path
    steps: int
    seed: int
    settings: TrainerConfig
    batch_size: int
    workers: int
    device: torch.device
    backbone: str
    """The prefix of the backbone's keys."""


class DrawnImages(Dataset[Example]):
    """The images of a run in their order: item n is METR's draw n.

    Args:
        datasets: Training splits with transforms of training.
        loader: Batch size and mixture.
        steps: Length of the run.
        seed: Decides order and augmentation.
    """

    def __init__(self, datasets: Sequence[DetectionDataset], loader: LoaderConfig, steps: int, seed: int) -> None:
        self.mixed = MixedDataset(datasets)
        weights = mixture_weights(self.mixed.lengths, loader.mixture)
        sampler = MixedSampler(self.mixed.lengths, weights, loader.batch_size, seed)
        self.draws = [draw for batch in islice(sampler, steps) for draw in batch]

    def __len__(self) -> int:
        """The number of draws."""
        return len(self.draws)

    def __getitem__(self, number: int) -> Example:
        """Draw `number`.

        Raises:
            DataError: hardly an image of its dataset can be read.
        """
        return _readable(self.mixed[self.draws[number]])


@dataclass(frozen=True)
class Collator:
    """Images of one shape as transformers' detectors take them: normalised, with labels and boxes (cxcywh, 0..1)."""

    colours: Colours

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch; crowds are left out, as transformers' image processors do."""
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in self.colours)
        pixels = torch.stack([example.image for example in examples]).float() / 255
        return {
            "pixel_values": (pixels - mean) / deviation,
            "labels": [
                {"class_labels": example.targets.labels[0], "boxes": example.targets.boxes[0]} for example in examples
            ],
        }


class Clock(TrainerCallback, ExportableState):
    """Counts the seconds of training steps; checkpoints keep the count, however often a run is stopped.

    Args:
        seconds: Counted so far.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self._since = seconds, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Starts."""
        self._since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Counts the step."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"args": {"seconds": self.seconds}, "attributes": {}}


class Teller(TrainerCallback):
    """Tells where training is.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_log(self, args: Any, state: Any, control: Any, **told: Any) -> None:  # noqa: ARG002  # as Trainer calls it
        """Tells step and loss."""
        if "loss" in (logs := told.get("logs") or {}):
            loss = f"loss {float(logs['loss']):.2f}"
            self.console.print(f"step {state.global_step} of {state.max_steps}: {loss}", highlight=False)


def train_detector(
    model: PreTrainedModel, images: DrawnImages, collate: Collator, work: Work, console: Console
) -> float:
    """Trains a detector of transformers from where the run in the folder stopped, and keeps it in `TRAINED`.

    Args:
        model: With the weights that the run begins with.
        images: As many as there are steps, in batches.
        collate: Makes batches of them.
        work: The rest.
        console: Where progress is told.

    Returns:
        The seconds of its steps.
    """
    cv2.setNumThreads(0)  # the processes that read images are forked from this one, and have a core each
    trainer = Trainer(
        model=model,
        args=_arguments(work),
        data_collator=collate,
        train_dataset=images,
        callbacks=[Clock(), Teller(console)],
        optimizers=(_optimizer(model, work), None),
    )
    trainer.remove_callback(PrinterCallback)
    stopped = last_checkpoint(work.folder)
    with quiet():
        trainer.train(resume_from_checkpoint=stopped)
        model.save_pretrained(work.folder / TRAINED)
    # going on, Trainer replaces the clock by that of the checkpoint
    return next(round(one.seconds, 3) for one in trainer.callback_handler.callbacks if isinstance(one, Clock))


def last_checkpoint(folder: Path) -> str | None:
    """Where a run that was stopped goes on; None where it has nothing to go on from."""
    # the Trainer writes its state last: a checkpoint without it was cut short
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def drop_checkpoints(folder: Path) -> None:
    """Removes what a finished run would go on from."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


@torch.no_grad()
def judged(model: nn.Module, dataset: DetectionDataset, names: Sequence[str], collate: Collator) -> CocoResult:
    """METR's COCO numbers of a detector of transformers, whose labels are rows of `names`.

    Args:
        model: On its device; left in evaluation mode.
        dataset: The images, with transforms of evaluation.
        names: The names of the labels.
        collate: Makes batches of images.

    Raises:
        DataError: an image cannot be read.
    """
    device = next(model.parameters()).device
    model.eval()
    found: dict[ImageId, Detections] = {}
    for start in range(0, len(dataset), 8):
        examples = [_readable(dataset[number]) for number in range(start, min(start + 8, len(dataset)))]
        output = model(pixel_values=collate(examples)["pixel_values"].to(device))
        for example, logits, boxes in zip(examples, output.logits.cpu(), output.pred_boxes.cpu(), strict=True):
            found[example.image_id] = detections(logits, boxes, example.original_size, names)
    spelling = tuple(name.strip() for name in dataset.annotations.categories)
    return evaluate_detections(dataset.annotations, found, spelling)


def detections(logits: Tensor, boxes: Tensor, size: tuple[int, int], names: Sequence[str]) -> Detections:
    """The best pairs of query and label of one image.

    Args:
        logits: [q c], one binary question each.
        boxes: [q 4], cxcywh in 0..1.
        size: (height, width) of the image in pixels.
        names: The names of the labels.
    """
    best, pair = logits.float().sigmoid().flatten().topk(min(MAX_DETECTIONS, logits.numel()))
    height, width = size
    corners = clip(cxcywh_to_xyxy(boxes.float()), 1.0, 1.0) * torch.tensor([width, height, width, height])
    query, label = pair // logits.shape[1], pair % logits.shape[1]
    return Detections(boxes=corners[query], scores=best, labels=label, names=tuple(names))


def _arguments(work: Work) -> TrainingArguments:
    """In the order of the draws, keeping the last checkpoint alone, telling nobody outside."""
    settings, on_cpu = work.settings, work.device.type == "cpu"
    return TrainingArguments(
        output_dir=str(work.folder),
        max_steps=work.steps,
        per_device_train_batch_size=work.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * work.steps),
        max_grad_norm=settings.clip_norm,
        save_steps=settings.checkpoint_every,
        save_total_limit=1,
        logging_steps=20,
        train_sampling_strategy="sequential",
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        dataloader_num_workers=work.workers,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        report_to=[],
        seed=work.seed,
        use_cpu=on_cpu,
    )


def _optimizer(model: nn.Module, work: Work) -> torch.optim.Optimizer:
    """AdamW with a rate of its own for the backbone, and no decay of biases and norms."""
    settings = work.settings
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith(work.backbone), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": settings.learning_rate * (settings.backbone_multiplier if in_backbone else 1.0),
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (in_backbone, decays), parameters in groups.items()
        ]
    )


def _readable(example: Example | Missing) -> Example:
    if isinstance(example, Missing):
        raise DataError("an image cannot be read", where=example.dataset, hint="metr inspect lists all")
    return example
