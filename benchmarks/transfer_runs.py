"""The runs of the transfer benchmark: pretrainings without a dataset, and both arms on shares of it.

Every run has a folder of its own; `report.json` in it says that it is finished, and is not run again.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field
from rich.console import Console

from metr.api.datasets import JointData, open_joint
from metr.api.finetuning import FinetuneOptions, finetune
from metr.api.training import fit, train, training_parts
from metr.config import Config, merge
from metr.data.few_shot import SubsetConfig, subset_of
from metr.engine.recipe import load_recipe
from metr.engine.trainer import Outcome
from metr.errors import ConfigError
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
REPORT, RECIPE = "report.json", "recipe.yaml"
Share = Annotated[float, Field(gt=0, le=1)]


class Profile(Config):
    """What is run; sections of a run's configuration are laid over the defaults of `metr train` and `metr finetune`."""

    left_out: tuple[str, ...]
    """Datasets that take turns being left out."""
    shared: bool = False
    """Whether one pretraining without all of them serves all, instead of one for each."""
    tell_apart: bool = False
    """Whether the pretrained arm first moves the new names from each other (`metr finetune --tell-apart`)."""
    seeds: dict[Share, tuple[int, ...]]
    """For each share of the training pictures the seeds that choose them and train."""
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
class RunResult:
    """What a run found on the left-out dataset's val split; AP of 0 to 100, times in seconds of training steps."""

    left_out: str
    share: float
    seed: int
    arm: Arm
    images: int
    steps: int
    ap: float
    ap50: float
    training_seconds: float


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """One run of an arm."""

    left_out: str
    share: float
    seed: int
    arm: Arm

    def folder(self, place: Workplace) -> Path:
        return place.out / self.left_out / f"{self.share:g}-{self.seed}-{self.arm}"

    @property
    def subset(self) -> SubsetConfig:
        return SubsetConfig(share=self.share, seed=self.seed)


def run_all(place: Workplace, profile: Profile) -> bool:
    """Runs everything that is not finished; False where training was interrupted.

    Raises:
        MetrError: data or configuration do not fit.
    """
    if missing := sorted(profile.seeds.keys() - profile.steps.keys()):
        raise ConfigError(f"no steps for a share of {missing[0]:g}", where="steps", hint="give each share its steps")
    runs = list(_cells(profile))
    for number, cell in enumerate(runs, 1):
        report = cell.folder(place) / REPORT
        if report.is_file():
            continue
        began = _pretraining(cell.left_out, place, profile) if cell.arm == "pretrained" else None
        if cell.arm == "pretrained" and began is None:
            return False
        told = f"{cell.left_out}, {cell.share:.0%}, seed {cell.seed}, {cell.arm}"
        place.console.rule(f"{told} ({number} of {len(runs)})")
        tuned = _from_imagenet(cell, place, profile) if began is None else _from_pretrained(cell, began, place, profile)
        if tuned is None:
            return False
        report.write_text(json.dumps(asdict(tuned), indent=1) + "\n", encoding="utf-8")
    return True


def finished(place: Workplace, profile: Profile) -> list[RunResult]:
    """The results of the runs that are finished."""
    reports = [cell.folder(place) / REPORT for cell in _cells(profile)]
    return [RunResult(**json.loads(path.read_text(encoding="utf-8"))) for path in reports if path.is_file()]


def _cells(profile: Profile) -> Iterator[_Cell]:
    """Both arms of one comparison after each other, the smallest shares first."""
    for left_out in profile.left_out:
        for share in sorted(profile.seeds):
            for seed in profile.seeds[share]:
                yield from (_Cell(left_out=left_out, share=share, seed=seed, arm=arm) for arm in ARMS)


def _pretraining(left_out: str, place: Workplace, profile: Profile) -> Path | None:
    """The checkpoint that has not seen a dataset, trained now unless it was before; None where it was interrupted."""
    without = profile.left_out if profile.shared else (left_out,)
    folder = place.out / f"without-{'-'.join(without)}"
    # the last weights, not the best: nothing is chosen by the pictures of any val split
    if not (folder / REPORT).is_file():
        place.console.rule(f"pretraining without {' and '.join(without)}")
        data = [place.argument(name) for name in place.datasets if name not in without]
        recipe = load_recipe("nano", _written(folder, profile.pretrain), place.overrides)
        outcome = train(data, folder, recipe, resume=True, console=place.console)
        if outcome.interrupted:
            return None
        told = {"data": data, "metrics": dict(outcome.metrics), "training_seconds": round(training_seconds(folder), 1)}
        (folder / REPORT).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return folder / "last"


def _from_pretrained(cell: _Cell, began: Path, place: Workplace, profile: Profile) -> RunResult | None:
    out = cell.folder(place)
    options = FinetuneOptions(
        file=_written(out, _tree(cell, profile)),
        overrides=place.overrides,
        subset=cell.subset,
        compare=False,
        tell_apart=profile.tell_apart,
    )
    data = [place.argument(cell.left_out)]
    outcome = finetune(data, began, out, options, resume=True, console=place.console).training
    return _result(cell, _chosen(cell, place), outcome, out)


def _from_imagenet(cell: _Cell, place: Workplace, profile: Profile) -> RunResult | None:
    out = cell.folder(place)
    overrides = [f"train.loop.seed={cell.seed}", *place.overrides]
    recipe = load_recipe("nano", _written(out, _tree(cell, profile)), overrides)
    joint = _chosen(cell, place)
    parts = training_parts(joint, recipe, place.console)
    outcome = fit(parts, joint.evaluation(), recipe, out, resume=True, console=place.console)
    return _result(cell, joint, outcome, out)


def _chosen(cell: _Cell, place: Workplace) -> JointData:
    """The left-out dataset with the part of its training pictures that both arms see."""
    joint = open_joint([place.argument(cell.left_out)])
    chosen = {source.name: subset_of(source.split("train"), cell.subset) for source in joint.sources}
    return replace(joint, chosen=chosen)


def _tree(cell: _Cell, profile: Profile) -> dict[str, Any]:
    """The configuration of a run but for what its verb gives by default."""
    own = profile.pretrained if cell.arm == "pretrained" else profile.imagenet
    return merge(profile.tuning, own, {"train": {"loop": {"steps": profile.steps[cell.share]}}})


def _written(folder: Path, tree: Mapping[str, Any]) -> Path:
    """A configuration as a file of the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(yaml.safe_dump(dict(tree), sort_keys=False), encoding="utf-8")
    return folder / RECIPE


def _result(cell: _Cell, joint: JointData, outcome: Outcome, out: Path) -> RunResult | None:
    """What the evaluation after the last step said; None where it was not reached."""
    if outcome.interrupted:
        return None
    return RunResult(
        left_out=cell.left_out,
        share=cell.share,
        seed=cell.seed,
        arm=cell.arm,
        images=joint.lengths[cell.left_out],
        steps=outcome.step,
        ap=outcome.metrics["AP"],
        ap50=outcome.metrics["AP50"],
        training_seconds=round(training_seconds(out), 1),
    )
