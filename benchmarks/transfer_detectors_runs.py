"""The runs of the benchmark of detectors: pretrainings without a dataset, and every arm on that dataset.

Every run has a folder of its own; `report.json` in it says that it is finished, and is not run again
(see kept_runs.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from kept_runs import RECIPE, UNKNOWN, Run
from metr.config import Config, merge, parse_overrides
from metr.conversion.export import colours_of
from metr.data.joint import JointData, open_joint
from metr.data.loading import spare_cores
from metr.devices import resolved_device
from metr.errors import ConfigError
from metr.evaluation.coco import CocoResult
from metr.run_directory import RunDirectory
from metr.training.logger import read_metrics
from metr.training.recipe import RunConfig, load_recipe
from metr.training.train import train
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
    DrawnImages,
    TrainerConfig,
    Work,
    drop_checkpoints,
    judged,
    train_detector,
)
from transfer_runs import Workplace, written

Kind = Literal["metr", "joint"]
KINDS: tuple[Kind, ...] = ("metr", "joint")
"""What is pretrained: METR, and the detector itself."""


class DetectorConfig(Config):
    """One detector of transformers: the METR whose weights fit it, and how Trainer trains it in every arm."""

    model: dict[str, Any]
    """METR's family, laid over the size `nano`."""
    trainer: TrainerConfig
    pretrain: dict[str, Any] = Field(default_factory=dict)
    """Laid over the profile's `pretrain`, for both of its pretrainings."""
    steps: int | None = None
    """Of its fine-tuning, if not the profile's."""


class Profile(Config):
    """What is run."""

    left_out: str
    """The dataset that nothing is pretrained on, and all arms are fine-tuned on."""
    seeds: tuple[int, ...]
    """Each fine-tunes every arm once; pretrainings go by the first alone."""
    steps: int
    """Of fine-tuning, in every arm; a detector may have its own."""
    pretrain: dict[str, Any]
    """METR's pretraining: a run's configuration over the size `nano`. Images, augmentation, batch size, steps and
    seed are those of the detectors' own pretraining too; augmentation and batch size also those of fine-tuning."""
    detectors: dict[str, DetectorConfig]

    def steps_of(self, detector: str) -> int:
        """Steps of a detector's fine-tuning."""
        return self.detectors[detector].steps or self.steps


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What an arm found on the left-out dataset's val split; AP of 0 to 100, times in seconds of training steps.

    `ap_before` is that before the first step, of the arm that has an answer then; `commit` is what made the run, or
    several where it was stopped in between.
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
    commit: str = UNKNOWN

    @property
    def title(self) -> str:
        """The run in a few words."""
        return f"{self.detector}, {self.arm}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A finished pretraining: images drawn (None where it does not tell), seconds of steps, and what made it."""

    detector: str
    kind: Kind
    images: int | None
    training_seconds: float
    commit: str

    @property
    def title(self) -> str:
        """The run in a few words."""
        return f"{self.detector}, pretraining of {'METR' if self.kind == 'metr' else 'its own'}"


class Bench:
    """Runs what is not finished of one detector.

    Args:
        detector: Its name.
        place: Where data and runs are.
        profile: What is run.

    Raises:
        ConfigError: the recipe pads images, which RT-DETR would see, or runs were begun with other settings.
    """

    def __init__(self, detector: str, place: Workplace, profile: Profile) -> None:
        self.detector, self.place, self.profile = detector, place, profile
        self.config, self.home = profile.detectors[detector], place.out / detector
        check_runs(place, profile, [detector])
        self.recipe: RunConfig = load_recipe("nano", written(self.home, _tree(detector, profile)), place.overrides)
        if self.recipe.augmentation.resize.mode != "stretch":
            where = "pretrain.augmentation.resize.mode"
            raise ConfigError("expected stretch: images of one shape, without padding", where=where)
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
        kept = arm_run(self.place, self.profile, self.detector, arm, seed)
        if kept.finished:
            return True
        model = self.beginning(arm, seed)
        if model is None:
            return False
        self.place.console.rule(f"{self.family.target.title}, {arm}, seed {seed}")
        kept.begin()
        before = self._judged(model).ap if arm == "metr" else None
        steps, images = self.profile.steps_of(self.detector), chosen(self.left_out, self.recipe, training=True)
        seconds = self._trained(model, DrawnImages([images], self.recipe.loader, steps, seed), kept.folder, seed)
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
        _finish(kept, asdict(told))
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
        kept = self._kept("metr")
        if not kept.finished:
            kept.begin()
            self.place.console.rule(f"pretraining METR for {self.family.target.title}")
            data = [self.place.argument(source.name) for source in self.joint.sources]
            if train(data, kept.folder, self.recipe, resume=True, console=self.place.console).interrupted:
                return None
            seconds = round(training_seconds(kept.folder), 3)
            _finish(kept, {"data": data, "images": _drawn(kept.folder), "training_seconds": seconds})
        # the last weights: nothing is chosen by the images of any val split
        return kept.folder / "last"

    def pretrained_detector(self) -> Path:
        """The detector's own pretraining on the concatenated labels, made now unless it was before."""
        kept = self._kept("joint")
        if not kept.finished:
            kept.begin()
            self.place.console.rule(f"pretraining {self.family.target.title} on concatenated labels")
            loop, datasets = self.recipe.train.loop, pretraining_data(self.family, self.joint)
            images = DrawnImages(datasets, self.recipe.loader, loop.steps, loop.seed)
            model = pretraining_start(self.family, self.joint)
            seconds, drawn = self._trained(model, images, kept.folder, loop.seed), len(images)
            _finish(kept, {"data": list(images.mixed.lengths), "images": drawn, "training_seconds": seconds})
        return kept.folder / TRAINED

    def _kept(self, kind: Kind) -> Run:
        return pretraining_run(self.place, self.profile, self.detector, kind)

    def _trained(self, model: PreTrainedModel, images: DrawnImages, folder: Path, seed: int) -> float:
        batch, workers = self.recipe.loader.batch_size, self.recipe.loader.workers
        work = Work(
            folder=folder,
            steps=len(images) // batch,
            seed=seed,
            settings=self.config.trainer,
            batch_size=batch,
            workers=spare_cores() if workers is None else workers,
            device=resolved_device(self.recipe.train.loop.device),
            backbone=self.family.target.backbone,
        )
        return train_detector(model, images, self.collate, work, self.place.console)

    def _judged(self, model: nn.Module) -> CocoResult:
        val = chosen(self.left_out, self.recipe, training=False)
        model.to(resolved_device(self.recipe.train.loop.device))
        return judged(model, val, self.left_out.vocabulary.names, self.collate)


