"""Model cards: README.md with the hub's header, written from what a checkpoint knows of itself and nothing else."""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from metr.checkpoint import Checkpoint
from metr.errors import MetrError
from metr.evaluation.report import TITLES, UNANNOTATED, dataset_table
from metr.evaluation.results import MODES, EvaluationReport, Mode, from_dict
from metr.run_directory import RunDirectory
from metr.serialization import read_json
from metr.training.comparison import COMPARISON
from metr.training.provenance import DataFacts, TrainingFacts

CARD, EVALUATION = "README.md", "evaluation.json"
UNKNOWN = "unknown"
TAGS = ("object-detection", "open-vocabulary", "multi-dataset", "detr", "metr")
_logger = logging.getLogger(__name__)

_MOST_NAMES = 150  # of a dataset, in words
_FEW = 300  # images, below which a dataset is called small
_SAME_AP = 1.0  # two measurements of one checkpoint differ by less
_RESTRICTED = re.compile(r"non-?commercial|\bnc\b", re.IGNORECASE)
_SIGNATURE = re.compile(r"\n*<!-- written by METR[^>]*sha256 ([0-9a-f]{64})[^>]*-->\s*\Z")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All that a card tells.

    `title` is what the model is called, `repository` its name on the hub where it has one. `licence` is the model's, by
    the hub's identifier. `dtype` is that of the weights in the file, where it is not that of training.
    """

    title: str
    checkpoint: Checkpoint
    parameters: int
    report: EvaluationReport | None = None
    repository: str | None = None
    licence: str = UNKNOWN
    dtype: str | None = None
    training: TrainingFacts = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "training", TrainingFacts.of(self.checkpoint.training))

    @property
    def data(self) -> dict[str, tuple[int, DataFacts]]:
        """Each dataset of training with the stage that it was last in, from 0."""
        return {
            name: (number, one)
            for number, stage in enumerate(self.training.stages())
            for name, one in stage.data.items()
        }


def write_card(facts: CardFacts) -> str:
    """The card as text: header, sections, and a last line by which `is_untouched` knows it again."""
    sections = {
        "Use": _use(facts),
        "What it finds": _names(facts),
        "Data": _data(facts),
        "Results": _results(facts),
        "Training": _training(facts),
        "Limits": _limits(facts),
        "Files": _files(facts),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return _signed(f"---\n{card_data(facts).to_yaml()}\n---\n\n# {_cell(facts.title)}\n\n{_summary(facts)}\n\n{body}")


def is_untouched(card: str) -> bool:
    """Whether a card is as METR wrote it: a person's is never written over."""
    signature = _SIGNATURE.search(card)
    return signature is not None and signature.group(1) == _digest(card[: signature.start()])


def card_data(facts: CardFacts) -> ModelCardData:
    """The header by which the hub finds and shows a model."""
    results = list(_eval_results(facts))
    return ModelCardData(
        license=facts.licence,
        library_name="metr",
        pipeline_tag="object-detection",
        tags=list(TAGS),
        datasets=[_slug(name) for name in _datasets(facts)] or None,
        metrics=["map"] if results else None,
        model_name=facts.title,
        eval_results=results or None,
    )


def find_report(folder: Path, checkpoint: Checkpoint) -> EvaluationReport | None:
    """What evaluation said of the checkpoint in `folder`: beside it, in its run's `evaluation`, or after fine-tuning.

    A report that contradicts what training measured of these very weights is of others, and is left out.
    """
    run = folder.parent if folder.name in {RunDirectory(folder).best.name, RunDirectory(folder).last.name} else folder
    places = dict.fromkeys((folder, folder / "evaluation", run / "evaluation", run))
    told = TrainingFacts.of(checkpoint.training).metrics
    for path in (*(place / EVALUATION for place in places), run / COMPARISON):
        if not path.is_file():
            continue
        try:
            values = read_json(path)
            report = from_dict(values["after"] if path.name == COMPARISON else values, where=path)
        except (MetrError, KeyError) as error:
            _logger.warning("no results in the model card: %s", error)
            continue
        if _contradicts(report, told):
            _logger.warning("%s is of other weights than %s: left out of the model card", path, folder)
            continue
        return report
    return None


def _contradicts(report: EvaluationReport, told: dict[str, float]) -> bool:
    """Whether training measured something else on a validation split that both have."""
    pairs = [(one.ap("own"), told.get(f"AP {one.name}")) for one in report.datasets if one.split == "val"]
    return any(abs(one - other) > _SAME_AP for one, other in pairs if one is not None and other is not None)


# sections


