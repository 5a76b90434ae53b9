"""Which changes of training make suppression within a name needless?

    python benchmarks/duplicates.py --profile trial --data FOLDER

METR is trained as the recipe says, with each cure of the profile, and with all of them: the same images for the same
steps, several seeds. The last weights are asked for each dataset's own names and for all names:

    bare        mean AP without suppression (NMS), own names
    with NMS    the same with suppression at 0.7 IoU within a name
    NMS adds    the difference
    all names   the same two with all names of training asked for
    repeats     of the best detections without suppression, own names, as many an image as it has objects: the share
                that overlaps a better one of its name by 0.5 IoU or more

A cure that changes only the statistics of the average's batch norms is not trained: they are estimated, as training
would at its end, for the recipe's weights. Differences to the recipe of the same seeds have a paired bootstrap over the
images: the middle 95 % of `RESAMPLES` draws. It says nothing of the seeds: their range does.

Profile `trial`, three seeds, one thread, bf16 (results/duplicates-trial.json): suppression adds 1.2 AP to the recipe,
1.0 to 1.3 to the cures, and 1.7 to all together. With own names no cure is outside chance.

Results: `results/duplicates-PROFILE.json` and `.md`, written whenever the command ends, with what is finished until
then. Runs: `--out`, resumable; several processes may share the work.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from pydantic import Field

import report
import runner
from detection_defaults import ask, difference, encoded, joined, resampled
from metr.boxes import pairwise_iou
from metr.config import Config, Tree, leaves, merge
from metr.data.joint import open_joint
from metr.data.records import InMemoryAnnotations
from metr.devices import autocast, resolved_precision
from metr.inference.config import InferenceConfig, PostprocessConfig
from metr.model import METR
from metr.structures import Detections
from metr.training.batch_statistics import estimated_statistics, learned_batch_norms, take_statistics
from metr.training.config import RunConfig
from metr.training.train import training_parts
from runner import Run, Study

RECIPE, TOGETHER = "recipe", "together"
RESAMPLES, NMS, SAME_PLACE = 50, 0.7, 0.5
ADDS = 0.3
"""AP that suppression may add in the mean."""
FIGURES = {
    "bare": "bare",
    "suppressed": "with NMS",
    "adds": "NMS adds",
    "joint_bare": "all names, bare",
    "joint": "all names, with NMS",
}
STATISTICS = "train.ema.batch_norm_images"


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
    data, arms = study.datasets(profile.datasets), profile.arms()
    runs = {(arm, seed): arm_run(study, profile, data, arm, seed) for seed in profile.seeds for arm in arms}
    done = runner.run_all(study, list(runs.values()), independent=True)
    found = {key: one for key, run in runs.items() for one in runner.reports([run])}
    if found:
        result = {
            **runner.circumstances("duplicates", report.all_commits(found.values()), "cpu"),
            "profile": study.profile,
            "complete": done,
            "written_by": runner.commit(),
            "settings": profile.model_dump(mode="json") | {"set": list(study.overrides)},
            "training_seconds": round(sum(one["training_seconds"] for one in found.values())),
            "runs": [
                {
                    "arm": arm,
                    "seed": seed,
                    **one,
                    "means": {key: np.round(each, 3).tolist() for key, each in one["means"].items()},
                }
                for (arm, seed), one in found.items()
            ],
            "arms": (figures := summary(arms, profile.seeds, found)),
            "bars": [{"what": arm, **report.bar(one["adds"]["mean"], ADDS)} for arm, one in figures.items()],
        }
        report.write_result(study.stem, result, page(result))
    return done


def arm_run(study: Study, profile: Profile, data: Sequence[str], arm: str, seed: int) -> Run:
    """The training, where the arm needs one of its own, and the judgement of one arm with one seed."""
    changes = profile.arms()[arm]
    recipe = study.recipe(merge(profile.recipe, changes), f"train.loop.seed={seed}")
    untrained = leaves(changes).keys() == {STATISTICS}
    folder = study.out / f"{arm.replace(' ', '-')}-{seed}"
    weights = study.out / f"{RECIPE}-{seed}" if untrained else folder
    training = runner.training_run(study, folder, recipe, data, arm)

    def work() -> Tree | None:
        took = {**runner.training_cost(weights), "training_seconds": 0.0} if untrained else training.work()
        if took is None:
            return None
        model = METR.from_pretrained(weights / "last", device="cpu")
        if untrained:
            settle(model, recipe, data, study)
        return {**took, **judged(model, data)}

    settings = {**training.settings, "arm": arm, "resamples": RESAMPLES}
    return Run(folder=folder, title=f"{arm}, seed {seed}", settings=settings, work=work)


def settle(model: METR, recipe: RunConfig, data: Sequence[str], study: Study) -> None:
    """Estimates the statistics of the model's learned batch norms, from the images that training would take for it."""
    parts, loop, batch = training_parts(open_joint(data), recipe, study.console), recipe.train.loop, recipe.loader
    number = loop.steps * loop.accumulation
    place = {"seed": loop.seed, "start": number * batch.batch_size, "rank": 0, "world": 1}
    device = torch.device("cpu")
    loader = parts.loader(**place, device=device, batches=number)
    batches = islice(loader, math.ceil(recipe.train.ema.batch_norm_images / batch.batch_size))
    norms = learned_batch_norms(parts.network.train())
    with autocast(resolved_precision(loop.precision, device), device):
        found = estimated_statistics(model.network, norms, batches, Accelerator(cpu=True))
    take_statistics(model.network, found)


