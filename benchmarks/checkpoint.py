"""What does the checkpoint that comes with the project find? It is trained and measured here.

    python benchmarks/checkpoint.py --data FOLDER

A `nano` METR of bccd, aquarium, playing_cards, chess_pieces, doc_tables, and those photographs of coco_mini whose
licences allow it. What is measured is what is shipped: the last weights, in float16.

Profile `thirty` is of these and 19 more whose licence is stated, with other words for their names (words.yaml):
300,000 images, 750 minutes of training steps of one thread of an Intel Xeon with AMX in bf16
(results/checkpoint-thirty.json). Mean AP of the five: 62.9, of 24 datasets: 48.4, with all 256 names 62.9 and 48.1.

Profile `cpu`, one thread of an AMD EPYC: 40,000 images seen in 173 minutes of training steps, the predecessor
(results/checkpoint-cpu.json). Mean AP of five datasets: 60.5 with own names, 60.3 with all 110 names. Profile `gpu` has
not been run.

Where a run is lost, averaged weights that were kept of it go on: `--start FOLDER --done STEPS` trains for the steps
that are left, on the rest of the same schedule, with a fresh optimiser and a warm-up.

Results: `results/checkpoint-PROFILE.json`, `.md` and a sheet of detections; the checkpoint with its model card goes to
`--target`. Run: `--out`, resumable.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import metr
import report
import runner
from metr.checkpoint import EVALUATION as CARD_FILE
from metr.config import Tree, merge, read_yaml
from metr.evaluation.report import as_markdown
from metr.evaluation.results import as_dict
from metr.evaluation.runner import evaluate
from metr.model import METR
from metr.training.config import RunConfig
from multifield import EVALUATION
from multifield_page import training_facts
from runner import Study
from study_data import DATASETS, WORDS, every_licensed, licensed_datasets, with_words

LICENCE = "apache-2.0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__, ("cpu", "gpu", "thirty"))
    parser.add_argument("--target", type=Path, default=runner.HERE.parent / "checkpoints" / "metr-nano")
    parser.add_argument("--start", type=Path, help="averaged weights of an earlier run of this profile")
    parser.add_argument("--done", type=int, default=0, metavar="STEPS", help="how many steps that run had made")
    study, given = runner.parse_study(parser, "checkpoint", arguments)
    return runner.exit_status(lambda: conduct(study, given["target"], given["start"], given["done"]))


def conduct(study: Study, target: Path, start: Path | None = None, done: int = 0) -> bool:
    """Trains, evaluates, writes results and checkpoint; False where training was stopped."""
    words = read_yaml(WORDS) if study.profile == "thirty" else {}
    recipe = what_is_left(study, done)
    arguments = licensed_datasets(study, every_licensed() if words else DATASETS)
    if words:
        arguments = with_words(study, arguments, words)
    # most val boxes of ships are of classes without a name
    more: Tree = {"allow_empty": bool(words)} | ({} if start is None else {"start": str(start)})
    run = runner.training_run(study, study.out, recipe, arguments, "the checkpoint", **more)
    if not runner.run_all(study, [run]):
        return False
    save(study.out / "last", target)
    evaluation = study.out / "evaluation"
    found = evaluate(target, arguments, evaluation, config=EVALUATION, allow_empty=bool(words), console=study.console)
    (took,) = runner.reports([run])
    result = {
        **runner.circumstances("checkpoint", took["commit"]),
        "profile": study.profile,
        "seed": recipe.train.loop.seed,
        **{key: round(took[key]) for key in ("steps", "images_seen", "training_seconds")},
        "steps_before": done,  # of the run whose averaged weights this one began with
        "recipe": recipe.model_dump(mode="json"),
        "report": as_dict(found),
    }
    report.draw_sheet(arguments, target, study.results / f"{study.stem.name}-detections.jpg")
    page = report.joined(as_markdown(found), f"{training_facts(result)} Weights in float16.")
    report.write_result(study.stem, result, page)
    shutil.copyfile(evaluation / CARD_FILE, target / CARD_FILE)
    save(target, target)  # once more, with the results in its card
    return True


def what_is_left(study: Study, done: int) -> RunConfig:
    """The profile's recipe; behind an earlier run's steps, the rest of its schedule with other draws of the images."""
    profile = study.read_profile()
    loop = profile["train"]["loop"]
    steps, seed = loop["steps"] - done, loop["seed"] + done
    return study.recipe(merge(profile, {"train": {"loop": {"steps": steps, "seed": seed}, "schedule": {"done": done}}}))


def save(source: Path, target: Path) -> None:
    """Writes a checkpoint in float16 with its model card."""
    metr.save(METR.from_pretrained(source), target, dtype=torch.float16, licence=LICENCE)


if __name__ == "__main__":
    sys.exit(main())
