"""Is a METR that was pretrained on other datasets a better beginning than an ImageNet backbone alone?

    python benchmarks/transfer.py --profile trial --data FOLDER
    python benchmarks/transfer.py --profile fields --data FOLDER [--from RUN]

Leaves a dataset out, pretrains METR on the others, and fine-tunes it on a fraction of the left-out dataset's training
images. The other arm is the same network with the ImageNet backbone alone, trained on the same images for the same
steps. AP on the left-out dataset's val split (its test split, where it has no val), own names, last weights.

Profile `trial`, one thread of an AMD EPYC: 50 minutes of training steps besides 62 of pretraining, one seed
(results/transfer-trial.json). Mean AP of chess_pieces and playing_cards: 42.3 to 44.1 with a tenth of the images
(+1.8; the goal of +5.0 is missed), 54.2 to 60.2 with all of them (+6.0). Profile `gpu` (four left-out datasets, four
fractions, three seeds for the small ones) has not been run. Profile `fields` pretrains nothing: it begins with a given
checkpoint, the project's own by default, and takes seven datasets that this has never seen. Another arm has ImageNet's
weights back in the checkpoint's backbone. Six to eight hours of one core (results/transfer-fields.json): +7.3 AP in the
mean with a tenth of the images, +8.8 with all, and no dataset worse; with ImageNet's backbone +10.2 (the goal of +12 is
missed) and +14.2. Profile `tenth` is a tenth of the images for twice the steps, in bf16 (results/transfer-tenth.json):
+2.8, behind on two of seven; with ImageNet's backbone +5.8, behind on one by 0.9.

Results: `results/transfer-PROFILE.json`, `.md` and `.png`, written whenever the command ends, with what is finished
until then. Runs: `--out`, resumable.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

import report
import runner
import starts
from metr.checkpoint import load_checkpoint
from metr.config import Config, Tree, merge
from metr.data.config import SubsetConfig
from metr.data.joint import open_joint, subset_of
from metr.errors import ConfigError
from metr.models.config import DetectorConfig
from metr.run_directory import RunDirectory, find_checkpoint
from metr.training.finetune import finetune
from metr.training.finetune_data import FinetuneOptions
from metr.training.train import fit, training_parts
from runner import DATASETS, Run, Study

TITLES = {"imagenet": "ImageNet backbone alone", "pretrained": "pretrained on the other datasets"}
ARMS = tuple(TITLES)
_MIXED = "backbone-"  # and the share: what begins with the pretrained METR, and so much of ImageNet's backbone
Fraction = Annotated[float, Field(gt=0, le=1)]


class Profile(Config):
    """What is run; training configurations are laid over the defaults of `metr train` and `metr finetune`."""

    left_out: tuple[str, ...]  # datasets that take turns being left out
    shared: bool = False  # whether one pretraining without all of them serves all, instead of one for each
    seeds: dict[Fraction, tuple[int, ...]]  # for each fraction of the images those that choose them and train
    steps: dict[Fraction, int]  # of both arms for each fraction
    pretrain: dict[str, Any] | None = None  # the pretrainings; without them a given checkpoint is the beginning
    tuning: dict[str, Any]  # both arms
    pretrained: dict[str, Any]  # the arm that begins with the pretrained METR
    imagenet: dict[str, Any]  # the arm that begins with the backbone alone
    backbones: tuple[
        Fraction, ...
    ] = ()  # further arms, pretrained too: the share of ImageNet's weights in the backbone
    aims: dict[Fraction, float] = Field(default={0.1: 5.0, 1.0: 1.5})  # gains in mean AP that are aimed at
    least: dict[Fraction, float] = Field(default={1.0: -1.0})  # the least gain that any dataset is to have

    @property
    def arms(self) -> tuple[str, ...]:
        """The names of the arms, the one without a pretrained METR first."""
        return (*ARMS, *(f"{_MIXED}{share:g}" for share in self.backbones))

    def tree(self, arm: str, share: float) -> Tree:
        """The configuration of an arm, without what its verb adds by default."""
        steps = {"train": {"loop": {"steps": self.steps[share]}}}
        if arm == "imagenet":
            return merge(self.tuning, self.imagenet, steps)
        mixed = float(arm.removeprefix(_MIXED)) if arm.startswith(_MIXED) else 0.0
        return merge(self.tuning, self.pretrained, steps, {"train": {"pretrained_backbone": mixed}})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__, ("trial", "gpu", "fields", "tenth"))
    parser.add_argument(
        "--from", dest="source", metavar="RUN", help="begin with this run or checkpoint of other datasets"
    )
    study, given = runner.parse_study(parser, "transfer", arguments)
    return runner.exit_status(lambda: conduct(study, given["source"]))


def conduct(study: Study, source: str | None = None) -> bool:
    """Does the runs that are not finished, writes what is; False where it was stopped."""
    profile = Profile.checked(study.read_profile(), where=study.profile)
    if source is None and profile.pretrain is None:
        source = str(starts.SHIPPED)
    study.datasets(DATASETS if source is None else profile.left_out)
    before, arms = plan(study, profile, source)
    if source is not None and not all(run.finished for run in arms):
        starts.check_source(source, (), profile.left_out)
    # each arm begins with what was there before; none needs another arm
    done = runner.run_all(study, [*before, *arms], before) and runner.run_all(study, arms, independent=True)
    result = summary(study, profile, runner.reports(before), runner.reports(arms), done)
    if source is not None:  # the path to a checkpoint is of this machine alone
        result["start"] = {"name": Path(source).name, "weights": starts.weights_digest(source)}
    if result["points"]:
        report.draw_curves(study.stem.with_suffix(".png"), curves(result), titles(result))
        report.write_result(study.stem, result, page(result))
    return done


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Where the pretrained arm begins: a checkpoint folder, what decides its weights, and its network's configuration.

    `model` is empty where the profile itself says it.
    """

    source: str
    settings: Tree
    model: Tree = field(default_factory=dict)


