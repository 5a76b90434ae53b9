"""Is it worth training one detector on many isolated datasets jointly?

    python benchmarks/multifield.py --profile trial --data FOLDER
    python benchmarks/multifield.py --profile comparison --data FOLDER

MultiField: seven real datasets of five fields. METR trains on the train splits; for each val split the result says
COCO AP with the dataset's own names and with all names of all datasets, the recall of category extraction at K, and
cross-dataset confusion. `--arms` runs other arms for the same number of images seen: `separate` trains one METR for
each dataset, `closed_set` is one closed head over the concatenated labels (closed_set.py), and every other arm is joint
METR, by how it treats the categories that an image's dataset does not annotate.

Profile `trial`, one thread of an AMD EPYC, 16,000 images seen in 47 minutes of training steps
(results/multifield-trial.json): mean AP of six datasets 45.0 with own names, 45.6 with all 115 names.
Profile `comparison` (four datasets, 10,000 images seen by every arm in about half an hour;
results/multifield-comparison.json), mean AP with own / all names: separate 45.3, closed head 54.2 / 54.2, joint METR
54.0 / 53.9 with unannotated categories presumed absent, 53.1 / 50.1 with them ignored, 53.5 / 53.7 with pseudo-labels.
So joint training is 8.8 ahead of separate detectors and better on every dataset; a closed head is level with it.
Profile `gpu` has not been run.

Results: `results/multifield-PROFILE.json` and `.md`, with a sheet of detections and curves or bars. The page
`OUT/arms.html` compares the best joint arm with the others, and says what the datasets gave each other. Runs: `--out`,
resumable; finished arms are not run again, so several processes may share the work.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import report
import runner
from closed_set import ClosedSetCriterion, ClosedSetDetector, concatenated
from metr.checkpoint import Checkpoint, load_checkpoint
from metr.config import Tree
from metr.data.dataset import DetectionDataset
from metr.data.images import read_image
from metr.data.joint import open_joint
from metr.data.loading import build_train_loader
from metr.data.sampling import mixture_weights
from metr.data.transforms import build_transforms
from metr.evaluation.report import as_markdown, show
from metr.evaluation.results import EvaluationConfig, EvaluationReport, as_dict, from_dict
from metr.evaluation.runner import EvaluationRunner, evaluate
from metr.inference.draw import save_image
from metr.report import write_evaluation_page
from metr.training.config import RunConfig
from metr.training.curves import plot_curves
from metr.training.logger import read_metrics
from metr.training.parts import TrainingParts
from metr.training.state import seed_everything
from metr.training.trainer import Trainer
from runner import Run, Study

FIELDS = {
    "bccd": "blood",
    "playing_cards": "cards",
    "doc_tables": "pages",
    "chess_pieces": "chess",
    "aquarium": "natural photographs",
    "endangered_animals": "natural photographs",
    "coco_mini": "natural photographs",
}
# 195 images for 80 names are too few to learn from: coco_mini is reported beside the mean
EVALUATION = EvaluationConfig(domains=FIELDS, outside_mean=("coco_mini",))
QUICK = EVALUATION.model_copy(update={"modes": ("own",)})
TITLES = {
    "separate": "a METR for each",
    "closed_set": "closed head, concatenated labels",
    "ignore": "joint METR, unannotated ignored",
    "negative": "joint METR, unannotated negative",
    "pseudo_label": "joint METR, unannotated pseudo-labelled",
}
ARMS = tuple(TITLES)
JOINT = ARMS[2:]
RECALL_AT = 10
PROFILES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "trial": (tuple(sorted(FIELDS)), ()),
    "comparison": (("bccd", "chess_pieces", "endangered_animals", "playing_cards"), ARMS),
    "gpu": (tuple(sorted(FIELDS)), ("separate", "closed_set", "pseudo_label")),
}
"""Datasets and arms of each profile; without arms joint METR is trained as the recipe says."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__, tuple(PROFILES))
    parser.add_argument("--arms", nargs="*", choices=ARMS, help="baselines and ways to train; those of the profile")
    study, given = runner.parse_study(parser, "multifield", arguments)
    arms = PROFILES[study.profile][1] if given["arms"] is None else given["arms"]
    return runner.exit_status(partial(compare, study, arms) if arms else partial(joint, study))