def _summary(facts: CardFacts) -> str:
    names, datasets = len(facts.checkpoint.vocabulary), len(_datasets(facts))
    origin = f" from {_count(datasets, 'dataset')}" if datasets else ""
    joint = ", trained on without merging their labels" if datasets > 1 else ""
    return (
        f"An object detector for {_count(names, 'name')}{origin}{joint}. It is asked by name, as in "
        f"[METR](https://arxiv.org/abs/2304.03580). {facts.parameters:,} weights."
    )


def _use(facts: CardFacts) -> str:
    lines = [
        "from metr import METR",
        "",
        f'model = METR.from_pretrained("{facts.repository or "path/to/this/folder"}")',
        'found = model.detect("photo.jpg")  # every name below',
        'found = model.detect("photo.jpg", ["traffic cone"])  # or any other',
    ]
    return "\n".join(["```python", *lines, "```"])


def _names(facts: CardFacts) -> str:
    vocabulary = facts.checkpoint.vocabulary
    listed = [f"- **{_cell(dataset)}**: {_few(names)}" for dataset, names in vocabulary.datasets.items()]
    owned = {name for names in vocabulary.datasets.values() for name in names}
    if others := [name for name in vocabulary.names if name not in owned]:
        listed.append(f"- {'of no dataset: ' if listed else ''}{_few(others)}")
    return "\n".join(listed)


def _data(facts: CardFacts) -> str:
    if not facts.data:
        return "The checkpoint does not tell what it was trained on."
    tuned = len(facts.training.stages()) > 1
    head = ["dataset", "format", "images by split", "trained on", "names", "seen", "licence, as given"]
    rows = []
    for name, (number, one) in facts.data.items():
        stage = facts.training.stages()[number]
        splits = ", ".join(f"{split} {size:,}" for split, size in one.splits.items())
        times = f"{stage.epochs[name]:.1f} times" if name in stage.epochs else ""
        label = f"{name} ({'pretraining' if number == 0 else 'fine-tuning'})" if tuned else name
        rows.append([label, one.format, splits, f"{one.trained_on:,}", str(one.names), times, _licences(one)])
    origins = [f"- {_cell(name)}: {_cell(one.origin)}" for name, (_, one) in facts.data.items() if one.origin]
    note = (
        "Licences are repeated as the datasets' own files give them, after the file's name, and not judged; "
        f"`{UNKNOWN}` means that they say nothing. The licence in the header is the model's, chosen by who shares it."
    )
    parts = [_table(head, rows), "\n".join(["Where they say they come from:", "", *origins]) if origins else "", note]
    return "\n\n".join(part for part in parts if part)


def _licences(data: DataFacts) -> str:
    told = [
        f"{one.stated_in}{'' if one.images is None else ', ' + _count(one.images, 'image')}: {one.text}"
        for one in data.licences
    ]
    return " / ".join(told) or UNKNOWN


def _is_restricted(data: DataFacts) -> bool:
    return any(_RESTRICTED.search(f"{one.text} {one.url or ''}") for one in data.licences)


def _results(facts: CardFacts) -> str:
    if facts.report is not None:
        splits = sorted({one.split for one in facts.report.datasets})
        parts = [
            f"COCO average precision over IoU 0.50:0.95, 0 to 100, on the {' and '.join(splits)} splits. "
            "*Own names*: asked for the dataset's names alone; *joint vocabulary*: for all "
            f"{facts.report.names:,} names at once.",
            dataset_table(facts.report),
        ]
        if facts.dtype is not None:
            when = "with the weights" if facts.report.weights == facts.dtype else "before the weights were"
            parts.append(f"Measured {when} stored as {facts.dtype}.")
        return "\n\n".join(parts)
    metrics = facts.training.metrics
    if not metrics:
        return "Not measured."
    rows = [[name, f"{value:.1f}"] for name, value in metrics.items()]
    return "As measured during training, each dataset asked for its own names, 0 to 100.\n\n" + _table(["", "AP"], rows)


def _training(facts: CardFacts) -> str:
    config, stages = facts.checkpoint.model, facts.training.stages()
    size, queries = facts.checkpoint.preprocessing.get("size"), _count(config.queries.number, "query", "queries")
    lines = [
        f"- network: backbone {config.backbone.name}, {config.encoder.kind} encoder, width {config.width}, "
        f"{_count(config.decoder.layers, 'decoder layer')}, {queries} an image" + (f", {size} pixels" if size else ""),
        f"- text encoder: {_text_encoder(facts)}",
    ]
    for number, stage in enumerate(stages):
        title = "training" if len(stages) == 1 else "pretraining" if number == 0 else "fine-tuning"
        lines.append(f"- {title}: {', '.join(_stage(stage)) or 'nothing is recorded'}")
    return "\n".join(lines)


