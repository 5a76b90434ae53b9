"""The runs of the transfer benchmark: pretrainings without a dataset, and both arms on shares of it.

Every run has a folder of its own; `report.json` in it says that it is finished, and is not run again
(see kept_runs.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field
from rich.console import Console

from kept_runs import RECIPE, UNKNOWN, Run
from metr.config import Config, merge, parse_overrides
from metr.data.few_shot import SubsetConfig, subset_of
from metr.data.joint import JointData, open_joint
from metr.errors import ConfigError
from metr.run_directory import RunDirectory
from metr.training.finetune import finetune
from metr.training.finetune_data import FinetuneOptions
from metr.training.recipe import load_recipe
from metr.training.train import fit, train, training_parts
from metr.training.trainer import Outcome
from resumable import training_seconds

Arm = Literal["pretrained", "imagenet"]
DATASETS = (
    "aquarium",
    "bccd",
    "chess_pieces",
    "coco_mini",
    "doc_tables",
    "endangered_animals",
    "playing_cards",
)
ARMS: tuple[Arm, ...] = ("imagenet", "pretrained")
Share = Annotated[float, Field(gt=0, le=1)]


class Profile(Config):
    """What is run; sections of a run's configuration are laid over the defaults of `metr train` and `metr finetune`."""

    left_out: tuple[str, ...]
    """Datasets that take turns being left out."""
    shared: bool = False
    """Whether one pretraining without all of them serves all, instead of one for each."""
    decorrelate_names: bool = False
    """Whether the pretrained arm first moves the new names from each other (`metr finetune --decorrelate-names`)."""
    seeds: dict[Share, tuple[int, ...]]
    """For each share of the training images the seeds that choose them and train."""
    steps: dict[Share, int]
    """Steps of both arms for each share."""
    pretrain: dict[str, Any]
    """The configuration of the pretrainings."""
    tuning: dict[str, Any]
    """What both arms have in common."""
    pretrained: dict[str, Any]
    """The arm that begins with the pretrained detector."""
    imagenet: dict[str, Any]
    """The arm that begins with the backbone alone."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where data and runs are; `overrides` (`section.key=value`) go to every run."""

    data: Path
    out: Path
    datasets: tuple[str, ...]
    overrides: tuple[str, ...]
    console: Console

    def argument(self, name: str) -> str:
        """A dataset as an argument of a command."""
        return f"{name}={self.data / name}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of an arm."""

    left_out: str
    share: float
    seed: int
    arm: Arm

    def folder(self, place: Workplace) -> Path:
        """Where it is."""
        return place.out / self.left_out / f"{self.share:g}-{self.seed}-{self.arm}"

    @property
    def subset(self) -> SubsetConfig:
        """The part of the training images that it sees."""
        return SubsetConfig(fraction=self.share, seed=self.seed)

    @property
    def title(self) -> str:
        """The run in a few words."""
        return f"{self.left_out}, {self.share:.0%}, seed {self.seed}, {self.arm}"


@dataclass(frozen=True, kw_only=True)
class RunResult(Cell):
    """What a run found on the left-out dataset's val split; AP of 0 to 100, times in seconds of training steps.

    `steps` are those that it took; `commit` is what made it, or several where it was stopped in between.
    """

    images: int
    steps: int
    ap: float
    ap50: float
    training_seconds: float
    commit: str = UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A finished pretraining: the datasets that it has not seen, what made it, and its seconds of training steps."""

    without: tuple[str, ...]
    commit: str
    training_seconds: float

    @property
    def title(self) -> str:
        """The run in a few words."""
        return f"pretraining without {' and '.join(self.without)}"


def run_all(place: Workplace, profile: Profile) -> bool:
    """Runs everything that is not finished; False where training was interrupted.

    Raises:
        MetrError: data or configuration do not fit, or runs were begun with other settings.
    """
    if missing := sorted(profile.seeds.keys() - profile.steps.keys()):
        raise ConfigError(f"no steps for a share of {missing[0]:g}", where="steps", hint="give each share its steps")
    runs = list(_cells(profile))
    for run in (*_pretrainings(place, profile).values(), *(_run(cell, place, profile) for cell in runs)):
        run.check()
    for number, cell in enumerate(runs, 1):
        run = _run(cell, place, profile)
        if run.finished:
            continue
        began = _pretraining(cell.left_out, place, profile) if cell.arm == "pretrained" else None
        if cell.arm == "pretrained" and began is None:
            return False
        place.console.rule(f"{cell.title} ({number} of {len(runs)})")
        run.begin()
        tuned = _from_imagenet(cell, place, profile) if began is None else _from_pretrained(cell, began, place, profile)
        if tuned is None:
            return False
        run.finish(asdict(tuned))
    return True


def finished(place: Workplace, profile: Profile) -> list[RunResult]:
    """The results of the runs that are finished."""
    known = {one.name for one in fields(RunResult)}
    reports = [run.report() for cell in _cells(profile) if (run := _run(cell, place, profile)).finished]
    return [RunResult(**{key: value for key, value in told.items() if key in known}) for told in reports]


def pretrainings(place: Workplace, profile: Profile) -> list[Pretraining]:
    """The pretrainings that are finished."""
    reports = {without: run.report() for without, run in _pretrainings(place, profile).items() if run.finished}
    return [
        Pretraining(without=without, commit=told["commit"], training_seconds=told["training_seconds"])
        for without, told in reports.items()
    ]


def pretrained(run: Run, tree: Mapping[str, Any], names: Sequence[str], place: Workplace) -> Path | None:
    """The last checkpoint of a pretraining, trained now unless it was before; None where it was interrupted.

    Args:
        run: Its folder and settings.
        tree: Its configuration, over the size `nano`.
        names: The datasets that it sees.
        place: Where data and runs are.

    Raises:
        MetrError: data or configuration do not fit, or it was begun with other settings.
    """
    if not run.finished:
        run.begin()
        data = [place.argument(name) for name in names]
        recipe = load_recipe("nano", written(run.folder, tree), place.overrides)
        outcome = train(data, run.folder, recipe, resume=True, console=place.console)
        if outcome.interrupted:
            return None
        seconds = round(training_seconds(run.folder), 3)
        run.finish({"data": data, "metrics": dict(outcome.metrics), "training_seconds": seconds})
    # the last weights, not the best: nothing is chosen by the images of any val split
    return run.folder / "last"


def written(folder: Path, tree: Mapping[str, Any]) -> Path:
    """A configuration as a file of the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(yaml.safe_dump(dict(tree), sort_keys=False), encoding="utf-8")
    return folder / RECIPE