def joint(study: Study) -> bool:
    """Trains one METR, evaluates it, writes the result; False where it was stopped."""
    data, recipe = study.datasets(PROFILES[study.profile][0]), study.recipe(study.read_profile())
    run = runner.training_run(study, study.out, recipe, data, "joint METR", QUICK)
    if not runner.run_all(study, [run]):
        return False
    last = study.out / "last"
    found = evaluate(last, data, study.out / "evaluation", config=EVALUATION, console=study.console)
    (took,) = runner.reports([run])
    evaluating = sum(float(record.get("evaluation_seconds", 0.0)) for record in read_metrics(study.out))
    result = {
        **circumstances(study, recipe, took["commit"]),
        **{key: round(took[key]) for key in ("steps", "images_seen", "training_seconds")},
        "wall_seconds": round(took["training_seconds"] + evaluating),
        "report": as_dict(found),
    }
    report.draw_sheet(data, last, beside(study, "detections.jpg"))
    save_image(read_image(plot_curves(study.out)), beside(study, "curves.png"))
    report.write_result(study.stem, result, page(result))
    return True


def compare(study: Study, arms: Sequence[str]) -> bool:
    """Does some arms, and writes what all finished ones found; False where one was stopped."""
    data, recipe = study.datasets(PROFILES[study.profile][0]), study.recipe(study.read_profile())
    runs = {arm: arm_run(study, data, recipe, arm) for arm in ARMS}
    if not runner.run_all(study, list(runs.values()), [runs[arm] for arm in arms]):
        return False
    found = {arm: one for arm, run in runs.items() for one in runner.reports([run])}
    kept = ("images_seen", "training_seconds", "commit", "report")
    results = {arm: {key: one[key] for key in kept} for arm, one in found.items()}
    result = circumstances(study, recipe, report.all_commits(results.values())) | {"arms": results}
    if best := best_joint(result):
        write_arms(result, study.out / "arms.html")
        report.draw_sheet(data, study.out / best / "last", beside(study, "detections.jpg"))
    report.draw_bars(beside(study, "bars.png"), bars(results), {arm: TITLES[arm] for arm in results})
    report.write_result(study.stem, result, page(result))
    return True


def beside(study: Study, name: str) -> Path:
    """The path of an image beside the result."""
    return study.results / f"{study.stem.name}-{name}"


def circumstances(study: Study, recipe: RunConfig, commits: str) -> Tree:
    """From what and how a result was made."""
    settings, seed = recipe.model_dump(mode="json"), recipe.train.loop.seed
    return runner.circumstances("multifield", commits) | {"profile": study.profile, "seed": seed, "settings": settings}


def arm_run(study: Study, data: Sequence[str], recipe: RunConfig, arm: str) -> Run:
    """The training and the evaluation of one arm."""
    folder = study.out / arm
    if arm in JOINT:
        recipe = recipe.model_copy(update={"unannotated": arm})
    work = {"separate": _separate, "closed_set": _closed_set}.get(arm, _joint)
    settings = {"arm": arm, "datasets": [one.partition("=")[0] for one in data], "configuration": recipe}
    return Run(folder=folder, title=arm, settings=settings, work=partial(work, study, folder, data, recipe))


def _joint(
    study: Study, folder: Path, data: Sequence[str], recipe: RunConfig, config: EvaluationConfig = EVALUATION
) -> Tree | None:
    """One METR for all datasets."""
    took = runner.training_run(study, folder, recipe, data, folder.name, QUICK).work()
    if took is None:
        return None
    found = evaluate(folder / "last", data, folder / "evaluation", config=config, console=study.console)
    return {**took, "training_seconds": round(took["training_seconds"]), "report": as_dict(found)}


