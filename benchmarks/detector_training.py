"""Starts, training and evaluation of transformers' detectors, for `transfer_detectors.py`.

Images, their order and their augmentation are METR's, sample by sample, whatever is trained: two runs of one seed see
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
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModelForObjectDetection, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from metr.boxes import clip, cxcywh_to_xyxy
from metr.config import Config
from metr.conversion.convert import giving_to_theirs, receive
from metr.conversion.export import build, variances
from metr.conversion.targets.base import Colours, Target
from metr.data.config import LoaderConfig
from metr.data.dataset import DetectionDataset, Example, Missing, MixedDataset
from metr.data.loading import spare_cores
from metr.data.sampling import MixedSampler, mixture_weights
from metr.devices import resolved_device
from metr.errors import DataError
from metr.evaluation.coco import MAX_DETECTIONS, CocoResult, evaluate_detections
from metr.hub import quiet
from metr.inference.postprocess import ImageId
from metr.models.detector import Detector
from metr.structures import Detections
from metr.training.config import RunConfig

TRAINED = "model"
"""The folder inside a run folder that holds the trained detector."""
BACKBONE_MULTIPLIER = 0.5
"""The backbone's learning rate, relative to the others'."""
WARMUP, WEIGHT_DECAY, CLIP_NORM = 0.1, 1e-4, 1.0
"""Fraction of the steps in which the learning rate rises; of matrices and kernels alone; of the gradient."""


class TrainerConfig(Config):
    """How transformers' Trainer trains: AdamW, a linear warm-up of the learning rate, then half a cosine."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Of everything but the backbone."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Steps."""


class SampledImages(Dataset[Example]):
    """The images of a run in their order: item n is METR's sample n.

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
        self.samples = [sample for batch in islice(sampler, steps) for sample in batch]

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.samples)

    def __getitem__(self, number: int) -> Example:
        """Sample `number`; raises DataError where hardly an image of its dataset can be read."""
        return _readable(self.mixed[self.samples[number]])


@dataclass(frozen=True)
class Collator:
    """Makes batches of images of one shape as transformers' detectors take them, from the colours they expect."""

    colours: Colours

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Normalised pixels, labels and boxes (cxcywh, 0..1); crowds are left out, as transformers' processors do."""
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in self.colours)
        pixels = torch.stack([example.image for example in examples]).float() / 255
        targets = [example.targets for example in examples]
        labels = [{"class_labels": target.labels[0], "boxes": target.boxes[0]} for target in targets]
        return {"pixel_values": (pixels - mean) / deviation, "labels": labels}


class Clock(TrainerCallback, ExportableState):
    """Counts the seconds of training steps; checkpoints keep the count, however often a run is stopped."""

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


def backbone_alone(target: Target, network: Detector, names: Sequence[str], seed: int) -> PreTrainedModel:
    """A detector with METR's ImageNet backbone; all else, queries too, is as transformers initialises it."""
    model: PreTrainedModel = build(target, network, names, seed)
    ours = {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()}
    derived = variances(network.backbone, model, target.backbone)
    given = giving_to_theirs(ours, target.table(model.config, network.config).backbone, derived)
    receive(model, given, source="ImageNet", name=target.title)
    return model


def renamed(folder: Path, names: Sequence[str], fresh: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A trained detector with other names: the heads that do not fit them begin as those of `fresh`.

    transformers' own new heads would do worse than that: Deformable DETR's would first say "perhaps" of everything, and
    choose the places of its queries, which no gradient ever reaches, at random.
    """
    auto: Any = AutoModelForObjectDetection  # its methods have no types
    numbered = dict(enumerate(names))
    labels = {"id2label": numbered, "label2id": {name: row for row, name in numbered.items()}}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = auto.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True, **labels)
    ours, theirs = model.state_dict(), fresh.state_dict()
    with torch.no_grad():
        for key, *_ in info["mismatched_keys"]:
            ours[key].copy_(theirs[key])
    trained: PreTrainedModel = model
    return trained


def train_detector(
    model: PreTrainedModel,
    images: SampledImages,
    collate: Collator,
    arguments: TrainingArguments,
    optimizer: torch.optim.Optimizer,
) -> float:
    """Trains a detector of transformers from where the run stopped, saves it in `TRAINED`, gives seconds of steps."""
    cv2.setNumThreads(0)  # the processes that read images are forked from this one, and have a core each
    folder = Path(str(arguments.output_dir))
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=images,
        callbacks=[Clock()],
        optimizers=(optimizer, None),
    )
    with quiet():
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        model.save_pretrained(folder / TRAINED)
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
def evaluate_detector(
    model: nn.Module, dataset: DetectionDataset, names: Sequence[str], collate: Collator
) -> CocoResult:
    """METR's COCO numbers of a detector of transformers, whose labels are rows of `names`, on a whole split.

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
    categories = tuple(name.strip() for name in dataset.annotations.categories)
    return evaluate_detections(dataset.annotations, found, categories)


def detections(logits: Tensor, boxes: Tensor, size: tuple[int, int], names: Sequence[str]) -> Detections:
    """The best pairs of query and label of an image of `size` (height, width).

    Logits [q c] are one binary question each; boxes [q 4] are cxcywh in 0..1.
    """
    best, pair = logits.float().sigmoid().flatten().topk(min(MAX_DETECTIONS, logits.numel()))
    height, width = size
    corners = clip(cxcywh_to_xyxy(boxes.float()), 1.0, 1.0) * torch.tensor([width, height, width, height])
    query, label = pair // logits.shape[1], pair % logits.shape[1]
    return Detections(boxes=corners[query], scores=best, labels=label, names=tuple(names))


def training_arguments(
    folder: Path, steps: int, seed: int, config: TrainerConfig, recipe: RunConfig
) -> TrainingArguments:
    """What Trainer is told: keep the order of the samples and the last checkpoint alone, report to nobody outside."""
    on_cpu, workers = resolved_device(recipe.train.loop.device).type == "cpu", recipe.loader.workers
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=recipe.loader.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(WARMUP * steps),
        max_grad_norm=CLIP_NORM,
        save_steps=config.checkpoint_every,
        save_total_limit=1,
        logging_steps=20,
        train_sampling_strategy="sequential",
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        dataloader_num_workers=spare_cores() if workers is None else workers,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        report_to=[],
        seed=seed,
        use_cpu=on_cpu,
    )


def detector_optimizer(model: nn.Module, config: TrainerConfig, backbone: str) -> torch.optim.Optimizer:
    """AdamW with a rate of its own for the backbone (the prefix of its keys), and no decay of biases and norms."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith(backbone), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": config.learning_rate * (BACKBONE_MULTIPLIER if in_backbone else 1.0),
                "weight_decay": WEIGHT_DECAY if decays else 0.0,
            }
            for (in_backbone, decays), parameters in groups.items()
        ]
    )


def _readable(example: Example | Missing) -> Example:
    if isinstance(example, Missing):
        raise DataError("an image cannot be read", where=example.dataset, hint="metr inspect lists all")
    return example
