"""Added names: what names that an image does not show do to the names that it was asked for before.

    python benchmarks/added_names.py --run plain=runs/plain/last among=runs/among/last --data ../shared/data \
        --nouns index.noun

Every image of the datasets' evaluation splits is asked for its dataset's own names, and then for those and 10, 100
and 1,000 more: names of the other fields first, then nouns drawn from WordNet's index (see vocabulary.py). Of several
runs (with and without attention among categories, say) each is told beside the others, without and with a presence
threshold.

    AP        COCO AP on the dataset's own names; of each image the 100 best detections count, whatever they name
    kept      share of the detections (score at least 0.3) that are found again: same name, IoU at least 0.9
    moved     the same detections' scores: mean distance from what they were, on the scale 0 to 100
    presence  mean distance of the own names' presence probabilities from what they were, on the scale 0 to 100
    slots     slots that added names took, an image

The result is written to `results/added-names.json` and `.md` beside this file.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor

from machine import commit, hardware
from metr.boxes import pairwise_iou
from metr.data.collate import padding_mask, stack_images
from metr.data.config import AugmentationConfig
from metr.data.dataset import DetectionDataset, Example
from metr.data.joint import JointData, open_joint
from metr.data.records import Annotations, InMemoryAnnotations
from metr.data.transforms.pipeline import build_transforms
from metr.errors import ConfigError, MetrError
from metr.evaluation.coco import evaluate_detections
from metr.inference.postprocess import postprocess
from metr.inference.predictor import inference
from metr.model import METR
from metr.models.config import CategoryConfig
from metr.structures import Detections, DetectorOutput
from vocabulary import vocabulary

HERE = Path(__file__).resolve().parent
SIZES = (10, 100, 1000)
SURE, SAME_PLACE = 0.3, 0.9
FIGURES = ("kept", "moved", "presence", "slots")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says. `runs` have a name each; `images` counts those of each dataset, 0 being all."""

    runs: dict[str, Path]
    data: Path
    nouns: Path
    sizes: tuple[int, ...] = SIZES
    thresholds: tuple[float, ...] = (0.0, 0.1)
    images: int = 0
    seed: int = 0
    threads: int = 0
    results: Path = HERE / "results"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a network said of one image: its detections, own names' presence, and slots that went to other names."""

    found: Detections
    presence: Float[Tensor, " v"]
    negative_slots: int


@dataclass
class Tally:
    """What is known so far of one dataset, asked for some number of added names."""

    found: dict[int | str, Detections] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in FIGURES})

    def add(self, image_id: int | str, answer: Answer, before: Answer) -> None:
        """Takes an image's answer in, beside the one that it gave to its own names alone."""
        self.found[image_id] = answer.found
        shares, moved = persistence(before.found, answer.found)
        self.values["kept"] += shares
        self.values["moved"] += moved
        self.values["presence"] += (100 * (answer.presence - before.presence).abs()).tolist()
        self.values["slots"].append(answer.negative_slots)


def persistence(before: Detections, after: Detections) -> tuple[list[float], list[float]]:
    """Of each sure detection: whether (100 or 0) it is found again, and how far its score has moved if it is."""
    sure = before.scores >= SURE
    same = torch.tensor([[name == other for other in _called(after)] for name in _called(before)], dtype=torch.bool)
    overlap = pairwise_iou(before.boxes, after.boxes).where(same.view(len(before), len(after)), 0.0)
    if not len(after):
        return [0.0] * int(sure.sum()), []
    best, place = overlap.max(1)
    again = best >= SAME_PLACE
    moved = 100 * (after.scores[place] - before.scores).abs()
    return (100.0 * again[sure]).tolist(), moved[sure & again].tolist()


def _called(found: Detections) -> list[str]:
    return [found.names[label] for label in found.labels.tolist()]


def measure(settings: Settings, console: Console) -> dict[str, Any]:
    """All figures, as the JSON file has them."""
    began_with, runs = commit(), {}
    for name, path in settings.runs.items():
        model = METR.from_pretrained(path, device="cpu")
        joint = open_joint([f"{one}={settings.data / one}" for one in sorted(model.vocabulary.datasets)])
        runs[name] = {
            "self_attention": model.checkpoint.model.categories.self_attention,
            "steps": model.checkpoint.training.get("step"),
            "thresholds": {
                str(threshold): _of_run(_with_threshold(model, threshold), joint, settings, console)
                for threshold in settings.thresholds
            },
        }
    return {
        "benchmark": "added names",
        "hardware": hardware(torch.device("cpu")),
        "torch": torch.__version__,
        "commit": began_with,
        "seed": settings.seed,
        "images": settings.images or "all",
        "sure": SURE,
        "runs": runs,
    }


def _with_threshold(model: METR, threshold: float) -> METR:
    categories: CategoryConfig = model.network.config.categories.model_copy(update={"threshold": threshold})
    model.network.config = model.network.config.model_copy(update={"categories": categories})
    return model