def _separate(study: Study, folder: Path, data: Sequence[str], recipe: RunConfig) -> Tree | None:
    """One METR for each dataset: a joint run's steps, divided as its samples are."""
    lengths = {one.name: len(one.split("train")) for one in open_joint(data).sources}
    weights = mixture_weights(lengths, recipe.loader.mixture)
    each = []
    for argument, weight in zip(data, weights.values(), strict=True):
        steps = round(weight * recipe.train.loop.steps)
        train = recipe.train.model_copy(update={"loop": recipe.train.loop.model_copy(update={"steps": steps})})
        loader = recipe.loader.model_copy(update={"mixture": "equal"})
        alone = recipe.model_copy(update={"train": train, "loader": loader})
        found = _joint(study, folder / argument.partition("=")[0], [argument], alone, QUICK)
        if found is None:
            return None
        each.append(found)
    parts = [from_dict(one["report"]) for one in each]
    datasets, names = tuple(one for part in parts for one in part.datasets), sum(part.names for part in parts)
    took = {key: sum(one[key] for one in each) for key in ("images_seen", "training_seconds")}
    return took | {"report": as_dict(EvaluationReport(datasets=datasets, names=names))}


def _closed_set(study: Study, folder: Path, data: Sequence[str], recipe: RunConfig) -> Tree | None:
    """The closed head over the concatenated labels."""
    joint = open_joint(data)
    names, (vocabulary, of_labels) = joint.vocabulary.names, concatenated(joint.vocabulary)
    seed_everything(recipe.train.loop.seed)
    network = ClosedSetDetector(recipe.model, of_labels, names)
    transforms = build_transforms(recipe.augmentation, training=True)
    datasets = [DetectionDataset(one.split("train"), vocabulary, transforms) for one in joint.sources]
    parts = TrainingParts(
        network=network,
        criterion=ClosedSetCriterion(recipe.criterion),
        loader=partial(build_train_loader, datasets, recipe.loader),
        checkpoint=Checkpoint(
            model=recipe.model,
            vocabulary=vocabulary,
            text_embeddings=torch.eye(len(vocabulary)),
            text_encoder={},
            preprocessing=recipe.augmentation.resize.model_dump(mode="json"),
        ),
    )
    trainer = Trainer(parts, recipe.train, folder, resolved=recipe, console=study.console)
    if trainer.fit(resume=True).interrupted:
        return None
    network.load_state_dict(dict(load_checkpoint(folder / "last").weights))
    text, sets, resize = torch.eye(len(names)), joint.evaluation(), recipe.augmentation.resize
    judge = EvaluationRunner(joint.vocabulary, text, sets, resize, recipe.evaluation_loader, EVALUATION)
    found = judge.report(network.eval(), study.console, "negative")
    show(found, study.console)
    took = runner.training_cost(folder)
    return {**took, "training_seconds": round(took["training_seconds"]), "report": as_dict(found)}


def best_joint(result: Mapping[str, Any]) -> str | None:
    """Of the joint arms the one with the highest mean AP, all names asked for."""
    joint = [arm for arm in JOINT if arm in result["arms"]]
    return max(joint, key=lambda arm: mean_ap(result["arms"][arm], "joint") or 0.0, default=None)


def write_arms(result: Mapping[str, Any], path: Path) -> Path:
    """The page of the best joint arm, with the other arms beside it; each separate METR is an arm of its own."""
    reports = {arm: from_dict(one["report"]) for arm, one in result["arms"].items()}
    names = tuple(one.name for one in next(iter(reports.values())).datasets)
    alone = reports.pop("separate", EvaluationReport(datasets=(), names=0))
    reports = {arm: replace(one, trained_on=names) for arm, one in reports.items()}
    best = best_joint(result) or next(iter(reports))
    arms = {f"{one.name} alone": replace(alone, datasets=(one,), trained_on=(one.name,)) for one in alone.datasets}
    arms |= {TITLES[arm]: one for arm, one in reports.items() if arm != best}
    return write_evaluation_page(reports[best], path, f"MultiField, {result['profile']}: {TITLES[best]}", arms)


def mean_ap(arm: Mapping[str, Any], mode: str) -> float | None:
    """The mean AP of an arm, asked for own names or for all; None where it was not evaluated so."""
    values: Mapping[str, float] = arm["report"]["mean"].get(mode, {})
    return values.get("ap")


