"""Do calibrated scores say how likely a detection is right, on images that calibration has not seen?

    python benchmarks/calibration.py --run checkpoints/metr-nano --data FOLDER

The evaluation split of each trained dataset is cut into two halves, `--cuts` times. Scores are calibrated on one half
and judged on the other, with the dataset's own names:

    error       expected calibration error of all detections, of scores as they are and calibrated
    shown       precision, recall and F1 of what `metr detect` shows by default, at IoU 0.5, all objects alike: from a
                threshold of the dataset, fitted with the scores
    from 0.3    F1 with one threshold for all datasets, of scores as they are and calibrated
    best        F1 from the one score for all names that is best for the very images that are judged

metr-nano, 24 datasets, 923 images, five cuts (results/calibration.json): the mean error falls from 0.028 to 0.009.
F1 of what is shown is 2.3 below the best in the mean, 3.9 with one threshold for all datasets; 18 datasets are within
3 points.

Results: `results/calibration.json` and `.md`. Runs: `--out`; a dataset that was measured is not measured again.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import report
import runner
from detection_defaults import Encoded, ask, encoded
from metr.config import Tree
from metr.data.records import InMemoryAnnotations
from metr.evaluation.calibration import FittedScores, fit_scores
from metr.evaluation.coco import CocoScorer
from metr.evaluation.diagnosis import Judged, diagnose
from metr.inference.config import InferenceConfig, with_calibration
from metr.inference.postprocess import ScoreThresholds
from metr.model import METR
from metr.structures import Detections
from runner import Run, Study

NEAR = 3.0
"""Points of F1 that what is shown may be below the best."""
_SIDES = ("raw", "from_default", "calibrated")
_FIGURES = ("error", "threshold", "precision", "recall", "f1", "best")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--run", required=True, help="a checkpoint or a run folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of its datasets, one folder each")
    parser.add_argument("--leave-out", nargs="*", default=["coco_mini"], help="trained datasets that are not judged")
    parser.add_argument("--cuts", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"))
    given = vars(parser.parse_args(arguments))
    paths = {key: given.pop(key) for key in ("data", "out", "results")}
    return runner.exit_status(lambda: conduct(Study(name="calibration", profile="", **paths), given))


def conduct(study: Study, options: Mapping[str, Any]) -> bool:
    """Measures the datasets that are not measured yet, and writes the result."""
    torch.set_num_threads(options["threads"])
    model = METR.from_pretrained(options["run"], device="cpu")
    names = sorted({*model.vocabulary.datasets}.difference(options["leave_out"]))
    runs = [
        Run(
            folder=study.out / name,
            title=f"calibrated scores: {name}",
            settings={"run": options["run"], "cuts": options["cuts"]},
            work=partial(measured, model, path, options["cuts"]),
        )
        for name, path in zip(names, study.datasets(names), strict=True)
    ]
    done = runner.run_all(study, runs)
    if done:
        found = runner.reports(runs)
        result = {
            **runner.circumstances("calibration", report.all_commits(found), "cpu"),
            "datasets": dict(zip(names, found, strict=True)),
            "bars": [
                report.aim(
                    f"F1 of what is shown over the best, {name}", -NEAR, one["calibrated"]["f1"] - one["raw"]["best"]
                )
                for name, one in zip(names, found, strict=True)
            ],
        }
        report.write_result(study.results / "calibration", result, page(result))
    return done


def measured(model: METR, path: str, cuts: int) -> Tree:
    """The figures of a dataset with scores as they are and calibrated on the other half, means over halves and cuts."""
    one = encoded(model, path)
    config = model.inference()
    bare = config.model_copy(update={"postprocess": config.postprocess.model_copy(update={"calibration": {}})})
    raw = ask(model, one, one.names, bare)
    rows: dict[str, list[list[float]]] = {side: [] for side in _SIDES}
    for cut in range(cuts):
        order = np.random.default_rng(cut).permutation(len(one.annotations.records))
        for fitted_on, judged_on in ((order[::2], order[1::2]), (order[1::2], order[::2])):
            first, second = (part(one.annotations, half) for half in (fitted_on, judged_on))
            fitted = fit_scores(CocoScorer(first), of(first, raw), one.names)
            after = of(second, moved(model, one, bare, fitted))
            own = {} if fitted.threshold is None else dict.fromkeys(one.names, fitted.threshold)
            rows["raw"].append(figures(second, of(second, raw), one.names))
            rows["from_default"].append(figures(second, after, one.names))
            rows["calibrated"].append(figures(second, after, one.names, ScoreThresholds(names=own)))
    means = {side: dict(zip(_FIGURES, np.mean(rows[side], axis=0).tolist(), strict=True)) for side in _SIDES}
    return {"images": len(one.annotations), **means}


def moved(model: METR, one: Encoded, config: InferenceConfig, fitted: FittedScores) -> dict[int | str, Detections]:
    """What is found with calibrated scores."""
    return ask(model, one, one.names, with_calibration(config, fitted.calibration))


def part(annotations: InMemoryAnnotations, rows: np.ndarray) -> InMemoryAnnotations:
    """Some of the images, in the order of the split, and their categories under the names that are asked for."""
    records = tuple(annotations.records[row] for row in sorted(rows.tolist()))
    return replace(annotations, records=records, categories=tuple(name.strip() for name in annotations.categories))


def of(annotations: InMemoryAnnotations, found: Mapping[int | str, Detections]) -> dict[int | str, Detections]:
    """The detections in these images."""
    return {record.image_id: found[record.image_id] for record in annotations.records}


def figures(
    annotations: InMemoryAnnotations,
    found: Mapping[int | str, Detections],
    names: Sequence[str],
    shown: ScoreThresholds | None = None,
) -> list[float]:
    """`_FIGURES` of detections in some images."""
    shown = shown or ScoreThresholds()
    judged = diagnose(Judged.of(CocoScorer(annotations), found, names, shown), shown).calibration
    if judged.error is None or judged.shown is None or judged.best is None:
        return [0.0] * len(_FIGURES)
    point = judged.shown
    return [judged.error, point.threshold, point.precision, point.recall, point.f1, judged.best.f1]


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: a row a dataset."""
    rows = []
    for name, one in result["datasets"].items():
        raw, from_default, calibrated = (one[side] for side in _SIDES)
        errors = [f"{each['error']:.3f}" for each in (raw, calibrated)]
        shown = [report.number(calibrated[key]) for key in ("precision", "recall", "f1")]
        one_score = [report.number(each["f1"]) for each in (raw, from_default)]
        rows.append([name, *errors, *one_score, f"{calibrated['threshold']:.2f}", *shown, report.number(raw["best"])])
    scores = ["error", "error, calibrated", "F1 from 0.3", "F1 from 0.3, calibrated"]
    head = ["dataset", *scores, "shown from", "precision", "recall", "F1"]
    return report.joined(
        "# Calibrated scores",
        f"{sum(one['images'] for one in result['datasets'].values())} images. {report.facts(result)}.",
        report.table([*head, "best F1"], rows),
        report.aims_list(result["bars"]),
    )


if __name__ == "__main__":
    sys.exit(main())
