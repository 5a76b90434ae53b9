"""Which settings of detection hold without any training: suppression, presence, queries a name?

    python benchmarks/detection_defaults.py --run checkpoints/metr-nano --data FOLDER --untrained raccoon cones_cubes

Each image is encoded once, and then asked in several ways for several vocabularies:

    own        the names of its dataset                        AP, mean over the trained datasets
    joint      all names of training                           AP, likewise
    untrained  the names of datasets that were not trained     AP, mean over these datasets
    crowded    these and all names of training                 AP, likewise
    nonsense   the names of another field                      detections an image with a score of 0.3 and more

Differences to the first setting are tested by a paired bootstrap over the images: of `--resamples` draws, the middle
95 % of the differences of the means. metr-nano, 24 trained and five untrained datasets, 923 and 214 images, one thread,
an hour on a busy machine (results/detection-defaults.json): suppression within a name adds 0.05 AP (-0.09 to +0.14) to
own names, presence in the score takes 0.3 and four fifths of the nonsense.

Results: `results/detection-defaults.json` and `.md`. Runs: `--out`; what was measured is not measured again.
"""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import report
import runner
from metr.config import Tree, merge
from metr.data.config import AugmentationConfig
from metr.data.dataset import DetectionDataset
from metr.data.images import exif_oriented
from metr.data.joint import open_joint
from metr.data.loading import build_evaluation_loader
from metr.data.records import ImageRecord, InMemoryAnnotations
from metr.data.transforms import build_transforms
from metr.evaluation.coco import CocoScorer
from metr.inference.config import InferenceConfig
from metr.inference.postprocess import postprocess
from metr.inference.selection import name_limits
from metr.model import METR
from metr.structures import Detections, Memory
from runner import Run, Study