def given_beginning(source: str) -> Beginning:
    """The checkpoint that is given.

    Raises:
        CheckpointError: there is none.
    """
    model = network_of(load_checkpoint(find_checkpoint(Path(source))).model)
    return Beginning(source=source, settings={"start": starts.weights_digest(source)}, model=model)


def network_of(model: DetectorConfig) -> Tree:
    """The network of a checkpoint, to be made with the backbone's first weights."""
    tree = model.model_dump(mode="json")
    for key in ("pretrained", "revision", "options"):
        tree["backbone"].pop(key)
    return tree


def plan(study: Study, profile: Profile, source: str | None = None) -> tuple[list[Run], list[Run]]:
    """The pretrainings, and both arms of one comparison after each other, the smallest fractions first.

    Args:
        study: The study.
        profile: Its profile.
        source: The checkpoint to begin with, in place of pretrainings.

    Raises:
        ConfigError: a fraction has no steps.
        CheckpointError: there is no such checkpoint.
    """
    if missing := sorted(profile.seeds.keys() - profile.steps.keys()):
        raise ConfigError(
            f"no steps for the fraction {missing[0]:g}", where="steps", hint="give each fraction its steps"
        )
    if source is None:
        before = {left_out: pretraining_run(study, profile, left_out) for left_out in profile.left_out}
        begun = {
            left_out: Beginning(source=str(run.folder / "last"), settings={"pretraining": run.settings})
            for left_out, run in before.items()
        }
    else:
        before, begun = {}, dict.fromkeys(profile.left_out, given_beginning(source))
    cells = [
        {"left_out": left_out, "share": share, "seed": seed, "arm": arm}
        for left_out in profile.left_out
        for share in sorted(profile.seeds)
        for seed in profile.seeds[share]
        for arm in profile.arms
    ]
    once = {run.folder: run for run in before.values()}
    return list(once.values()), [arm_run(study, profile, cell, begun[str(cell["left_out"])]) for cell in cells]


def pretraining_run(study: Study, profile: Profile, left_out: str) -> Run:
    """The pretraining that a left-out dataset is learned from."""
    without = profile.left_out if profile.shared else (left_out,)
    names, folder = [name for name in DATASETS if name not in without], f"without-{'-'.join(without)}"
    title = f"pretraining without {' and '.join(without)}"
    recipe, data = study.recipe(profile.pretrain or {}), study.datasets(names)
    return runner.training_run(study, study.out / folder, recipe, data, title)


