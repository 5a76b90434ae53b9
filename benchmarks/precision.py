"""Does a METR that is trained in bf16 learn what it learns in fp32? How long steps take: step_pair.py.

    python benchmarks/precision.py --profile trial --data FOLDER

The same recipe, images and seeds in both precisions, one thread of a processor that multiplies bf16 itself (AMX or
AVX512_BF16):

    loss    mean of all steps, and of the last third of them
    AP      mean of the datasets' val splits by the last weights, own names

Profile `trial`, three datasets of 128 pixels (results/precision-trial.json): loss of the last third 19.24 in fp32,
19.17 in bf16; AP 26.6 and 27.4. With AVX512_BF16 in place of AMX (results/precision-avx512-bf16.json): 19.15 and 19.13,
27.6 and 27.2.

Results, once all runs are finished: `results/precision-PROFILE.json` and `.md`. Runs: `--out`, resumable.
"""

import sys
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import report
import runner
from metr.config import Config, Tree, merge
from metr.evaluation.results import EvaluationConfig
from metr.evaluation.runner import evaluate
from metr.training.logger import read_metrics
from runner import Run, Study

FULL, LOW = "fp32", "bf16"


class Profile(Config):
    """What is run; the recipe is laid over the defaults of `metr train`."""

    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    study, _ = runner.parse_study(runner.option_parser(__doc__, ("trial",)), "precision", arguments)
    return runner.exit_status(lambda: conduct(study))


def conduct(study: Study) -> bool:
    """Does the runs that are not finished and writes the result; False where it was stopped."""
    profile = Profile.checked(study.read_profile(), where=study.profile)
    data = study.datasets(profile.datasets)
    keys = [(seed, precision) for seed in profile.seeds for precision in (FULL, LOW)]
    runs = [arm_run(study, profile, data, *key) for key in keys]
    if not runner.run_all(study, runs):
        return False
    found = [
        {"seed": seed, "precision": precision, **one}
        for (seed, precision), one in zip(keys, runner.reports(runs), strict=True)
    ]
    result = {
        **runner.circumstances("precision", report.all_commits(found), "cpu"),
        "profile": study.profile,
        "settings": profile.model_dump(mode="json") | {"set": list(study.overrides)},
        "runs": found,
    }
    report.write_result(study.stem, result, page(result))
    return True


def arm_run(study: Study, profile: Profile, data: Sequence[str], seed: int, precision: str) -> Run:
    """The training and the judgement in one precision with one seed."""
    changes = {"train": {"loop": {"precision": precision, "seed": seed}}}
    recipe = study.recipe(merge(profile.recipe, changes))
    folder = study.out / f"{precision}-{seed}"
    training = runner.training_run(study, folder, recipe, data, precision)

    def work() -> Tree | None:
        took = training.work()
        if took is None:
            return None
        losses = [sum(one["losses"].values()) for one in read_metrics(folder) if one["kind"] == "train"]
        judged = evaluate(
            folder / "last", data, folder / "evaluation", config=EvaluationConfig(modes=("own",)), console=study.console
        )
        late = losses[-(len(losses) // 3) :]
        return {**took, "losses": losses, "loss": mean(losses), "late_loss": mean(late), "ap": judged.mean("own")}

    return Run(folder=folder, title=f"{precision}, seed {seed}", settings=training.settings, work=work)


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: both precisions by seed, and their means."""
    figures = {"loss": ".2f", "late_loss": ".2f", "ap": ".1f"}
    runs = result["runs"]
    rows = [
        [
            str(seed),
            *(f"{of(runs, seed, precision)[key]:{form}}" for key, form in figures.items() for precision in (FULL, LOW)),
        ]
        for seed in dict.fromkeys(one["seed"] for one in runs)
    ]
    means = {
        (key, precision): mean(one[key] for one in runs if one["precision"] == precision)
        for key in figures
        for precision in (FULL, LOW)
    }
    rows.append(
        [
            "**mean**",
            *(f"**{means[key, precision]:{form}}**" for key, form in figures.items() for precision in (FULL, LOW)),
        ]
    )
    titles = {"loss": "loss", "late_loss": "loss, last third", "ap": "AP"}
    head = ["seed", *(f"{title}, {precision}" for title in titles.values() for precision in (FULL, LOW))]
    return report.joined(
        f"# Training in two precisions: {report.facts(result)}",
        report.table(head, rows),
        f"{runs[0]['steps']:,} steps, {runs[0]['images_seen']:,} images each.",
    )


def of(runs: Sequence[Mapping[str, Any]], seed: int, precision: str) -> Mapping[str, Any]:
    """The run of a seed in a precision."""
    return next(one for one in runs if (one["seed"], one["precision"]) == (seed, precision))


if __name__ == "__main__":
    sys.exit(main())
