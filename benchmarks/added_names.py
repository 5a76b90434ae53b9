"""What do names that an image does not show do to the names that the detector was asked for before?

    python benchmarks/added_names.py --run plain=RUN among=RUN --data FOLDER --nouns index.noun

Every image of the datasets' evaluation splits is asked for its dataset's own names, and then for those and 10, 100 and
1,000 more: names of the other fields first, then nouns of WordNet's index (see vocabulary.py). Several runs (with and
without attention among categories, say) are reported side by side, without and with a presence threshold.

    AP        COCO AP on the dataset's own names; of each image the 100 best detections count, whatever they name
    kept      percentage of the detections (score at least 0.3) that are found again: same name, IoU at least 0.9
    moved     the same detections' scores: mean distance from what they were, on the scale 0 to 100
    presence  mean distance of the own names' presence probabilities from what they were, on the scale 0 to 100
    slots     slots that added names took, an image

20 images of each of four datasets, one thread of an AMD EPYC (results/added-names.json, added-names-attention.json):
AP falls from 52.7 to 51.3, 51.0 and 50.4; with the threshold 0.1, ten added names cost nothing (53.0 to 52.9).

Results: `results/added-names.json` and `.md`. Runs: `--out`; a checkpoint that was measured is not measured again.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

import report
import runner
from metr.boxes import pairwise_iou
from metr.config import Tree
from metr.data.collate import padding_mask, stack_images
from metr.data.config import AugmentationConfig
from metr.data.dataset import DetectionDataset, Example
from metr.data.joint import JointData, Subset, open_joint
from metr.data.records import Annotations
from metr.data.transforms import build_transforms
from metr.errors import ConfigError
from metr.evaluation.coco import evaluate_detections
from metr.inference.postprocess import postprocess
from metr.inference.predictor import inference
from metr.model import METR
from metr.structures import Detections
from runner import Run, Study
from vocabulary import with_nouns

SURE, SAME_PLACE = 0.3, 0.9
THRESHOLDS = (0.0, 0.1)
TITLES = {"AP": "AP", "kept": "kept, %", "moved": "score moved", "presence": "presence moved", "slots": "slots taken"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the study; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--run", nargs="+", required=True, metavar="NAME=FOLDER", help="checkpoints or run folders")
    parser.add_argument("--data", type=Path, required=True, help="the folder of their datasets, one folder each")
    parser.add_argument("--nouns", type=Path, required=True, help="WordNet's index.noun")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000], help="numbers of added names")
    parser.add_argument("--images", type=int, default=0, help="of each dataset; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/added-names"))
    given = vars(parser.parse_args(arguments))
    paths = {key: given.pop(key) for key in ("data", "out", "results")}
    return runner.exit_status(lambda: conduct(Study(name="added-names", profile="", **paths), given))


def conduct(study: Study, options: Mapping[str, Any]) -> bool:
    """Measures every checkpoint that was not measured yet, and writes the result."""
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    runs = [measuring(study, argument, options) for argument in options["run"]]
    done = runner.run_all(study, runs)
    if done:
        found = runner.reports(runs)
        result = {
            **runner.circumstances("added names", report.all_commits(found), "cpu"),
            "seed": options["seed"],
            "images": options["images"] or "all",
            "sure": SURE,
            "runs": {
                one["name"]: {key: one[key] for key in ("self_attention", "steps", "thresholds")} for one in found
            },
        }
        report.write_result(study.results / "added-names", result, page(result))
    return done


def measuring(study: Study, argument: str, options: Mapping[str, Any]) -> Run:
    """The run that measures one checkpoint.

    Raises:
        ConfigError: it has no name.
        MetrError: there is no such checkpoint.
    """
    name, _, folder = argument.partition("=")
    if not folder:
        raise ConfigError(f"expected NAME=FOLDER, found {argument!r}", where="--run")
    model = METR.from_pretrained(folder, device="cpu")
    steps, data = model.checkpoint.training.get("step"), study.datasets(sorted(model.vocabulary.datasets))

    def work() -> Tree:
        joint, thresholds = open_joint(data), {}
        for threshold in THRESHOLDS:
            plain = model.network.config
            categories = plain.categories.model_copy(update={"threshold": threshold})
            model.network.config = plain.model_copy(update={"categories": categories})
            each = [of_dataset(model, joint, one, options) for one in joint.evaluation().values()]
            thresholds[str(threshold)] = {
                number: {key: mean(one[number][key] for one in each) for key in TITLES} for number in each[0]
            }
        attention = model.checkpoint.model.categories.self_attention
        return {"name": name, "self_attention": attention, "steps": steps, "thresholds": thresholds}

    kept = {key: options[key] for key in ("nouns", "sizes", "images", "seed")}
    settings = {"checkpoint": folder, "steps": steps, "datasets": data, **kept}
    return Run(folder=study.out / name, title=f"added names: {name}", settings=settings, work=work)


def of_dataset(
    model: METR, joint: JointData, annotations: Annotations, options: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """The figures of one dataset at each number of added names."""
    vocabulary = joint.vocabulary
    categories = tuple(vocabulary.names[vocabulary.index_of(name)] for name in annotations.categories)
    own = tuple(dict.fromkeys(categories))
    others = tuple(name for name in vocabulary.names if name not in own)
    numbers = (0, *options["sizes"])
    sizes = [len(own) + number for number in numbers]
    names = with_nouns((*own, *others), options["nouns"], max(sizes), options["seed"])
    text = model.embed(names, tell=False)
    total = len(annotations)
    seen = Subset(annotations, np.array(report.evenly_spread(total, options["images"] or total)))
    dataset = DetectionDataset(
        seen, vocabulary, build_transforms(AugmentationConfig(resize=model.resize), training=False)
    )
    found: dict[int, dict[int | str, Detections]] = {number: {} for number in numbers}
    values: dict[int, dict[str, list[float]]] = {number: {key: [] for key in TITLES} for number in numbers}
    for index in track(range(len(dataset)), annotations.name):
        if not isinstance(example := dataset[index], Example):
            continue
        answers = [answer(model, example, names[:asked], text[:asked], len(own)) for asked in sizes]
        before, presence, _ = answers[0]
        for number, (after, shown, slots) in zip(numbers, answers, strict=True):
            kept, moved = persistence(before, after)
            found[number][example.image_id] = after
            values[number]["kept"] += kept
            values[number]["moved"] += moved
            values[number]["presence"] += (100 * (shown - presence).abs()).tolist()
            values[number]["slots"].append(slots)
    return {
        str(number): {key: mean(each) if each else 0.0 for key, each in values[number].items()}
        | {"AP": evaluate_detections(seen, found[number], categories).ap or 0.0}
        for number in numbers
    }


def answer(
    model: METR, example: Example, names: Sequence[str], text: Tensor, own: int
) -> tuple[Detections, Tensor, int]:
    """What a network says of one image: detections, own names' presence [v], slots that went to other names."""
    pixels, image = stack_images([example.image]), example.image
    mask = padding_mask([(image.shape[1], image.shape[2])], pixels.shape[-2], pixels.shape[-1])
    with inference(model.network, model.device):
        output = model.network(pixels.to(torch.float32) / 255, mask, text)
    kept = output.categories
    found = postprocess(output, [example.original_size], tuple(names))[0]
    return found, kept.presence_logits[-1, 0, :own].sigmoid(), int((kept.valid & (kept.ids >= own)).sum())


