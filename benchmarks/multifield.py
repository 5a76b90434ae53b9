"""Is it worth training one detector on many isolated datasets jointly?

    python benchmarks/multifield.py --profile trial --data FOLDER
    python benchmarks/multifield.py --profile comparison --data FOLDER
    python benchmarks/multifield.py --profile thirty --data FOLDER

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
Profile `thirty` is of the 25 datasets of the checkpoint's profile `thirty`: 20,000 images seen by joint METR and by the
closed head, about 90 minutes each on one core, and separate METRs for six of the datasets. Its page says where names
mean the same (same_meaning.yaml) and what the closed head loses there. With own names METR is 2.2 behind the closed
head and 5.7 behind separate detectors, and confusion is 44 % (results/multifield-thirty.json): all goals are missed.
Profile `gpu` has not been run.

Results: `results/multifield-PROFILE.json` and `.md`, with a sheet of detections and curves or bars. The page
`OUT/arms.html` compares the best joint arm with the others, and says what the datasets gave each other. Runs: `--out`,
resumable; finished arms are not run again, so several processes may share the work.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
from metr.evaluation.report import show
from metr.evaluation.results import EvaluationConfig, EvaluationReport, as_dict, from_dict
from metr.evaluation.runner import EvaluationRunner, evaluate
from metr.inference.draw import save_image
from metr.training.config import RunConfig
from metr.training.curves import plot_curves
from metr.training.logger import read_metrics
from metr.training.parts import TrainingParts
from metr.training.state import seed_everything
from metr.training.trainer import Trainer
from multifield_page import ARMS, JOINT, TITLES, bars, best_joint, goals, page, same_meaning, write_arms
from runner import Run, Study
from study_data import every_licensed, licensed_datasets

FIELDS = {
    "bccd": "blood",
    "playing_cards": "cards",
    "doc_tables": "pages",
    "chess_pieces": "chess",
    "aquarium": "natural photographs",
    "endangered_animals": "natural photographs",
    "coco_mini": "natural photographs",
    "raccoon": "natural photographs",
    "arithmetic": "mathematics",
    "asl_letters": "gestures",
    "cacao": "farm",
    "rice_leaf": "farm",
    "rice_pest": "farm",
    "cones_cubes": "robotics",
    "datamatrix": "codes",
    "qr_codes": "codes",
    "garment_faults": "textile",
    "kuih": "food",
    "license_plates": "traffic",
    "turkish_road": "traffic",
    "oil_palm": "from above",
    "ships": "from above",
    "rubik": "toys",
    "sewer_pipes": "sewers",
    "taco_litter": "garbage",
    "wagon_defects": "rail",
}
# 195 images for 80 names are too few to learn from: coco_mini is reported beside the mean
EVALUATION = EvaluationConfig(domains=FIELDS, outside_mean=("coco_mini",))
QUICK = EVALUATION.model_copy(update={"modes": ("own",)})


class Protocol(NamedTuple):
    """What a profile runs.

    Attributes:
        datasets: The datasets of joint training.
        arms: The arms to run; without any, joint METR is trained as the recipe says.
        alone: The datasets that get a METR of their own in the arm `separate`; all of them if None.
        least_steps: The fewest steps of such a METR.
        licensed: Whether coco_mini goes without photographs whose licence forbids commercial use, and val splits that
            lost most of their boxes are used: most boxes of ships have no name.
    """

    datasets: tuple[str, ...]
    arms: tuple[str, ...] = ()
    alone: tuple[str, ...] | None = None
    least_steps: int = 0
    licensed: bool = False

    def arguments(self, study: Study) -> list[str]:
        """The datasets as METR's verbs take them."""
        return licensed_datasets(study, self.datasets) if self.licensed else study.datasets(self.datasets)


PROFILES = {
    "trial": Protocol(runner.DATASETS),
    "comparison": Protocol(("bccd", "chess_pieces", "endangered_animals", "playing_cards"), ARMS),
    "gpu": Protocol(runner.DATASETS, ("separate", "closed_set", "pseudo_label")),
    "thirty": Protocol(
        every_licensed(),
        ("negative", "closed_set", "separate"),
        alone=("bccd", "playing_cards", "turkish_road", "asl_letters", "rice_pest", "cones_cubes"),
        least_steps=300,
        licensed=True,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__, tuple(PROFILES))
    parser.add_argument("--arms", nargs="*", choices=ARMS, help="baselines and ways to train; those of the profile")
    study, given = runner.parse_study(parser, "multifield", arguments)
    arms = PROFILES[study.profile].arms if given["arms"] is None else given["arms"]
    return runner.exit_status(partial(compare, study, arms) if arms else partial(joint, study))


def joint(study: Study) -> bool:
    """Trains one METR, evaluates it, writes the result; False where it was stopped."""
    data, recipe = PROFILES[study.profile].arguments(study), study.recipe(study.read_profile())
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
    data, recipe = PROFILES[study.profile].arguments(study), study.recipe(study.read_profile())
    runs = {arm: arm_run(study, data, recipe, arm) for arm in ARMS}
    if not runner.run_all(study, list(runs.values()), [runs[arm] for arm in arms], independent=True):
        return False
    found = {arm: one for arm, run in runs.items() for one in runner.reports([run])}
    kept = ("images_seen", "training_seconds", "commit", "report")
    results = {arm: {key: one[key] for key in kept} for arm, one in found.items()}
    result = circumstances(study, recipe, report.all_commits(results.values())) | {"arms": results}
    result |= {"goals": goals(result), "same_meaning": same_meaning(PROFILES[study.profile].datasets)}
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
    partly = PROFILES[study.profile].licensed
    took = runner.training_run(study, folder, recipe, data, folder.name, QUICK, allow_empty=partly).work()
    if took is None:
        return None
    evaluation = folder / "evaluation"
    found = evaluate(folder / "last", data, evaluation, config=config, allow_empty=partly, console=study.console)
    return {**took, "training_seconds": round(took["training_seconds"]), "report": as_dict(found)}


def _separate(study: Study, folder: Path, data: Sequence[str], recipe: RunConfig) -> Tree | None:
    """One METR for each dataset, or for some: a joint run's steps, divided as its samples are."""
    protocol = PROFILES[study.profile]
    lengths = {one.name: len(one.split("train")) for one in open_joint(data).sources}
    weights = mixture_weights(lengths, recipe.loader.mixture)
    each = []
    for argument, (name, weight) in zip(data, weights.items(), strict=True):
        if protocol.alone is not None and name not in protocol.alone:
            continue
        steps = max(protocol.least_steps, round(weight * recipe.train.loop.steps))
        train = recipe.train.model_copy(update={"loop": recipe.train.loop.model_copy(update={"steps": steps})})
        loader = recipe.loader.model_copy(update={"mixture": "equal"})
        alone = recipe.model_copy(update={"train": train, "loader": loader})
        found = _joint(study, folder / name, [argument], alone, QUICK)
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


if __name__ == "__main__":
    sys.exit(main())