def arm_run(study: Study, profile: Profile, cell: Tree, begun: Beginning) -> Run:
    """The run of one arm, on one fraction of a left-out dataset, with one seed."""
    left_out, share, seed, arm = cell.values()
    folder, tree = study.out / left_out / f"{share:g}-{seed}-{arm}", profile.tree(arm, share)
    subset, data = SubsetConfig(fraction=share, seed=seed), study.datasets([left_out])
    settings = {**cell, "configuration": study.configuration(tree)}
    if arm != "imagenet":
        settings |= begun.settings
    elif begun.model:
        settings["model"] = begun.model

    def work() -> Tree | None:
        joint = open_joint(data)
        joint = replace(joint, chosen={one.name: subset_of(one.split("train"), subset) for one in joint.sources})
        if arm != "imagenet":
            overrides = (*runner.as_overrides(tree), *study.overrides)
            options = FinetuneOptions(overrides=overrides, fraction=share, seed=seed, compare=False)
            outcome = finetune(
                data, begun.source, folder, options, resume=RunDirectory(folder).resumable, console=study.console
            ).training
        else:
            recipe = study.recipe(merge({"model": begun.model}, tree), f"train.loop.seed={seed}")
            parts = training_parts(joint, recipe, study.console)
            outcome = fit(parts, joint.evaluation(), recipe, folder, resume=True, console=study.console)
        if outcome.interrupted:
            return None
        found = {"ap": outcome.metrics["AP"], "ap50": outcome.metrics["AP50"]}
        took = {"steps": outcome.step, "training_seconds": runner.training_seconds(folder)}
        return {**cell, "images": joint.lengths[left_out], **found, **took}

    return Run(folder=folder, title=run_title(cell), settings=settings, work=work)


def run_title(run: Mapping[str, Any]) -> str:
    """The run of an arm in a few words."""
    return f"{run['left_out']}, {run['share']:.0%}, seed {run['seed']}, {run['arm']}"


def summary(study: Study, profile: Profile, before: Sequence[Tree], arms: Sequence[Tree], done: bool) -> Tree:
    """The result as the JSON file has it."""
    points = report.compare_arms(arms, ("left_out", "share"), profile.arms)
    return {
        **runner.circumstances("transfer", report.all_commits([*before, *arms])),
        "profile": study.profile,
        "complete": done,
        "written_by": runner.commit(),
        "settings": profile.model_dump(mode="json") | {"set": list(study.overrides)},
        "training_seconds": round(sum(one["training_seconds"] for one in arms)),
        "pretraining": [
            {
                "without": [name for name in DATASETS if name not in set(one["data"])],
                "commit": one["commit"],
                "training_seconds": one["training_seconds"],
            }
            for one in before
        ],
        "runs": list(arms),
        "points": points,
        "bars": goals(points, profile),
    }


def means(points: Sequence[Tree], left_out: Sequence[str]) -> dict[float, dict[str, float]]:
    """The mean AP of each arm at the fractions of which every left-out dataset has a point."""
    by_share: dict[float, list[Tree]] = {}
    for point in points:
        by_share.setdefault(point["share"], []).append(point)
    return {
        share: {arm: sum(point["ap"][arm] for point in several) / len(several) for arm in several[0]["ap"]}
        for share, several in sorted(by_share.items())
        if len(several) == len(left_out)
    }


def gain(ap: Mapping[str, float], arm: str = "pretrained") -> float:
    """What an arm brings over the ImageNet backbone alone, in AP."""
    return ap[arm] - ap["imagenet"]


def titles(result: Mapping[str, Any]) -> dict[str, str]:
    """What the arms of a result are, in words."""
    mixed = {f"{_MIXED}{share:g}": share for share in result["settings"].get("backbones", ())}
    return TITLES | {arm: f"pretrained, backbone {share:.0%} ImageNet's" for arm, share in mixed.items()}


