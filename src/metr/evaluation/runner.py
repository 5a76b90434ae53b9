"""Evaluates one detector on many datasets, with each dataset's own names and with the joint vocabulary."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from metr.data.config import AugmentationConfig, LoaderConfig, ResizeConfig
from metr.data.dataset import DetectionDataset
from metr.data.guard import check_usable
from metr.data.images import exif_oriented
from metr.data.joint import open_joint
from metr.data.loading import build_evaluation_loader, explained_loss_of_workers
from metr.data.records import Annotations, ImageRecord, InMemoryAnnotations
from metr.data.transforms import build_transforms
from metr.errors import DataError, ModelError
from metr.evaluation.coco import CocoScorer
from metr.evaluation.report import show, write_report
from metr.evaluation.results import (
    EVERY_MODE,
    MODES,
    CrossDatasetConfusion,
    DatasetReport,
    EvaluationConfig,
    EvaluationReport,
    Mode,
    ModeReport,
    PresenceRecall,
    count_best_names,
    cross_dataset_confusion,
    presence_recall,
)
from metr.inference.postprocess import ImageId, postprocess
from metr.inference.predictor import answers, device_of, inference, project
from metr.inference.selection import name_limits
from metr.model import METR
from metr.models.detector import Detector
from metr.structures import Batch, Detections, NameLimits
from metr.text.same_names import told_aliases, with_training
from metr.text.vocabulary import Vocabulary


def evaluate(
    source: METR | str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    split: str | None = None,
    device: str = "auto",
    config: EvaluationConfig | None = None,
    allow_empty: bool = False,
    console: Console | None = None,
) -> EvaluationReport:
    """Measures average precision on datasets, with each one's own names and with the joint vocabulary.

    The joint vocabulary holds the names of the given datasets together with those of training. Where the detector looks
    for some names by default, those of its fine-tuning, it is asked for these as well.

    Args:
        source: A model, a checkpoint folder, a run folder, or a name on the hub.
        data: One dataset or several: folders, name=folder, or YAML files that list some; training need not have seen
            them.
        out: The folder where the report goes as JSON, Markdown and a chart, made if missing; None writes nothing.
        split: The split of each dataset; by default val, or test where a dataset has neither train nor val.
        device: Where the network runs, if it is loaded here.
        config: Modes, prompts, domains, batch size and post-processing.
        allow_empty: Whether splits without a box are evaluated on, and splits of which most was lost while reading.
        console: Where progress and the table are shown.

    Raises:
        DataError, CheckpointError: something is missing or does not fit.
    """
    console, config = console or Console(quiet=True), config or EvaluationConfig()
    joint = open_joint([str(data)] if isinstance(data, str | Path) else [str(one) for one in data])
    for one in () if allow_empty else joint.sources:
        check_usable(one, split or one.evaluation_split()[0])
    model = source if isinstance(source, METR) else METR.from_pretrained(source, device=device)
    aliases = model.checkpoint.detection.aliases
    joint = joint.renamed({one.name: told_aliases(one.name, one.categories, aliases) for one in joint.sources})
    vocabulary = with_training(joint.vocabulary, model.vocabulary, config.prompts)
    config = _with_default_names(config, model.checkpoint.detection.names)
    loader = LoaderConfig(batch_size=config.inference.batch_size)
    text, sets = model.embed(vocabulary), joint.evaluation(split)
    runner = EvaluationRunner(vocabulary, text, sets, model.resize, loader, config, model.vocabulary)
    unannotated = model.checkpoint.training.get("unannotated")
    report = runner.report(model.network, console, None if unannotated is None else str(unannotated))
    report = replace(report, weights=model.stored_as)
    paths = [] if out is None else write_report(report, Path(out))
    show(report, console)
    if paths:
        table, page, chart = (path.name for path in paths)
        console.print(f"{table}, {page} and {chart} are in {out}", markup=False, soft_wrap=True)
    return report


def _with_default_names(config: EvaluationConfig, names: tuple[str, ...]) -> EvaluationConfig:
    """Adds the default names of a checkpoint, if it has some, to both other vocabularies."""
    if not names or config.modes != MODES:
        return config
    return config.model_copy(update={"modes": EVERY_MODE, "default_names": names})


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """One split of one dataset: its annotations, and batches with each of its images at most once."""

    annotations: Annotations
    batches: Iterable[Batch]


class EvaluationRunner:
    """Evaluates networks repeatedly on the same datasets.

    Args:
        vocabulary: All names.
        text: Their embeddings [v t].
        sets: One split of each dataset, by name. The header of each of their images is read here.
        resize: The shape in which images enter the network.
        loader: Batch size, workers and padding; its other settings concern training only.
        config: Modes, domains and post-processing.
        trained: The names of training, and which dataset has which; by default all of `vocabulary`.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        text: Float[Tensor, "v t"],
        sets: Mapping[str, Annotations],
        resize: ResizeConfig,
        loader: LoaderConfig | None = None,
        config: EvaluationConfig | None = None,
        trained: Vocabulary | None = None,
    ) -> None:
        self.vocabulary, self.text, self.config = vocabulary, text, config or EvaluationConfig()
        self.trained = trained or vocabulary
        transforms = build_transforms(AugmentationConfig(resize=resize), training=False)
        self.loader = loader or LoaderConfig()
        self.datasets = [DetectionDataset(exif_oriented(one), vocabulary, transforms) for one in sets.values()]

    def report(
        self, network: nn.Module, console: Console | None = None, unannotated: str | None = None
    ) -> EvaluationReport:
        """The report on all datasets; shows a progress bar for each on the console.

        Raises:
            DataError: a dataset has no readable image, or a process that reads images died.
        """
        loader, device = self.loader, device_of(network)
        load = partial(build_evaluation_loader, workers=loader.workers, multiple=loader.multiple, device=device)
        sets = [
            EvaluationSet(annotations=one.annotations, batches=load(one, loader.batch_size)) for one in self.datasets
        ]
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        console = console or Console(quiet=True)
        # where the output is piped a bar would leave nothing but an empty line
        bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        with explained_loss_of_workers(), bars as progress:
            tasks = {one.name: progress.add_task(one.name, total=len(one)) for one in self.datasets}
            evaluator = Evaluator(
                self.text,
                self.vocabulary,
                self.config,
                lambda name, done, _: progress.update(tasks[name], completed=done),
                self.trained,
            )
            return evaluator.evaluate(network, sets, unannotated)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Question:
    """A vocabulary to run the network with; `columns[c]` is the row of the dataset's category c in it."""

    names: tuple[str, ...]
    text: Float[Tensor, "v t"]
    columns: tuple[int, ...]


