"""The page of a training run: curves, data seen, configuration, environment, examples, and its evaluation."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from metr.data.images import read_image
from metr.errors import CheckpointError, DataError, MetrError, counted
from metr.evaluation.report import TITLES
from metr.evaluation.results import EvaluationReport
from metr.report.charts import Chart, Point, line_chart
from metr.report.evaluation_page import EvaluationView, evaluation_view, read_report
from metr.report.page import Picture, picture, said, write_page
from metr.run_directory import CONFIG, RunDirectory, existing_folder, find_checkpoint
from metr.serialization import read_json
from metr.training.comparison import COMPARISON
from metr.training.logger import Record, read_metrics
from metr.training.progress import duration, grouped_terms
from metr.training.provenance import TrainingFacts
from metr.writable import check_file_to_write

PAGE = "report.html"
"""The file of the page."""
_SHEET, _SHEET_BYTES = 1680, 1_200_000  # pixels of the longer side of a sheet of images, and bytes
_MOST_TEXT = 200_000  # characters of the configuration
_COMMAND = re.compile(r"^\S+ \S+ command: (.+)$", re.M)


@dataclass(frozen=True, kw_only=True)
class DataRow:
    """One dataset of the run. `epochs` is how many times its training images were seen."""

    name: str
    format: str
    splits: str
    trained_on: int
    names: int
    epochs: float | None
    licences: str


@dataclass(frozen=True, kw_only=True)
class ChangeRow:
    """AP of one dataset (own names, then all) before and after a fine-tuning."""

    dataset: str
    role: str
    before: tuple[float | None, ...]
    after: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """An image of the run folder: what it is, and what it shows."""

    title: str
    told: str
    picture: Picture


@dataclass(frozen=True, kw_only=True)
class RunView:
    """All that the page says of a run. What a run does not have is empty."""

    tiles: tuple[tuple[str, str], ...]
    charts: tuple[Chart, ...]
    data: tuple[DataRow, ...]
    changes: tuple[ChangeRow, ...]
    titles: tuple[str, ...]
    sheets: tuple[Sheet, ...]
    facts: tuple[tuple[str, str], ...]
    config: str


class _Compared(msgspec.Struct, frozen=True):
    """A dataset in comparison.json."""

    dataset: str
    role: str
    before: dict[str, float | None]
    after: dict[str, float | None]


def write_run_page(run: Path, path: Path | None = None, arms: Mapping[str, EvaluationReport] | None = None) -> Path:
    """Writes the page of a training run and gives its path.

    Args:
        run: The run folder; training may still go on.
        path: The HTML file; by default report.html in the run folder.
        arms: Other evaluations to compare the run's with, by what they are called.

    Raises:
        CheckpointError: this is no run folder, or the disk refuses.
        DataError: there is something to compare with, but the run has not been evaluated, or on other splits.
        MetrError: a file of the run is damaged, or the page would be too large.
    """
    folder = RunDirectory(run)
    if not folder.config.is_file() and not folder.metrics.is_file():
        what = "expected the folder of a training run, which has a config.yaml and a metrics.jsonl"
        raise CheckpointError(what, where=run, hint="the folder that metr train or metr finetune got with -o")
    check_file_to_write(path := path or run / PAGE)
    evaluation: EvaluationView | None = None
    try:
        evaluation = evaluation_view(read_report(run), arms=arms)
    except DataError:
        if arms or any((run / place).is_file() for place in ("evaluation.json", "evaluation/evaluation.json")):
            raise
    if evaluation is not None:
        _check_comparable(evaluation, run)
    title = f"Training run {run.resolve().name}"
    return write_page(path, title, {"run": _run(folder), "evaluation": evaluation})


def _check_comparable(evaluation: EvaluationView, run: Path) -> None:
    """Checks that each other evaluation has a split of this one.

    Raises:
        DataError: one has none.
    """
    if strange := next((arm for arm in evaluation.arms if not arm.rows), None):
        names = ", ".join(f"{one.report.name} ({one.report.split})" for one in evaluation.datasets)
        what = f"the evaluation {strange.name!r} has none of the splits that this run was evaluated on: {names}"
        raise DataError(what, where=run, hint="evaluate both on the same datasets, with the same --split")


def _run(folder: RunDirectory) -> RunView:
    records = read_metrics(folder.metrics)
    training = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    facts = _facts(folder)
    changes = _changes(folder.path / COMPARISON)
    return RunView(
        tiles=tuple(_tiles(training, evaluations)),
        charts=tuple(chart for chart in _charts(training, evaluations) if chart is not None),
        data=tuple(_data(facts, records)),
        changes=changes,
        titles=(TITLES["own"], TITLES["joint"]),
        sheets=tuple(_sheets(folder)),
        facts=tuple(_environment(facts, folder)),
        config=_config(folder.config),
    )


def _facts(folder: RunDirectory) -> TrainingFacts:
    """What the best checkpoint, else the last one, tells of its training; nothing where there is none yet."""
    try:
        checkpoint = find_checkpoint(folder.path)
    except CheckpointError:
        return TrainingFacts()
    return TrainingFacts.of(read_json(checkpoint / CONFIG).get("training", {}))


def _tiles(training: Sequence[Record], evaluations: Sequence[Record]) -> Iterator[tuple[str, str]]:
    if training:
        last = training[-1]
        yield "steps", f"{last['step']:,}"
        if isinstance(last.get("images"), int):
            yield "images seen", f"{last['images']:,}"
        if isinstance(last.get("seconds"), int | float):
            yield "training time", duration(float(last["seconds"]))
        if last.get("skipped"):
            yield "steps skipped", f"{last['skipped']:,}"
    scores = [(float(one["metrics"]["AP"]), one["step"]) for one in evaluations if _number(one["metrics"].get("AP"))]
    if scores:
        best, step = max(scores)
        yield f"best AP on val, at step {step:,}", f"{best:.1f}"
        yield "last AP on val", f"{scores[-1][0]:.1f}"


def _charts(training: Sequence[Record], evaluations: Sequence[Record]) -> Iterator[Chart | None]:
    yield line_chart("AP on val", _mapped(evaluations, "metrics"), "step", "0 to 100")
    yield line_chart("Loss", {"total": _points(training, "total")}, "step", "loss", log=True)
    terms = [{**record, "losses": grouped_terms(_numbers(record.get("losses")))} for record in training]
    yield line_chart("Loss by term, summed over layers", _mapped(terms, "losses"), "step", "loss", log=True)
    yield line_chart("Data seen", _mapped(training, "epochs"), "step", "epochs")
    yield line_chart("Learning rate", _mapped(training, "learning_rate"), "step", "learning rate")
    yield line_chart("Speed", {"images a second": _points(training, "images_per_second")}, "step", "images a second")
    yield line_chart("Norm of the gradient", {"norm": _points(training, "gradient_norm")}, "step", "norm", log=True)


def _points(records: Sequence[Record], key: str) -> list[Point]:
    return [(float(record["step"]), float(record[key])) for record in records if _number(record.get(key))]


def _mapped(records: Sequence[Record], key: str) -> dict[str, list[Point]]:
    """A line for each name of a mapping in the records."""
    lines: dict[str, list[Point]] = {}
    for record in records:
        for name, value in _numbers(record.get(key)).items():
            lines.setdefault(str(name), []).append((float(record["step"]), value))
    return lines


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(values: object) -> dict[str, float]:
    pairs = values.items() if isinstance(values, Mapping) else ()
    return {name: float(value) for name, value in pairs if _number(value)}


def _data(facts: TrainingFacts, records: Sequence[Record]) -> Iterator[DataRow]:
    """The datasets of training; `epochs` are those of the newest record."""
    epochs = next((_numbers(record.get("epochs")) for record in reversed(records) if record.get("epochs")), {})
    for name, one in facts.data.items():
        yield DataRow(
            name=name,
            format=one.format,
            splits=", ".join(f"{split} {size:,}" for split, size in one.splits.items()),
            trained_on=one.trained_on,
            names=one.names,
            epochs=epochs.get(name, facts.epochs.get(name)),
            licences=" / ".join(dict.fromkeys(licence.text for licence in one.licences)) or "unknown",
        )


def _changes(path: Path) -> tuple[ChangeRow, ...]:
    """What a fine-tuning did to each dataset, where it has been compared.

    Raises:
        DataError: comparison.json is not METR's.
    """
    if not path.is_file():
        return ()
    try:
        rows = msgspec.convert(read_json(path).get("datasets", []), list[_Compared])
    except msgspec.ValidationError as error:
        raise DataError(f"not a comparison: {error}", where=path) from None
    modes = ("own", "joint")
    return tuple(
        ChangeRow(
            dataset=row.dataset,
            role=row.role,
            before=tuple(row.before.get(mode) for mode in modes),
            after=tuple(row.after.get(mode) for mode in modes),
        )
        for row in rows
    )


def _sheets(folder: RunDirectory) -> Iterator[Sheet]:
    """The images that training draws into its folder; those that cannot be read are left out."""
    places = (
        (
            folder.train_batch,
            "First batch",
            "As the network sees it: after augmentation, with its boxes; ignored ones dashed.",
        ),
        (
            folder.val_images,
            "Val images",
            "Always the same ones: annotations at the left, at the right what the newest evaluation found.",
        ),
    )
    for path, title, told in places:
        if not path.is_file():
            continue
        try:
            yield Sheet(title=title, told=told, picture=picture(read_image(path), _SHEET, _SHEET_BYTES))
        except DataError:
            continue


def _environment(facts: TrainingFacts, folder: RunDirectory) -> Iterator[tuple[str, str]]:
    """What the run ran on and with."""
    if commands := _commands(folder.log):
        yield "command", commands[0]
        if len(commands) > 1:
            yield "resumed", counted(len(commands) - 1, "time")
    if facts.started_from is not None:
        yield "started from", facts.started_from
    if facts.hardware is not None:
        yield "hardware", facts.hardware
    yield from facts.software.items()
    if facts.seed is not None:
        yield "seed", str(facts.seed)
    if facts.batch is not None:
        yield "images a step", f"{facts.batch:,}"
    if facts.learning_rate is not None:
        yield "learning rate", f"{facts.learning_rate:g}"
    if facts.unannotated is not None:
        yield "unannotated categories", facts.unannotated
    for checkpoint in (folder.best, folder.last):
        found = existing_folder(checkpoint) / CONFIG
        if found.is_file():
            step = read_json(found).get("training", {}).get("step")
            yield f"checkpoint {checkpoint.name}", "" if step is None else f"step {step:,}"


def _commands(log: Path) -> list[str]:
    try:
        return [said(line, 4000) for line in _COMMAND.findall(log.read_text(encoding="utf-8", errors="replace"))]
    except OSError:
        return []


def _config(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:_MOST_TEXT]
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise MetrError(f"cannot be read: {error}", where=path) from None
