"""The arms of MultiField: what joint METR is compared with, each for the same number of images seen.

`separate` trains one METR for each dataset, on as many of its images as the joint arms see. `closed_set` is one
closed head over the concatenated labels (see closed_set.py). Every other arm is joint METR, by how it treats the
categories that an image's dataset does not annotate. An arm that is finished is not run again: `report.json` in its
folder says so.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from closed_set import ClosedSetCriterion, ClosedSetDetector, concatenated
from machine import commit
from metr.checkpoint import Checkpoint, load_checkpoint
from metr.data.dataset import DetectionDataset
from metr.data.joint import JointData, open_joint
from metr.data.loading import build_train_loader
from metr.data.mixture import mixture_weights
from metr.data.transforms.pipeline import build_transforms
from metr.evaluation.evaluate import evaluate
from metr.evaluation.report import show
from metr.evaluation.results import EvaluationConfig, EvaluationReport, as_dict, from_dict
from metr.evaluation.runner import EvaluationRunner
from metr.training.random_state import seed_everything
from metr.training.recipe import RunConfig
from metr.training.train import train
from metr.training.trainer import Trainer, TrainingParts
from resumable import training_seconds

UNANNOTATED = ("ignore", "negative", "pseudo_label")
ARMS = ("separate", "closed_set", *UNANNOTATED)
REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an arm works on: datasets as arguments of a command, its folder, how it trains and is judged."""

    data: Sequence[str]
    out: Path
    recipe: RunConfig
    judged: EvaluationConfig
    console: Console


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What an arm found, and what it took: images seen, seconds of training steps; `commit` is what it began with."""

    arm: str
    report: EvaluationReport
    images_seen: int
    training_seconds: float
    commit: str


def run_arm(arm: str, task: Task) -> ArmResult | None:
    """The result of an arm, trained now unless it was before; None where training was interrupted."""
    stored = task.out / REPORT
    if not stored.is_file():
        task.console.rule(arm)
        began_with = commit()
        report = _TRAINED.get(arm, partial(_joint, arm))(task)
        if report is None:
            return None
        told = as_dict(report) | _taken(task.out) | {"commit": began_with}
        stored.write_text(json.dumps(told), encoding="utf-8")
    values = json.loads(stored.read_text(encoding="utf-8"))
    return ArmResult(
        arm=arm,
        report=from_dict(values, where=stored),
        images_seen=values["images_seen"],
        training_seconds=values["training_seconds"],
        commit=values["commit"],
    )


def _joint(unannotated: str, task: Task) -> EvaluationReport | None:
    """Joint METR."""
    recipe = task.recipe.model_copy(update={"unannotated": unannotated})
    quick = task.judged.model_copy(update={"modes": ("own",)})
    if train(task.data, task.out, recipe, resume=True, console=task.console, judged=quick).interrupted:
        return None
    return evaluate(task.out / "last", task.data, task.out / "evaluation", config=task.judged, console=task.console)


def _separate(task: Task) -> EvaluationReport | None:
    """One METR for each dataset: a joint run's steps, shared out as its draws are."""
    own, reports = task.judged.model_copy(update={"modes": ("own",)}), []
    for argument, steps in zip(task.data, _shares(task), strict=True):
        out = task.out / argument.partition("=")[0]
        loop = task.recipe.train.loop.model_copy(update={"steps": steps})
        recipe = task.recipe.model_copy(
            update={
                "train": task.recipe.train.model_copy(update={"loop": loop}),
                "loader": task.recipe.loader.model_copy(update={"mixture": "equal"}),
            }
        )
        if train([argument], out, recipe, resume=True, console=task.console, judged=own).interrupted:
            return None
        reports.append(evaluate(out / "last", [argument], out / "evaluation", config=own, console=task.console))
    return EvaluationReport(
        datasets=tuple(one for report in reports for one in report.datasets),
        names=sum(report.names for report in reports),
    )


def _shares(task: Task) -> list[int]:
    """How many of the joint run's steps fall to each dataset."""
    lengths = {source.name: len(source.split("train")) for source in open_joint(task.data).sources}
    shares = mixture_weights(lengths, task.recipe.loader.base_mixture)
    return [round(share * task.recipe.train.loop.steps) for share in shares.values()]


def _closed_set(task: Task) -> EvaluationReport | None:
    """The closed head over the concatenated labels."""
    joint, recipe = open_joint(task.data), task.recipe
    names = joint.vocabulary.names
    vocabulary, of_labels = concatenated(joint.vocabulary)
    seed_everything(recipe.train.loop.seed)
    network = ClosedSetDetector(recipe.model, of_labels, names)
    parts = TrainingParts(
        network=network,
        criterion=ClosedSetCriterion(recipe.criterion),
        loader=partial(build_train_loader, _closed_datasets(joint, vocabulary, recipe), recipe.loader),
        checkpoint=Checkpoint(
            model=recipe.model,
            vocabulary=vocabulary,
            text_embeddings=torch.eye(len(vocabulary)),
            text_encoder={},
            preprocessing=recipe.augmentation.resize.model_dump(mode="json"),
        ),
    )
    trainer = Trainer(parts, recipe.train, task.out, resolved=recipe, console=task.console)
    if trainer.fit(resume=True).interrupted:
        return None
    network.load_state_dict(dict(load_checkpoint(task.out / "last").weights))
    text, sets = torch.eye(len(names)), joint.evaluation()
    judge = EvaluationRunner(
        joint.vocabulary, text, sets, recipe.augmentation.resize, recipe.evaluation_loader, task.judged
    )
    report = judge.report(network.eval(), task.console, "negative")
    show(report, task.console)
    return report


def _closed_datasets(joint: JointData, vocabulary: Any, recipe: RunConfig) -> list[DetectionDataset]:
    transforms = build_transforms(recipe.augmentation, training=True)
    return [DetectionDataset(source.split("train"), vocabulary, transforms) for source in joint.sources]


def _taken(out: Path) -> dict[str, float]:
    """Images seen and seconds of steps, summed over the runs in a folder."""
    images, seconds = 0, 0.0
    for metrics in sorted(out.rglob("metrics.jsonl")):
        images += load_checkpoint(metrics.parent / "last").training["images"]
        seconds += training_seconds(metrics)
    return {"images_seen": images, "training_seconds": round(seconds)}


_TRAINED: dict[str, Callable[[Task], EvaluationReport | None]] = {"separate": _separate, "closed_set": _closed_set}