SHOWN = 0.3
QUESTIONS = ("own", "joint", "untrained", "crowded", "nonsense")
_GATED: Tree = {"selection": {"presence_threshold": 0.1}}
_BARE: Tree = {"postprocess": {"nms_iou": None, "presence_power": 0.0}}
SETTINGS: dict[str, Tree] = {
    "presence 0.1, all boxes": merge(_BARE, _GATED),
    "+ NMS within a name": merge(_BARE, _GATED, {"postprocess": {"nms_iou": 0.7}}),
    "NMS across names instead": merge(_BARE, _GATED, {"postprocess": {"nms_iou": 0.7, "nms_across_names": True}}),
    "+ presence only where names outnumber slots": {
        "postprocess": {"presence_power": 0.0},
        "selection": {"untrained_threshold": 0.1},
    },
    "+ 0.02 for untrained names": {"postprocess": {"presence_power": 0.0}},
    "+ presence^0.25 in the score (default)": {},
    "presence^0.5 instead": {"postprocess": {"presence_power": 0.5}},
    "default + queries as in training": {"selection": {"trained_queries": True}},
}


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One evaluation split: its records, its names, and the memory of its images in batches."""

    annotations: InMemoryAnnotations
    names: tuple[str, ...]
    batches: tuple[tuple[Memory, tuple[tuple[int, int], ...], tuple[int | str, ...]], ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--run", required=True, help="a checkpoint or a run folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the datasets, one folder each")
    parser.add_argument("--untrained", nargs="*", default=[], help="datasets that training did not see")
    parser.add_argument("--leave-out", nargs="*", default=["coco_mini"], help="trained datasets that share fields")
    parser.add_argument("--resamples", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/detection-defaults"))
    given = vars(parser.parse_args(arguments))
    paths = {key: given.pop(key) for key in ("data", "out", "results")}
    study = Study(name="detection-defaults", profile="", **paths)
    return runner.exit_status(lambda: conduct(study, given))


def conduct(study: Study, options: Mapping[str, Any]) -> bool:
    """Measures all settings, and writes the result."""
    torch.set_num_threads(options["threads"])
    model = METR.from_pretrained(options["run"], device="cpu")
    trained = sorted({*model.vocabulary.datasets}.difference(options["leave_out"]))
    run = Run(
        folder=study.out / "all",
        title="settings of detection",
        settings={key: options[key] for key in ("run", "untrained", "resamples")} | {"trained": trained},
        work=lambda: measured(model, study, trained, options),
    )
    done = runner.run_all(study, [run])
    if done:
        (found,) = runner.reports([run])
        result = {**runner.circumstances("detection defaults", report.all_commits([found]), "cpu"), **found}
        report.write_result(study.results / "detection-defaults", result, page(result))
    return done


def measured(model: METR, study: Study, trained: Sequence[str], options: Mapping[str, Any]) -> Tree:
    """The figures of every setting; differences of own and joint AP to the first setting by bootstrap."""
    known = [encoded(model, path) for path in study.datasets(trained)]
    strange = [encoded(model, path) for path in study.datasets(options["untrained"])]
    figures: Tree = {}
    means: dict[str, dict[str, np.ndarray]] = {}
    for title, changes in SETTINGS.items():
        config = InferenceConfig.checked(changes)
        found = {
            "own": [ask(model, one, one.names, config) for one in known],
            "joint": [ask(model, one, joined(one.names, model.names), config) for one in known],
            "untrained": [ask(model, one, one.names, config) for one in strange],
            "crowded": [ask(model, one, joined(one.names, model.names), config) for one in strange],
        }
        sets = {"own": known, "joint": known, "untrained": strange, "crowded": strange}
        each = {
            question: [ap(*pair) for pair in zip(sets[question], found[question], strict=True)] for question in found
        }
        figures[title] = {
            **{question: report.mean(values) for question, values in each.items()},
            "nonsense": nonsense(model, known, config),
            "datasets": {
                question: {one.annotations.name: value for one, value in zip(sets[question], values, strict=True)}
                for question, values in each.items()
            },
        }
        means[title] = {
            question: resampled(known, found[question], options["resamples"]) for question in ("own", "joint")
        }
    first = means[next(iter(SETTINGS))]
    for title, own in means.items():
        figures[title]["difference"] = {question: difference(first[question], own[question]) for question in own}
    images = {
        "trained": sum(len(one.annotations) for one in known),
        "untrained": sum(len(one.annotations) for one in strange),
    }
    return {"images": images, "trained": list(trained), "ways": figures}


def encoded(model: METR, path: str) -> Encoded:
    """The evaluation split of a dataset, every image encoded once."""
    joint = open_joint([path])
    (annotations,) = joint.evaluation().values()
    transforms = build_transforms(AugmentationConfig(resize=model.resize), training=False)
    dataset = DetectionDataset(exif_oriented(annotations), joint.vocabulary, transforms)
    batches = []
    with torch.inference_mode():
        for batch in build_evaluation_loader(dataset, 8, workers=0, device=torch.device("cpu")):
            memory = model.network.encode(batch.images, batch.padding_mask)
            batches.append((memory, batch.original_sizes, batch.image_ids))
    seen = {image for _, _, images in batches for image in images}
    records = (dataset.annotations[index] for index in range(len(dataset)))
    kept = InMemoryAnnotations(
        name=annotations.name,
        split=annotations.split,
        categories=annotations.categories,
        records=tuple(record for record in records if record.image_id in seen),
    )
    names = tuple(dict.fromkeys(name.strip() for name in annotations.categories))
    return Encoded(annotations=kept, names=names, batches=tuple(batches))


def joined(own: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """The names of both, each once."""
    return tuple(dict.fromkeys((*own, *more)))


def ask(model: METR, one: Encoded, names: Sequence[str], config: InferenceConfig) -> dict[int | str, Detections]:
    """What is found in each image when it is asked for these names."""
    limits = name_limits(names, model.vocabulary, model.checkpoint.model, config.selection)
    text = model.network.project(model.embed(names))
    found: dict[int | str, Detections] = {}
    for memory, sizes, images in one.batches:
        with torch.inference_mode():
            output = model.network.detect(memory, text, limits=limits)
        found.update(zip(images, postprocess(output, sizes, names, config.postprocess), strict=True))
    return found


def ap(one: Encoded, found: Mapping[int | str, Detections]) -> float | None:
    """COCO AP on a dataset."""
    return CocoScorer(one.annotations, [name.strip() for name in one.annotations.categories]).score(found).ap


def nonsense(model: METR, known: Sequence[Encoded], config: InferenceConfig) -> float:
    """Detections an image that are shown when it is asked for the names of another dataset that shares none."""
    shown = images = 0
    for one, other in itertools.permutations(known, 2):
        if alike(one.names, other.names):
            continue
        found = ask(model, one, other.names, config)
        shown += sum(int((each.scores >= SHOWN).sum()) for each in found.values())
        images += len(found)
    return shown / max(images, 1)


def alike(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether two datasets have words in common, such as the queens of chess and of cards."""
    words = [{word for name in names for word in name.lower().replace("-", " ").split()} for names in (ours, theirs)]
    return bool(words[0] & words[1])


