"""Evaluation's configuration and results: reports, presence recall, cross-dataset confusion."""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from rich.console import Console
from torch import Tensor

from metr.checkpoint import find_checkpoint, load_checkpoint, update_detection
from metr.config import Calibration, Config
from metr.data.records import Annotations
from metr.errors import DataError, counted
from metr.evaluation.calibration import mean_by_objects
from metr.evaluation.coco import CocoResult
from metr.evaluation.diagnosis import Diagnosis
from metr.inference.config import InferenceConfig
from metr.inference.postprocess import ImageId
from metr.structures import Detections
from metr.text.same_names import PromptChoice

DEFAULT_KEPT = (1, 5, 10, 20)
# fewer objects of a dataset say little of its scores
_FEW_OBJECTS = 30
NO_DOMAIN = "no domain"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PresenceRecall:
    """Counts, summed over batches: of `pairs` (image, category present in it), `hits[k]` are kept at `k`.

    A pair is kept at `k` if its category is among the image's `k` most likely ones.
    """

    pairs: int = 0
    hits: Mapping[int, int] = field(default_factory=dict)

    def __add__(self, other: "PresenceRecall") -> "PresenceRecall":
        """The counts of both."""
        kept = sorted({*self.hits, *other.hits})
        hits = {k: self.hits.get(k, 0) + other.hits.get(k, 0) for k in kept}
        return PresenceRecall(pairs=self.pairs + other.pairs, hits=hits)

    @property
    def shares(self) -> dict[int, float | None]:
        """Recall at each k on the scale 0 to 100; None where nothing was present."""
        return {k: 100 * hits / self.pairs if self.pairs else None for k, hits in self.hits.items()}


def presence_recall(
    logits: Float[Tensor, "b v"], present: Bool[Tensor, "b v"], kept: Sequence[int] = DEFAULT_KEPT
) -> PresenceRecall:
    """Counts how many present categories are among the most likely ones.

    Args:
        logits: Presence logits of the last extraction block; ties go to the earlier row. A category at -inf was not
            shortlisted, and is kept at no `k`.
        present: Where a category is annotated and has an object.
        kept: The numbers of categories to keep.
    """
    order = logits.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)[present]
    possible = ~logits[present].isneginf()
    return PresenceRecall(pairs=rank.numel(), hits={k: int((possible & (rank < k)).sum()) for k in kept})


@dataclass(frozen=True, kw_only=True)
class CrossDatasetConfusion:
    """Which domains the best detections name.

    `counts[i][j]` is how many detections in images of `domains[i]` name `domains[j]`. A name of several domains counts
    for the image's own domain if that is one of them, else for each in equal parts. `shares` is the share that names
    another domain, 0 to 100, for each dataset; None: nothing detected. Their mean is `EvaluationReport.mean_confusion`.
    """

    domains: tuple[str, ...]
    counts: tuple[tuple[float, ...], ...]
    shares: Mapping[str, float | None]


def count_best_names(annotations: Annotations, detections: Mapping[ImageId, Detections]) -> Counter[str]:
    """How often each name occurs among the n best detections of each image, n being its number of objects.

    This leaves out the long tail of weak detections.

    Args:
        annotations: What the images show; crowds are no objects.
        detections: Detections with the joint vocabulary, by image id; images without an entry add nothing.
    """
    names: Counter[str] = Counter()
    for index in range(len(annotations)):
        record = annotations[index]
        found = detections.get(record.image_id)
        if found is not None:
            objects = int((~record.ignore).sum())
            best = found.scores.argsort(descending=True, stable=True)[:objects]
            names.update(found.names[label] for label in found.labels[best].tolist())
    return names


