"""Which changes of training make suppression within a name needless?

    python benchmarks/duplicates.py --profile trial --data FOLDER

METR is trained as the recipe says, with each cure of the profile, and with all of them: the same images for the same
steps, several seeds. The last weights are asked for each dataset's own names and for all names:

    bare       mean AP without suppression (NMS), own names
    with NMS   the same with suppression at 0.7 IoU within a name; *adds*: the difference
    all names  mean AP with suppression, all names asked for
    repeats    of the best detections without suppression, as many an image as it has objects: the share that overlaps
               a better one of its name by 0.5 IoU or more

Differences to the recipe of the same seeds have a paired bootstrap over the images: the middle 95 % of `RESAMPLES`
draws. Profile `trial` has not been run.

Results: `results/duplicates-PROFILE.json` and `.md`, written whenever the command ends, with what is finished until
then. Runs: `--out`, resumable; several processes may share the work.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

import report
import runner
from detection_defaults import ask, difference, encoded, joined, resampled
from metr.boxes import pairwise_iou
from metr.config import Config, Tree, merge
from metr.data.records import InMemoryAnnotations
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.model import METR
from metr.structures import Detections
from runner import Run, Study

RECIPE, TOGETHER = "recipe", "together"
RESAMPLES, NMS, SAME_PLACE = 50, 0.7, 0.5
ADDS = 0.3
"""AP that suppression may add in the mean."""
FIGURES = ("bare", "suppressed", "joint")


class Profile(Config):
    """What is run; configurations are laid over the defaults of `metr train`."""

    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    cures: dict[str, dict[str, Any]] = Field(min_length=1)  # what is changed, by what it is called
    recipe: dict[str, Any]

    def arms(self) -> dict[str, Tree]:
        """The configuration of each arm, over the recipe's."""
        return {RECIPE: {}, **self.cures, TOGETHER: merge(*self.cures.values())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    study, _ = runner.parse_study(runner.option_parser(__doc__, ("trial",)), "duplicates", arguments)
    return runner.exit_status(lambda: conduct(study))


def conduct(study: Study) -> bool:
    """Does the runs that are not finished, writes what is; False where it was stopped."""
    profile = Profile.checked(study.read_profile(), where=study.profile)
    data = study.datasets(profile.datasets)
    runs = {
        (arm, seed): arm_run(study, data, study.recipe(with_seed(merge(profile.recipe, tree), seed)), arm, seed)
        for seed in profile.seeds
        for arm, tree in profile.arms().items()
    }
    done = runner.run_all(study, list(runs.values()))
    found = {key: one for key, run in runs.items() for one in runner.reports([run])}
    if found:
        commits = report.all_commits(found.values())
        result = {**runner.circumstances("duplicates", commits), "profile": study.profile, "complete": done}
        result |= {"arms": summary(profile, found)}
        result["bars"] = goals(result)
        report.write_result(study.stem, result, page(result))
    return done


def with_seed(tree: Tree, seed: int) -> Tree:
    """The configuration with a seed."""
    return merge(tree, {"train": {"loop": {"seed": seed}}})


def arm_run(study: Study, data: Sequence[str], recipe: Any, arm: str, seed: int) -> Run:
    """The training and the judgement of one arm with one seed."""
    folder = study.out / f"{arm.replace(' ', '-')}-{seed}"
    training = runner.training_run(study, folder, recipe, data, arm)

    def work() -> Tree | None:
        took = training.work()
        return None if took is None else {**took, **judged(folder / "last", data)}

    return Run(folder=folder, title=f"{arm}, seed {seed}", settings={**training.settings, "arm": arm}, work=work)


def judged(checkpoint: Path, data: Sequence[str]) -> Tree:
    """The mean AP of each figure, first of the images as they are and then of images drawn anew, and the repeats.

    Draws are the same for every checkpoint.
    """
    model = METR.from_pretrained(checkpoint, device="cpu")
    sets = [encoded(model, path) for path in data]
    bare, suppressed = (InferenceConfig(postprocess=PostprocessConfig(nms_iou=iou)) for iou in (None, NMS))
    asked = {
        "bare": [ask(model, one, one.names, bare) for one in sets],
        "suppressed": [ask(model, one, one.names, suppressed) for one in sets],
        "joint": [ask(model, one, joined(one.names, model.names), suppressed) for one in sets],
    }
    means = {figure: resampled(sets, found, RESAMPLES).tolist() for figure, found in asked.items()}
    repeats = [repeated(one.annotations, found) for one, found in zip(sets, asked["bare"], strict=True)]
    return {"means": means, "repeats": report.mean(repeats)}


def repeated(annotations: InMemoryAnnotations, found: Mapping[int | str, Detections]) -> float | None:
    """In percent, how many of the best detections overlap a better one of their name; None without detections."""
    total = again = 0
    for record in annotations.records:
        best = found[record.image_id]
        number = min(len(best), int((~record.ignore).sum()))
        boxes, labels = best.boxes[:number], best.labels[:number]
        same = (pairwise_iou(boxes, boxes) >= SAME_PLACE) & (labels[:, None] == labels[None])
        total, again = total + number, again + int(same.tril(-1).any(1).sum())
    return 100 * again / total if total else None


def summary(profile: Profile, found: Mapping[tuple[str, int], Mapping[str, Any]]) -> Tree:
    """Each arm's figures by seed, their means, and differences to the recipe over the seeds that both have finished."""
    result: Tree = {}
    for arm in profile.arms():
        seeds = [seed for seed in profile.seeds if (arm, seed) in found]
        if not seeds:
            continue
        own = [found[arm, seed] for seed in seeds]
        each = {figure: [one["means"][figure][0] for one in own] for figure in FIGURES}
        pairs = [(found[RECIPE, seed], found[arm, seed]) for seed in seeds if (RECIPE, seed) in found]
        result[arm] = {
            "seeds": seeds,
            "each": each,
            "mean": {figure: report.mean(values) for figure, values in each.items()},
            "adds": report.mean(one["means"]["suppressed"][0] - one["means"]["bare"][0] for one in own),
            "repeats": report.mean(one["repeats"] for one in own),
            "gains": {figure: gained(pairs, figure) for figure in FIGURES} if pairs and arm != RECIPE else None,
        }
    return result


def gained(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], figure: str) -> Tree:
    """The mean difference over seeds, with the bootstrap's limits."""
    before, after = (np.mean([one[side]["means"][figure] for one in pairs], axis=0) for side in (0, 1))
    return difference(before, after)