def _of_run(model: METR, joint: JointData, settings: Settings, console: Console) -> dict[str, dict[str, float]]:
    """The figures at each number of added names, averaged over datasets."""
    rows: dict[int, list[dict[str, float]]] = {number: [] for number in (0, *settings.sizes)}
    for annotations in joint.evaluation().values():
        for number, figures in _of_dataset(model, joint, annotations, settings, console).items():
            rows[number].append(figures)
    return {str(number): {key: mean(one[key] for one in each) for key in each[0]} for number, each in rows.items()}


def _of_dataset(
    model: METR, joint: JointData, annotations: Annotations, settings: Settings, console: Console
) -> dict[int, dict[str, float]]:
    rows = dict.fromkeys(joint.vocabulary.index_of(name) for name in annotations.categories)
    own = tuple(joint.vocabulary.names[row] for row in rows)
    spelling = tuple(joint.vocabulary.names[joint.vocabulary.index_of(name)] for name in annotations.categories)
    others = tuple(name for name in joint.vocabulary.names if name not in own)
    names = vocabulary((*own, *others), settings.nouns, len(own) + max(settings.sizes), settings.seed)
    text = model.embed(names)
    seen = _some(annotations, settings.images)
    tallies = {number: Tally() for number in (0, *settings.sizes)}
    dataset = DetectionDataset(
        seen, joint.vocabulary, build_transforms(AugmentationConfig(resize=model.resize), training=False)
    )
    for index in track(range(len(dataset)), annotations.name, console=console):
        example = dataset[index]
        if not isinstance(example, Example):
            continue
        before = None
        for number, tally in tallies.items():
            asked = len(own) + number
            answer = _answer(model, example, names[:asked], text[:asked], len(own))
            before = before or answer
            tally.add(example.image_id, answer, before)
    return {number: _figures(tally, seen, spelling) for number, tally in tallies.items()}


def _figures(tally: Tally, seen: Annotations, spelling: Sequence[str]) -> dict[str, float]:
    ap = evaluate_detections(seen, tally.found, spelling).ap
    return {"AP": ap or 0.0, **{name: mean(values) if values else 0.0 for name, values in tally.values.items()}}


def _some(annotations: Annotations, number: int) -> InMemoryAnnotations:
    """Images of a split, evenly spread."""
    total = len(annotations)
    number = min(number or total, total)
    return InMemoryAnnotations(
        name=annotations.name,
        split=annotations.split,
        categories=annotations.categories,
        records=tuple(annotations[(2 * i + 1) * total // (2 * number)] for i in range(number)),
        format=annotations.format,
    )


def _answer(model: METR, example: Example, names: Sequence[str], text: Tensor, own: int) -> Answer:
    network, image = model.network, example.image
    pixels = stack_images([image])
    mask = padding_mask([(image.shape[1], image.shape[2])], pixels.shape[-2], pixels.shape[-1])
    with inference(network, model.device):
        output: DetectorOutput = network(pixels.to(torch.float32) / 255, mask, text)
    found = postprocess(output, [example.original_size], tuple(names))[0]
    kept = output.categories
    return Answer(
        found=found,
        presence=output.categories.presence_logits[-1, 0, :own].sigmoid(),
        negative_slots=int((kept.valid & (kept.ids >= own)).sum()),
    )


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The result as a table, its titles first."""
    table = [["run", "threshold", "names added", "AP", "kept, %", "score moved", "presence moved", "slots taken"]]
    for name, run in result["runs"].items():
        for threshold, sizes in run["thresholds"].items():
            for number, figures in sizes.items():
                told = [f"{figures['AP']:.1f}", f"{figures['kept']:.1f}"]
                told += [f"{figures[key]:.2f}" for key in ("moved", "presence", "slots")]
                table.append([name, threshold, f"{int(number):,}", *told])
    return table


def as_markdown(result: dict[str, Any]) -> str:
    """The page."""
    titles, *lines = rows(result)
    table = [titles, ["---", *["---:"] * (len(titles) - 1)], *lines]
    facts = f"{result['hardware']}, torch {result['torch']}, commit {result['commit']}, seed {result['seed']}"
    return "\n".join(f"| {' | '.join(line)} |" for line in table) + f"\n\nImages: {result['images']}. {facts}.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; the exit status is 0, or 1 with one message where something is missing."""
    console = Console()
    try:
        settings = _settings(arguments)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        result = measure(settings, console)
    except MetrError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    settings.results.mkdir(parents=True, exist_ok=True)
    path = settings.results / "added-names.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(as_markdown(result), encoding="utf-8")
    console.print(as_markdown(result), markup=False, soft_wrap=True)
    return 0


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", required=True, metavar="NAME=FOLDER", help="checkpoints or run folders")
    parser.add_argument("--data", type=Path, required=True, help="the folder of their datasets")
    parser.add_argument("--nouns", type=Path, required=True, help="WordNet's index.noun")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of added names")
    for name in ("images", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name))
    parser.add_argument("--results", type=Path, default=Settings.results)
    given = vars(parser.parse_args(arguments))
    runs = {}
    for argument in given.pop("run"):
        name, _, folder = argument.partition("=")
        if not folder:
            raise ConfigError(f"expected NAME=FOLDER, found {argument!r}", where="--run")
        runs[name] = Path(folder)
    return Settings(runs=runs, **given | {"sizes": tuple(given["sizes"])})


if __name__ == "__main__":
    sys.exit(main())