def goals(points: Sequence[Tree], profile: Profile) -> list[Tree]:
    """The goals of each pretrained arm whose fraction is complete."""
    mean, found = means(points, profile.left_out), []
    for arm in profile.arms[1:]:
        called = "" if arm == "pretrained" else f", {arm}"
        found += [
            report.aim(f"gain in mean AP at {share:.0%}{called}", profile.aims[share], gain(ap, arm))
            for share, ap in mean.items()
            if share in profile.aims
        ]
        for share in mean:
            if share in profile.least:
                worst = min(gain(point["ap"], arm) for point in points if point["share"] == share)
                found.append(report.aim(f"least gain of a dataset at {share:.0%}{called}", profile.least[share], worst))
    return found


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: how it was measured, the table, the goals, what got worse."""
    points, before, settings = result["points"], result["pretraining"], result["settings"]
    named = {f"{point['left_out']} at {point['share']:.0%}": point for point in points}
    minutes, earlier = (sum(one["training_seconds"] for one in several) / 60 for several in (result["runs"], before))
    if start := result.get("start"):
        beginning = f"from the checkpoint {start['name']} (weights {start['weights']})"
        left_out = "a dataset without one is judged on its test split; the checkpoint has seen none of them"
    else:
        beginning = f"besides {earlier:.0f} of pretraining"
        left_out = f"left out: {'all of them at once' if settings['shared'] else 'one at a time'}"
    made = [(f"pretraining without {' and '.join(one['without'])}", one["commit"]) for one in before]
    made += [(run_title(one), one["commit"]) for one in result["runs"]]
    return report.joined(
        f"# Transfer: {result['profile']}",
        f"{report.profile_of(result)}: {minutes:.0f} minutes of training steps, {beginning}, "
        f"on {report.facts(result)}.",
        f"AP (0 to 100) on the val split of the left-out dataset, own names, last weights; {left_out}. "
        f"{'All' if settings.get('backbones') else 'Both'} arms see the same images in the same order, "
        f"{report.same_steps(named)}. In brackets: the range of the seeds.",
        table(result),
        report.aims_list(result["bars"]),
        *worse(result, named),
        report.runs_by_commit(made),
    )


def table(result: Mapping[str, Any]) -> str:
    """AP of each arm for each dataset and fraction, and what each pretrained arm gains."""
    arms = titles(result)
    gaining = list(arms)[1:]
    rows = [
        [
            point["left_out"],
            f"{point['share']:.0%}",
            str(point["images"]),
            report.steps_of(point),
            str(len(point["seeds"])),
            *(report.ap_of_seeds(point, arm) for arm in arms),
            *(f"{gain(point['ap'], arm):+.1f}" for arm in gaining),
        ]
        for point in result["points"]
    ]
    for share, ap in means(result["points"], result["settings"]["left_out"]).items():
        values = [*(f"{ap[arm]:.1f}" for arm in arms), *(f"{gain(ap, arm):+.1f}" for arm in gaining)]
        rows.append(["**mean**", f"{share:.0%}", "", "", "", *(f"**{value}**" for value in values)])
    gains = ["gain" if arm == "pretrained" else f"gain, {arms[arm].removeprefix('pretrained, ')}" for arm in gaining]
    return report.table(["left out", "share", "images", "steps", "seeds", *arms.values(), *gains], rows)


def worse(result: Mapping[str, Any], named: Mapping[str, Tree]) -> list[str]:
    """Where each pretrained arm is behind the ImageNet backbone alone, in words."""
    told = []
    for arm, title in titles(result).items():
        if arm != "imagenet":
            found = [
                f"{name} ({gain(point['ap'], arm):+.1f})" for name, point in named.items() if gain(point["ap"], arm) < 0
            ]
            called = "with pretraining" if arm == "pretrained" else f"if {title}"
            told.append(f"Worse {called}: {', '.join(found) or 'nothing'}.")
    return told


def curves(result: Mapping[str, Any]) -> dict[str, list[Tree]]:
    """The points of the chart: a panel for each left-out dataset, and one for their mean."""
    points, left_out = result["points"], result["settings"]["left_out"]
    panels = {name: [point for point in points if point["left_out"] == name] for name in left_out}
    mean = [{"share": share, "ap": ap} for share, ap in means(points, left_out).items()]
    return {name: several for name, several in {**panels, "mean": mean}.items() if several}


if __name__ == "__main__":
    sys.exit(main())
