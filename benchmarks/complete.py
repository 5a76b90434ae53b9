"""Are the names that a detector adds to datasets right, and does training on them help?

    python benchmarks/complete.py --profile trial --data FOLDER

The training images of each dataset are cut into two parts, and in each part a different share of the names is hidden:
every hidden name is annotated in the other part. METR is trained on all parts, once with unannotated names as
negatives and once without a loss on them. The latter completes the parts (`metr complete`), and is trained again on
the completed ones, for the same steps with the same seed.

    precision   of the added boxes at IoU 0.5 against what was hidden, and recall: the share of hidden objects found
    AP          of the names that are hidden in a part, on whole images that no training and no threshold saw (test,
                or val where a dataset has no test)

Profile `trial`, one seed (results/complete-trial.json): precision 91.8 %, recall 14.3 %; AP of hidden names 45.6,
against 43.2 with negatives and 44.4 without a loss.

Results, once all runs are finished: `results/complete-PROFILE.json` and `.md`. Runs: `--out`, resumable. Profile `tiny`
is for tests.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

import report
import runner
from metr.completion.complete import BOXES, DATA, run_completion
from metr.completion.request import CompletionRequest
from metr.completion.thresholds import CompletionConfig, iou_of
from metr.config import Config, Tree, merge
from metr.data.config import Unannotated
from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset
from metr.data.export import MemorySource, write_coco
from metr.data.records import TEST, TRAIN, VAL, Annotations, ImageRecord, InMemoryAnnotations, seeded_order
from metr.errors import ConfigError
from metr.evaluation.results import EvaluationConfig
from metr.evaluation.runner import evaluate
from metr.run_directory import RunDirectory
from runner import Run, Study

PARTS = ("first", "second")
ARMS = ("negative", "ignore", "completed")
SAME_PLACE = 0.5
TITLES = {"negative": "negatives", "ignore": "no loss", "completed": "completed"}


class Profile(Config):
    """What is run; the training configuration is laid over the defaults of `metr train`."""

    datasets: tuple[str, ...]
    hidden: Annotated[
        float, Field(gt=0, le=0.5)
    ]  # share of a dataset's names that is hidden in each part, at least one
    seed: int  # of the cut and of the names
    precision: float  # that `metr complete` is asked for
    pretrain: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a dataset's training images, and the names that are hidden in it."""

    dataset: str
    part: str
    images: tuple[int, ...]
    hidden: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it is called as a dataset."""
        return f"{self.dataset} {self.part}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__, ("trial", "tiny"))
    study, _ = runner.parse_study(parser, "complete", arguments)
    return runner.exit_status(lambda: conduct(study))


def conduct(study: Study) -> bool:
    """Does the runs that are not finished, and writes the result when all are; False where it was stopped."""
    profile = Profile.checked(study.read_profile(), where=study.profile)
    study.datasets(profile.datasets)  # whether all are there
    sources = {name: open_dataset(DatasetConfig(name=name, path=study.data / name)) for name in profile.datasets}
    cuts = {name: cut(source, profile) for name, source in sources.items()}
    data = [write_part(study, sources[one.dataset], one) for parts in cuts.values() for one in parts]
    settings = {"hidden": {one.name: list(one.hidden) for parts in cuts.values() for one in parts}}
    completing = completing_run(study, profile, sources, cuts, data, settings)
    trainings = [training(study, profile, arm, data, settings) for arm in ARMS[:2]]
    completed = training(study, profile, ARMS[2], [str(completing.folder / "data" / DATA)], settings)
    evaluations = [evaluation(study, arm, sources, cuts, settings) for arm in ARMS]
    done = runner.run_all(study, [*trainings, completing, completed, *evaluations])
    if done:
        found = runner.reports([completing])[0], runner.reports(evaluations)
        result = summary(study, profile, cuts, *found)
        report.write_result(study.stem, result, page(result))
    return done


def cut(source: DatasetSource, profile: Profile) -> tuple[Part, ...]:
    """Cuts the training images of a dataset, and chooses the names that each part hides.

    Only names with objects in both parts and in val are hidden: there must be something to learn, to find and to set a
    threshold on.

    Raises:
        ConfigError: a dataset has too few such names.
    """
    train = source.split(TRAIN)
    order = seeded_order(train.relative_paths(), seed=profile.seed)
    halves = [tuple(sorted(order[number::2].tolist())) for number in range(len(PARTS))]
    shown = [{train.categories[row] for image in half for row in objects_of(train[image])} for half in halves]
    in_val = {source.categories[row] for record in source.split(VAL) for row in objects_of(record)}
    names = [name for name in source.categories if all(name in some for some in (*shown, in_val))]
    count = max(1, round(profile.hidden * len(source.categories)))
    count = min(count, len(names) // len(PARTS))
    if not count:
        what = f"expected two names with objects in both halves and in val, found {len(names)}"
        raise ConfigError(what, where=source.name, hint="take another dataset or seed")
    chosen = [names[place] for place in seeded_order(names, seed=profile.seed).tolist()]
    hidden = [tuple(sorted(chosen[number * count : (number + 1) * count])) for number in range(len(PARTS))]
    return tuple(
        Part(dataset=source.name, part=part, images=half, hidden=some)
        for part, half, some in zip(PARTS, halves, hidden, strict=True)
    )


def objects_of(record: ImageRecord) -> set[int]:
    """The categories of the objects of an image."""
    return set(record.labels[~record.ignore].tolist())


def write_part(study: Study, source: DatasetSource, part: Part) -> str:
    """Writes a part as a COCO dataset without its hidden names, unless it is there; its val is that of the dataset."""
    folder = study.out / "parts" / part.name
    if not folder.is_dir():
        kept = tuple(name for name in source.categories if name not in part.hidden)
        train = source.split(TRAIN)
        splits = {TRAIN: [train[image] for image in part.images], VAL: list(source.split(VAL))}
        memory = MemorySource(
            name=part.name,
            root=source.root,
            config=DatasetConfig(name=part.name, path=source.root),
            categories=kept,
            splits={split: without(records, source, kept, split) for split, records in splits.items()},
        )
        write_coco(memory, folder)
    return f"{part.name}={folder}"


def without(records: Sequence[ImageRecord], source: DatasetSource, kept: tuple[str, ...], split: str) -> Annotations:
    """Records with the kept names alone."""
    rows = np.array([kept.index(name) if name in kept else -1 for name in source.categories])

    def reduced(record: ImageRecord) -> ImageRecord:
        mine = rows[record.labels] >= 0
        annotated = None if record.annotated is None else tuple(sorted({*rows[list(record.annotated)].tolist()} - {-1}))
        return replace(
            record,
            boxes=record.boxes[mine],
            labels=rows[record.labels][mine],
            areas=record.areas[mine],
            ignore=record.ignore[mine],
            annotated=annotated,
        )

    return InMemoryAnnotations(name=source.name, split=split, categories=kept, records=tuple(map(reduced, records)))


def training(study: Study, profile: Profile, arm: str, data: Sequence[str], settings: Mapping[str, Any]) -> Run:
    """The training of one arm."""
    unannotated: Unannotated = "negative" if arm == "negative" else "ignore"
    tree = merge(profile.pretrain, {"unannotated": unannotated})
    recipe = study.recipe(tree)
    if recipe.unannotated != unannotated:
        raise ConfigError("decides what the arms compare", where="--set unannotated", hint="leave it out")
    run = runner.training_run(study, study.out / arm, recipe, data, f"training: {TITLES[arm]}")
    return replace(run, settings={**run.settings, "datasets": list(settings["hidden"]), **settings})


def completing_run(
    study: Study,
    profile: Profile,
    sources: Mapping[str, DatasetSource],
    cuts: Mapping[str, Sequence[Part]],
    data: Sequence[str],
    settings: Mapping[str, Any],
) -> Run:
    """The run that completes all parts, and compares what was added with what was hidden."""
    folder = study.out / "completing"

    def work() -> Tree:
        out, config = folder / "data", CompletionConfig(precision=profile.precision)
        if not (out / DATA).is_file() or not (out / BOXES).is_file():
            request = CompletionRequest(data=tuple(data), out=out)
            run_completion(study.out / "ignore" / "last", request, config=config, console=study.console)
        boxes = json.loads((out / BOXES).read_text(encoding="utf-8"))["boxes"]
        each = {one.name: quality(sources[name], one, boxes) for name, parts in cuts.items() for one in parts}
        return {"parts": each}

    own = {"precision": profile.precision, "detector": "ignore", **settings}
    return Run(folder=folder, title="completing", settings=own, work=work)


def quality(source: DatasetSource, part: Part, boxes: Sequence[Mapping[str, Any]]) -> Tree:
    """How many boxes were added to a part, how many are right, and how many hidden objects there are.

    Images are known by their names, which are the same in all parts of a dataset. Boxes of names that are not hidden in
    the part, such as those of other datasets, are wrong: `foreign` counts them.
    """
    train = source.split(TRAIN)
    truth = {train[image].path.name: train[image] for image in part.images}
    mine = [one for one in boxes if one["dataset"] == part.name]
    counts = {name: {"objects": 0, "added": 0, "right": 0} for name in part.hidden}
    for file, record in truth.items():
        here = [one for one in mine if Path(one["image"]).name == file]
        for name, count in counts.items():
            row = source.categories.index(name)
            objects = record.boxes[(record.labels == row) & ~record.ignore]
            found = sorted((one for one in here if one["name"] == name), key=lambda one: -one["score"])
            count["objects"] += len(objects)
            count["added"] += len(found)
            count["right"] += right_of(np.array([one["box"] for one in found]).reshape(-1, 4), objects)
    return {"names": counts, "foreign": sum(one["name"] not in part.hidden for one in mine)}


def right_of(found: np.ndarray, objects: np.ndarray) -> int:
    """How many boxes, best first, are at an object that no better one is at."""
    overlap, right = iou_of(found, objects), 0
    for row in overlap:
        if len(row) and row.max() >= SAME_PLACE:
            overlap[:, int(row.argmax())] = 0
            right += 1
    return right


def evaluation(
    study: Study,
    arm: str,
    sources: Mapping[str, DatasetSource],
    cuts: Mapping[str, Sequence[Part]],
    settings: Mapping[str, Any],
) -> Run:
    """The run that evaluates an arm on whole images; AP of each hidden name."""

    def work() -> Tree:
        names = {}
        for name, source in sources.items():
            split = TEST if TEST in source.splits else VAL
            config = EvaluationConfig(modes=("own",))
            where = f"{name}={study.data / name}"
            last = RunDirectory(study.out / arm).path / "last"
            found = evaluate(last, where, split=split, config=config, console=study.console).datasets[0].own
            assert found is not None
            hidden = {one for part in cuts[name] for one in part.hidden}
            names[name] = {one.name: one.ap for one in found.coco.categories if one.name in hidden}
        return {"arm": arm, "names": names}

    return Run(folder=study.out / f"{arm}-evaluation", title=f"evaluating: {TITLES[arm]}", settings=settings, work=work)


def summary(
    study: Study, profile: Profile, cuts: Mapping[str, Sequence[Part]], completing: Tree, evaluations: Sequence[Tree]
) -> Tree:
    """The result as the JSON file has it."""
    datasets = {}
    for name, parts in cuts.items():
        counts = [completing["parts"][one.name] for one in parts]
        aps = {one["arm"]: one["names"][name] for one in evaluations}
        datasets[name] = {**rates(counts), "AP": {arm: report.mean(each.values()) for arm, each in aps.items()}}
    whole = rates(list(completing["parts"].values()))
    mean = {arm: report.mean(one["AP"][arm] for one in datasets.values()) for arm in ARMS}
    return {
        **runner.circumstances("complete", report.all_commits([completing, *evaluations])),
        "profile": study.profile,
        "written_by": runner.commit(),
        "settings": profile.model_dump(mode="json") | {"set": list(study.overrides)},
        "hidden": {one.name: list(one.hidden) for parts in cuts.values() for one in parts},
        "datasets": datasets,
        "all": {**whole, "AP": mean},
        "aims": [
            report.aim("precision of added boxes, %", 90, whole["precision"] or 0.0),
            *(
                report.aim(
                    f"AP of hidden names, completed less {TITLES[arm]}",
                    0,
                    (mean["completed"] or 0.0) - (mean[arm] or 0.0),
                    above=True,
                )
                for arm in ARMS[:2]
            ),
        ],
        "parts": completing["parts"],
    }


def rates(parts: Sequence[Tree]) -> Tree:
    """Precision and recall of some parts in per cent, and the numbers that they are of."""
    counts = [count for one in parts for count in one["names"].values()]
    objects, right = (sum(count[key] for count in counts) for key in ("objects", "right"))
    foreign = sum(one["foreign"] for one in parts)
    added = foreign + sum(count["added"] for count in counts)
    return {
        "objects": objects,
        "added": added,
        "right": right,
        "foreign": foreign,
        "precision": 100 * right / added if added else None,
        "recall": 100 * right / objects if objects else None,
    }


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: how right the added boxes are, and what they do to AP."""
    rows = [
        [
            name,
            *(f"{one[key]:,}" for key in ("objects", "added", "foreign")),
            *(report.number(one[key]) for key in ("precision", "recall")),
            *(report.number(one["AP"][arm]) for arm in ARMS),
        ]
        for name, one in [*result["datasets"].items(), ("all", result["all"])]
    ]
    head = ["dataset", "hidden objects", "boxes added", "of other datasets' names", "precision, %", "recall, %"]
    hidden = "; ".join(f"{name}: {', '.join(names)}" for name, names in result["hidden"].items())
    return report.joined(
        f"# Completed labels: {result['profile']}",
        report.aims_list(result["aims"]),
        "AP (0 to 100) of the hidden names, own names asked for, by what was done with unannotated names in training. "
        "A box that was added under a name of another dataset counts as wrong.",
        report.table([*head, *(f"AP, {TITLES[arm]}" for arm in ARMS)], rows),
        f"Hidden: {hidden}.",
        f"{report.profile_of(result)}. {report.facts(result)}.",
    )


if __name__ == "__main__":
    sys.exit(main())