def cross_dataset_confusion(
    named: Mapping[str, Mapping[str, int]],
    categories: Mapping[str, Sequence[str]],
    domains: Mapping[str, str] | None = None,
) -> CrossDatasetConfusion:
    """Sums up which domains the detections in the images of each dataset name.

    Args:
        named: For each dataset, how often each name was detected in its images (`count_best_names`).
        categories: The names of each dataset, those of datasets that were not evaluated included.
        domains: The domain of each dataset; a dataset that is not in it is a domain of its own.
    """
    domain_of = {dataset: (domains or {}).get(dataset, dataset) for dataset in (*named, *categories)}
    owners = _owners(categories, domain_of)
    order = list(dict.fromkeys(domain_of.values()))
    if any(name not in owners for names in named.values() for name in names):
        order.append(NO_DOMAIN)
    row = {domain: number for number, domain in enumerate(order)}
    counts = np.zeros((len(order), len(order)))
    shares: dict[str, float | None] = {}
    for dataset, names in named.items():
        here, own = np.zeros(len(order)), domain_of[dataset]
        for name, number in names.items():
            owning = owners.get(name, (NO_DOMAIN,))
            counted = (own,) if own in owning else owning
            here[[row[domain] for domain in counted]] += number / len(counted)
        counts[row[own]] += here
        shares[dataset] = _share(here.sum() - here[row[own]], here.sum())
    return CrossDatasetConfusion(
        domains=tuple(order),
        counts=tuple(tuple(line) for line in counts.tolist()),
        shares=shares,
    )


