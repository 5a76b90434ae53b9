"""Runs networks on datasets and scores what they find, with each dataset's own names and with other vocabularies."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metr.data.records import Annotations, ImageRecord, PartlyRead, seeded_order
from metr.errors import DataError, ModelError
from metr.evaluation.answers import Answers, Observation, Question, records_of, seen_annotations
from metr.evaluation.calibration import fit_scores
from metr.evaluation.coco import CocoScorer
from metr.evaluation.results import (
    CrossDatasetConfusion,
    DatasetReport,
    EvaluationConfig,
    EvaluationReport,
    Mode,
    ModeReport,
    count_best_names,
    cross_dataset_confusion,
)
from metr.inference.postprocess import ImageId
from metr.inference.predictor import answers, device_of, inference, project
from metr.inference.selection import name_limits
from metr.models.detector import Detector
from metr.process_group import from_main
from metr.processes import process_count
from metr.structures import Batch, NameLimits
from metr.text.vocabulary import Vocabulary

LOOKED_INTO = 40
"""Images of a dataset of which an `Observation` has the presence of each name."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """One split of one dataset: its annotations, and batches with each of its images at most once.

    Where there are several processes, `batches` has the images that this one is to evaluate.
    """

    annotations: Annotations
    batches: Iterable[Batch]


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """A dataset's report, and how often each name is among the best detections with the joint vocabulary."""

    report: DatasetReport
    best_names: Mapping[str, int]


