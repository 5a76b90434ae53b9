"""Sampling, image size, augmentation, depth: what is each choice of a long pretraining worth in a short one?

    python benchmarks/choices.py --profile thirty --data FOLDER

The same recipe from the ImageNet backbone on the 25 datasets of the checkpoint's profile `thirty`, with one thing
changed in each arm, for the same number of images. By the last weights, on each dataset's val split:

    own, all names   mean AP with a dataset's own names, and with all names of all datasets
    better           on how many datasets the arm has more AP than the recipe with the same seed, own names
    confusion        the share of the best detections that are called as another dataset's things are

Every seed of an arm is compared with the recipe's run of that seed; the seeds of the recipe alone say how far two equal
runs are apart.

Profile `thirty`, one thread, bf16 (results/choices-thirty.json): own names 23.4 and 24.9 by the recipe's two seeds,
22.2 to 25.9 by the arms. The best are those without crops, and with six decoder layers.

Results: `results/choices-PROFILE.json` and `.md`, written whenever the command ends, with what is finished until then.
Runs: `--out`, resumable; several processes may share the work.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

import report
import runner
from metr.config import Config, Tree, merge
from metr.evaluation.runner import evaluate
from multifield import EVALUATION
from runner import Run, Study
from study_data import every_licensed, licensed_datasets

RECIPE = "recipe"
FIGURES = {"own": "own names", "joint": "all names", "confusion": "confusion, %"}


class Profile(Config):
    """What is run; configurations are laid over the defaults of `metr train`."""

    seeds: tuple[int, ...] = Field(min_length=1)  # of the recipe
    arms: dict[str, dict[str, Any]] = Field(min_length=1)  # what is changed, by what it is called
    arm_seeds: tuple[int, ...] = Field(min_length=1)
    recipe: dict[str, Any]

    def runs(self) -> list[tuple[str, int]]:
        """All arms and seeds, the recipe's first."""
        return [(RECIPE, seed) for seed in self.seeds] + [(arm, seed) for seed in self.arm_seeds for arm in self.arms]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    study, _ = runner.parse_study(runner.option_parser(__doc__, ("thirty",)), "choices", arguments)
    return runner.exit_status(lambda: conduct(study))


def conduct(study: Study) -> bool:
    """Does the runs that are not finished, writes what is; False where it was stopped."""
    profile = Profile.checked(study.read_profile(), where=study.profile)
    data = licensed_datasets(study, every_licensed())
    runs = {(arm, seed): arm_run(study, profile, data, arm, seed) for arm, seed in profile.runs()}
    done = runner.run_all(study, list(runs.values()), independent=True)
    found = [{"arm": arm, "seed": seed, **one} for (arm, seed), run in runs.items() for one in runner.reports([run])]
    if found:
        result = {
            **runner.circumstances("choices", report.all_commits(found), "cpu"),
            "profile": study.profile,
            "complete": done,
            "settings": profile.model_dump(mode="json") | {"set": list(study.overrides)},
            "runs": found,
        }
        report.write_result(study.stem, result, page(result))
    return done


def arm_run(study: Study, profile: Profile, data: Sequence[str], arm: str, seed: int) -> Run:
    """The training and the judgement of one arm with one seed."""
    recipe = study.recipe(merge(profile.recipe, profile.arms.get(arm, {})), f"train.loop.seed={seed}")
    folder = study.out / f"{arm.replace(' ', '-')}-{seed}"
    # most val boxes of ships are of classes without a name
    training = runner.training_run(study, folder, recipe, data, arm, allow_empty=True)

    def work() -> Tree | None:
        took = training.work()
        if took is None:
            return None
        found = evaluate(
            folder / "last", data, folder / "evaluation", config=EVALUATION, allow_empty=True, console=study.console
        )
        return {
            **took,
            "own": found.mean("own"),
            "joint": found.mean("joint"),
            "confusion": found.mean_confusion,
            "datasets": {one.name: one.ap("own") for one in found.datasets if one.in_mean},
        }

    return Run(folder=folder, title=f"{arm}, seed {seed}", settings=training.settings, work=work)


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: a row an arm and seed, with the differences to the recipe of that seed."""
    runs = result["runs"]
    recipes = {one["seed"]: one for one in runs if one["arm"] == RECIPE}
    rows = [
        [
            one["arm"],
            str(one["seed"]),
            *(report.number(one[figure]) for figure in FIGURES),
            *against(one, None if one["arm"] == RECIPE else recipes.get(one["seed"])),
        ]
        for one in runs
    ]
    head = ["arm", "seed", *FIGURES.values(), "own, to recipe", "all names, to recipe", "better"]
    return report.joined(
        "# Choices of a pretraining",
        f"{report.profile_of(result)}, on {report.facts(result)}.",
        f"Mean AP (0 to 100) of {len(runs[0]['datasets'])} datasets, last weights, "
        f"{report.number_range(one['images_seen'] for one in runs)} images seen.",
        report.table(head, rows),
        report.runs_by_commit((f"{one['arm']}, seed {one['seed']}", one["commit"]) for one in runs),
    )


def against(one: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> list[str]:
    """The differences to the recipe's run of the seed, and on how many datasets there is more AP; "-" without one."""
    if recipe is None:
        return ["-"] * 3
    pairs = [(ap, recipe["datasets"].get(name)) for name, ap in one["datasets"].items()]
    known = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    better = f"{sum(ours > theirs for ours, theirs in known)} of {len(known)}"
    return [*(report.number(one[figure] - recipe[figure], "+.1f") for figure in ("own", "joint")), better]


if __name__ == "__main__":
    sys.exit(main())
