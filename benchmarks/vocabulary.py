"""What do thousands of names cost in time of inference, and in knowing which of them an image shows?

    python benchmarks/vocabulary.py --run RUN --data FOLDER --nouns index.noun

Asks a trained detector for 80, 365, 1,203, 5,000 and 20,000 names: first those of its datasets, then distractors, nouns
of WordNet's index (`--nouns`: the file index.noun, of the Debian package wordnet-base for example). Images are those of
the datasets' evaluation splits, evenly spread.

    time      seconds an image, from its pixels in memory to detections, one image at a time; sizes take turns on every
              image, so that whatever else the machine does hits all. A ratio is the median of the images'
    recall    share of the pairs (image, name present in it) whose name is among the K most likely, with the shortlist
              and, on the same names, with every name looked at; a detector without a shortlist is only timed
    text      seconds that the text encoder takes for a name that it has not met

One thread of an AMD EPYC, a METR of 29 names at 224 pixels (results/vocabulary-cpu.json): 20,000 names take 1.26 times
as long as 80 (72 and 60 ms; 739 ms if every name is looked at), and the shortlist costs no recall at 20 (93.4; 91.8).

Results: `results/vocabulary-DEVICE.json` and `.md`.
"""

import copy
import random
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from rich.progress import track
from torch import Tensor

import report
import runner
from metr.config import Tree
from metr.data.collate import padding_mask, stack_images
from metr.data.config import AugmentationConfig
from metr.data.dataset import DetectionDataset, Example
from metr.data.images import read_image
from metr.data.joint import JointData, open_joint
from metr.data.transforms import build_transforms
from metr.devices import resolved_device
from metr.errors import DataError
from metr.evaluation.results import PresenceRecall, presence_recall
from metr.inference.predictor import Predictor, inference
from metr.model import METR
from metr.models.detector import Detector
from metr.text.config import TextEncoderConfig
from metr.text.encoder import TextEncoder

