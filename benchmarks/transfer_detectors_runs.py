"""The runs of the benchmark of detectors: pretrainings without a dataset, and every arm on that dataset.

Every run has a folder of its own; `report.json` in it says that it is finished, and is not run again.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedModel

from metr.api.datasets import JointData, open_joint
from metr.api.training import train
from metr.config import Config, merge
from metr.data.loading import spare_cores
from metr.engine.hardware import resolved_device
from metr.engine.recipe import RunConfig, load_recipe
from metr.errors import ConfigError
from metr.evaluation.coco import CocoResult
from metr.transfer.outgoing import colours_of
from resumable import training_seconds
from transfer_detectors_starts import (
    ARMS,
    Arm,
    Family,
    bare_names,
    chosen,
    joint_start,
    metr_start,
    own_start,
    pretraining_data,
    pretraining_start,
    untrained_start,
)
from transfer_detectors_training import (
    TRAINED,
    Collator,
    DrawnPictures,
    TrainerConfig,
    Work,
    drop_checkpoints,
    judged,
    train_detector,
)
from transfer_runs import Workplace

REPORT, RECIPE = "report.json", "recipe.yaml"


class DetectorConfig(Config):
    """One detector of transformers: the METR whose weights fit it, and how Trainer trains it in every arm."""

    model: dict[str, Any]
    """METR's family, laid over the size `nano`."""
    trainer: TrainerConfig


class Profile(Config):
    """What is run."""

    left_out: str
    """The dataset that nothing is pretrained on, and all arms are fine-tuned on."""
    seeds: tuple[int, ...]
    """Each fine-tunes every arm once; pretrainings go by the first alone."""
    steps: int
    """Of fine-tuning, in every arm."""
    pretrain: dict[str, Any]
    """METR's pretraining: a run's configuration over the size `nano`. Pictures, augmentation, batch size, steps and
    seed are those of the detectors' own pretraining too; augmentation and batch size also those of fine-tuning."""
    detectors: dict[str, DetectorConfig]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What an arm found on the left-out dataset's val split; AP of 0 to 100, times in seconds of training steps.

    `ap_before` is that before the first step, of the arm that has an answer then.
    """

    detector: str
    arm: Arm
    seed: int
    images: int
    steps: int
    ap: float
    ap50: float
    ap_before: float | None
    training_seconds: float


class Bench:
    """Runs what is not finished of one detector.

    Args:
        detector: Its name.
        place: Where data and runs are.
        profile: What is run.

    Raises:
        ConfigError: the recipe pads pictures, which RT-DETR would see.
    """

    def __init__(self, detector: str, place: Workplace, profile: Profile) -> None:
        self.detector, self.place, self.profile = detector, place, profile
        self.config, self.home = profile.detectors[detector], place.out / detector
        tree = merge(profile.pretrain, {"model": self.config.model})
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / RECIPE).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        self.recipe: RunConfig = load_recipe("nano", self.home / RECIPE, place.overrides)
        if self.recipe.augmentation.resize.mode != "stretch":
            where = "pretrain.augmentation.resize.mode"
            raise ConfigError("expected stretch: pictures of one shape, without padding", where=where)
        self.collate = Collator(colours_of(self.family.untrained.network))

    @cached_property
    def joint(self) -> JointData:
        """The datasets of pretraining."""
        return open_joint([self.place.argument(name) for name in self.place.datasets if name != self.profile.left_out])

    @cached_property
    def left_out(self) -> JointData:
        """The dataset of fine-tuning."""
        return open_joint([self.place.argument(self.profile.left_out)])

    @cached_property
    def family(self) -> Family:
        """The detector and its METR before the first step."""
        return Family.of(self.detector, self.joint, self.recipe)

    def run(self, arm: Arm, seed: int) -> bool:
        """Runs an arm, and before it what it begins with, as far as they are not finished; False if interrupted."""
        folder = arm_folder(self.place, self.detector, arm, seed)
        if (folder / REPORT).is_file():
            return True
        model = self.beginning(arm, seed)
        if model is None:
            return False
        self.place.console.rule(f"{self.family.target.title}, {arm}, seed {seed}")
        before = self._judged(model).ap if arm == "metr" else None
        steps, images = self.profile.steps, chosen(self.left_out, self.recipe, training=True)
        seconds = self._trained(model, DrawnPictures([images], self.recipe.loader, steps, seed), folder, seed)
        after = self._judged(model)
        told = RunResult(
            detector=self.detector,
            arm=arm,
            seed=seed,
            images=len(images),
            steps=steps,
            ap=after.ap or 0.0,
            ap50=after.ap50 or 0.0,
            ap_before=before,
            training_seconds=seconds,
        )
        self.place.console.print(f"AP {told.ap:.1f}, AP50 {told.ap50:.1f}", highlight=False)
        _write(folder, asdict(told))
        return True

    def beginning(self, arm: Arm, seed: int) -> PreTrainedModel | None:
        """The detector before an arm's first step; None where a pretraining was interrupted."""
        names = bare_names(self.left_out)
        model: PreTrainedModel
        if arm == "own":
            model = own_start(self.family, names.names, seed)
        elif arm == "untrained":
            model = untrained_start(self.family, names)
        elif arm == "joint":
            model = joint_start(self.family, self.pretrained_detector(), names, seed)
        elif (checkpoint := self.pretrained_metr()) is None:
            return None
        else:
            model = metr_start(self.family, checkpoint, names)
        return model

    def pretrained_metr(self) -> Path | None:
        """METR's checkpoint, trained now unless it was before; None where that was interrupted."""
        folder = self.home / "pretrained-metr"
        if not (folder / REPORT).is_file():
            self.place.console.rule(f"pretraining METR for {self.family.target.title}")
            data = [self.place.argument(source.name) for source in self.joint.sources]
            if train(data, folder, self.recipe, resume=True, console=self.place.console).interrupted:
                return None
            _write(folder, {"data": data, "training_seconds": round(training_seconds(folder), 1)})
        # the last weights: nothing is chosen by the pictures of any val split
        return folder / "last"

    def pretrained_detector(self) -> Path:
        """The detector's own pretraining on the concatenated labels, made now unless it was before."""
        folder = self.home / "pretrained-joint"
        if not (folder / REPORT).is_file():
            self.place.console.rule(f"pretraining {self.family.target.title} on concatenated labels")
            loop, datasets = self.recipe.train.loop, pretraining_data(self.family, self.joint)
            pictures = DrawnPictures(datasets, self.recipe.loader, loop.steps, loop.seed)
            model = pretraining_start(self.family, self.joint)
            seconds = self._trained(model, pictures, folder, loop.seed)
            _write(folder, {"data": list(pictures.mixed.lengths), "training_seconds": seconds})
        return folder / TRAINED

    def _trained(self, model: PreTrainedModel, pictures: DrawnPictures, folder: Path, seed: int) -> float:
        batch, workers = self.recipe.loader.batch_size, self.recipe.loader.workers
        work = Work(
            folder=folder,
            steps=len(pictures) // batch,
            seed=seed,
            settings=self.config.trainer,
            batch_size=batch,
            workers=spare_cores() if workers is None else workers,
            device=resolved_device(self.recipe.train.loop.device),
            backbone=self.family.target.backbone,
        )
        return train_detector(model, pictures, self.collate, work, self.place.console)

    def _judged(self, model: nn.Module) -> CocoResult:
        val = chosen(self.left_out, self.recipe, training=False)
        model.to(resolved_device(self.recipe.train.loop.device))
        return judged(model, val, self.left_out.vocabulary.names, self.collate)


