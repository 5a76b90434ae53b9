"""How much of a METR's AP does another detector keep that it becomes: from names alone, fitted to images, taught?

    python benchmarks/taught.py --run checkpoints/metr-nano --data FOLDER

For each dataset the METR becomes a detector of transformers that finds the dataset's names, in three ways:

    names alone    its weights, and class heads from the text of the names
    fitted         queries and class heads fitted to the dataset's training images, without labels
    taught         then taught the METR's detections there (`metr transfer` by default)

Each is judged on the evaluation split as `metr evaluate` does, and without suppression, as the pipeline of transformers
detects: AP, AP50, and the expected calibration error of the scores.

Results: `results/taught.json` and `.md`. Runs: `--out`; a detector that was made and judged is not made again.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import report
import runner
from metr.config import Tree
from metr.conversion.distillation import STEPS
from metr.conversion.transfer import transfer
from metr.data.joint import open_joint
from metr.evaluation.results import EvaluationConfig
from metr.evaluation.runner import evaluate_in_detail
from metr.inference.config import InferenceConfig
from metr.model import METR
from runner import Run, Study

SOURCE, WAYS = "METR", ("names alone", "fitted", "taught")
KEPT = 90.0
"""How much of the METR's AP is to be left with suppression when it was taught, in %."""
_BARE = InferenceConfig.checked({"postprocess": {"nms_iou": None}})
EVALUATED = "as evaluated"
_JUDGES = {EVALUATED: InferenceConfig(), "without suppression": _BARE}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--run", required=True, help="a checkpoint or a run folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the datasets, one folder each")
    parser.add_argument("--datasets", nargs="+", default=["bccd", "chess_pieces", "playing_cards"])
    parser.add_argument("--to", default="rt_detr", help="the detector: rt_detr, d_fine, deimv2, ...")
    parser.add_argument("--steps", type=int, default=STEPS, help="that teach it, of 8 images each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/taught"))
    given = vars(parser.parse_args(arguments))
    paths = {key: given.pop(key) for key in ("data", "out", "results")}
    return runner.exit_status(lambda: conduct(Study(name="taught", profile="", **paths), given))


def conduct(study: Study, options: Mapping[str, Any]) -> bool:
    """Makes and judges the detectors that are not judged yet, and writes the result."""
    torch.set_num_threads(options["threads"])
    names = options["datasets"]
    runs = {
        (name, way): Run(
            folder=study.out / f"{name}-{way.replace(' ', '-')}",
            title=f"{way}: {name}",
            settings={key: options[key] for key in ("run", "to")}
            | ({"steps": options["steps"]} if way == "taught" else {}),
            work=partial(made, study, options, argument, way, study.out / f"{name}-{way.replace(' ', '-')}"),
        )
        for name, argument in zip(names, study.datasets(names), strict=True)
        for way in (SOURCE, *WAYS)
    }
    done = runner.run_all(study, list(runs.values()))
    if done:
        found = dict(zip(runs, runner.reports(list(runs.values())), strict=True))
        result = {
            **runner.circumstances("taught", report.all_commits(found.values()), "cpu"),
            "settings": {key: options[key] for key in ("to", "steps")} | {"from": Path(options["run"]).name},
            "datasets": {name: {way: found[name, way] for way in (SOURCE, *WAYS)} for name in names},
        }
        result["bars"] = [goal(name, one) for name, one in result["datasets"].items()]
        report.write_result(study.results / "taught", result, page(result))
    return done


def made(study: Study, options: Mapping[str, Any], argument: str, way: str, folder: Path) -> Tree:
    """Makes one detector, if it is not the METR itself, and judges it both ways."""
    source = options["run"]
    if way != SOURCE:
        source = folder / "detector"
        data = argument.partition("=")[2] or argument
        names = open_joint([argument]).vocabulary.names if way == "names alone" else data
        steps = {"names alone": None, "fitted": 0, "taught": options["steps"]}[way]
        transfer(options["run"], options["to"], source, names=names, steps=steps, console=study.console)
    model = METR.from_pretrained(source, device="cpu")
    return {title: judged(model, argument, config) for title, config in _JUDGES.items()}


def judged(model: METR, argument: str, inference: InferenceConfig) -> Tree:
    """AP, AP50 and the calibration error of a detector with a dataset's own names."""
    config = EvaluationConfig(modes=("own",), inference=inference)
    (one,) = evaluate_in_detail(model, argument, config=config).report.datasets
    calibration = None if one.diagnosis is None else one.diagnosis.calibration.error
    assert one.own is not None
    return {"ap": one.own.coco.ap, "ap50": one.own.coco.ap50, "calibration_error": calibration}


def goal(name: str, one: Mapping[str, Any]) -> Tree:
    """Whether a dataset's detector keeps enough once it was taught."""
    before, after = (one[way][EVALUATED]["ap"] or 0.0 for way in (SOURCE, "taught"))
    return report.aim(f"AP that is kept, {name}, %", KEPT, 100 * after / before if before else 0.0)


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: AP by dataset and way, then the errors of the scores."""
    ways = [way if judge == EVALUATED else f"{way}, {judge}" for judge in _JUDGES for way in (SOURCE, *WAYS)]
    tables = []
    for figure, digits in (("ap", ".1f"), ("calibration_error", ".3f")):
        rows = [
            [name, *(report.number(one[way][judge][figure], digits) for judge in _JUDGES for way in one)]
            for name, one in result["datasets"].items()
        ]
        tables.append(report.table(["dataset", *ways], rows))
    settings = result["settings"]
    return report.joined(
        "# METR as another detector",
        f"{settings['from']} as {settings['to']}, taught for {settings['steps']} steps. {report.facts(result)}.",
        "AP (0 to 100) with the dataset's own names:",
        tables[0],
        "Expected calibration error of the scores (0 to 1):",
        tables[1],
        report.aims_list(result["bars"]),
    )


if __name__ == "__main__":
    sys.exit(main())