def resampled(sets: Sequence[Encoded], found: Sequence[Mapping[int | str, Detections]], resamples: int) -> np.ndarray:
    """The mean AP over datasets, first of the images as they are, then of images drawn anew; the same for any `found`.

    Returns:
        [1 + resamples].
    """
    draw = np.random.default_rng(0)
    means = [report.mean(ap(one, each) for one, each in zip(sets, found, strict=True))]
    for _ in range(resamples):
        values = []
        for one, each in zip(sets, found, strict=True):
            rows = draw.integers(len(one.annotations.records), size=len(one.annotations.records))
            drawn = replace(one, annotations=redrawn(one.annotations, rows), batches=())
            values.append(ap(drawn, dict(relabelled(one.annotations, rows, each))))
        means.append(report.mean(values))
    return np.array([mean or 0.0 for mean in means])


def difference(before: np.ndarray, after: np.ndarray) -> Tree:
    """The difference of the mean AP, and the middle 95 % of the differences when the images are drawn anew."""
    low, high = np.percentile((after - before)[1:], [2.5, 97.5]) if len(after) > 1 else (0.0, 0.0)
    return {"mean": float(after[0] - before[0]), "low": float(low), "high": float(high)}


def redrawn(annotations: InMemoryAnnotations, rows: np.ndarray) -> InMemoryAnnotations:
    """The images of these rows, under numbers as ids: one may come several times."""
    records: list[ImageRecord] = [annotations.records[row] for row in rows]
    return replace(annotations, records=tuple(replace(one, image_id=n) for n, one in enumerate(records)))


def relabelled(
    annotations: InMemoryAnnotations, rows: np.ndarray, found: Mapping[int | str, Detections]
) -> Iterator[tuple[int, Detections]]:
    """The detections of these rows, by number."""
    for number, row in enumerate(rows):
        yield number, found[annotations.records[row].image_id]


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: a row a setting."""
    rows = []
    for title, figures in result["ways"].items():
        cells = [report.number(figures[question]) for question in QUESTIONS[:-1]]
        gains = [figures["difference"][question] for question in ("own", "joint")]
        spans = [f"{gain['mean']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})" for gain in gains]
        rows.append([title, cells[0], spans[0], cells[1], spans[1], *cells[2:], f"{figures['nonsense']:.3f}"])
    head = ["setting", "own", "difference", "joint", "difference", "untrained", "crowded", "nonsense"]
    return report.joined(
        report.table(head, rows),
        f"Images: {result['images']['trained']} of {len(result['trained'])} trained datasets, "
        f"{result['images']['untrained']} of untrained ones. {report.facts(result)}.",
    )


if __name__ == "__main__":
    sys.exit(main())
