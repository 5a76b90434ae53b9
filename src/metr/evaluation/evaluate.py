"""The verb evaluate: the COCO protocol on each dataset, with its own names and with all names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from metr.data.config import AugmentationConfig, LoaderConfig, ResizeConfig
from metr.data.dataset import DetectionDataset
from metr.data.exif_oriented import ExifOriented
from metr.data.joint import open_joint
from metr.data.loading import build_evaluation_loader
from metr.data.records import Annotations
from metr.data.transforms.pipeline import build_transforms
from metr.evaluation.evaluator import (
    EvaluationConfig,
    EvaluationReport,
    EvaluationSet,
    Evaluator,
    Mode,
    ModeReport,
)
from metr.evaluation.report import write_report
from metr.inference.predictor import device_of
from metr.model import METR
from metr.text.vocabulary import Vocabulary

_SHORT: dict[Mode, str] = {"own": "own", "joint": "all"}
_METRICS: tuple[Literal["ap"], Literal["ap50"]] = ("ap", "ap50")


def evaluate(
    source: str | Path,
    data: Sequence[str],
    out: Path,
    *,
    split: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    config: EvaluationConfig | None = None,
    console: Console | None = None,
) -> EvaluationReport:
    """Evaluates a checkpoint on datasets and writes JSON, Markdown and a chart into `out`.

    "All names" are those of the given datasets together with those of training.

    Args:
        source: A checkpoint folder, a run folder, or a name on the hub.
        data: Datasets: folders, name=folder, or YAML files that list some; training need not have seen them.
        out: The folder to write; made if missing.
        split: Of each dataset; by default val, else test.
        batch_size: Images a step.
        device: Where the network runs.
        config: Modes, fields and post-processing.
        console: Where progress and the table are shown.

    Raises:
        DataError, CheckpointError: something is missing or does not fit.
    """
    console = console or Console(quiet=True)
    joint, model = open_joint(data), METR.from_pretrained(source, device=device)
    vocabulary = _with_training(joint.vocabulary, model.vocabulary)
    judge = EvaluationRunner(
        vocabulary,
        model.embed(vocabulary),
        joint.evaluation(split),
        model.resize,
        LoaderConfig(batch_size=batch_size),
        config,
    )
    unannotated = model.checkpoint.training.get("unannotated")
    report = judge.report(model.network, console, None if unannotated is None else str(unannotated))
    report = replace(report, weights=model.stored_as)
    table, text, chart = write_report(report, out)
    show(report, console)
    console.print(f"{table.name}, {text.name} and {chart.name} are in {out}", markup=False, soft_wrap=True)
    return report


class EvaluationRunner:
    """Evaluates networks on the same datasets again and again.

    Args:
        vocabulary: All names.
        text: Their embeddings [v t].
        sets: One split of each dataset, by name.
        resize: The shape in which images enter the network.
        loader: Images a step, who reads them, and to what they are padded; the rest is of training.
        config: Modes, fields and post-processing.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        text: Float[Tensor, "v t"],
        sets: Mapping[str, Annotations],
        resize: ResizeConfig,
        loader: LoaderConfig | None = None,
        config: EvaluationConfig | None = None,
    ) -> None:
        self.vocabulary, self.text, self.config = vocabulary, text, config or EvaluationConfig()
        transforms = build_transforms(AugmentationConfig(resize=resize), training=False)
        self.loader = loader or LoaderConfig()
        self.datasets = [DetectionDataset(ExifOriented(one), vocabulary, transforms) for one in sets.values()]

    def report(
        self, network: nn.Module, console: Console | None = None, unannotated: str | None = None
    ) -> EvaluationReport:
        """What the network does to each dataset; shows a bar for each on the console."""
        loader, device = self.loader, device_of(network)
        load = partial(build_evaluation_loader, workers=loader.workers, multiple=loader.multiple, device=device)
        sets = [
            EvaluationSet(annotations=one.annotations, batches=load(one, loader.batch_size)) for one in self.datasets
        ]
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console or Console(quiet=True), transient=True) as progress:
            tasks = {one.name: progress.add_task(one.name, total=len(one)) for one in self.datasets}
            evaluator = Evaluator(
                self.text,
                self.vocabulary,
                self.config,
                lambda name, done, _: progress.update(tasks[name], completed=done),
            )
            return evaluator.evaluate(network, sets, unannotated)


def show(report: EvaluationReport, console: Console) -> None:
    """The report as a table on the console, 80 columns wide unless names of datasets are long."""
    asked: dict[Mode, bool] = {
        "own": any(one.own is not None for one in report.datasets),
        "joint": any(one.joint is not None for one in report.datasets),
    }
    modes = [mode for mode, wanted in asked.items() if wanted]
    confusion = report.confusion
    table = Table(title="average precision, COCO protocol, 0 to 100", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("dataset", overflow="fold")
    table.add_column("split")
    numbers = [f"{_SHORT[mode]} {metric}" for mode in modes for metric in ("AP", "AP50")]
    for title in ("images", *numbers, *(["confused"] if confusion else [])):
        table.add_column(title, justify="right", no_wrap=True)
    for one in report.datasets:
        parts = [one.own if mode == "own" else one.joint for mode in modes]
        values = [value for part in parts for value in _scores(part)]
        values += [confusion.shares.get(one.name)] if confusion else []
        name = one.name if one.in_mean else f"({one.name})"
        table.add_row(escape(name), one.split, str(one.images), *map(_number, values))
    means = [report.mean(mode, metric) for mode in modes for metric in _METRICS]
    means += [confusion.pooled] if confusion else []
    table.add_section()
    table.add_row(f"mean of {sum(one.in_mean for one in report.datasets)}", "", "", *map(_number, means))
    console.print(table)
    for line in _legend(report, modes):
        console.print(line, highlight=False, markup=False)


def _legend(report: EvaluationReport, modes: Sequence[Mode]) -> Iterator[str]:
    if "joint" in modes:
        yield f"own: asked for the dataset's own names; all: for all {report.names} names"
    if report.confusion is not None:
        yield "confused: % of the best detections that name another field, all names asked for"
    if outside := [one.name for one in report.datasets if not one.in_mean]:
        yield f"not in the mean: {', '.join(outside)}"


def _scores(part: ModeReport | None) -> tuple[float | None, float | None]:
    return (None, None) if part is None else (part.coco.ap, part.coco.ap50)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _with_training(given: Vocabulary, trained: Vocabulary) -> Vocabulary:
    """The names of the given datasets, then those of training that are not among them.

    A name keeps the prompt of training unless the given datasets have another for it.
    """
    return Vocabulary(
        names=tuple(dict.fromkeys((*given.names, *trained.names))),
        prompts={**trained.prompts, **given.prompts},
        datasets={**trained.datasets, **given.datasets},
    )
