"""The verb evaluate: the COCO protocol on each dataset, with its own names and with all names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from metr.api.datasets import open_joint
from metr.api.model import METR
from metr.data.config import AugmentationConfig, ResizeConfig
from metr.data.dataset import DetectionDataset
from metr.data.loading import build_evaluation_loader
from metr.data.records import Annotations
from metr.data.transforms.pipeline import build_transforms
from metr.evaluation.evaluator import EvaluationConfig, EvaluationReport, EvaluationSet, Evaluator
from metr.evaluation.report import write_report
from metr.text.vocabulary import Vocabulary


def evaluate_run(
    source: str | Path,
    data: Sequence[str],
    out: Path,
    *,
    split: str | None = None,
    batch_size: int = 8,
    config: EvaluationConfig | None = None,
    console: Console | None = None,
) -> EvaluationReport:
    """Evaluates a checkpoint on datasets and writes JSON, Markdown and a chart into `out`.

    "All names" are those of the given datasets together with those of training.

    Raises:
        DataError, CheckpointError: something is missing or does not fit.
    """
    console = console or Console(quiet=True)
    joint, model = open_joint(data), METR.from_pretrained(source)
    vocabulary = _with_training(joint.vocabulary, model.vocabulary)
    judge = Judge(vocabulary, model.embed(vocabulary.names), joint.evaluation(split), model.resize, batch_size, config)
    foreign = model.checkpoint.training.get("foreign")
    report = judge.report(model.network, console, None if foreign is None else str(foreign))
    table, text, chart = write_report(report, out)
    show(report, console)
    console.print(f"written: {table}, {text.name}, {chart.name}", markup=False)
    return report


class Judge:
    """Evaluates networks on the same datasets again and again.

    Args:
        vocabulary: All names.
        text: Their embeddings [v t].
        sets: One split of each dataset, by name.
        resize: The shape in which pictures enter the network.
        batch_size: Pictures a step.
        config: Modes, fields and post-processing.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        text: Float[Tensor, "v t"],
        sets: Mapping[str, Annotations],
        resize: ResizeConfig,
        batch_size: int = 8,
        config: EvaluationConfig | None = None,
    ) -> None:
        self.vocabulary, self.text, self.config = vocabulary, text, config or EvaluationConfig()
        transforms = build_transforms(AugmentationConfig(resize=resize), training=False)
        self.batch_size = batch_size
        self.datasets = [DetectionDataset(one, vocabulary, transforms) for one in sets.values()]

    def report(
        self, network: nn.Module, console: Console | None = None, foreign: str | None = None
    ) -> EvaluationReport:
        """What the network does to each dataset; shows a bar for each on the console."""
        sets = [
            EvaluationSet(annotations=one.annotations, batches=build_evaluation_loader(one, self.batch_size))
            for one in self.datasets
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
            return evaluator.evaluate(network, sets, foreign)


def show(report: EvaluationReport, console: Console) -> None:
    """The report as a table on the console."""
    table = Table(title="average precision, COCO protocol, 0 to 100")
    for title in ("dataset", "split", "pictures", "AP own", "AP50 own", "AP all names", "AP50 all names"):
        table.add_column(title, justify="left" if title in ("dataset", "split") else "right")
    for one in report.datasets:
        numbers = [
            None if part is None else value
            for part in (one.own, one.unified)
            for value in ((None, None) if part is None else (part.coco.ap, part.coco.ap50))
        ]
        table.add_row(one.name, one.split, str(one.images), *map(_number, numbers))
    means = [report.mean(mode, metric) for mode in ("own", "unified") for metric in ("ap", "ap50")]
    table.add_section()
    table.add_row("mean", "", "", *map(_number, means))
    console.print(table)
    if report.confusion is not None and report.confusion.pooled is not None:
        console.print(f"field confusion: {report.confusion.pooled:.1f} %")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _with_training(given: Vocabulary, trained: Vocabulary) -> Vocabulary:
    """The names of the given datasets, then those of training that are not among them.

    Names that training gave a prompt keep it.
    """
    datasets = {
        **given.datasets,
        **{name: held for name, held in trained.datasets.items() if name not in given.datasets},
    }
    return Vocabulary.union(datasets)
