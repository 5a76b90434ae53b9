"""Vocabulary: what thousands of names cost in time of inference, and in knowing which of them an image shows.

    python benchmarks/vocabulary.py --run runs/multifield-trial/last --data ../shared/data --nouns index.noun

Asks a trained detector for 80, 365, 1,203, 5,000 and 20,000 names: first those of its datasets, then distractors, nouns
drawn from WordNet's index (`--nouns`: the file index.noun, of the Debian package wordnet-base for example).

    time      seconds an image, from its pixels in memory to detections, one image at a time; sizes take turns on
              every image, so that whatever else the machine does hits all. A ratio is the median of the images'
    recall    share of the pairs (image, name present in it) whose name is among the K most likely, with the shortlist
              and, on the same names, with every name looked at
    text      seconds that the text encoder takes for a name that it has not met

The images are those of the datasets' evaluation splits, evenly spread. A detector without a shortlist is timed as it
is. The result is written to `results/vocabulary-DEVICE.json` and `.md` beside this file.
"""

import argparse
import copy
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from machine import commit, hardware
from metr.data.collate import padding_mask, stack_images
from metr.data.config import AugmentationConfig
from metr.data.dataset import DetectionDataset, Example
from metr.data.images import read_image
from metr.data.joint import JointData, open_joint
from metr.data.transforms.pipeline import build_transforms
from metr.devices import resolved_device
from metr.errors import DataError, MetrError
from metr.evaluation.metrics import PresenceRecall, presence_recall
from metr.inference.predictor import Predictor, inference
from metr.model import METR
from metr.models.detector import Detector
from metr.text.encoder import TextEncoder, TextEncoderConfig

HERE = Path(__file__).resolve().parent
TIME_BAR, RECALL_BAR = 1.3, 2.0  # times the smallest vocabulary's; points of 100
KEPT = (1, 5, 10, 20)
SHORTLIST, EVERYTHING = "shortlist", "every name"
_LEMMA = re.compile(r"[a-z][a-z_'-]*")
# names whose embedding is timed, and names that are embedded (and kept on disk) together
_TIMED_NAMES, _CHUNK = 64, 500


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says. `images` and `timed` count those of each dataset, for recall and for time."""

    run: Path
    data: Path
    nouns: Path
    sizes: tuple[int, ...] = (80, 365, 1203, 5000, 20000)
    images: int = 20
    timed: int = 3
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    results: Path = HERE / "results"


@dataclass(frozen=True, kw_only=True)
class Question:
    """Names that every contender is asked for."""

    names: tuple[str, ...]
    text: Float[Tensor, "v t"]


@dataclass(frozen=True, kw_only=True)
class Sight:
    """An image as it is stored and as the network sees it, and which of the datasets' names it shows."""

    pixels: UInt8[np.ndarray, "h w 3"]
    example: Example
    timed: bool

    def present(self, words: int) -> Bool[Tensor, "1 v"]:
        """Where a name among the first `words` is annotated and has an object; the rest is distractors."""
        target = self.example.targets
        shown = torch.zeros(max(words, len(target.annotated)), dtype=torch.bool)
        shown[target.labels] = target.annotated[target.labels]
        return shown[:words].unsqueeze(0)


def measure(settings: Settings, console: Console) -> dict[str, Any]:
    """All figures, as the JSON file has them."""
    began_with = commit()
    model = METR.from_pretrained(settings.run, device=resolved_device(settings.device))
    joint = _joint(settings.data, model)
    names = vocabulary(joint.vocabulary.names, settings.nouns, max(settings.sizes), settings.seed)
    text, embedding = _embedded(model, names, console)
    questions = [Question(names=names[:size], text=text[:size]) for size in settings.sizes]
    sights = _sights(joint, model, settings)
    contenders = {EVERYTHING: _without_shortlist(model.network)}
    if model.network.category_extraction.shortlist is not None:
        contenders = {SHORTLIST: model.network, **contenders}
    seconds = _seconds(model, contenders, questions, [one.pixels for one in sights if one.timed])
    recalls = _recalls(contenders, questions, sights) if SHORTLIST in contenders else {}
    config = model.checkpoint.model
    return {
        "benchmark": "vocabulary",
        "hardware": hardware(model.device),
        "torch": torch.__version__,
        "commit": began_with,
        "settings": {
            **{key: value for key, value in asdict(settings).items() if key not in ("run", "data", "nouns", "results")},
            "shortlist": config.categories.shortlist,
            "kept": config.categories.kept,
            "width": config.width,
            "pixels": model.resize.size,
            "trained_names": len(model.names),
            "steps": model.checkpoint.training.get("step"),
        },
        "images": {"timed": sum(one.timed for one in sights), "recall": len(sights) if recalls else 0},
        "text": embedding,
        **_figures(settings.sizes, seconds, recalls, config.categories.kept),
    }