def run_all(place: Workplace, profile: Profile, detectors: Sequence[str]) -> bool:
    """Runs everything of these detectors that is not finished; False where training was interrupted.

    Raises:
        MetrError: data or configuration do not fit, or runs were begun with other settings.
    """
    check_runs(place, profile, tuple(profile.detectors))  # all that is finished is told, whatever is run now
    for detector in detectors:
        left = [run for run in _runs(profile) if not arm_run(place, profile, detector, *run).finished]
        if not left:
            continue
        bench = Bench(detector, place, profile)
        for arm, seed in left:
            if not bench.run(arm, seed):
                return False
    return True


def check_runs(place: Workplace, profile: Profile, detectors: Sequence[str]) -> None:
    """Whether all that was begun of these detectors, finished or not, was begun with what is asked for.

    Raises:
        ConfigError: a run was begun with something else.
    """
    for detector in detectors:
        for kind in KINDS:
            pretraining_run(place, profile, detector, kind).check()
        for arm, seed in _runs(profile):
            arm_run(place, profile, detector, arm, seed).check()


def finished(place: Workplace, profile: Profile) -> list[RunResult]:
    """The results of the runs that are finished."""
    known = {one.name for one in fields(RunResult)}
    runs = [arm_run(place, profile, detector, *run) for detector in profile.detectors for run in _runs(profile)]
    reports = [run.report() for run in runs if run.finished]
    return [RunResult(**{key: value for key, value in told.items() if key in known}) for told in reports]


def pretrainings(place: Workplace, profile: Profile) -> list[Pretraining]:
    """The pretrainings that are finished."""
    found = []
    for detector in profile.detectors:
        for kind in KINDS:
            run = pretraining_run(place, profile, detector, kind)
            if run.finished:
                told = run.report()
                # METR's reports told the last logged step's at first, a detector's own nothing
                images = _drawn(run.folder) or told.get("images")
                one = Pretraining(
                    detector=detector,
                    kind=kind,
                    images=images,
                    training_seconds=told["training_seconds"],
                    commit=told["commit"],
                )
                found.append(one)
    return found


def arm_run(place: Workplace, profile: Profile, detector: str, arm: Arm, seed: int) -> Run:
    """What is kept of a run of an arm."""
    own = {"left_out": profile.left_out, "arm": arm, "seed": seed, "steps": profile.steps_of(detector)}
    settings = _settings(place, profile, detector) | own
    return Run(folder=place.out / detector / f"{seed}-{arm}", settings=settings, beside=_beside(place, detector))


def pretraining_run(place: Workplace, profile: Profile, detector: str, kind: Kind) -> Run:
    """What is kept of a pretraining."""
    names = [name for name in place.datasets if name != profile.left_out]
    settings = _settings(place, profile, detector) | {"datasets": names}
    folder = _pretraining_folder(place, detector, kind)
    return Run(folder=folder, settings=settings, beside=_beside(place, detector))


def _settings(place: Workplace, profile: Profile, detector: str) -> dict[str, Any]:
    """What all runs of a detector have in common."""
    configuration = merge(_tree(detector, profile), parse_overrides(place.overrides))
    trainer = profile.detectors[detector].trainer.model_dump(mode="json")
    return {"detector": detector, "trainer": trainer, "configuration": configuration}


def _tree(detector: str, profile: Profile) -> dict[str, Any]:
    """The configuration of a detector's METR, over the size `nano`."""
    own = profile.detectors[detector]
    return merge(merge(profile.pretrain, own.pretrain), {"model": own.model})


def _beside(place: Workplace, detector: str) -> tuple[Path, ...]:
    """The configuration of a detector's METR, as it is asked for and as it came out."""
    metr = RunDirectory(_pretraining_folder(place, detector, "metr"))
    return place.out / detector / RECIPE, metr.config


def _pretraining_folder(place: Workplace, detector: str, kind: Kind) -> Path:
    return place.out / detector / f"pretrained-{kind}"


def _drawn(folder: Path) -> int | None:
    """Images that METR's training drew, by its run folder: as many in each of its steps, logged or not."""
    records = read_metrics(folder)
    logged = next((record for record in reversed(records) if "images" in record), None)
    if logged is None:
        return None
    steps = max(int(record["step"]) for record in records)
    return steps * int(logged["images"]) // int(logged["step"])


def _runs(profile: Profile) -> Iterator[tuple[Arm, int]]:
    return ((arm, seed) for seed in profile.seeds for arm in ARMS)


def _finish(run: Run, told: dict[str, Any]) -> None:
    """From here on the run is finished."""
    run.finish(told)
    drop_checkpoints(run.folder)