def run_all(place: Workplace, profile: Profile, detectors: Sequence[str]) -> bool:
    """Runs everything of these detectors that is not finished; False where training was interrupted.

    Raises:
        MetrError: data or configuration do not fit.
    """
    for detector in detectors:
        left = [run for run in _runs(profile) if not (arm_folder(place, detector, *run) / REPORT).is_file()]
        if not left:
            continue
        bench = Bench(detector, place, profile)
        for arm, seed in left:
            if not bench.run(arm, seed):
                return False
    return True


def finished(place: Workplace, profile: Profile) -> list[RunResult]:
    """The results of the runs that are finished."""
    reports = [
        arm_folder(place, detector, arm, seed) / REPORT
        for detector in profile.detectors
        for arm, seed in _runs(profile)
    ]
    return [RunResult(**json.loads(path.read_text(encoding="utf-8"))) for path in reports if path.is_file()]


def pretraining_seconds(place: Workplace, profile: Profile) -> dict[str, dict[str, float]]:
    """Seconds of the steps of the pretrainings that are finished, by detector and by what was pretrained."""
    told: dict[str, dict[str, float]] = {}
    for detector in profile.detectors:
        for kind in ("metr", "joint"):
            report = place.out / detector / f"pretrained-{kind}" / REPORT
            if report.is_file():
                values = json.loads(report.read_text(encoding="utf-8"))
                told.setdefault(detector, {})[kind] = values["training_seconds"]
    return told


def arm_folder(place: Workplace, detector: str, arm: Arm, seed: int) -> Path:
    """Where a run of an arm is."""
    return place.out / detector / f"{seed}-{arm}"


def _runs(profile: Profile) -> Iterator[tuple[Arm, int]]:
    return ((arm, seed) for seed in profile.seeds for arm in ARMS)


def _write(folder: Path, told: dict[str, Any]) -> None:
    """From here on the run is finished."""
    (folder / REPORT).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    drop_checkpoints(folder)
