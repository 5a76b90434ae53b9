"""A small real run: two datasets of rectangles, the small detector, a checkpoint's other half."""

import copy
import os
import signal
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from metr.checkpoint import Checkpoint
from metr.config import merge
from metr.data.config import AugmentationConfig, LoaderConfig, ResizeConfig
from metr.data.dataset import DetectionDataset
from metr.data.loading import build_train_loader
from metr.data.records import ImageRecord, InMemoryAnnotations
from metr.data.transforms import build_transforms
from metr.losses.config import CriterionConfig
from metr.losses.criterion import SetCriterion
from metr.models.config import DetectorConfig
from metr.models.detector import Detector
from metr.text.vocabulary import Vocabulary
from metr.training.config import TrainConfig
from metr.training.parts import TrainingParts
from metr.training.trainer import Trainer

from small import TEXT_WIDTH, small_config, small_detector

TESTS = Path(__file__).parent
NAMES = {"cells": ("red cell", "platelet"), "fish": ("shark", "puffin")}
VOCABULARY = Vocabulary.union(NAMES)
COLOURS = [(255, 40, 40), (40, 255, 40), (40, 40, 255), (240, 240, 40)]


def make_datasets(folder: Path, size: int = 32) -> list[DetectionDataset]:
    """Two datasets of five images each, at 32 pixels, augmented."""
    transforms = build_transforms(AugmentationConfig(resize=ResizeConfig(size=size)), training=True)
    return [DetectionDataset(_annotations(folder, name), VOCABULARY, transforms) for name in NAMES]


def _annotations(folder: Path, name: str) -> InMemoryAnnotations:
    rng = np.random.default_rng(len(name))
    (folder / name).mkdir(parents=True, exist_ok=True)
    records = tuple(_record(folder / name / f"{index}.png", index, rng) for index in range(5))
    return InMemoryAnnotations(name=name, split="train", categories=NAMES[name], records=records)


def _record(path: Path, index: int, rng: np.random.Generator) -> ImageRecord:
    """A noisy image with one rectangle, or none in the last."""
    count = int(index < 4)
    image = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
    label = index % 2
    left, top = rng.integers(4, 24, 2)
    width, height = rng.integers(16, 36, 2)
    if count:
        image[top : top + height, left : left + width] = COLOURS[label]
    cv2.imwrite(str(path), image[..., ::-1])
    boxes = np.array([[left, top, left + width, top + height]], dtype=np.float32)[:count]
    return ImageRecord(
        image_id=index,
        path=path,
        width=64,
        height=64,
        boxes=boxes,
        labels=np.array([label])[:count],
        areas=np.array([float(width * height)])[:count],
        ignore=np.zeros(count, dtype=bool),
    )


def make_description(**model: Any) -> Checkpoint:
    """A checkpoint without weights."""
    generator = torch.Generator().manual_seed(7)
    embeddings = torch.nn.functional.normalize(torch.randn(len(VOCABULARY), TEXT_WIDTH, generator=generator), dim=-1)
    return Checkpoint(
        model=small_config(**{"denoising": 8} | model),
        vocabulary=VOCABULARY,
        text_embeddings=embeddings,
        text_encoder={"source": "random", "width": TEXT_WIDTH},
        preprocessing={"size": 32},
    )


@cache
def _network(config: str) -> Detector:
    return small_detector(DetectorConfig.model_validate_json(config))


def make_parts(
    folder: Path,
    *,
    criterion: SetCriterion | None = None,
    batch_size: int = 2,
    workers: int = 0,
    size: int = 32,
    **model: Any,
) -> TrainingParts:
    """Everything the trainer wants; the network's weights are the same every time, `model` goes to `small_config`."""
    loader = LoaderConfig(batch_size=batch_size, workers=workers)
    checkpoint = make_description(**model)
    return TrainingParts(
        network=copy.deepcopy(
            _network(checkpoint.model.model_dump_json())
        ),  # building one takes longer than a few steps
        criterion=criterion or SetCriterion(CriterionConfig()),
        loader=partial(build_train_loader, make_datasets(folder, size), loader),
        checkpoint=checkpoint,
    )


def make_config(steps: int = 6, **changes: Any) -> TrainConfig:
    """A short training on the CPU; `changes` are laid over it section by section."""
    base = {
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 2},
        "ema": {"decay": 0.9, "tau": 2},
        "loop": {
            "steps": steps,
            "device": "cpu",
            "precision": "fp32",
            "log_every": 4,
            "evaluate_every": 0,
            "checkpoint_every": 0,
            "curves": False,
            "images": False,
        },
    }
    return TrainConfig.checked(merge(base, changes))


def interrupt_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Sends Ctrl-C to this process while a trainer makes a step."""
    made = Trainer.train_step

    def interrupted(self: Trainer, *arguments: Any) -> Any:
        if self.counters.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return made(self, *arguments)

    patch.setattr(Trainer, "train_step", interrupted)