def goals(result: Mapping[str, Any]) -> list[Tree]:
    """What suppression adds to each arm."""
    return [{"what": arm, **report.bar(one["adds"], ADDS)} for arm, one in result["arms"].items()]


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: a row an arm."""
    rows = []
    for arm, one in result["arms"].items():
        spread = [f"{min(values):.1f} to {max(values):.1f}" for values in (one["each"]["suppressed"],)]
        gains = [
            "-" if one["gains"] is None else "{mean:+.1f} ({low:+.1f} to {high:+.1f})".format(**one["gains"][figure])
            for figure in FIGURES
        ]
        cells = [
            part
            for figure, gain in zip(FIGURES, gains, strict=True)
            for part in (report.number(one["mean"][figure]), gain)
        ]
        rows.append(
            [arm, str(len(one["seeds"])), *cells, *spread, f"{one['adds']:+.2f}", report.number(one["repeats"])]
        )
    head = [
        "arm",
        "seeds",
        "bare",
        "gain",
        "with NMS",
        "gain",
        "all names",
        "gain",
        "seeds' range",
        "NMS adds",
        "repeats, %",
    ]
    return report.joined(
        "# Duplicates",
        f"{report.profile_of(result)}. {report.facts(result)}.",
        report.table(head, rows),
        "\n".join(
            f"- {one['what']}: suppression adds {one['value']:+.2f} AP ({report.bar_text(one)})"
            for one in result["bars"]
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
