"""MultiField: one detector for seven real datasets of five fields, trained jointly, judged on each.

    python benchmarks/multifield.py --profile trial --data ../shared/data

Trains on the train splits and reports, for each val split, COCO AP with the dataset's own names and with all names of
all datasets, the recall of category extraction at K, and cross-dataset confusion.
It can be stopped and run again: it goes on where it was. The result is written to `results/multifield-PROFILE.json` and `.md` beside this file, with a page of
detections, and the run itself to `--out`.

`--arms` runs baselines beside joint METR, for the same number of images seen (see multifield_arms.py); finished arms
are not run again, so several processes may share the work. The profile `comparison` runs them all on four datasets.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import resumable
from machine import commit, hardware
from metr.checkpoint import load_checkpoint
from metr.data.images import read_image
from metr.data.joint import open_joint
from metr.data.records import Annotations, ImageRecord
from metr.devices import resolved_device
from metr.evaluation.evaluate import evaluate
from metr.evaluation.report import as_markdown
from metr.evaluation.results import EvaluationConfig, EvaluationReport, as_dict
from metr.inference.draw import contact_sheet, draw_detections, save_image
from metr.model import METR
from metr.training.curves import plot_curves
from metr.training.metrics import read_metrics
from metr.training.recipe import RunConfig, load_recipe
from metr.training.train import train
from multifield_arms import ARMS, REPORT, ArmResult, Task, run_arm
from multifield_comparison import as_markdown as compared
from multifield_comparison import best_joint, draw_bars
from resumable import check_data, command_line, exit_status, parsed, training_seconds, write_result

HERE = Path(__file__).resolve().parent
FIELDS = {
    "bccd": "blood",
    "playing_cards": "cards",
    "doc_tables": "pages",
    "chess_pieces": "chess",
    "aquarium": "natural photographs",
    "endangered_animals": "natural photographs",
    "coco_mini": "natural photographs",
}
PROFILES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "trial": (tuple(sorted(FIELDS)), ()),
    "comparison": (("bccd", "chess_pieces", "endangered_animals", "playing_cards"), ARMS),
    "gpu": (tuple(sorted(FIELDS)), ("separate", "closed_set", "teacher")),
}
"""Datasets and arms of each profile; without arms joint METR is trained as the recipe says."""

# 195 images for 80 names are too few to learn from: told beside the mean
OUTSIDE_MEAN = ("coco_mini",)
JUDGED = EvaluationConfig(domains=FIELDS, outside_mean=OUTSIDE_MEAN)
SHOWN = 2  # images of each dataset on the page of detections
THRESHOLD = 0.35


@dataclass(frozen=True, kw_only=True)
class Settings(resumable.Settings):
    """What the command line says."""

    arms: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the protocol; the exit status is 0, 1 with one message where something is missing, 130 where it stopped."""
    settings = _settings(arguments)
    return exit_status(partial(compare if settings.arms else run, settings))


def run(settings: Settings, console: Console) -> bool:
    """Trains (or goes on training), evaluates, writes the result; False where training was interrupted."""
    data, began_with = _data(settings), commit()
    recipe, config = _recipe(settings), JUDGED
    judged = config.model_copy(update={"modes": ("own",)})
    if train(data, settings.out, recipe, resume=True, console=console, judged=judged).interrupted:
        return False
    # the last weights, not the best: choosing by the very images that are reported would flatter
    report = evaluate(settings.out / "last", data, settings.out / "evaluation", config=config, console=console)
    _write(settings, _result(settings, recipe, report, began_with), report)
    draw_page(data, settings.out / "last", _beside(settings, "detections.jpg"))
    save_image(read_image(plot_curves(settings.out)), _beside(settings, "curves.png"))
    console.print(f"written: {settings.stem}.json, .md and images", markup=False, soft_wrap=True)
    return True


def compare(settings: Settings, console: Console) -> bool:
    """Runs the arms that are asked for, and writes what all finished ones found; False where one was interrupted."""
    data, began_with, recipe = _data(settings), commit(), _recipe(settings)
    tasks = {
        arm: Task(data=data, out=settings.out / arm, recipe=recipe, judged=JUDGED, console=console) for arm in ARMS
    }
    for arm in settings.arms:
        if run_arm(arm, tasks[arm]) is None:
            return False
    finished = [arm for arm in ARMS if (tasks[arm].out / REPORT).is_file()]
    results = [result for arm in finished if (result := run_arm(arm, tasks[arm])) is not None]
    written = _circumstances(settings, recipe, began_with) | {"arms": {one.arm: _arm(one) for one in results}}
    _write_comparison(settings, written, results)
    if (best := best_joint(results)) is not None:
        draw_page(data, settings.out / best.arm / "last", _beside(settings, "detections.jpg"))
    console.print(compared(results), markup=False, soft_wrap=True)
    return True


