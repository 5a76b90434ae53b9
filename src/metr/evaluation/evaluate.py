"""The verb evaluate: the COCO protocol on each dataset, with its own names and with the joint vocabulary."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from metr.data.config import LoaderConfig
from metr.data.joint import open_joint
from metr.evaluation.report import show, write_report
from metr.evaluation.results import EvaluationConfig, EvaluationReport
from metr.evaluation.runner import EvaluationRunner
from metr.model import METR
from metr.text.vocabulary import Vocabulary


def evaluate(
    source: METR | str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    split: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    config: EvaluationConfig | None = None,
    console: Console | None = None,
) -> EvaluationReport:
    """Measures average precision on datasets, with each one's own names and with the joint vocabulary.

    The joint vocabulary holds the names of the given datasets together with those of training.

    Args:
        source: A model, a checkpoint folder, a run folder, or a name on the hub.
        data: One dataset or several: folders, name=folder, or YAML files that list some; training need not have seen
            them.
        out: The folder where the report goes as JSON, Markdown and a chart, made if missing; None writes nothing.
        split: Of each dataset; by default val, else test.
        batch_size: Images a step.
        device: Where the network runs, if it is loaded here.
        config: Modes, domains and post-processing.
        console: Where progress and the table are shown.

    Raises:
        DataError, CheckpointError: something is missing or does not fit.
    """
    console = console or Console(quiet=True)
    joint = open_joint([str(data)] if isinstance(data, str | Path) else [str(one) for one in data])
    model = source if isinstance(source, METR) else METR.from_pretrained(source, device=device)
    vocabulary = _with_training(joint.vocabulary, model.vocabulary)
    loader = LoaderConfig(batch_size=batch_size)
    text, sets = model.embed(vocabulary), joint.evaluation(split)
    runner = EvaluationRunner(vocabulary, text, sets, model.resize, loader, config)
    unannotated = model.checkpoint.training.get("unannotated")
    report = runner.report(model.network, console, None if unannotated is None else str(unannotated))
    report = replace(report, weights=model.stored_as)
    paths = [] if out is None else write_report(report, Path(out))
    show(report, console)
    if paths:
        table, page, chart = (path.name for path in paths)
        console.print(f"{table}, {page} and {chart} are in {out}", markup=False, soft_wrap=True)
    return report


def _with_training(given: Vocabulary, trained: Vocabulary) -> Vocabulary:
    """The names of the given datasets, then those of training that are not among them.

    A name keeps the prompt of training unless the given datasets have another for it.
    """
    return Vocabulary(
        names=tuple(dict.fromkeys((*given.names, *trained.names))),
        prompts={**trained.prompts, **given.prompts},
        datasets={**trained.datasets, **given.datasets},
    )
