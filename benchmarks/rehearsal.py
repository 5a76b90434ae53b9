"""Does a detector that is fine-tuned on a new dataset still find the old ones' categories, with rehearsal or without?

    python benchmarks/rehearsal.py --profile trial --data FOLDER
    python benchmarks/rehearsal.py --profile fields --data FOLDER [--from RUN]

Takes a METR of the old datasets (`--from RUN`; by default it trains one itself) and fine-tunes it on a new dataset
twice, without rehearsal and with a fraction of the images from the old datasets, for the same steps with the same seed.
All datasets are evaluated before and after: AP with each dataset's own names, and with all names of all of them.

Profile `trial`, one thread of an AMD EPYC, begun with the METR of `multifield.py --profile comparison --arms
negative`: 13 minutes of training steps (results/rehearsal-trial.json). Mean AP of the four old datasets, own
names: 54.1 before, 22.1 without rehearsal, 48.5 with it; the new one (aquarium) comes to 10.2 and 10.0. Two old
datasets (endangered_animals, playing_cards) keep less than nine tenths of their AP even so.

Profile `fields` begins with a given checkpoint, the project's own by default, and asks whether all of its datasets
together keep 92 % of their mean AP while it learns tomatoes; coco_mini goes without photographs of NonCommercial
licences. One thread of an Intel Xeon, 16 minutes of training steps (results/rehearsal-fields.json): 46.5 before, 24.6
without rehearsal, 43.2 (93 %) with half of the images from the old datasets; tomatoes come to 33.2 and 29.6. Profile
`gpu` has not been run.

Results, once both arms are finished: `results/rehearsal-PROFILE.json` and `.md`. Runs: `--out`, resumable.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

import report
import runner
import starts
from metr.config import Config, Tree
from metr.run_directory import RunDirectory
from metr.training.finetune import finetune
from metr.training.finetune_data import FinetuneOptions
from runner import Run, Study
from study_data import licensed_datasets

ARMS = ("without", "with")
MODES = {"own": "own names", "joint": "all names"}
KEPT = 0.9  # the fraction of its AP that a dataset is to keep, whatever names it is asked for; else it is lost
FOUND = 1.0  # the AP before under which there is nothing to lose
MEAN_KEPT = 92.0  # how much of the old datasets' mean AP is to be left with rehearsal, in %
ALIKE = 0.1  # the most, in AP, that two evaluations of the same weights may differ by


class Profile(Config):
    """What is run; training configurations are laid over the defaults of `metr train` and `metr finetune`."""

    old: tuple[str, ...] = ()  # the datasets that pretraining sees; all of the given checkpoint's if there are none
    new: str  # the dataset that both arms are fine-tuned on
    share: Annotated[float, Field(gt=0, lt=1)]  # fraction of the samples that are of the old datasets with rehearsal
    seed: int  # of both arms
    pretrain: dict[str, Any] | None = None  # without it the study begins with a given checkpoint
    tuning: dict[str, Any]  # both arms: everything but the samples


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__, ("trial", "gpu", "fields"))
    parser.add_argument("--from", dest="source", metavar="RUN", help="a run or checkpoint of the old datasets")
    study, given = runner.parse_study(parser, "rehearsal", arguments)
    return runner.exit_status(lambda: conduct(study, given["source"]))


def conduct(study: Study, source: str | None) -> bool:
    """Does the runs that are not finished, and writes the result when all are; False where it was stopped."""
    profile = Profile.checked(study.read_profile(), where=study.profile)
    if source is None and profile.pretrain is None:
        source = str(starts.SHIPPED)
    if source is not None and not profile.old:
        profile = profile.model_copy(update={"old": starts.datasets_of(source)})
    study.datasets([*profile.old, profile.new])  # whether all are there
    before: list[Run] = []
    begun: Tree
    if source is None:
        folder, title = study.out / "pretrained", f"pretraining on {', '.join(profile.old)}"
        recipe = study.recipe(profile.pretrain or {})
        before = [runner.training_run(study, folder, recipe, study.datasets(profile.old), title)]
        start, begun = str(folder / "last"), {"pretraining": before[0].settings}
    else:
        start, begun = source, {"from": source, "weights": starts.weights_digest(source)}
    arms = [arm_run(study, profile, arm, start, begun) for arm in ARMS]
    if source is not None and not all(run.finished for run in arms):
        starts.check_source(source, profile.old, [profile.new])
    done = runner.run_all(study, [*before, *arms])
    if done:
        result = summary(study, profile, source, runner.reports(before), runner.reports(arms))
        report.write_result(study.stem, result, page(result))
    return done


def arm_run(study: Study, profile: Profile, arm: str, source: str, begun: Mapping[str, Any]) -> Run:
    """The fine-tuning of one arm, and the evaluation of all datasets before and after it."""
    given = profile.pretrain is None
    folder, old = study.out / arm, tuple((licensed_datasets if given else Study.datasets)(study, profile.old))

    def work() -> Tree | None:
        # one evaluation, so the last weights are evaluated: nothing is chosen by the images of any val split
        overrides = (*runner.as_overrides(profile.tuning), *study.overrides, "train.loop.evaluate_every=0")
        options = FinetuneOptions(
            overrides=overrides,
            seed=profile.seed,
            **({"rehearse": old, "rehearse_fraction": profile.share} if arm == "with" else {}),
            rehearse_evaluate=() if arm == "with" else old,
            allow_empty=given,  # most val boxes of ships have no name
        )
        data = study.datasets([profile.new])
        outcome = finetune(data, source, folder, options, resume=RunDirectory(folder).resumable, console=study.console)
        if outcome.comparison is None:
            return None
        took = {"steps": outcome.training.step, "training_seconds": runner.training_seconds(folder)}
        return {"arm": arm, **took, "datasets": [asdict(change) for change in outcome.comparison.changes]}

    settings = {
        "arm": arm,
        "old": profile.old,
        "new": profile.new,
        "share": profile.share if arm == "with" else None,
        "seed": profile.seed,
        "configuration": study.configuration(profile.tuning),
        **begun,
    }
    return Run(folder=folder, title=f"{arm} rehearsal", settings=settings, work=work)


def summary(study: Study, profile: Profile, source: str | None, before: Sequence[Tree], arms: Sequence[Tree]) -> Tree:
    """The result as the JSON file has it."""
    # the path to a checkpoint is of this machine alone
    begun = "its own pretraining" if source is None else Path(source).name
    datasets, alike = compare(arms, profile)
    return {
        **runner.circumstances("rehearsal", report.all_commits([*before, *arms])),
        "profile": study.profile,
        "written_by": runner.commit(),
        "settings": profile.model_dump(mode="json") | {"set": list(study.overrides), "from": begun},
        "training_seconds": round(sum(one["training_seconds"] for one in (*before, *arms))),
        "pretraining_seconds": before[0]["training_seconds"] if before else None,
        "arms": {one["arm"]: {key: one[key] for key in ("steps", "training_seconds", "commit")} for one in arms},
        "datasets": datasets,
        "lost": {arm: lost_datasets(datasets, arm) for arm in ARMS},
        "alike": alike,
        "bars": goals(datasets),
        "verdict": verdict(datasets),
    }


def compare(arms: Sequence[Tree], profile: Profile) -> tuple[dict[str, Tree], bool]:
    """AP of every dataset before and after each arm, and whether both arms began with the same detector, by its AP."""
    changes = {one["arm"]: {change["dataset"]: change for change in one["datasets"]} for one in arms}
    first, second = (changes[arm] for arm in ARMS)
    datasets = {
        name: row(name != profile.new, first[name]["before"], {arm: changes[arm][name]["after"] for arm in ARMS})
        for name in (*profile.old, profile.new)
    }
    old = [datasets[name] for name in profile.old]
    before = {mode: report.mean(one["before"][mode] for one in old) for mode in MODES}
    after = {arm: {mode: report.mean(one["after"][arm][mode] for one in old) for mode in MODES} for arm in ARMS}
    datasets[f"mean of {len(old)} old"] = row(True, before, after)
    apart = [difference(second[name]["before"][mode], first[name]["before"][mode]) for name in first for mode in MODES]
    return datasets, all(abs(value or 0.0) <= ALIKE for value in apart)


def row(old: bool, before: Mapping[str, float | None], after: Mapping[str, Mapping[str, float | None]]) -> Tree:
    """One dataset, or the mean of several: AP (0 to 100) by arm and by the names asked for; None: nothing to find."""
    change = {arm: {mode: difference(after[arm][mode], before[mode]) for mode in MODES} for arm in ARMS}
    gain = {mode: difference(after["with"][mode], after["without"][mode]) for mode in MODES}
    return {"old": old, "before": dict(before), "after": after, "change": change, "gain": gain}


def difference(later: float | None, earlier: float | None) -> float | None:
    """What was gained; None where either is unknown."""
    return None if later is None or earlier is None else later - earlier


def old_datasets(datasets: Mapping[str, Tree]) -> dict[str, dict[str, float]]:
    """The old datasets without their mean, each with its AP before in those ways to ask in which it can be lost."""
    return {
        name: {mode: ap for mode, ap in one["before"].items() if (ap or 0.0) >= FOUND}
        for name, one in datasets.items()
        if one["old"] and not name.startswith("mean of ")
    }


def lost_datasets(datasets: Mapping[str, Tree], arm: str) -> dict[str, list[str]]:
    """The old datasets that an arm lost, and the ways to ask in which it did."""
    lost = {
        name: [mode for mode, ap in before.items() if (datasets[name]["after"][arm][mode] or 0.0) < KEPT * ap]
        for name, before in old_datasets(datasets).items()
    }
    return {name: modes for name, modes in lost.items() if modes}


def verdict(datasets: Mapping[str, Tree]) -> str:
    """Whether the old names are kept, in one sentence."""
    found, told = sum(bool(before) for before in old_datasets(datasets).values()), {}
    if not found:
        return "Nothing can be said of the old names: the detector found nothing of them before."
    for arm in ARMS:
        falls = []
        for name, modes in lost_datasets(datasets, arm).items():
            before, after = datasets[name]["before"], datasets[name]["after"][arm]
            ways = (f"{MODES[mode]} {before[mode]:.1f} to {after[mode] or 0.0:.1f}" for mode in modes)
            falls.append(f"{name} ({', '.join(ways)})")
        told[arm] = f"lost are: {'; '.join(falls)}" if falls else ""
    if told["with"]:
        beside = told["without"] or "none is lost"
        return f"The old names are not all kept: with rehearsal, {told['with']}; without it, {beside}."
    beside = f"without it, {told['without']}" if told["without"] else "they are without it, too"
    return f"The old names are kept with rehearsal, in all {found} old datasets that were found before; {beside}."


def goals(datasets: Mapping[str, Tree]) -> list[Tree]:
    """How much of the old datasets' mean AP is left with rehearsal, in % and by the names asked for."""
    (mean,) = (one for name, one in datasets.items() if name.startswith("mean of "))
    return [
        report.aim(
            f"mean AP of the old datasets that is left with rehearsal, {title}, %", MEAN_KEPT, 100 * after / before
        )
        for mode, title in MODES.items()
        if (before := mean["before"][mode]) and (after := mean["after"]["with"][mode]) is not None
    ]


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: the verdict, a table for each way to ask, and how it was measured."""
    settings, datasets, arms = result["settings"], result["datasets"], result["arms"]
    steps = report.same_steps({"the arms": {"steps": {arm: [one["steps"]] for arm, one in arms.items()}}})
    nothing = [name for name, before in old_datasets(datasets).items() if not before]
    return report.joined(
        f"# Rehearsal: {result['profile']}",
        f"**{result['verdict']}**",
        f"AP (0 to 100) on the val splits, last weights. A detector of {', '.join(settings['old'])} learns "
        f"{settings['new']} in {report.number_range(one['steps'] for one in arms.values())} steps with the same seed, "
        f"{steps}; with rehearsal, {settings['share']:.0%} of the images are of the old datasets instead. Lost is a "
        f"dataset that has less than {KEPT:.0%} of its AP before, asked for its own names or for all names of all "
        "datasets.",
        report.aims_list(result.get("bars", ())),
        f"Not found before, so nothing to lose: {', '.join(nothing)}." if nothing else "",
        "" if result["alike"] else "**The arms did not begin with one detector: AP before is that of the first.**",
        *(f"## {title.capitalize()}\n\n{ap_table(result, mode)}" for mode, title in MODES.items()),
        f"{report.profile_of(result)}, from {settings['from']}: {result['training_seconds'] / 60:.0f} minutes of "
        f"training steps on {report.facts(result)}.",
        report.runs_by_commit((f"{arm} rehearsal", one["commit"]) for arm, one in arms.items()),
    )


def ap_table(result: Mapping[str, Any], mode: str) -> str:
    """AP before and after, asked for one kind of names: old datasets, their mean, the new one."""
    lines = []
    for name, one in sorted(result["datasets"].items(), key=lambda item: not item[1]["old"]):
        line = [name, "old" if one["old"] else "new", report.number(one["before"][mode])]
        for arm in ARMS:
            lost = mode in result["lost"][arm].get(name, ())
            line.append(f"{report.number(one['after'][arm][mode])}{' **lost**' if lost else ''}")
        differences = (*(one["change"][arm][mode] for arm in ARMS), one["gain"][mode])
        lines.append([*line, *(report.number(value, "+.1f") for value in differences)])
    head = ["dataset", "is", "before", "after, without", "after, with", "change, without", "change, with", "gain"]
    return report.table(head, lines, left=2)


if __name__ == "__main__":
    sys.exit(main())