def _arm(result: ArmResult) -> dict[str, Any]:
    return {
        "images_seen": result.images_seen,
        "training_seconds": result.training_seconds,
        "commit": result.commit,
        "report": as_dict(result.report),
    }


def _write_comparison(settings: Settings, written: dict[str, Any], results: Sequence[ArmResult]) -> None:
    facts = (
        f"Profile `{written['profile']}`, {written['hardware']}, torch {written['torch']}, seed {written['seed']}, "
        f"commit {written['commit']}."
    )
    write_result(settings.stem, written, f"# MultiField: {settings.profile}\n\n{facts}\n\n{compared(results)}")
    draw_bars(results, _beside(settings, "bars.png"))


def _circumstances(settings: Settings, recipe: RunConfig, began_with: str) -> dict[str, Any]:
    """On what, from what and how a result was made."""
    return {
        "benchmark": "multifield",
        "profile": settings.profile,
        "hardware": hardware(resolved_device("auto")),
        "torch": torch.__version__,
        "commit": began_with,
        "seed": recipe.train.loop.seed,
        "settings": recipe.model_dump(mode="json"),
    }


def _recipe(settings: Settings) -> RunConfig:
    return load_recipe("nano", HERE / "profiles" / f"multifield-{settings.profile}.yaml", settings.overrides)


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = command_line(__doc__, "multifield", tuple(PROFILES), overridden="every run")
    parser.add_argument("--arms", nargs="*", choices=ARMS, help="baselines and ways to train; those of the profile")
    given = parsed(parser, arguments)
    _, usual = PROFILES[given["profile"]]
    return Settings(**given | {"arms": usual if given["arms"] is None else tuple(given["arms"])})


def _data(settings: Settings) -> list[str]:
    """The profile's datasets as arguments of a command, in a fixed order."""
    names, _ = PROFILES[settings.profile]
    check_data(settings.data, names)
    return [f"{name}={settings.data / name}" for name in names]


def _result(settings: Settings, recipe: RunConfig, report: EvaluationReport, began_with: str) -> dict[str, Any]:
    """What is written; times are those of the last lines of metrics.jsonl, however often the run was stopped."""
    records = read_metrics(settings.out / "metrics.jsonl")
    trained = load_checkpoint(settings.out / "last").training
    training = training_seconds(settings.out)
    evaluating = sum(float(record.get("evaluation_seconds", 0.0)) for record in records)
    return _circumstances(settings, recipe, began_with) | {
        "steps": trained["step"],
        "images_seen": trained["images"],
        "training_seconds": round(training),
        "wall_seconds": round(training + evaluating),
        "report": as_dict(report),
    }


def _write(settings: Settings, result: dict[str, Any], report: EvaluationReport) -> None:
    facts = (
        f"Profile `{result['profile']}`: {result['images_seen']:,} images seen in {result['steps']:,} steps, "
        f"{result['training_seconds'] / 60:.0f} minutes of training steps on {result['hardware']}, "
        f"torch {result['torch']}, seed {result['seed']}, commit {result['commit']}.\n"
    )
    write_result(settings.stem, result, f"{as_markdown(report)}\n{facts}")


def draw_page(data: Sequence[str], checkpoint: Path, path: Path) -> None:
    """Images of every val split through the one detector, all names asked for, on one sheet."""
    predictor = METR.from_pretrained(checkpoint).predictor()
    images, captions = [], []
    for name, annotations in open_joint(data).evaluation().items():
        for record in _spread(annotations):
            found = predictor.detect(record.path)
            images.append(draw_detections(read_image(record.path), found, THRESHOLD))
            captions.append(f"{name}: {int((found.scores >= THRESHOLD).sum())} found, {len(record.boxes)} labelled")
    sheet = contact_sheet(images, captions, columns=4, cell=400)
    save_image(sheet, path)


def _spread(annotations: Annotations) -> list[ImageRecord]:
    """A few records, evenly spread over a split: nobody chose them."""
    return [annotations[(2 * i + 1) * len(annotations) // (2 * SHOWN)] for i in range(SHOWN)]


def _beside(settings: Settings, name: str) -> Path:
    """An image's place beside the result."""
    return settings.results / f"{settings.stem.name}-{name}"


if __name__ == "__main__":
    sys.exit(main())
