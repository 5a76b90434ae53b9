"""Evaluation of one detector on many datasets: with each dataset's own names, and with all names at once."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from metr.config import Config
from metr.data.records import Annotations, ImageRecord, InMemoryAnnotations
from metr.errors import DataError, ModelError
from metr.evaluation.coco import CocoResult, ImageId, evaluate_detections
from metr.evaluation.cross_dataset import CrossDatasetConfusion, count_best_names, cross_dataset_confusion
from metr.evaluation.presence import DEISSUE_KEPT, PresenceRecall, presence_recall
from metr.inference.config import PostprocessConfig, Precision
from metr.inference.postprocess import postprocess
from metr.inference.predictor import device_of, inference
from metr.structures import Batch, Detections
from metr.text.vocabulary import Vocabulary

Mode = Literal["own", "joint"]
Progress = Callable[[str, int, int], None]


class EvaluationConfig(Config):
    """What is evaluated, and how."""

    modes: Annotated[tuple[Mode, ...], Field(min_length=1)] = ("own", "joint")
    """Vocabularies: `own` asks for a dataset's own names, `unified` for all names of all datasets."""
    recall_at: tuple[PositiveInt, ...] = DEISSUE_KEPT
    """Numbers of most likely categories for which the recall of present ones is told."""
    fields: dict[str, str] = Field(default_factory=dict)
    """The field of each dataset, for the cross-dataset confusion; one that is not named is a field of its own."""
    outside_mean: tuple[str, ...] = ()
    """Datasets that are told beside the mean over datasets, not in it."""
    precision: Precision = "fp32"
    """Arithmetic of the network (autocast)."""
    postprocess: PostprocessConfig = PostprocessConfig()
    """How answers become detections; the protocol wants its defaults."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """One split of one dataset: what there is to find, and its images, each at most once."""

    annotations: Annotations
    batches: Iterable[Batch]


@dataclass(frozen=True, kw_only=True)
class ModeReport:
    """One dataset with one vocabulary of `names` names: detection, and recall of presence at each K (0 to 100)."""

    names: int
    coco: CocoResult
    recall: Mapping[int, float | None]


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What the detector did to one dataset. `missing` images could not be read, and are not in any number."""

    name: str
    split: str
    field: str
    in_mean: bool
    images: int
    missing: int
    own: ModeReport | None = None
    joint: ModeReport | None = None

    def ap(self, mode: Mode) -> float | None:
        """COCO AP with one vocabulary; None where that was not evaluated or nothing is to be found."""
        part = self.own if mode == "own" else self.joint
        return None if part is None else part.coco.ap


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What the detector did to each dataset.

    `unannotated` says how training treated unannotated categories, `weights` is the type of those on disk ("float16").
    """

    datasets: tuple[DatasetReport, ...]
    names: int
    confusion: CrossDatasetConfusion | None = None
    unannotated: str | None = None
    weights: str | None = None

    def mean(self, mode: Mode, metric: Literal["ap", "ap50", "ap75", "ar100"] = "ap") -> float | None:
        """The mean over the datasets that belong to it; None where none has a number."""
        parts = [one.own if mode == "own" else one.joint for one in self.datasets if one.in_mean]
        values: list[float | None] = [getattr(part.coco, metric) for part in parts if part is not None]
        scored = [value for value in values if value is not None]
        return sum(scored) / len(scored) if scored else None

    def metrics(self) -> dict[str, float]:
        """The report as flat numbers for curves: "AP" is the mean with own names, or else with all names."""
        own_run = any(one.own is not None for one in self.datasets)
        first: Mode = "own" if own_run else "joint"
        values = {"AP": self.mean(first), "AP50": self.mean(first, "ap50")}
        if own_run:
            values["AP joint vocabulary"] = self.mean("joint")
        for dataset in self.datasets:
            values[f"AP {dataset.name}"] = dataset.ap(first)
        if self.confusion is not None:
            values["cross-dataset confusion"] = self.confusion.pooled
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Question:
    """A vocabulary to run the network with; `columns[c]` is where a dataset's category c stands in it."""

    names: tuple[str, ...]
    text: Float[Tensor, "v t"]
    columns: tuple[int, ...]


@dataclass
class _Answers:
    """What the network has answered so far for the images of a dataset."""

    detections: dict[ImageId, Detections] = field(default_factory=dict)
    recall: PresenceRecall = field(default_factory=PresenceRecall)