class Evaluator:
    """Runs networks on batches of datasets and scores what they find, in one process or many.

    Each process runs the network on its own batches. The main process gathers the answers of all and scores them, and
    every process gets the report. They call it together, with the same sets.

    Args:
        text: The embedding of each name of the vocabulary.
        vocabulary: All names; its datasets say which domains have which names.
        config: Modes, recall, domains, post-processing.
        progress: Called after each batch with the dataset's name, and its number of images done (about as many times
            this process's as there are processes) and in all.
        trained: The names of training, and which dataset has which; by default all of `vocabulary`.
        observe: Called in the main process with the answers about each dataset, for whoever wants more than numbers.

    Raises:
        ModelError: `text` does not have a row for each name.
    """

    def __init__(
        self,
        text: Float[Tensor, "v t"],
        vocabulary: Vocabulary,
        config: EvaluationConfig | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        trained: Vocabulary | None = None,
        observe: Callable[[Observation], None] | None = None,
    ) -> None:
        if len(text) != len(vocabulary):
            raise ModelError(f"expected a text embedding for each of {len(vocabulary)} names, found {len(text)}")
        self.text, self.vocabulary = text, vocabulary
        self.config, self.progress = config or EvaluationConfig(), progress
        self.trained, self.observe = trained or vocabulary, observe

    def evaluate(
        self, network: nn.Module, sets: Sequence[EvaluationSet], unannotated: str | None = None
    ) -> EvaluationReport:
        """The report on all of `sets`.

        Args:
            network: A `Detector`, which encodes each image once for all vocabularies, or any other network, called as
                `network(images, padding_mask, text)`. Its mode is left as it was.
            sets: Splits of datasets, each with a name of its own.
            unannotated: How training treated categories that an image's dataset does not annotate, for the report.

        Raises:
            DataError: no sets, a category that the vocabulary lacks, a dataset without a readable image, a batch of
                images that are not in the annotations, or two sets with one name.
        """
        _check_names([item.annotations.name for item in sets])
        reports: list[DatasetReport] = []
        named: dict[str, Mapping[str, int]] = {}
        for item in sets:
            scored = self._dataset(network, item)
            reports.append(scored.report)
            if scored.report.joint is not None:
                named[scored.report.name] = scored.best_names
        return EvaluationReport(
            datasets=tuple(reports),
            names=len(self.vocabulary),
            confusion=self._confusion(named, sets),
            unannotated=unannotated,
        )

    def _dataset(self, network: nn.Module, item: EvaluationSet) -> _Scored:
        """Scores one dataset, whose images all processes have shared among them."""
        annotations = item.annotations
        names = tuple(name.strip() for name in annotations.categories)
        records = [annotations[index] for index in range(len(annotations))]
        questions = self._questions(names, device_of(network))
        # With one dataset both vocabularies are the same: then the network is asked once.
        answered = self._answers(network, item, records, list(dict.fromkeys(questions.values())))
        image_ids = [record.image_id for record in records]
        answered = [one.of_all_processes(image_ids, annotations.name) for one in answered]
        return from_main(lambda: self._scored(annotations, records, questions, answered), _Scored)

    def _scored(
        self,
        annotations: Annotations,
        records: Sequence[ImageRecord],
        questions: Mapping[Mode, Question],
        answered: Sequence[Answers],
    ) -> _Scored:
        """Scores the answers to each question about all images of a dataset."""
        seen = seen_annotations(annotations, records, answered[0].detections)
        if not len(seen):
            raise DataError("no image could be read", where=annotations.name, hint="metr inspect lists the issues")
        scorer = CocoScorer(seen, tuple(name.strip() for name in annotations.categories))
        parts = {
            one.question: ModeReport(
                names=len(one.question.names), coco=scorer.score(one.detections), recall=one.recall.shares
            )
            for one in answered
        }
        observation = _observation(annotations.name, seen, scorer, questions, answered)
        applied = self.config.inference.postprocess.calibration
        fitted = fit_scores(scorer, observation.detections, observation.names, applied)
        report = DatasetReport(
            name=annotations.name,
            split=annotations.split,
            domain=self.config.domains.get(annotations.name, annotations.name),
            in_mean=annotations.name not in self.config.outside_mean,
            images=len(seen),
            missing=len(annotations) - len(seen),
            own=parts[questions["own"]] if "own" in questions else None,
            joint=parts[questions["joint"]] if "joint" in questions else None,
            default=parts[questions["default"]] if "default" in questions else None,
            calibration=fitted.calibration,
            threshold=fitted.threshold,
        )
        if self.observe is not None:
            self.observe(observation)
        found = next((one.detections for one in answered if one.question is questions.get("joint")), {})
        return _Scored(report=report, best_names=count_best_names(seen, found))

    def _questions(self, names: Sequence[str], device: torch.device) -> dict[Mode, Question]:
        """The vocabulary of each mode that the dataset can be asked with; one object where they have the same names."""
        rows = [self.vocabulary.index_of(name) for name in names]
        own, text = list(dict.fromkeys(rows)), self.text.to(device)
        joint = Question(names=self.vocabulary.names, text=text, columns=tuple(rows))
        narrow = Question(
            names=tuple(self.vocabulary.names[row] for row in own),
            text=text[own],
            columns=tuple(own.index(row) for row in rows),
        )
        questions: dict[Mode, Question] = {"own": joint if len(own) == len(text) else narrow, "joint": joint}
        asked = [self.vocabulary.index_of(name) for name in self.config.default_names]
        if set(own) == set(asked) and asked:
            questions["default"] = questions["own"]
        elif set(own) < set(asked):
            columns = tuple(asked.index(row) for row in rows)
            questions["default"] = Question(names=self.config.default_names, text=text[asked], columns=columns)
        return {mode: questions[mode] for mode in self.config.modes if mode in questions}

    def _answers(
        self,
        network: nn.Module,
        item: EvaluationSet,
        records: Sequence[ImageRecord],
        questions: Sequence[Question],
    ) -> list[Answers]:
        """The network's answers to each question about the images of this process; each is read and encoded once."""
        dataset, device = item.annotations.name, device_of(network)
        by_id = {record.image_id: record for record in records}
        looked = _looked_into(records) if self.observe is not None else frozenset[ImageId]()
        answered = [
            Answers(question=question, recall_at=self.config.recall_at, looked_into=looked) for question in questions
        ]
        precision = self.config.inference.precision
        with inference(network, device, precision):
            asked = [
                (project(network, question.text), self._limits(network, question.names, device))
                for question in questions
            ]
        done = 0
        for arrived in item.batches:
            batch = arrived.to(device)
            shown = records_of(batch, by_id, dataset)
            with inference(network, device, precision):
                outputs = answers(network, batch.images, batch.padding_mask, asked)
            for output, answer in zip(outputs, answered, strict=True):
                answer.add(output, batch, shown, self.config.inference.postprocess)
            done += len(shown)
            if self.progress is not None:  # the others have done about as many
                self.progress(dataset, min(done * process_count(), len(records)), len(records))
        return answered

    def _limits(self, network: nn.Module, names: Sequence[str], device: torch.device) -> NameLimits | None:
        """The limits of each name; None for a network that knows none."""
        if not isinstance(network, Detector):
            return None
        return name_limits(names, self.trained, network.config, self.config.inference.selection).to(device)

    def _confusion(
        self, named: Mapping[str, Mapping[str, int]], sets: Sequence[EvaluationSet]
    ) -> CrossDatasetConfusion | None:
        """The confusion; None with a single domain, or without the joint vocabulary."""
        evaluated = {item.annotations.name: _names_of_files(item.annotations) for item in sets}
        categories = {**self.vocabulary.datasets, **evaluated}
        domains = {dataset: self.config.domains.get(dataset, dataset) for dataset in categories}
        if not named or len(set(domains.values())) < 2:
            return None
        return cross_dataset_confusion(named, categories, domains)


def _names_of_files(annotations: Annotations) -> tuple[str, ...]:
    """The names of a dataset, those included that are not read: whoever finds these names no other dataset's."""
    unread = annotations.unknown_names if isinstance(annotations, PartlyRead) else ()
    return tuple(map(str.strip, (*annotations.categories, *unread)))


def _observation(
    dataset: str,
    seen: Annotations,
    scorer: CocoScorer,
    questions: Mapping[Mode, Question],
    answered: Sequence[Answers],
) -> Observation:
    """The answers to the question that detection is nearest to (`DatasetReport.asked`)."""
    order: tuple[Mode, ...] = ("default", "joint", "own")
    mode = next(one for one in order if one in questions)
    (answer,) = (one for one in answered if one.question is questions[mode])
    return Observation(
        dataset=dataset,
        mode=mode,
        annotations=seen,
        scorer=scorer,
        names=answer.question.names,
        detections=answer.detections,
        presence=answer.presence,
    )


def _looked_into(records: Sequence[ImageRecord]) -> frozenset[ImageId]:
    """Some images of a dataset, which their ids alone decide."""
    order = seeded_order([str(record.image_id) for record in records])
    return frozenset(records[number].image_id for number in order[:LOOKED_INTO].tolist())


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise DataError("no dataset to evaluate", hint="name at least one")
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise DataError(f"two datasets are called {twice[0]!r}", hint="name them apart: first=PATH second=PATH")