def persistence(before: Detections, after: Detections) -> tuple[list[float], list[float]]:
    """Of each sure detection: whether (100 or 0) it is found again, and how far its score has moved if it is."""
    sure = before.scores >= SURE
    if not len(after):
        return [0.0] * int(sure.sum()), []
    names, others = ([found.names[label] for label in found.labels.tolist()] for found in (before, after))
    same = torch.tensor([[name == other for other in others] for name in names], dtype=torch.bool)
    overlap = pairwise_iou(before.boxes, after.boxes).where(same.view(len(before), len(after)), 0.0)
    best, place = overlap.max(1)
    again = best >= SAME_PLACE
    moved = 100 * (after.scores[place] - before.scores).abs()
    return (100.0 * again[sure]).tolist(), moved[sure & again].tolist()


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: every run at every threshold and number of added names."""
    rows = [
        [name, threshold, f"{int(number):,}"]
        + [f"{figures[key]:{'.1f' if key in ('AP', 'kept') else '.2f'}}" for key in TITLES]
        for name, run in result["runs"].items()
        for threshold, sizes in run["thresholds"].items()
        for number, figures in sizes.items()
    ]
    return report.joined(
        report.table(["run", "threshold", "names added", *TITLES.values()], rows),
        f"Images: {result['images']} of each dataset. {report.facts(result)}, seed {result['seed']}.",
    )


if __name__ == "__main__":
    sys.exit(main())
