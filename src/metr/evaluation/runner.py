"""Evaluates one detector on many datasets, with each dataset's own names and with the joint vocabulary."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor, nn

from metr.data.config import AugmentationConfig, LoaderConfig, ResizeConfig
from metr.data.dataset import DetectionDataset
from metr.data.datasets_file import DatasetSource
from metr.data.guard import check_usable, log_issues
from metr.data.images import exif_oriented
from metr.data.joint import open_joint
from metr.data.loading import build_evaluation_loader, explained_loss_of_workers
from metr.data.records import ALL, Annotations
from metr.data.transforms import build_transforms
from metr.errors import counted
from metr.evaluation.answers import Observation
from metr.evaluation.diagnosis import Judged, diagnose
from metr.evaluation.evaluator import EvaluationSet, Evaluator
from metr.evaluation.report import FILES, main_console, show, write_report
from metr.evaluation.results import (
    EVERY_MODE,
    MODES,
    EvaluationConfig,
    EvaluationReport,
)
from metr.evaluation.seen import known_seen, tell_seen
from metr.inference.calibrated_names import checked_calibrations
from metr.inference.postprocess import ScoreThresholds
from metr.inference.predictor import device_of
from metr.model import METR
from metr.process_group import from_main, joined_device
from metr.processes import in_main_process, process_count, process_index
from metr.text.same_names import told_aliases, with_training
from metr.text.vocabulary import Vocabulary
from metr.writable import check_folder_to_write

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Detailed:
    """A report, and the answers that it was made of, with the verdicts on them by dataset.

    Answers and verdicts are there in the main process only.
    """

    report: EvaluationReport
    observations: tuple[Observation, ...]
    judged: Mapping[str, Judged]


def evaluate(
    source: METR | str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    split: str | None = None,
    device: str | torch.device = "auto",
    config: EvaluationConfig | None = None,
    allow_empty: bool = False,
    console: Console | None = None,
) -> EvaluationReport:
    """Measures average precision on datasets, with each one's own names and with the joint vocabulary.

    The joint vocabulary holds the names of the given datasets together with those of training. Where the detector looks
    for some names by default, those of its fine-tuning, it is asked for these as well.

    Several processes (`torchrun`, `accelerate launch`) that call it together share the images among them. All get the
    report; the main process writes and shows it.

    Args:
        source: A model, a checkpoint folder, a run folder, or a name on the hub.
        data: One dataset or several: folders, name=folder, or YAML files that list some; training need not have seen
            them.
        out: The folder where the report goes as JSON, Markdown and a chart, made if missing; None writes nothing.
        split: The split of each dataset; by default val, or test where a dataset has neither train nor val. "all" means
            all images of a dataset, which tells something only where training has seen none of them.
        device: Where the network runs, if it is loaded here.
        config: Modes, prompts, domains, batch size and post-processing.
        allow_empty: Whether splits without a box are evaluated on, and splits of which most was lost while reading.
        console: Where progress and the table are shown.

    Raises:
        DataError, CheckpointError: something is missing or does not fit, or `out` cannot be written.
    """
    return evaluate_in_detail(
        source, data, out, split=split, device=device, config=config, allow_empty=allow_empty, console=console
    ).report


def evaluate_in_detail(
    source: METR | str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    split: str | None = None,
    device: str | torch.device = "auto",
    config: EvaluationConfig | None = None,
    allow_empty: bool = False,
    console: Console | None = None,
) -> Detailed:
    """Does what `evaluate` does, and keeps the answers for whoever looks further, such as `metr.report`."""
    console, config = main_console(console), config or EvaluationConfig()
    if out is not None:
        check_folder_to_write(Path(out), FILES)
    given = [data] if isinstance(data, str | Path) else data
    joint = open_joint([str(one) for one in given], together=split == ALL)
    splits = {one.name: split or one.evaluation_split()[0] for one in joint.sources}
    for one in () if allow_empty else joint.sources:
        check_usable(one, splits[one.name])
    for one in joint.sources:
        one.split(splits[one.name])  # what is not there is told before the detector is loaded
    log_issues(joint.sources)
    device = joined_device(device_of(source.network) if isinstance(source, METR) else device)
    model = source if isinstance(source, METR) else METR.from_pretrained(source, device=device)
    meant = {one.name: model.meant(one.categories) for one in joint.sources}
    joint = joint.renamed({one.name: told_aliases(one.name, one.categories, meant[one.name]) for one in joint.sources})
    seen = _told_seen(joint.sources, splits, model, asked=split)
    vocabulary = with_training(joint.vocabulary, model.vocabulary, config.prompts)
    inference = checked_calibrations(config.inference, vocabulary.names, model.names, model.meant(vocabulary.names))
    config = config.model_copy(update={"inference": model.inference(inference)})
    config = _with_default_names(config, model.checkpoint.detection.names)
    loader = LoaderConfig(batch_size=config.inference.batch_size, multiple=model.network.backbone.multiple)
    text, sets = model.embed(vocabulary), {one.name: one.split(splits[one.name]) for one in joint.sources}
    runner = EvaluationRunner(vocabulary, text, sets, model.resize, loader, config, model.vocabulary)
    unannotated = model.checkpoint.training.get("unannotated")
    told, observations = None if unannotated is None else str(unannotated), list[Observation]()
    report = runner.report(model.network, console, told, observations.append)
    report = replace(report.with_seen(seen), weights=model.stored_as, trained_on=tuple(model.vocabulary.datasets))
    detailed = diagnosed(report, observations, model.thresholds())
    _kept_and_shown(detailed.report, None if out is None else Path(out), console)
    return detailed


def _kept_and_shown(report: EvaluationReport, out: Path | None, console: Console) -> None:
    """Writes the report and shows it: neither a disk that refuses nor a pipe that is closed takes both."""
    try:
        if out is not None and in_main_process():
            write_report(report, out)
    finally:
        show(report, console)
    if out is not None:
        table, page, chart = FILES
        console.print(f"{table}, {page} and {chart} are in {out}", markup=False, soft_wrap=True)


def diagnosed(
    report: EvaluationReport, observations: Sequence[Observation], thresholds: ScoreThresholds | None = None
) -> Detailed:
    """The report with a diagnosis of each dataset. Several processes call it together; the main one has observed."""
    shown = thresholds or ScoreThresholds()
    judged: dict[str, Judged] = {}  # they stay where they were made

    def with_diagnosis() -> EvaluationReport:
        for one in observations:
            judged[one.dataset] = Judged.of(one.scorer, one.detections, one.names, shown)
        found = {name: diagnose(one, shown) for name, one in judged.items()}
        return replace(report, datasets=tuple(replace(one, diagnosis=found[one.name]) for one in report.datasets))

    whole = from_main(with_diagnosis, EvaluationReport)
    return Detailed(report=whole, observations=tuple(observations), judged=judged)


def _told_seen(
    sources: Sequence[DatasetSource], splits: Mapping[str, str], model: METR, asked: str | None
) -> dict[str, str]:
    """By dataset, what is known of its images having been trained on. It is told; so is what is held out elsewhere."""
    found = known_seen(model.checkpoint.training, sources, splits, model.vocabulary)
    tell_seen(found)
    facts = {one.dataset: one.fact for one in found}
    _tell_held_out([one for one in sources if one.name not in facts] if asked is None else ())
    return facts


def _tell_held_out(sources: Sequence[DatasetSource]) -> None:
    """Says how to evaluate on all images of datasets of which a part was held out."""
    if held_out := [source.name for source in sources if source.held_out]:
        what = "evaluated on the held-out images alone; --split all takes all images, if training has seen none of them"
        _logger.info("%s: %s", ", ".join(held_out), what)


def _with_default_names(config: EvaluationConfig, names: tuple[str, ...]) -> EvaluationConfig:
    """Adds the default names of a checkpoint, if it has some, to both other vocabularies."""
    if not names or config.modes != MODES:
        return config
    return config.model_copy(update={"modes": EVERY_MODE, "default_names": names})


class EvaluationRunner:
    """Evaluates networks repeatedly on the same datasets, in one process or many.

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
        self,
        network: nn.Module,
        console: Console | None = None,
        unannotated: str | None = None,
        observe: Callable[[Observation], None] | None = None,
    ) -> EvaluationReport:
        """The report on all datasets; shows a progress bar for each on the console.

        The processes share the images of each dataset among them, and all get the same report. The network is whole
        in each of them.

        Raises:
            DataError: a dataset has no readable image, or a process that reads images died.
        """
        loader, device = self.loader, device_of(network)
        joined_device(device)
        load = partial(
            build_evaluation_loader,
            workers=loader.workers,
            multiple=loader.multiple,
            rank=process_index(),
            world=process_count(),
            device=device,
        )
        sets = [
            EvaluationSet(annotations=one.annotations, batches=load(one, loader.batch_size)) for one in self.datasets
        ]
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn()
        console, started = main_console(console), time.perf_counter()
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
                observe,
            )
            report = evaluator.evaluate(network, sets, unannotated)
        _log_speed(report, time.perf_counter() - started)
        return report


class _Speed(ProgressColumn):
    """The number of images a second of a progress bar."""

    def render(self, task: Task) -> Text:
        """The number in words; empty before it is known."""
        return Text("" if task.speed is None else f"{task.speed:.1f} images/s")


def _log_speed(report: EvaluationReport, seconds: float) -> None:
    """Logs how long an evaluation took, in the main process."""
    if in_main_process():
        images, processes = sum(one.images for one in report.datasets), process_count()
        together = f", {processes} processes" if processes > 1 else ""
        message = "evaluated %s in %.1f s: %.1f images a second%s"
        _logger.info(message, counted(images, "image"), seconds, images / max(seconds, 1e-9), together)