def _stage(stage: TrainingFacts) -> Iterator[str]:
    """What is recorded of one stage."""
    if stage.started_from is not None:
        yield f"started from {_cell(stage.started_from)}"
    if stage.step is not None:
        yield f"{_count(stage.step, 'step')}" + (f" of {_count(stage.batch, 'image')}" if stage.batch else "")
    if stage.images is not None:
        yield f"{_count(stage.images, 'image')} seen"
    if stage.learning_rate is not None:
        yield f"learning rate {stage.learning_rate:g}"
    if stage.unannotated is not None:
        yield f"`unannotated = {stage.unannotated}`"
    if stage.seed is not None:
        yield f"seed {stage.seed}"
    if stage.hardware is not None:
        yield f"on {_cell(stage.hardware)}"
    if stage.software:
        yield "with " + ", ".join(f"{name} {version}" for name, version in stage.software.items())


def _limits(facts: CardFacts) -> str:
    stages, data = facts.training.stages(), facts.data
    lines = ["- Names other than those above were not tested: how well they are found is not known."]
    if _is_local(facts):
        lines = [
            "- Only the names above can be asked for, unless the text encoder of training, a folder, is there too."
        ]
    if len(_datasets(facts)) > 1:
        lines.append(
            "- Each dataset annotates its own names only, so what is found of one dataset's names in another's "
            "images has not been counted: the results judge no dataset on unannotated names."
        )
    for unannotated in dict.fromkeys(stage.unannotated for stage in stages if stage.unannotated is not None):
        lines.append(f"- {UNANNOTATED.get(unannotated, f'Categories unannotated to a dataset: {unannotated}.')}")
    if any(stage.seed is not None for stage in stages):
        lines.append("- One run with one seed: how much the results vary from run to run is not known.")
    if few := [f"{_cell(name)} ({one.trained_on})" for name, (_, one) in data.items() if one.trained_on < _FEW]:
        lines.append(f"- Few training images: {', '.join(few)}.")
    if bound := [_cell(name) for name, (_, one) in data.items() if _is_restricted(one)]:
        lines.append(f"- Licences that mention non-commercial use: {', '.join(bound)}.")
    if silent := [_cell(name) for name, (_, one) in data.items() if not one.licences]:
        lines.append(f"- Licence not known: {', '.join(silent)}.")
    judged = {one.name for one in facts.report.datasets} if facts.report is not None else set()
    judged |= {key.removeprefix("AP ") for key in facts.training.metrics}
    if unjudged := [_cell(name) for name in data if name not in judged]:
        lines.append(f"- Not evaluated: {', '.join(unjudged)}.")
    lines.append("- Results are on images like those of training; on others expect less.")
    return "\n".join(lines)


def _files(facts: CardFacts) -> str:
    stored = f" Weights are stored as {facts.dtype}." if facts.dtype is not None else ""
    return f"Weights are safetensors, all else is JSON: nothing is unpickled or run when it is loaded.{stored}"


# results for the header


def _eval_results(facts: CardFacts) -> Iterator[EvalResult]:
    if facts.report is None:
        for name in _datasets(facts):
            if (value := facts.training.metrics.get(f"AP {name}")) is not None:
                yield _eval_result(name, "val", "own", value)
        return
    for one in facts.report.datasets:
        for mode in MODES:
            if (value := one.ap(mode)) is not None:
                yield _eval_result(one.name, one.split, mode, value)


def _eval_result(dataset: str, split: str, mode: Mode, value: float) -> EvalResult:
    return EvalResult(
        task_type="object-detection",
        dataset_type=_slug(dataset),
        dataset_name=dataset,
        dataset_split=split,
        metric_type="map",
        metric_name=f"AP, {TITLES[mode]} (COCO, 0 to 100)",
        metric_value=round(value, 2),
    )


# small things


def _datasets(facts: CardFacts) -> tuple[str, ...]:
    """Those of the vocabulary, then those that only the history tells of."""
    return tuple(dict.fromkeys((*facts.checkpoint.vocabulary.datasets, *facts.data)))


def _text_encoder(facts: CardFacts) -> str:
    if _is_local(facts):
        return "a folder of the machine that it was trained on, which is not part of this"
    return f"`{facts.checkpoint.text_encoder.get('source', UNKNOWN)}`"


def _is_local(facts: CardFacts) -> bool:
    """Whether the text encoder is a folder: a bundled one has a colon, one on the hub is user/name at most."""
    source = str(facts.checkpoint.text_encoder.get("source", ""))
    return Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") > 1


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES:,} more (vocabulary.json)" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(_cell, names[:_MOST_NAMES])) + more


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Words of others, as they may stand in Markdown and its tables."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", plain)


def _slug(name: str) -> str:
    """A dataset's name as the hub's headers want it."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "dataset"


def _signed(text: str) -> str:
    line = "written by METR, and anew whenever the weights are, unless a person changes it"
    return f"{text.rstrip()}\n\n<!-- {line}: sha256 {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256("\n".join(text.rstrip().splitlines()).encode()).hexdigest()