class Evaluator:
    """Runs networks on datasets and scores what they find.

    Args:
        text: The embedding of each name of the vocabulary.
        vocabulary: All names; its datasets say which fields have which names.
        config: Modes, recall, fields, post-processing.
        progress: Called after each batch with the dataset's name, its images done, its images in all.

    Raises:
        ModelError: `text` does not have a row for each name.
    """

    def __init__(
        self,
        text: Float[Tensor, "v t"],
        vocabulary: Vocabulary,
        config: EvaluationConfig | None = None,
        progress: Progress | None = None,
    ) -> None:
        if len(text) != len(vocabulary):
            raise ModelError(f"expected a text embedding for each of {len(vocabulary)} names, found {len(text)}")
        self.text, self.vocabulary = text, vocabulary
        self.config, self.progress = config or EvaluationConfig(), progress

    def evaluate(
        self, network: nn.Module, sets: Sequence[EvaluationSet], unannotated: str | None = None
    ) -> EvaluationReport:
        """The report on all of `sets`.

        Args:
            network: Called as `network(images, padding_mask, text)`; its mode is left as it was.
            sets: Splits of datasets, each with a name of its own.
            unannotated: How training treated categories that an image's dataset does not annotate, for the report.

        Raises:
            DataError: no sets, a category that the vocabulary lacks, a dataset without a readable image, a batch of
                images that are not in the annotations, or two sets with one name.
        """
        _check_names([item.annotations.name for item in sets])
        reports: list[DatasetReport] = []
        named: dict[str, Counter[str]] = {}
        for item in sets:
            report, best = self._dataset(network, item)
            reports.append(report)
            if report.joint is not None:
                named[report.name] = best
        return EvaluationReport(
            datasets=tuple(reports),
            names=len(self.vocabulary),
            confusion=self._confusion(named, sets),
            unannotated=unannotated,
        )

    def _dataset(self, network: nn.Module, item: EvaluationSet) -> tuple[DatasetReport, Counter[str]]:
        """The report on one dataset, and how often each name is among the best detections with all names."""
        annotations = item.annotations
        names = tuple(name.strip() for name in annotations.categories)
        questions = self._questions(names, device_of(network))
        # With one dataset both vocabularies are the same: then the network is asked once.
        different = list(dict.fromkeys(questions.values()))
        answers = dict(zip(different, self._answers(network, item, different), strict=True))
        seen = _only(annotations, answers[different[0]].detections)
        parts = {
            question: ModeReport(
                names=len(question.names),
                coco=evaluate_detections(seen, answers[question].detections, names),
                recall=answers[question].recall.shares,
            )
            for question in different
        }
        report = DatasetReport(
            name=annotations.name,
            split=annotations.split,
            field=self.config.fields.get(annotations.name, annotations.name),
            in_mean=annotations.name not in self.config.outside_mean,
            images=len(seen),
            missing=len(annotations) - len(seen),
            own=parts[questions["own"]] if "own" in questions else None,
            joint=parts[questions["joint"]] if "joint" in questions else None,
        )
        found = answers[questions["joint"]].detections if "joint" in questions else {}
        return report, count_best_names(seen, found)

    def _questions(self, names: Sequence[str], device: torch.device) -> dict[Mode, _Question]:
        """The vocabulary of each mode; the same object where they have the same names."""
        rows = [self.vocabulary.index_of(name) for name in names]
        own, text = list(dict.fromkeys(rows)), self.text.to(device)
        unified = _Question(names=self.vocabulary.names, text=text, columns=tuple(rows))
        narrow = _Question(
            names=tuple(self.vocabulary.names[row] for row in own),
            text=text[own],
            columns=tuple(own.index(row) for row in rows),
        )
        questions = {"own": unified if len(own) == len(text) else narrow, "joint": unified}
        return {mode: questions[mode] for mode in self.config.modes}

    def _answers(self, network: nn.Module, item: EvaluationSet, questions: Sequence[_Question]) -> list[_Answers]:
        """Every image through the network with every vocabulary, read once."""
        annotations, device = item.annotations, device_of(network)
        records = {record.image_id: record for record in _records(annotations)}
        answers = [_Answers() for _ in questions]
        done = 0
        for arrived in item.batches:
            batch = arrived.to(device)
            shown = _shown(batch, records, annotations.name)
            for question, answer in zip(questions, answers, strict=True):
                with inference(network, device, self.config.precision):
                    output = network(batch.images, batch.padding_mask, question.text)
                found = postprocess(output, batch.original_sizes, question.names, self.config.postprocess)
                answer.detections.update(zip(batch.image_ids, (one.to("cpu") for one in found), strict=True))
                present = _present(shown, question.columns, len(question.names)).to(device)
                logits = output.categories.presence_logits[-1]
                answer.recall += presence_recall(logits, present, self.config.recall_at)
            done += len(shown)
            if self.progress is not None:
                self.progress(annotations.name, done, len(annotations))
        if not done:
            raise DataError("no image could be read", where=annotations.name, hint="metr inspect lists the issues")
        return answers

    def _confusion(
        self, named: Mapping[str, Counter[str]], sets: Sequence[EvaluationSet]
    ) -> CrossDatasetConfusion | None:
        """None where there is but one field, or detection with all names was not asked for."""
        evaluated = {item.annotations.name: tuple(map(str.strip, item.annotations.categories)) for item in sets}
        categories = {**self.vocabulary.datasets, **evaluated}
        fields = {dataset: self.config.fields.get(dataset, dataset) for dataset in categories}
        if not named or len(set(fields.values())) < 2:
            return None
        return cross_dataset_confusion(named, categories, fields)


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise DataError("no dataset to evaluate", hint="name at least one")
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise DataError(f"two datasets are called {twice[0]!r}", hint="name them apart: first=PATH second=PATH")


def _records(annotations: Annotations) -> Iterator[ImageRecord]:
    return (annotations[index] for index in range(len(annotations)))


def _only(annotations: Annotations, images: Mapping[ImageId, Detections]) -> Annotations:
    """The annotations of the images that the network saw."""
    return InMemoryAnnotations(
        name=annotations.name,
        split=annotations.split,
        categories=annotations.categories,
        records=tuple(record for record in _records(annotations) if record.image_id in images),
        format=annotations.format,
    )


def _shown(batch: Batch, records: Mapping[ImageId, ImageRecord], dataset: str) -> list[ImageRecord]:
    strange = [image_id for image_id in batch.image_ids if image_id not in records]
    if strange:
        raise DataError(f"image {strange[0]!r} is not in the annotations", where=dataset)
    return [records[image_id] for image_id in batch.image_ids]


def _present(records: Sequence[ImageRecord], columns: Sequence[int], names: int) -> Bool[Tensor, "b v"]:
    """Where a category is annotated in an image and has an object there."""
    present = torch.zeros(len(records), names, dtype=torch.bool)
    for row, record in zip(present, records, strict=True):
        labels = {*record.labels[~record.ignore].tolist()}
        if record.annotated is not None:
            labels &= {*record.annotated}
        row[[columns[label] for label in labels]] = True
    return present