def _owners(categories: Mapping[str, Sequence[str]], domain_of: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The domains that have each name."""
    owners: dict[str, dict[str, None]] = {}
    for dataset, names in categories.items():
        for name in names:
            owners.setdefault(name, {})[domain_of[dataset]] = None
    return {name: tuple(domains) for name, domains in owners.items()}


def _share(part: float, whole: float) -> float | None:
    return float(100 * part / whole) if whole else None


Mode = Literal["own", "joint", "default"]
MODES: tuple[Mode, ...] = ("own", "joint")
EVERY_MODE: tuple[Mode, ...] = ("own", "default", "joint")
"""All vocabularies, from the narrowest to the widest."""


class EvaluationConfig(Config):
    """What is evaluated, and how."""

    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = MODES
    """Vocabularies to evaluate with: `own`, each dataset's own names; `joint`, all names of all datasets; `default`,
    the names in `default_names`."""
    default_names: tuple[str, ...] = ()
    """What the detector looks for by default. A dataset that has other names is not evaluated with these."""
    prompts: PromptChoice = "trained"
    """What becomes of a dataset's prompt for a name that was trained without it: `trained` leaves it out, so that the
    name keeps what was learnt of it; `given` uses it."""
    recall_at: tuple[PositiveInt, ...] = DEFAULT_KEPT
    """Values of K for presence recall: the recall of present categories among the K most likely ones."""
    domains: dict[str, str] = Field(default_factory=dict)
    """The domain of each dataset, for the cross-dataset confusion; one that is not named is a domain of its own."""
    outside_mean: tuple[str, ...] = ()
    """Datasets that are reported, but left out of the mean over datasets."""
    inference: InferenceConfig = InferenceConfig()
    """How images go through the network, and what becomes of its outputs. AP needs a score threshold of 0."""


@dataclass(frozen=True, kw_only=True)
class ModeReport:
    """One dataset with one vocabulary of `names` names: detection, and recall of presence at each K (0 to 100)."""

    names: int
    coco: CocoResult
    recall: Mapping[int, float | None]


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """The results on one dataset. `missing` images could not be read, and are not in any number.

    `diagnosis` says what is wrong with the detections of `asked`; None where nobody looked. `calibration` makes
    scores, as the network gives them, probabilities of being right, and `threshold` is such a score, from which
    detections are shown; no name has one where none is right. `seen` says that training has seen these images, as far
    as that is known.
    """

    name: str
    split: str
    domain: str
    in_mean: bool
    images: int
    missing: int
    own: ModeReport | None = None
    joint: ModeReport | None = None
    default: ModeReport | None = None
    diagnosis: Diagnosis | None = None
    calibration: Mapping[str, Calibration] = field(default_factory=dict)
    threshold: float | None = None
    seen: str = ""

    def part(self, mode: Mode) -> ModeReport | None:
        """The report with one vocabulary; None where that was not evaluated."""
        return {"own": self.own, "joint": self.joint, "default": self.default}[mode]

    @property
    def asked(self) -> ModeReport | None:
        """The report with the vocabulary that detection is nearest to: the default names, all names, or its own."""
        return self.default or self.joint or self.own

    def ap(self, mode: Mode) -> float | None:
        """COCO AP with one vocabulary; None without such an evaluation or without objects."""
        part = self.part(mode)
        return None if part is None else part.coco.ap


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The results on each dataset.

    `unannotated` says how training treated unannotated categories, `weights` is their type on disk ("float16").
    `trained_on` are the datasets of training; empty where they are not known.
    """

    datasets: tuple[DatasetReport, ...]
    names: int
    confusion: CrossDatasetConfusion | None = None
    unannotated: str | None = None
    weights: str | None = None
    trained_on: tuple[str, ...] = ()

    @property
    def modes(self) -> list[Mode]:
        """The vocabularies with which every dataset was evaluated."""
        return [mode for mode in EVERY_MODE if all(one.part(mode) is not None for one in self.datasets)]

    def mean(self, mode: Mode, metric: Literal["ap", "ap50", "ap75", "ar100"] = "ap") -> float | None:
        """The mean over the datasets that belong to it; None where none has a number."""
        parts = [one.part(mode) for one in self.datasets if one.in_mean]
        values: list[float | None] = [getattr(part.coco, metric) for part in parts if part is not None]
        scored = [value for value in values if value is not None]
        return sum(scored) / len(scored) if scored else None

    @property
    def mean_confusion(self) -> float | None:
        """Cross-dataset confusion, the mean over the datasets that belong to it, as of AP; None where none has it."""
        shares = {} if self.confusion is None else self.confusion.shares
        known = [share for one in self.datasets if one.in_mean and (share := shares.get(one.name)) is not None]
        return sum(known) / len(known) if known else None

    def calibration(self) -> dict[str, Calibration]:
        """What makes scores, as the network gives them, probabilities of being right, by name.

        They are those of the question that detection asks (`DatasetReport.asked`): the more names are asked for, the
        less the same score says. A name of several datasets has their mean, weighted by its objects.
        """
        means = self._means({one.name: one.calibration for one in self.datasets})
        return {name: (scale, shift) for name, (scale, shift) in means.items()}

    def thresholds(self) -> dict[str, float]:
        """The scores from which detections are shown, by name, once they are calibrated; means as of `calibration`."""
        known = {one.name: one.threshold for one in self.datasets if one.threshold is not None}
        own = {
            one.name: dict.fromkeys(one.calibration, (known[one.name],)) for one in self.datasets if one.name in known
        }
        return {name: round(threshold, 2) for name, (threshold,) in self._means(own).items()}

    def _means(self, values: Mapping[str, Mapping[str, tuple[float, ...]]]) -> dict[str, tuple[float, ...]]:
        """The mean of each name's values, which are given by dataset, weighted by the objects of the name there."""
        several: dict[str, list[tuple[tuple[float, ...], int]]] = {}
        for dataset in self.datasets:
            objects = {} if dataset.asked is None else {one.name: one.objects for one in dataset.asked.coco.categories}
            for name, own in values.get(dataset.name, {}).items():
                several.setdefault(name, []).append((own, objects.get(name, 0)))
        return {name: mean_by_objects(parts) for name, parts in several.items()}

    def with_seen(self, facts: Mapping[str, str]) -> "EvaluationReport":
        """The report with what is known, by dataset, of images that training has seen."""
        return replace(self, datasets=tuple(replace(one, seen=facts.get(one.name, "")) for one in self.datasets))

    def metrics(self) -> dict[str, float]:
        """The report as flat numbers for curves: "AP" is the mean with own names, or else with the joint vocabulary."""
        own_run = any(one.own is not None for one in self.datasets)
        first: Mode = "own" if own_run else "joint"
        values = {"AP": self.mean(first), "AP50": self.mean(first, "ap50")}
        if own_run:
            values["AP default names"] = self.mean("default")
            values["AP joint vocabulary"] = self.mean("joint")
        for dataset in self.datasets:
            values[f"AP {dataset.name}"] = dataset.ap(first)
        if self.confusion is not None:
            values["cross-dataset confusion"] = self.mean_confusion
        return {name: value for name, value in values.items() if value is not None}


def fitted_scores(report: EvaluationReport, names: Collection[str]) -> tuple[dict[str, Calibration], dict[str, float]]:
    """The calibration of each of these names that the report has one of, and the thresholds of such names.

    Warns of those that are fitted to images of training.
    """
    for one in report.datasets:
        if one.calibration and one.seen:
            message = "%s: scores are fitted to images that training has seen, and promise too much on others"
            _logger.warning(message, one.name)
    found = {name: one for name, one in report.calibration().items() if name in names}
    return found, {name: score for name, score in report.thresholds().items() if name in found}


def store_calibration(report: EvaluationReport, run: Path, console: Console | None = None) -> None:
    """Keeps with a checkpoint, or the best one of a run, what makes scores probabilities and from which they are shown.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be written.
        DataError: no object of a trained name was found in the evaluation.
    """
    folder = find_checkpoint(run)
    checkpoint = load_checkpoint(folder)
    found, thresholds = fitted_scores(report, checkpoint.vocabulary.names)
    if not found:
        raise DataError("no object of a trained name was found, so scores cannot be calibrated", where=run)
    for one in report.datasets:
        if one.calibration and one.asked is not None and one.asked.coco.objects < _FEW_OBJECTS:
            names, objects = counted(len(one.calibration), "name"), counted(one.asked.coco.objects, "object")
            message = "%s: scores of %s are fitted to %s; evaluate on more images to be surer of them"
            _logger.warning(message, one.name, names, objects)
    update_detection(folder, checkpoint.detection.calibrated(found, thresholds))
    if console is not None:
        line = (
            f"calibration of {counted(len(found), 'name')} is kept in {folder}: scores are probabilities from there on"
            f"{_shown_from(thresholds.values())}"
        )
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _shown_from(thresholds: Collection[float]) -> str:
    """From which scores detections are shown, in words."""
    if not thresholds:
        return ""
    least, most = min(thresholds), max(thresholds)
    where = f"a score of {least:.2f}" if least == most else f"scores of {least:.2f} to {most:.2f}, by name"
    return f", and detections are shown from {where}"


def as_dict(report: EvaluationReport) -> dict[str, Any]:
    """The report as plain values, the means over datasets included; the inverse is `from_dict`."""
    values: dict[str, Any] = msgspec.to_builtins(report, str_keys=True)
    metrics: tuple[Literal["ap", "ap50", "ap75", "ar100"], ...] = ("ap", "ap50", "ap75", "ar100")
    means = {mode: {metric: report.mean(mode, metric) for metric in metrics} for mode in EVERY_MODE}
    mean: dict[str, Any] = {mode: mean for mode, mean in means.items() if mean["ap"] is not None}
    if report.mean_confusion is not None:
        mean["confusion"] = report.mean_confusion
    return {"mean": mean, **values}


def from_dict(values: dict[str, Any], *, where: object = None) -> EvaluationReport:
    """The report that `as_dict` wrote.

    Raises:
        DataError: something is missing or of the wrong kind.
    """
    try:
        return msgspec.convert(values, EvaluationReport, str_keys=True)
    except msgspec.ValidationError as error:
        raise DataError(f"not an evaluation report: {error}", where=where) from None