def judged(model: METR, data: Sequence[str]) -> Tree:
    """The mean AP of each figure, first of the images as they are and then of images drawn anew, and the repeats.

    Draws are the same for every model.
    """
    sets = [encoded(model, path) for path in data]
    bare, suppressed = (InferenceConfig(postprocess=PostprocessConfig(nms_iou=iou)) for iou in (None, NMS))
    asked = {
        "bare": [ask(model, one, one.names, bare) for one in sets],
        "suppressed": [ask(model, one, one.names, suppressed) for one in sets],
        "joint_bare": [ask(model, one, joined(one.names, model.names), bare) for one in sets],
        "joint": [ask(model, one, joined(one.names, model.names), suppressed) for one in sets],
    }
    means = {figure: resampled(sets, found, RESAMPLES).tolist() for figure, found in asked.items()}
    repeats = [repeated(one.annotations, found) for one, found in zip(sets, asked["bare"], strict=True)]
    images = sum(len(one.annotations) for one in sets)
    return {"images": images, "means": means, "repeats": report.mean(repeats)}


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


def summary(arms: Iterable[str], seeds: Sequence[int], found: Mapping[tuple[str, int], Mapping[str, Any]]) -> Tree:
    """Each arm's figures by seed, their means, and differences to the recipe over the seeds that both have finished."""
    result: Tree = {}
    for arm in arms:
        own = {seed: found[arm, seed] for seed in seeds if (arm, seed) in found}
        if not own:
            continue
        each = {figure: [float(values(one, figure)[0]) for one in own.values()] for figure in FIGURES}
        result[arm] = {
            "seeds": list(own),
            "each": each,
            "mean": {figure: report.mean(several) for figure, several in each.items()},
            "adds": difference(*(over_seeds(own.values(), figure) for figure in ("bare", "suppressed"))),
            "repeats": [one["repeats"] for one in own.values()],
            "gains": None,
        }
        pairs = [(found[RECIPE, seed], one) for seed, one in own.items() if (RECIPE, seed) in found]
        if pairs and arm != RECIPE:
            sides = list(zip(*pairs, strict=True))
            gains = {figure: difference(*(over_seeds(side, figure) for side in sides)) for figure in FIGURES}
            result[arm]["gains"] = gains
    return result


def values(one: Mapping[str, Any], figure: str) -> Float[np.ndarray, "n"]:
    """A figure of a run, first of the images as they are and then of each draw."""
    means = one["means"]
    return np.subtract(means["suppressed"], means["bare"]) if figure == "adds" else np.array(means[figure])


def over_seeds(several: Iterable[Mapping[str, Any]], figure: str) -> Float[np.ndarray, "n"]:
    """The mean of a figure over the runs of several seeds, draw by draw."""
    return np.asarray(np.mean([values(one, figure) for one in several], axis=0))


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: the figures, the differences to the recipe, the goal; a row an arm."""
    arms, runs = result["arms"], result["runs"]
    rows = [
        [arm, str(len(one["seeds"])), *map(of_seeds, [*one["each"].values(), one["repeats"]])]
        for arm, one in arms.items()
    ]
    gains = [[arm, *(limits(one["gains"][figure]) for figure in FIGURES)] for arm, one in arms.items() if one["gains"]]
    met = [
        f"- {one['what']}: suppression adds {limits(arms[one['what']]['adds'])} AP ({report.bar_text(one)})"
        for one in result["bars"]
    ]
    return report.joined(
        "# Duplicates",
        f"{report.profile_of(result)}: {result['training_seconds'] / 60:.0f} minutes of training steps, on "
        f"{report.facts(result)}.",
        f"Mean AP (0 to 100) of {len(result['settings']['datasets'])} datasets, {runs[0]['images']} images of their "
        f"evaluation splits, last weights, runs of {report.number_range(one['steps'] for one in runs)} steps. In "
        "brackets: the range of the seeds.",
        report.table(["arm", "seeds", *FIGURES.values(), "repeats, %"], rows),
        "Differences to the recipe of the same seeds, and what suppression adds. In brackets: the middle 95 % when the "
        "images are drawn anew.",
        report.table(["arm", *FIGURES.values()], gains) if gains else "",
        "\n".join(met),
        report.runs_by_commit((f"{one['arm']}, seed {one['seed']}", one["commit"]) for one in runs),
    )


def of_seeds(each: Iterable[float | None]) -> str:
    """The mean over seeds, and their range where there are several."""
    known = [value for value in each if value is not None]
    spread = f" ({min(known):.1f} to {max(known):.1f})" if len(known) > 1 else ""
    return report.number(report.mean(known)) + spread


def limits(one: Mapping[str, float]) -> str:
    """A difference and its limits."""
    return f"{one['mean']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})"


if __name__ == "__main__":
    sys.exit(main())