def vocabulary(known: Sequence[str], nouns: Path, number: int, seed: int) -> tuple[str, ...]:
    """The known names and then nouns that are none of them, in an order that the seed decides; `number` in all.

    Raises:
        DataError: the file is missing, or holds too few nouns.
    """
    if not nouns.is_file():
        hint = "give WordNet's index.noun with --nouns; the Debian package wordnet-base has it"
        raise DataError("no such file", where=nouns, hint=hint)
    lines = nouns.read_text(encoding="utf-8").splitlines()
    # the file begins with its licence, in lines that begin with a space
    lemmas = {line.split(" ", 1)[0] for line in lines if _LEMMA.match(line)}
    taken = {_plain(name) for name in known}
    fresh = sorted({lemma.replace("_", " ") for lemma in lemmas if _LEMMA.fullmatch(lemma)} - taken)
    random.Random(seed).shuffle(fresh)
    names = (*known, *fresh)
    if len(names) < number:
        raise DataError(f"expected {number - len(known)} nouns, found {len(fresh)}", where=nouns)
    return names[:number]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def _joint(folder: Path, model: METR) -> JointData:
    """The datasets of training that lie in a folder, each under its own name."""
    there = [name for name in sorted(model.vocabulary.datasets) if (folder / name).is_dir()]
    if not there:
        what = f"none of the datasets of training: {', '.join(sorted(model.vocabulary.datasets))}"
        raise DataError(what, where=folder, hint="name the folder that holds them with --data")
    return open_joint([f"{name}={folder / name}" for name in there])


def _embedded(model: METR, names: Sequence[str], console: Console) -> tuple[Float[Tensor, "v t"], dict[str, float]]:
    """The text embeddings, and what the encoder takes for a new name; what it has embedded before, it keeps on disk."""
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    text = torch.cat([model.embed(chunk) for chunk in track(chunks, "embedding the names", console=console)])
    described = {key: value for key, value in model.checkpoint.text_encoder.items() if key != "identity"}
    config = TextEncoderConfig.checked(described, where="text_encoder")
    with tempfile.TemporaryDirectory() as fresh:
        encoder = TextEncoder(config, cache_root=Path(fresh))
        encoder.embed(names[-1:])  # loads the language model
        some = names[-1 - _TIMED_NAMES : -1]
        began = time.perf_counter()
        encoder.embed(some)
        seconds = (time.perf_counter() - began) / len(some)
    return text, {"names": len(names), "seconds_a_new_name": seconds}


def _sights(joint: JointData, model: METR, settings: Settings) -> list[Sight]:
    """Some images of each dataset's evaluation split, evenly spread; every so often one that is timed."""
    transforms = build_transforms(AugmentationConfig(resize=model.resize), training=False)
    sights = []
    for annotations in joint.evaluation().values():
        dataset = DetectionDataset(annotations, joint.vocabulary, transforms)
        some, few = _spread(len(dataset), settings.images), settings.timed
        timed = {some[place] for place in _spread(len(some), few)}
        for index in some:
            example = dataset[index]
            if isinstance(example, Example):
                pixels = read_image(annotations[index].path)
                sights.append(Sight(pixels=pixels, example=example, timed=index in timed))
    return sights