def ap_by_dataset(arm: Mapping[str, Any], mode: str) -> dict[str, float | None]:
    """The AP of an arm on each dataset."""
    return {one["name"]: (one[mode] or {"coco": {}})["coco"].get("ap") for one in arm["report"]["datasets"]}


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: METR's own evaluation, or the arms side by side."""
    if "report" in result:
        return report.joined(as_markdown(from_dict(result["report"])), training_facts(result))
    arms = result["arms"]
    unified = {arm: one for arm, one in arms.items() if mean_ap(one, "joint") is not None}
    return report.joined(
        f"# MultiField: {result['profile']}",
        f"{report.profile_of(result)}, seed {result['seed']}, {report.facts(result)}.",
        "AP, each dataset's own names:",
        ap_table(arms, "own"),
        "AP, all names at once:" if unified else "",
        ap_table(unified, "joint") if unified else "",
        confusion_table(unified) if unified else "",
        *verdicts(result),
    )


def training_facts(result: Mapping[str, Any]) -> str:
    """What a training took, in one sentence."""
    return (
        f"{report.profile_of(result)}: {result['images_seen']:,} images seen in {result['steps']:,} steps, "
        f"{result['training_seconds'] / 60:.0f} minutes of training steps on {report.facts(result)}, "
        f"seed {result['seed']}."
    )


def ap_table(arms: Mapping[str, Any], mode: str) -> str:
    """AP of every arm on every dataset."""
    names = list(ap_by_dataset(next(iter(arms.values())), mode))
    rows = []
    for arm, one in arms.items():
        values = [*map(ap_by_dataset(one, mode).get, names), mean_ap(one, mode)]
        cost = [f"{one['images_seen']:,}", f"{one['training_seconds'] / 60:.0f}"]
        rows.append([TITLES[arm], *map(report.number, values), *cost])
    return report.table(["", *names, "mean", "images seen", "minutes"], rows)


def confusion_table(arms: Mapping[str, Any]) -> str:
    """What category extraction and the fields say of every arm that was asked for all names."""
    rows = []
    for arm, one in arms.items():
        datasets, confusion = one["report"]["datasets"], one["report"]["confusion"]
        recalls = ", ".join(report.number(each["joint"]["recall"].get(str(RECALL_AT))) for each in datasets)
        recalls = "-" if arm == "closed_set" else recalls
        shares = [share for share in (confusion or {}).get("shares", {}).values() if share is not None]
        rows.append([TITLES[arm], recalls, report.number(sum(shares) / len(shares) if shares else None)])
    names = ", ".join(ap_by_dataset(next(iter(arms.values())), "joint"))
    return report.table(["", f"recall at {RECALL_AT}: {names}", "cross-dataset confusion, %"], rows)


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """The best joint arm against the others, in words."""
    best, arms = best_joint(result), result["arms"]
    if best is None:
        return []
    own, unified = (mean_ap(arms[best], mode) or 0.0 for mode in ("own", "joint"))
    lines = [f"Best joint arm: {TITLES[best]}; all names / own names: {unified / own if own else 0:.2f}."]
    if "separate" in arms:
        alone, together = (ap_by_dataset(arms[arm], "own") for arm in ("separate", best))
        inside = [one["name"] for one in arms[best]["report"]["datasets"] if one["in_mean"]]
        worst = min((together[name] or 0.0) - (alone.get(name) or 0.0) for name in inside)
        gained = own - (mean_ap(arms["separate"], "own") or 0.0)
        lines.append(f"Against a METR for each, own names: {gained:+.1f} in the mean, {worst:+.1f} at worst.")
    if "closed_set" in arms:
        gained = unified - (mean_ap(arms["closed_set"], "joint") or 0.0)
        lines.append(f"Against the closed head, all names: {gained:+.1f} in the mean.")
    return lines


def bars(arms: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """AP with own and with all names: a group for each dataset and one for their mean."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for mode, label in (("own", "AP, own names"), ("joint", "AP, all names")):
        for arm, one in arms.items():
            for name, ap in {**ap_by_dataset(one, mode), "mean": mean_ap(one, mode)}.items():
                panels.setdefault(label, {}).setdefault(name, {}).update({} if ap is None else {arm: ap})
    return panels


if __name__ == "__main__":
    sys.exit(main())