TIME_BAR, RECALL_BAR = 1.3, 2.0  # times the smallest vocabulary's; points of 100
KEPT = (1, 5, 10, 20)
SHORTLIST, EVERYTHING = "shortlist", "every name"
SIZES = (80, 365, 1203, 5000, 20000)
LEMMA = re.compile(r"[a-z][a-z_'-]*")
# names whose embedding is timed, and names that are embedded (and kept on disk) together
TIMED_NAMES, CHUNK = 64, 500


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image as it is stored and as the network sees it; `timed`: not for recall alone."""

    pixels: UInt8[np.ndarray, "h w 3"]
    example: Example
    timed: bool

    def present(self, size: int) -> Bool[Tensor, "1 v"]:
        """Where a name among the first `size` is annotated and has an object; the rest is distractors."""
        targets = self.example.targets
        shown = targets.present & targets.annotated
        return torch.nn.functional.pad(shown, (0, max(0, size - shown.shape[1])))[:, :size]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; see `runner.exit_status`."""
    parser = runner.option_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a checkpoint or run folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder of its datasets, one folder each")
    parser.add_argument("--nouns", type=Path, required=True, help="WordNet's index.noun")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of names")
    parser.add_argument("--images", type=int, default=20, help="of each dataset")
    parser.add_argument("--timed", type=int, default=3, help="images of each dataset that are timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch likes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    given = vars(parser.parse_args(arguments))

    def work() -> bool:
        if given["threads"]:
            torch.set_num_threads(given["threads"])
        result = measure(given)
        name = "cpu" if resolved_device(given["device"]).type == "cpu" else "gpu"
        report.write_result(given["results"] / f"vocabulary-{name}", result, page(result))
        return True

    return runner.exit_status(work)


def measure(options: Mapping[str, Any]) -> Tree:
    """The result as the JSON file has it."""
    commit, sizes = runner.commit(), options["sizes"]
    model = METR.from_pretrained(options["run"], device=resolved_device(options["device"]))
    there = [name for name in sorted(model.vocabulary.datasets) if (options["data"] / name).is_dir()]
    if not there:
        what = f"none of the datasets of training: {', '.join(sorted(model.vocabulary.datasets))}"
        raise DataError(what, where=options["data"], hint="name the folder that holds them with --data")
    joint = open_joint([f"{name}={options['data'] / name}" for name in there])
    names = with_nouns(joint.vocabulary.names, options["nouns"], max(sizes), options["seed"])
    text, embedding = embedded(model, names)
    samples = sampled(joint, model, options)
    contenders = {EVERYTHING: without_shortlist(model.network)}
    if model.network.category_extraction.shortlist is not None:
        contenders = {SHORTLIST: model.network, **contenders}
    predictors = {
        name: [Predictor(network, text[:size], names[:size], model.resize) for size in sizes]
        for name, network in contenders.items()
    }
    seconds = timed(predictors, [one.pixels for one in samples if one.timed])
    recalls = recalled(contenders, [text[:size] for size in sizes], samples) if SHORTLIST in contenders else {}
    categories = model.checkpoint.model.categories
    kept = ("sizes", "images", "timed", "seed", "device", "threads")
    return {
        **runner.circumstances("vocabulary", commit, options["device"]),
        "settings": {
            **{key: options[key] for key in kept},
            "shortlist": categories.shortlist,
            "kept": categories.kept,
            "width": model.checkpoint.model.width,
            "pixels": model.resize.size,
            "trained_names": len(model.names),
            "steps": model.checkpoint.training.get("step"),
        },
        "images": {"timed": sum(one.timed for one in samples), "recall": len(samples) if recalls else 0},
        "text": embedding,
        **figures(sizes, seconds, recalls, categories.kept),
    }


def with_nouns(known: Sequence[str], nouns: Path, number: int, seed: int) -> tuple[str, ...]:
    """The known names and then nouns that are none of them, in an order that the seed decides; `number` in all.

    Raises:
        DataError: the file is missing, or holds too few nouns.
    """
    if not nouns.is_file():
        hint = "give WordNet's index.noun with --nouns; the Debian package wordnet-base has it"
        raise DataError("no such file", where=nouns, hint=hint)
    # the file begins with its licence, in lines that begin with a space
    lemmas = {line.split(" ", 1)[0] for line in nouns.read_text(encoding="utf-8").splitlines()}
    taken = {re.sub(r"[\s_-]+", " ", name).strip().lower() for name in known}
    fresh = sorted({lemma.replace("_", " ") for lemma in lemmas if LEMMA.fullmatch(lemma)} - taken)
    random.Random(seed).shuffle(fresh)
    if len(known) + len(fresh) < number:
        raise DataError(f"expected {number - len(known)} nouns, found {len(fresh)}", where=nouns)
    return (*known, *fresh)[:number]


def embedded(model: METR, names: Sequence[str]) -> tuple[Float[Tensor, "v t"], dict[str, float]]:
    """The text embeddings, and what the encoder takes for a new name; what it has embedded before, it keeps on disk."""
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    text = torch.cat([model.embed(chunk, tell=False) for chunk in track(chunks, "embedding the names")])
    described = {key: value for key, value in model.checkpoint.text_encoder.items() if key != "identity"}
    with tempfile.TemporaryDirectory() as fresh:
        encoder = TextEncoder(TextEncoderConfig.checked(described, where="text_encoder"), cache_root=Path(fresh))
        encoder.embed(names[-1:])  # loads the language model
        some = names[-1 - TIMED_NAMES : -1]
        began = time.perf_counter()
        encoder.embed(some)
        seconds = (time.perf_counter() - began) / len(some)
    return text, {"names": len(names), "seconds_a_new_name": seconds}


def sampled(joint: JointData, model: METR, options: Mapping[str, Any]) -> list[Sample]:
    """Some images of each dataset's evaluation split, evenly spread; every so often one that is timed."""
    transforms, samples = build_transforms(AugmentationConfig(resize=model.resize), training=False), []
    for annotations in joint.evaluation().values():
        dataset = DetectionDataset(annotations, joint.vocabulary, transforms)
        some = report.evenly_spread(len(dataset), options["images"])
        few = {some[place] for place in report.evenly_spread(len(some), options["timed"])}
        for index in some:
            if isinstance(example := dataset[index], Example):
                pixels = read_image(annotations[index].path)
                samples.append(Sample(pixels=pixels, example=example, timed=index in few))
    return samples


def without_shortlist(network: Detector) -> Detector:
    """The same weights, and every name is looked at."""
    plain = copy.deepcopy(network)
    plain.category_extraction.shortlist = None
    return plain


def timed(predictors: Mapping[str, Sequence[Predictor]], images: Sequence[np.ndarray]) -> dict[str, list[list[float]]]:
    """Seconds of each contender, image and size."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in predictors}
    # the first image is looked at twice, and counted once it is warm
    for turn, pixels in enumerate(track([images[0], *images], "time")):
        for name, sized in predictors.items():
            row = [0.0] * len(sized)
            for place in range(len(sized)):
                index = (place + turn) % len(sized)
                began = time.perf_counter()
                sized[index].detect(pixels)  # its detections come to the CPU, so nothing is left running
                row[index] = time.perf_counter() - began
            seconds[name].append(row)
    return {name: rows[1:] for name, rows in seconds.items()}


def recalled(
    contenders: Mapping[str, Detector], texts: Sequence[Tensor], samples: Sequence[Sample]
) -> dict[str, list[PresenceRecall]]:
    """Presence recall of each contender at each size; backbone and encoder see an image once."""
    first = next(iter(contenders.values()))
    device = next(first.parameters()).device
    recalls = {name: [PresenceRecall() for _ in texts] for name in contenders}
    with inference(first, device):
        projected = [first.project(text.to(device)) for text in texts]
        for sample in track(samples, "recall"):
            image, pixels = sample.example.image, stack_images([sample.example.image])
            mask = padding_mask([(image.shape[1], image.shape[2])], pixels.shape[-2], pixels.shape[-1]).to(device)
            memory = first.encoder(first.backbone(pixels.to(device).to(torch.float32) / 255), mask)
            for name, network in contenders.items():
                for place, text in enumerate(projected):
                    logits = network.category_extraction(memory, text).presence_logits[-1]
                    recalls[name][place] += presence_recall(logits, sample.present(len(texts[place])).to(device), KEPT)
    return recalls


def figures(
    sizes: Sequence[int], seconds: Mapping[str, Any], recalls: Mapping[str, Sequence[PresenceRecall]], kept: int
) -> Tree:
    """Medians, ratios and recalls of every size, and the bars."""
    smallest, at = sizes.index(min(sizes)), max(k for k in KEPT if k <= kept)
    by_size: dict[str, Tree] = {}
    for place, size in enumerate(sizes):
        by_size[str(size)] = {
            "seconds": {name: median(row[place] for row in rows) for name, rows in seconds.items()},
            "ratio": {name: median(row[place] / row[smallest] for row in rows) for name, rows in seconds.items()},
            "recall": {name: {str(k): it for k, it in one[place].shares.items()} for name, one in recalls.items()},
        }
        for one in recalls.values():
            by_size[str(size)]["pairs"] = one[place].pairs
    first = next(iter(seconds))
    bars = {"time_ratio": report.bar(by_size[str(max(sizes))]["ratio"][first], TIME_BAR)}
    if recalls:
        shares = [[one["recall"][name][str(at)] or 0.0 for name in (EVERYTHING, SHORTLIST)] for one in by_size.values()]
        bars["recall_lost"] = report.bar(max(every - some for every, some in shares), RECALL_BAR)
    return {"contender": first, "recall_at": at, "bars": bars, "sizes": by_size}


def page(result: Mapping[str, Any]) -> str:
    """The page of a result: the table, and what is to be said beside it."""
    first, at, settings, bars = (result[key] for key in ("contender", "recall_at", "settings", "bars"))
    rows = [
        [
            f"{int(size):,}",
            f"{1000 * one['seconds'][first]:.0f}",
            f"{one['ratio'][first]:.2f}",
            f"{1000 * one['seconds'][EVERYTHING]:.0f}",
            *(report.number(one["recall"].get(name, {}).get(str(at))) for name in (SHORTLIST, EVERYTHING)),
        ]
        for size, one in result["sizes"].items()
    ]
    head = ["names", "ms an image", "ratio", "ms, every name looked at", f"recall at {at}", "every name looked at"]
    notes = [f"{report.facts(result)}, seed {settings['seed']}."]
    if first == SHORTLIST:
        lost = f"{bars['recall_lost']['value']:.2f} points ({report.bar_text(bars['recall_lost'])})"
        notes.append(f"Shortlist of {settings['shortlist']} names, {settings['kept']} kept.")
        notes.append(f"Most recall lost to the shortlist: {lost}.")
    else:
        notes.append("This detector was trained without a shortlist (`categories.shortlist` is 0): times only.")
    ratio = f"{bars['time_ratio']['value']:.2f} ({report.bar_text(bars['time_ratio'])})"
    notes.append(f"Time at {max(map(int, result['sizes'])):,} names against the fewest: {ratio}.")
    notes.append(f"Embedding a new name: {1000 * result['text']['seconds_a_new_name']:.0f} ms, once.")
    return report.joined(report.table(head, rows, left=0), "\n".join(notes))


if __name__ == "__main__":
    sys.exit(main())