def _spread(length: int, number: int) -> list[int]:
    """At most `number` places in a list, evenly spread."""
    number = min(number, length)
    return [(2 * i + 1) * length // (2 * number) for i in range(number)]


def _without_shortlist(network: Detector) -> Detector:
    """The same weights, and every name is looked at."""
    plain = copy.deepcopy(network)
    plain.category_extraction.shortlist = None
    return plain


def _seconds(
    model: METR, contenders: dict[str, Detector], questions: Sequence[Question], images: Sequence[np.ndarray]
) -> dict[str, list[list[float]]]:
    """Seconds of each contender, image and size."""
    predictors = {
        name: [Predictor(network, one.text, one.names, model.resize) for one in questions]
        for name, network in contenders.items()
    }
    seconds: dict[str, list[list[float]]] = {name: [] for name in contenders}
    # the first image is looked at twice, and counted once it is warm
    for turn, pixels in enumerate(track([images[0], *images], "time", console=Console(stderr=True))):
        for name, sized in predictors.items():
            row = [0.0] * len(sized)
            for place in range(len(sized)):
                index = (place + turn) % len(sized)
                began = time.perf_counter()
                sized[index].detect(pixels)  # its detections come to the CPU, so nothing is left running
                row[index] = time.perf_counter() - began
            seconds[name].append(row)
    return {name: rows[1:] for name, rows in seconds.items()}


def _recalls(
    contenders: dict[str, Detector], questions: Sequence[Question], sights: Sequence[Sight]
) -> dict[str, list[PresenceRecall]]:
    """Presence recall of each contender at each size; backbone and encoder see an image once."""
    first = next(iter(contenders.values()))
    device = next(first.parameters()).device
    recalls = {name: [PresenceRecall() for _ in questions] for name in contenders}
    with inference(first, device):
        texts = [first.project(one.text.to(device)) for one in questions]
        for sight in track(sights, "recall", console=Console(stderr=True)):
            pixels = stack_images([sight.example.image])
            shape = (sight.example.image.shape[1], sight.example.image.shape[2])
            mask = padding_mask([shape], pixels.shape[-2], pixels.shape[-1]).to(device)
            memory = first.encoder(first.backbone(pixels.to(device).to(torch.float32) / 255), mask)
            for name, network in contenders.items():
                for place, text in enumerate(texts):
                    logits = network.category_extraction(memory, text).presence_logits[-1]
                    present = sight.present(len(questions[place].names)).to(device)
                    recalls[name][place] += presence_recall(logits, present, KEPT)
    return recalls


def _figures(
    sizes: Sequence[int], seconds: dict[str, list[list[float]]], recalls: dict[str, list[PresenceRecall]], kept: int
) -> dict[str, Any]:
    """Medians, ratios and recalls of every size, and the bars."""
    figures: dict[str, dict[str, Any]] = {str(size): {"seconds": {}, "ratio": {}, "recall": {}} for size in sizes}
    smallest, judged_at = min(range(len(sizes)), key=lambda i: sizes[i]), max(k for k in KEPT if k <= kept)
    for place, size in enumerate(sizes):
        figure = figures[str(size)]
        for name, rows in seconds.items():
            figure["seconds"][name] = median(row[place] for row in rows)
            figure["ratio"][name] = median(row[place] / row[smallest] for row in rows)
        for name, each in recalls.items():
            figure["recall"][name] = each[place].shares
            figure["pairs"] = each[place].pairs
    first = next(iter(seconds))
    bars = {"time_ratio": (figures[str(max(sizes))]["ratio"][first], TIME_BAR)}
    if recalls:
        lost = [_lost(figures[str(size)]["recall"], judged_at) for size in sizes]
        bars["recall_lost"] = (max(lost), RECALL_BAR)
    return {
        "contender": first,
        "recall_at": judged_at,
        "bars": {name: {"value": value, "bar": bar, "met": value <= bar} for name, (value, bar) in bars.items()},
        "sizes": figures,
    }


def _lost(recall: dict[str, dict[int, float | None]], kept: int) -> float:
    """Points of recall that the shortlist costs; none where nothing is present."""
    return (recall[EVERYTHING][kept] or 0.0) - (recall[SHORTLIST][kept] or 0.0)


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The result as a table, its titles first."""
    first, kept = result["contender"], result["recall_at"]
    table = [["names", "ms an image", "ratio", "ms, every name looked at", f"recall at {kept}", "every name looked at"]]
    for size, figure in result["sizes"].items():
        times, recall = figure["seconds"], figure["recall"]
        shares = [recall.get(name, {}).get(kept) for name in (SHORTLIST, EVERYTHING)]
        table.append(
            [
                f"{int(size):,}",
                f"{1000 * times[first]:.0f}",
                f"{figure['ratio'][first]:.2f}",
                f"{1000 * times[EVERYTHING]:.0f}",
                *("-" if share is None else f"{share:.1f}" for share in shares),
            ]
        )
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """What is to be said beside the table."""
    settings, bars, size = result["settings"], result["bars"], max(map(int, result["sizes"]))
    told = [f"{result['hardware']}, torch {result['torch']}, commit {result['commit']}, seed {settings['seed']}."]
    if result["contender"] == SHORTLIST:
        told.append(f"Shortlist of {settings['shortlist']} names, {settings['kept']} kept.")
        told.append(f"Most recall lost to the shortlist: {_judged(bars['recall_lost'])} points.")
    else:
        told.append("This detector was trained without a shortlist (`categories.shortlist` is 0): times only.")
    told.append(f"Time at {size:,} names against the fewest: {_judged(bars['time_ratio'])}.")
    told.append(f"Embedding a new name: {1000 * result['text']['seconds_a_new_name']:.0f} ms, once.")
    return told


def _judged(bar: dict[str, Any]) -> str:
    return f"{bar['value']:.2f} (at most {bar['bar']:g}: {'met' if bar['met'] else 'missed'})"


def show(result: dict[str, Any], console: Console) -> None:
    """The table on the console."""
    titles, *lines = rows(result)
    table = Table(title="Vocabularies of thousands")
    for title in titles:
        table.add_column(title, justify="right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for note in notes(result):
        console.print(note, highlight=False, markup=False)


def write(result: dict[str, Any], folder: Path) -> Path:
    """The result as JSON and as a page; the path of the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "cpu" if resolved_device(result["settings"]["device"]).type == "cpu" else "gpu"
    path = folder / f"vocabulary-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    titles, *lines = rows(result)
    table = [titles, ["---:"] * len(titles), *lines]
    page = "\n".join(f"| {' | '.join(line)} |" for line in table) + "\n\n" + "\n".join(notes(result)) + "\n"
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    return path


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
    show(result, console)
    console.print(f"written: {write(result, settings.results)}", markup=False, soft_wrap=True)
    return 0


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a checkpoint or run folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of its datasets")
    parser.add_argument("--nouns", type=Path, required=True, help="WordNet's index.noun")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(Settings.sizes), help="numbers of names")
    for name in ("images", "timed", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default=Settings.device)
    parser.add_argument("--results", type=Path, default=Settings.results)
    given = vars(parser.parse_args(arguments))
    return Settings(**given | {"sizes": tuple(given["sizes"])})


if __name__ == "__main__":
    sys.exit(main())
