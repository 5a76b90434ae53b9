"""The runs of the benchmark of rehearsal: a pretraining on old datasets, and both ways to learn a new one after it.

Every run has a folder of its own; `report.json` in it says that it is finished, and is not run again
(see kept_runs.py).
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from kept_runs import Run
from metr.config import Config, merge, parse_overrides
from metr.errors import ConfigError
from metr.model import METR
from metr.training.comparison import Change
from metr.training.finetune import finetune
from metr.training.finetune_data import FinetuneOptions
from resumable import training_seconds
from transfer_runs import Workplace, configurations, pretrained, written

Arm = Literal["without", "with"]
ARMS: tuple[Arm, ...] = ("without", "with")


class Profile(Config):
    """What is run; sections of a run's configuration are laid over the defaults of `metr train` and `metr finetune`."""

    old: tuple[str, ...]
    """Datasets that pretraining sees."""
    new: str
    """The dataset that both arms are fine-tuned on."""
    share: Annotated[float, Field(gt=0, lt=1)]
    """Share of the draws that goes to the old datasets where they are rehearsed."""
    seed: int
    """Of both arms."""
    pretrain: dict[str, Any]
    """The configuration of the pretraining."""
    tuning: dict[str, Any]
    """What both arms have in common, which is everything but the draws."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What an arm did to every dataset, in how many steps, how many seconds of steps, and what made it."""

    arm: Arm
    changes: tuple[Change, ...]
    steps: int
    training_seconds: float
    commit: str

    @property
    def title(self) -> str:
        """The run in a few words."""
        return f"{self.arm} rehearsal"


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A finished pretraining: seconds of its training steps, and what made it."""

    training_seconds: float
    commit: str


def run_all(place: Workplace, profile: Profile, source: str | None) -> bool:
    """Runs everything that is not finished; False where training was interrupted.

    Args:
        place: Where data and runs are.
        profile: What is run.
        source: The checkpoint that both arms begin with; None for one of the profile's own.

    Raises:
        MetrError: data, checkpoint or configuration do not fit, or runs were begun with other settings.
    """
    if source is None:
        _pretraining_run(place, profile).check()
    runs = {arm: _arm_run(arm, place, profile, source) for arm in ARMS}
    for run in runs.values():
        run.check()
    if all(run.finished for run in runs.values()):
        return True
    if source is None:
        place.console.rule(f"pretraining on {', '.join(profile.old)}")
        began = pretrained(_pretraining_run(place, profile), profile.pretrain, profile.old, place)
        if began is None:
            return False
        source = str(began)
    else:
        check_source(source, profile)
    return all(run.finished or _tuned(arm, run, source, place, profile) for arm, run in runs.items())


def check_source(source: str, profile: Profile) -> None:
    """Whether a checkpoint has seen the old datasets, and not the new one.

    Raises:
        ConfigError: it has not, or it has.
        MetrError: there is no checkpoint.
    """
    seen = METR.from_pretrained(source, device="cpu").vocabulary.datasets
    hint = "begin with a checkpoint that was trained on the profile's old datasets alone, or leave out --from"
    if missing := [name for name in profile.old if name not in seen]:
        what = f"has not seen {', '.join(missing)}, so there is nothing to be rehearsed"
        raise ConfigError(what, where=source, hint=hint)
    if profile.new in seen:
        raise ConfigError(f"has seen {profile.new} already, which is to be new", where=source, hint=hint)


def finished(place: Workplace, profile: Profile, source: str | None) -> list[ArmResult]:
    """The results of the arms that are finished."""
    runs = {arm: _arm_run(arm, place, profile, source) for arm in ARMS}
    reports = {arm: run.report() for arm, run in runs.items() if run.finished}
    return [
        ArmResult(
            arm=arm,
            changes=tuple(Change(**change) for change in told["datasets"]),
            steps=told["steps"],
            training_seconds=told["training_seconds"],
            commit=told["commit"],
        )
        for arm, told in reports.items()
    ]


def pretraining(place: Workplace, profile: Profile) -> Pretraining | None:
    """The profile's own pretraining, where it is finished."""
    run = _pretraining_run(place, profile)
    if not run.finished:
        return None
    told = run.report()
    return Pretraining(training_seconds=told["training_seconds"], commit=told["commit"])


def _pretraining_run(place: Workplace, profile: Profile) -> Run:
    """What is kept of the pretraining."""
    folder = place.out / "pretrained"
    configuration = merge(profile.pretrain, parse_overrides(place.overrides))
    settings = {"datasets": profile.old, "configuration": configuration}
    return Run(folder=folder, settings=settings, beside=configurations(folder))


def _arm_run(arm: Arm, place: Workplace, profile: Profile, source: str | None) -> Run:
    """What is kept of an arm."""
    folder = place.out / arm
    began = {"from": source} if source is not None else {"pretraining": _pretraining_run(place, profile).settings}
    settings = {
        "arm": arm,
        "old": profile.old,
        "new": profile.new,
        "share": profile.share if arm == "with" else None,
        "seed": profile.seed,
        "configuration": merge(profile.tuning, parse_overrides(place.overrides)),
        **began,
    }
    return Run(folder=folder, settings=settings, beside=configurations(folder))


def _tuned(arm: Arm, run: Run, source: str, place: Workplace, profile: Profile) -> bool:
    """Fine-tunes and compares with before; False where that was interrupted."""
    place.console.rule(f"fine-tuning on {profile.new} {arm} rehearsal")
    run.begin()
    old = tuple(place.argument(name) for name in profile.old)
    options = FinetuneOptions(
        config=written(run.folder, profile.tuning),
        # one evaluation, so the last weights are judged: nothing is chosen by the images of any val split
        overrides=(*place.overrides, "train.loop.evaluate_every=0"),
        seed=profile.seed,
        rehearse=old if arm == "with" else (),
        rehearse_fraction=profile.share,
        rehearse_evaluate=() if arm == "with" else old,
    )
    data = [place.argument(profile.new)]
    outcome = finetune(data, source, run.folder, options, resume=True, console=place.console)
    if outcome.comparison is None:
        return False
    told = {
        "steps": outcome.training.step,
        "training_seconds": round(training_seconds(run.folder), 3),
        "datasets": [asdict(change) for change in outcome.comparison.changes],
    }
    run.finish(told)
    return True