def configurations(folder: Path) -> tuple[Path, ...]:
    """Where a run folder tells its configuration: what was asked for, and what came of it."""
    return folder / RECIPE, RunDirectory(folder).config


def _cells(profile: Profile) -> Iterator[Cell]:
    """Both arms of one comparison after each other, the smallest shares first."""
    for left_out in profile.left_out:
        for share in sorted(profile.seeds):
            for seed in profile.seeds[share]:
                yield from (Cell(left_out=left_out, share=share, seed=seed, arm=arm) for arm in ARMS)


def _run(cell: Cell, place: Workplace, profile: Profile) -> Run:
    """What is kept of a run of an arm."""
    folder = cell.folder(place)
    settings = asdict(cell) | {"configuration": merge(_tree(cell, profile), parse_overrides(place.overrides))}
    if cell.arm == "pretrained":
        before = _pretraining_run(_without(cell.left_out, profile), place, profile).settings
        settings |= {"decorrelate_names": profile.decorrelate_names, "pretraining": before}
    return Run(folder=folder, settings=settings, beside=configurations(folder))


def _pretraining_run(without: tuple[str, ...], place: Workplace, profile: Profile) -> Run:
    """What is kept of a pretraining."""
    folder = place.out / f"without-{'-'.join(without)}"
    names = [name for name in place.datasets if name not in without]
    settings = {"datasets": names, "configuration": merge(profile.pretrain, parse_overrides(place.overrides))}
    return Run(folder=folder, settings=settings, beside=configurations(folder))


def _pretrainings(place: Workplace, profile: Profile) -> dict[tuple[str, ...], Run]:
    """All pretrainings, by what they have not seen."""
    several = dict.fromkeys(_without(left_out, profile) for left_out in profile.left_out)
    return {without: _pretraining_run(without, place, profile) for without in several}


def _without(left_out: str, profile: Profile) -> tuple[str, ...]:
    """What the pretraining that serves a left-out dataset has not seen."""
    return profile.left_out if profile.shared else (left_out,)


def _pretraining(left_out: str, place: Workplace, profile: Profile) -> Path | None:
    """The checkpoint that has not seen a dataset, trained now unless it was before; None where it was interrupted."""
    without = _without(left_out, profile)
    run = _pretraining_run(without, place, profile)
    if not run.finished:
        place.console.rule(f"pretraining without {' and '.join(without)}")
    return pretrained(run, profile.pretrain, run.settings["datasets"], place)


def _from_pretrained(cell: Cell, began: Path, place: Workplace, profile: Profile) -> RunResult | None:
    out = cell.folder(place)
    options = FinetuneOptions(
        config=written(out, _tree(cell, profile)),
        overrides=place.overrides,
        fraction=cell.share,
        seed=cell.seed,
        compare=False,
        decorrelate_names=profile.decorrelate_names,
    )
    data = [place.argument(cell.left_out)]
    outcome = finetune(data, began, out, options, resume=True, console=place.console).training
    return _result(cell, _chosen(cell, place), outcome, out)


def _from_imagenet(cell: Cell, place: Workplace, profile: Profile) -> RunResult | None:
    out = cell.folder(place)
    overrides = [f"train.loop.seed={cell.seed}", *place.overrides]
    recipe = load_recipe("nano", written(out, _tree(cell, profile)), overrides)
    joint = _chosen(cell, place)
    parts = training_parts(joint, recipe, place.console)
    outcome = fit(parts, joint.evaluation(), recipe, out, resume=True, console=place.console)
    return _result(cell, joint, outcome, out)


def _chosen(cell: Cell, place: Workplace) -> JointData:
    """The left-out dataset with the part of its training images that both arms see."""
    joint = open_joint([place.argument(cell.left_out)])
    chosen = {source.name: subset_of(source.split("train"), cell.subset) for source in joint.sources}
    return replace(joint, chosen=chosen)


def _tree(cell: Cell, profile: Profile) -> dict[str, Any]:
    """The configuration of a run but for what its verb gives by default."""
    own = profile.pretrained if cell.arm == "pretrained" else profile.imagenet
    return merge(profile.tuning, own, {"train": {"loop": {"steps": profile.steps[cell.share]}}})


def _result(cell: Cell, joint: JointData, outcome: Outcome, out: Path) -> RunResult | None:
    """What the evaluation after the last step said; None where it was not reached."""
    if outcome.interrupted:
        return None
    return RunResult(
        **asdict(cell),
        images=joint.lengths[cell.left_out],
        steps=outcome.step,
        ap=outcome.metrics["AP"],
        ap50=outcome.metrics["AP50"],
        training_seconds=round(training_seconds(out), 3),
    )
