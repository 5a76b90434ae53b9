"""The checkpoint that comes with the project: `nano`, trained on six small datasets whose images may be used so.

    python benchmarks/checkpoint.py --data ../shared/data

Trains on bccd, aquarium, playing_cards, chess_pieces, doc_tables and those photographs of coco_mini whose licences
allow it, goes on where it was stopped, and then writes

- the run folder (`--out`), with the measured results in `evaluation/`,
- `results/checkpoint-PROFILE.json`, `.md` and a page of detections beside this file,
- the checkpoint itself in float16 (`--target`), with its model card.
"""

import json
import os
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

import resumable
from machine import commit, hardware
from metr.checkpoint import load_checkpoint
from metr.devices import resolved_device
from metr.errors import DataError
from metr.evaluation.evaluate import evaluate
from metr.evaluation.report import as_markdown
from metr.evaluation.results import EvaluationConfig, EvaluationReport, as_dict
from metr.model import METR
from metr.sharing.model_card import EVALUATION
from metr.training.recipe import RunConfig, load_recipe
from metr.training.train import train
from multifield import FIELDS, OUTSIDE_MEAN, draw_page
from resumable import check_data, command_line, exit_status, parsed, training_seconds, write_result

HERE = Path(__file__).resolve().parent
DATASETS = ("aquarium", "bccd", "chess_pieces", "coco_mini", "doc_tables", "playing_cards")
PHOTOGRAPHS = "coco_mini"
NON_COMMERCIAL = frozenset({1, 2, 3})
"""COCO's numbers of the NonCommercial licences: their photographs stay out."""
LICENCE = "apache-2.0"
_JSON = "annotations/instances_*.json"


@dataclass(frozen=True, kw_only=True)
class Settings(resumable.Settings):
    """What the command line says."""

    target: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, evaluates, writes; 0, 1 with one message where something is missing, 130 where it stopped."""
    parser = command_line(__doc__, "checkpoint", ("cpu", "gpu"), overridden="the training")
    parser.set_defaults(profile="cpu")
    parser.add_argument("--target", type=Path, default=HERE.parent / "checkpoints" / "metr-nano")
    return exit_status(partial(run, Settings(**parsed(parser, arguments))))


def run(settings: Settings, console: Console) -> bool:
    """Everything; False where training was interrupted."""
    profile = HERE / "profiles" / f"checkpoint-{settings.profile}.yaml"
    began_with, recipe = commit(), load_recipe("nano", profile, settings.overrides)
    data = _data(settings)
    if train(data, settings.out, recipe, resume=True, console=console).interrupted:
        return False
    # the last weights, not the best: choosing by the very images that are reported would flatter
    trained, judged = settings.out / "last", EvaluationConfig(domains=FIELDS, outside_mean=OUTSIDE_MEAN)
    _save(trained, settings.target)  # what is measured is what is shipped: float16
    report = evaluate(settings.target, data, settings.out / "evaluation", config=judged, console=console)
    _write(settings, recipe, report, began_with)
    draw_page(data, settings.target, settings.stem.with_name(f"{settings.stem.name}-detections.jpg"))
    shutil.copyfile(settings.out / "evaluation" / EVALUATION, settings.target / EVALUATION)
    _save(settings.target, settings.target)  # once more, with the results in its card
    console.print(f"written: {settings.target}", markup=False, soft_wrap=True)
    return True


def _save(source: Path, target: Path) -> None:
    METR.from_pretrained(source).save_pretrained(target, dtype=torch.float16, licence=LICENCE)


def licensed_copy(source: Path, target: Path, left_out: Collection[int] = NON_COMMERCIAL) -> int:
    """A COCO folder once more, without the images of some licences; how many images it has.

    Args:
        source: A folder with `annotations/instances_SPLIT.json` and the images in `SPLIT`.
        target: Where to; images are hard links where the disk allows it. What is there is written over.
        left_out: `license` numbers of images that stay out.

    Raises:
        DataError: there are no annotations.
    """
    files = sorted(source.glob(_JSON))
    if not files:
        raise DataError(f"expected {_JSON}", where=source)
    kept = 0
    for file in files:
        tree = json.loads(file.read_text(encoding="utf-8"))
        tree["images"] = [image for image in tree["images"] if image["license"] not in left_out]
        ids = {image["id"] for image in tree["images"]}
        tree["annotations"] = [one for one in tree["annotations"] if one["image_id"] in ids]
        split = file.stem.removeprefix("instances_")
        for folder in (target / "annotations", target / split):
            folder.mkdir(parents=True, exist_ok=True)
        for image in tree["images"]:
            _link(source / split / image["file_name"], target / split / image["file_name"])
        (target / "annotations" / file.name).write_text(json.dumps(tree), encoding="utf-8")
        kept += len(ids)
    return kept


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)


def _data(settings: Settings) -> list[str]:
    """The datasets as arguments of a command; that of the photographs as its licensed part."""
    check_data(settings.data, DATASETS)
    folders = {name: settings.data / name for name in DATASETS}
    folders[PHOTOGRAPHS] = settings.out.with_name(f"{settings.out.name}-{PHOTOGRAPHS}")
    licensed_copy(settings.data / PHOTOGRAPHS, folders[PHOTOGRAPHS])
    return [f"{name}={folder}" for name, folder in folders.items()]


def _write(settings: Settings, recipe: RunConfig, report: EvaluationReport, began_with: str) -> None:
    trained, seconds = load_checkpoint(settings.out / "last").training, training_seconds(settings.out)
    machine = hardware(resolved_device(recipe.train.loop.device))
    result = {
        "benchmark": "checkpoint",
        "profile": settings.profile,
        "hardware": machine,
        "torch": torch.__version__,
        "commit": began_with,
        "seed": recipe.train.loop.seed,
        "steps": trained["step"],
        "images_seen": trained["images"],
        "training_seconds": round(seconds),
        "recipe": recipe.model_dump(mode="json"),
        "report": as_dict(report),
    }
    facts = (
        f"{trained['images']:,} images seen in {trained['step']:,} steps, {seconds / 60:.0f} minutes of training steps "
        f"on {machine}, torch {torch.__version__}, seed {recipe.train.loop.seed}, commit {began_with}; weights in "
        "float16.\n"
    )
    write_result(settings.stem, result, f"{as_markdown(report)}\n{facts}")


if __name__ == "__main__":
    sys.exit(main())