@dataclass
class _Answers:
    """The network's outputs so far for the images of a dataset."""

    detections: dict[ImageId, Detections] = field(default_factory=dict)
    recall: PresenceRecall = field(default_factory=PresenceRecall)


class Evaluator:
    """Runs networks on batches of datasets and scores what they find.

    Args:
        text: The embedding of each name of the vocabulary.
        vocabulary: All names; its datasets say which domains have which names.
        config: Modes, recall, domains, post-processing.
        progress: Called after each batch with the dataset's name, and its number of images done and in all.
        trained: The names of training, and which dataset has which; by default all of `vocabulary`.

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
    ) -> None:
        if len(text) != len(vocabulary):
            raise ModelError(f"expected a text embedding for each of {len(vocabulary)} names, found {len(text)}")
        self.text, self.vocabulary = text, vocabulary
        self.config, self.progress = config or EvaluationConfig(), progress
        self.trained = trained or vocabulary

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
        """The report on one dataset, and how often each name is among the best detections with the joint vocabulary."""
        annotations = item.annotations
        names = tuple(name.strip() for name in annotations.categories)
        records = [annotations[index] for index in range(len(annotations))]
        questions = self._questions(names, device_of(network))
        # With one dataset both vocabularies are the same: then the network is asked once.
        different = list(dict.fromkeys(questions.values()))
        answered = dict(zip(different, self._answers(network, item, records, different), strict=True))
        seen = _only(annotations, records, answered[different[0]].detections)
        scorer = CocoScorer(seen, names)
        parts = {
            question: ModeReport(
                names=len(question.names),
                coco=scorer.score(answered[question].detections),
                recall=answered[question].recall.shares,
            )
            for question in different
        }
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
        )
        found = answered[questions["joint"]].detections if "joint" in questions else {}
        return report, count_best_names(seen, found)

    def _questions(self, names: Sequence[str], device: torch.device) -> dict[Mode, _Question]:
        """The vocabulary of each mode that the dataset can be asked with; one object where they have the same names."""
        rows = [self.vocabulary.index_of(name) for name in names]
        own, text = list(dict.fromkeys(rows)), self.text.to(device)
        joint = _Question(names=self.vocabulary.names, text=text, columns=tuple(rows))
        narrow = _Question(
            names=tuple(self.vocabulary.names[row] for row in own),
            text=text[own],
            columns=tuple(own.index(row) for row in rows),
        )
        questions: dict[Mode, _Question] = {"own": joint if len(own) == len(text) else narrow, "joint": joint}
        asked = [self.vocabulary.index_of(name) for name in self.config.default_names]
        if set(own) == set(asked) and asked:
            questions["default"] = questions["own"]
        elif set(own) < set(asked):
            columns = tuple(asked.index(row) for row in rows)
            questions["default"] = _Question(names=self.config.default_names, text=text[asked], columns=columns)
        return {mode: questions[mode] for mode in self.config.modes if mode in questions}

    def _answers(
        self,
        network: nn.Module,
        item: EvaluationSet,
        records: Sequence[ImageRecord],
        questions: Sequence[_Question],
    ) -> list[_Answers]:
        """The network's answers to each question; every image is read and encoded once."""
        dataset, device = item.annotations.name, device_of(network)
        by_id = {record.image_id: record for record in records}
        answered = [_Answers() for _ in questions]
        precision, post = self.config.inference.precision, self.config.inference.postprocess
        with inference(network, device, precision):
            asked = [
                (project(network, question.text), self._limits(network, question.names, device))
                for question in questions
            ]
        done = 0
        for arrived in item.batches:
            batch = arrived.to(device)
            shown = _shown(batch, by_id, dataset)
            with inference(network, device, precision):
                outputs = answers(network, batch.images, batch.padding_mask, asked)
            for question, output, answer in zip(questions, outputs, answered, strict=True):
                found = postprocess(output, batch.original_sizes, question.names, post)
                answer.detections.update(zip(batch.image_ids, (one.to("cpu") for one in found), strict=True))
                present = _present(shown, question.columns, len(question.names)).to(device)
                logits = output.categories.presence_logits[-1]
                answer.recall += presence_recall(logits, present, self.config.recall_at)
            done += len(shown)
            if self.progress is not None:
                self.progress(dataset, done, len(records))
        if not done:
            raise DataError("no image could be read", where=dataset, hint="metr inspect lists the issues")
        return answered

    def _limits(self, network: nn.Module, names: Sequence[str], device: torch.device) -> NameLimits | None:
        """The limits of each name; None for a network that knows none."""
        if not isinstance(network, Detector):
            return None
        return name_limits(names, self.trained, network.config, self.config.inference.selection).to(device)

    def _confusion(
        self, named: Mapping[str, Counter[str]], sets: Sequence[EvaluationSet]
    ) -> CrossDatasetConfusion | None:
        """The confusion; None with a single domain, or without the joint vocabulary."""
        evaluated = {item.annotations.name: tuple(map(str.strip, item.annotations.categories)) for item in sets}
        categories = {**self.vocabulary.datasets, **evaluated}
        domains = {dataset: self.config.domains.get(dataset, dataset) for dataset in categories}
        if not named or len(set(domains.values())) < 2:
            return None
        return cross_dataset_confusion(named, categories, domains)


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise DataError("no dataset to evaluate", hint="name at least one")
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise DataError(f"two datasets are called {twice[0]!r}", hint="name them apart: first=PATH second=PATH")


def _only(
    annotations: Annotations, records: Sequence[ImageRecord], images: Mapping[ImageId, Detections]
) -> InMemoryAnnotations:
    """The annotations of the images that the network saw."""
    return InMemoryAnnotations(
        name=annotations.name,
        split=annotations.split,
        categories=annotations.categories,
        records=tuple(record for record in records if record.image_id in images),
        format=annotations.format,
    )


def _shown(batch: Batch, records: Mapping[ImageId, ImageRecord], dataset: str) -> list[ImageRecord]:
    strange = [image_id for image_id in batch.image_ids if image_id not in records]
    if strange:
        raise DataError(f"image {strange[0]!r} is not in the annotations", where=dataset)
    return [records[image_id] for image_id in batch.image_ids]


def _present(records: Sequence[ImageRecord], columns: Sequence[int], names: int) -> Bool[Tensor, "b v"]:
    """True where a category is annotated in an image and has an object there."""
    present = torch.zeros(len(records), names, dtype=torch.bool)
    for row, record in zip(present, records, strict=True):
        labels = {*record.labels[~record.ignore].tolist()}
        if record.annotated is not None:
            labels &= {*record.annotated}
        row[[columns[label] for label in labels]] = True
    return present
