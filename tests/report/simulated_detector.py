"""A detector that is played by a random number generator: it knows the truth and errs at known rates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from metr.data.records import Annotations, ImageRecord
from metr.evaluation.answers import Observation
from metr.evaluation.coco import CocoScorer
from metr.evaluation.results import (
    DatasetReport,
    EvaluationReport,
    ModeReport,
    count_best_names,
    cross_dataset_confusion,
)
from metr.evaluation.runner import Detailed, diagnosed
from metr.structures import Detections


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How often the detector errs, a detection or an object; `elsewhere`: detections of nothing, an image."""

    missed: float = 0.08
    wrong_name: float = 0.03
    twice: float = 0.04
    other_dataset: float = 0.03
    elsewhere: float = 0.4
    jitter: float = 0.05


def simulated(
    sets: Mapping[str, Annotations],
    truth: Mapping[str, Annotations] | None = None,
    seed: int = 0,
    rates: Rates | None = None,
) -> Detailed:
    """An evaluation of the detector on datasets.

    Args:
        sets: What the evaluation believes to be in the images.
        truth: What is really in them, which the detector sees; by default the same.
        seed: Of the detector.
        rates: Of its errors.
    """
    rng, truth, rates = np.random.default_rng(seed), truth or sets, rates or Rates()
    spelled = {name: [category.strip() for category in one.categories] for name, one in sets.items()}
    vocabulary = tuple(dict.fromkeys(category for names in spelled.values() for category in names))
    observations, reports, named = [], [], {}
    for name, believed in sets.items():
        records = [truth[name][row] for row in range(len(truth[name]))]
        joint = {one.image_id: _found(one, spelled[name], vocabulary, rng, rates) for one in records}
        own = {image_id: _only(found, spelled[name]) for image_id, found in joint.items()}
        scorer = CocoScorer(believed, spelled[name])
        parts = [
            ModeReport(names=number, coco=scorer.score(found), recall={1: 50.0, 5: 90.0})
            for number, found in ((len(spelled[name]), own), (len(vocabulary), joint))
        ]
        reports.append(
            DatasetReport(
                name=name,
                split=believed.split,
                domain=name,
                in_mean=True,
                images=len(believed),
                missing=0,
                own=parts[0],
                joint=parts[1],
            )
        )
        observations.append(
            Observation(
                dataset=name,
                mode="joint",
                annotations=believed,
                scorer=scorer,
                names=vocabulary,
                detections=joint,
                presence={one.image_id: _presence(one, spelled[name], vocabulary, rng) for one in records[:40]},
            )
        )
        named[name] = count_best_names(believed, joint)
    confusion = cross_dataset_confusion(named, spelled) if len(sets) > 1 else None
    report = EvaluationReport(
        datasets=tuple(reports), names=len(vocabulary), confusion=confusion, unannotated="negative"
    )
    return diagnosed(report, observations)


def _found(
    record: ImageRecord, own: Sequence[str], vocabulary: Sequence[str], rng: np.random.Generator, rates: Rates
) -> Detections:
    column = {name: row for row, name in enumerate(vocabulary)}
    others = [name for name in vocabulary if name not in own]
    rows: list[tuple[float, int, np.ndarray]] = []

    def add(box: np.ndarray, name: str, score: float) -> None:
        sides = np.tile(box[2:] - box[:2], 2)
        moved = box + rng.normal(0, rates.jitter, 4) * sides
        moved[2:] = np.maximum(moved[2:], moved[:2] + 2)
        rows.append((float(np.clip(score, 0.001, 0.999)), column[name], moved))

    for box, label in zip(record.boxes.astype(float), record.labels.tolist(), strict=True):
        name = own[label]
        if rng.random() >= rates.missed:
            add(box, str(rng.choice(own)) if rng.random() < rates.wrong_name else name, rng.beta(9, 2))
        if rng.random() < rates.twice:
            add(box, name, rng.beta(3, 5))
        if others and rng.random() < rates.other_dataset:
            add(box, str(rng.choice(others)), rng.beta(9, 3))
    for _ in range(rng.poisson(rates.elsewhere)):
        corner = rng.uniform(0, 0.7, 2) * (record.width, record.height)
        size = rng.uniform(0.08, 0.25, 2) * (record.width, record.height)
        add(np.concatenate([corner, corner + size]), str(rng.choice(own)), rng.beta(2, 5))
    for _ in range(12):
        corner = rng.uniform(0, 0.7, 2) * (record.width, record.height)
        add(np.concatenate([corner, corner + 20]), str(rng.choice(vocabulary)), rng.beta(1, 30))
    rows.sort(key=lambda row: -row[0])
    limits = np.array([record.width, record.height] * 2, dtype=float)
    return Detections(
        boxes=torch.tensor(np.array([np.clip(box, 0, limits) for _, _, box in rows]), dtype=torch.float32).reshape(
            -1, 4
        ),
        scores=torch.tensor([score for score, _, _ in rows]),
        labels=torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
        names=tuple(vocabulary),
    )


def _only(found: Detections, names: Sequence[str]) -> Detections:
    """The detections of some names."""
    keep = torch.tensor([found.names[label] in names for label in found.labels.tolist()], dtype=torch.bool)
    return Detections(boxes=found.boxes[keep], scores=found.scores[keep], labels=found.labels[keep], names=found.names)


def _presence(
    record: ImageRecord, own: Sequence[str], vocabulary: Sequence[str], rng: np.random.Generator
) -> torch.Tensor:
    there = {own[label] for label in record.labels.tolist()}
    values = [rng.beta(8, 2) if name in there else rng.beta(1, 9) for name in vocabulary]
    return torch.tensor(values, dtype=torch.float32)
