"""Model cards: a README.md with the hub's header, written from what a checkpoint knows of itself and nothing else.

What it says stands in `model_card.md.jinja`; the facts that it says it of are gathered here.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from metr.checkpoint import CARD, EVALUATION, Checkpoint, signed_card
from metr.errors import MetrError, counted, markdown
from metr.evaluation.report import TITLES, UNANNOTATED, dataset_table, seen_notes
from metr.evaluation.results import MODES, EvaluationReport, Mode, from_dict
from metr.model import METR
from metr.run_directory import RunDirectory
from metr.serialization import read_json
from metr.training.comparison import COMPARISON
from metr.training.provenance import DataFacts, TrainingFacts

__all__ = ["CARD", "EVALUATION", "CardFacts", "find_report", "model_card", "write_card"]

UNKNOWN = "unknown"
TAGS = ("object-detection", "open-vocabulary", "multi-dataset", "detr", "metr")
_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_logger = logging.getLogger(__name__)

_MOST_NAMES = 150  # that are listed of a dataset
_FEW = 300  # images, below which a dataset is called small
# two measurements of one checkpoint differ by less in the mean: rounding to float16 moves a split of few boxes more
_SAME_AP = 1.0
_RESTRICTED = re.compile(r"non-?commercial|\bnc\b", re.IGNORECASE)


def model_card(
    model: METR,
    *,
    title: str | None = None,
    repository: str | None = None,
    licence: str | None = None,
    dtype: torch.dtype | None = None,
) -> ModelCard:
    """The model card of a detector, as huggingface-hub's `ModelCard`: `str(card)` is its text, `card.save` writes it.

    Args:
        model: The detector.
        title: What the model is called; by default as its repository or its folder.
        repository: Its name on the hub ("user/name"), where it has one.
        licence: The model's, by the hub's identifier ("apache-2.0"); by default "unknown".
        dtype: The type of the weights in the file, where it is not that of training.
    """
    called = repository or ("METR" if model.folder is None else model.folder.name)
    title = title or called.rpartition("/")[2]
    return write_card(CardFacts.of(model, title, repository=repository, licence=licence, dtype=dtype))


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

    @staticmethod
    def of(
        model: METR, title: str, *, repository: str | None, licence: str | None, dtype: torch.dtype | None
    ) -> "CardFacts":
        """The facts of a detector, with the results that lie beside its checkpoint or in its run."""
        return CardFacts(
            title=title,
            checkpoint=model.checkpoint,
            parameters=sum(parameter.numel() for parameter in model.network.parameters()),
            report=None if model.folder is None else find_report(model.folder, model.checkpoint),
            repository=repository,
            licence=licence or UNKNOWN,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        )

    @cached_property
    def training(self) -> TrainingFacts:
        """What the checkpoint tells of its training."""
        return TrainingFacts.of(self.checkpoint.training)

    @cached_property
    def data(self) -> dict[str, tuple[int, DataFacts]]:
        """Each dataset of training with the stage that it was last in, from 0."""
        stages = enumerate(self.training.stages())
        return {name: (number, one) for number, stage in stages for name, one in stage.data.items()}

    @property
    def datasets(self) -> tuple[str, ...]:
        """The datasets of the vocabulary, then those that only the history tells of."""
        return tuple(dict.fromkeys((*self.checkpoint.vocabulary.datasets, *self.data)))

    @property
    def origins(self) -> dict[str, str]:
        """Where datasets say that they come from."""
        return {name: one.origin for name, (_, one) in self.data.items() if one.origin}

    @property
    def names_of_no_dataset(self) -> list[str]:
        """The names of the vocabulary that no dataset annotates."""
        vocabulary = self.checkpoint.vocabulary
        owned = {name for names in vocabulary.datasets.values() for name in names}
        return [name for name in vocabulary.names if name not in owned]

    @property
    def seen(self) -> list[str]:
        """What is known of evaluated images that training had, by dataset, in words."""
        return [] if self.report is None else seen_notes(self.report)

    @property
    def text_encoder_is_local(self) -> bool:
        """Whether the text encoder is a folder: a bundled one has a colon, one on the hub is user/name at most."""
        source = str(self.checkpoint.text_encoder.get("source", ""))
        return Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") > 1

    @property
    def treatments(self) -> list[str]:
        """How each way of training treated the categories that an image's dataset does not annotate."""
        ways = dict.fromkeys(stage.unannotated for stage in self.training.stages() if stage.unannotated is not None)
        return [UNANNOTATED.get(way, f"Categories that a dataset does not annotate: {way}.") for way in ways]

    @property
    def cautions(self) -> dict[str, list[str]]:
        """The datasets for which something is to be kept in mind, by what it is."""
        data = {name: one for name, (_, one) in self.data.items()}
        measured = {one.name for one in self.report.datasets} if self.report is not None else set()
        measured |= {key.removeprefix("AP ") for key in self.training.metrics}
        few = [f"{markdown(name)} ({one.trained_on})" for name, one in data.items() if one.trained_on < _FEW]
        return {
            "Few training images": few,
            "Licences that mention non-commercial use": [markdown(name) for name in data if _is_restricted(data[name])],
            "Licence not known": [markdown(name) for name in data if not data[name].licences],
            "Not evaluated": [markdown(name) for name in data if name not in measured],
        }


def write_card(facts: CardFacts) -> ModelCard:
    """The card: header, sections, and a last line by which `is_untouched` recognises it."""
    stages = facts.training.stages()

    def stage_title(number: int) -> str:
        return "training" if len(stages) == 1 else "pretraining" if number == 0 else "fine-tuning"

    card = ModelCard.from_template(
        _header(facts),
        template_path=str(_TEMPLATE),
        facts=facts,
        vocabulary=facts.checkpoint.vocabulary,
        model=facts.checkpoint.model,
        stages=stages,
        results="" if facts.report is None else dataset_table(facts.report),
        md=markdown,
        count=counted,
        first=_first,
        licences=_licences,
        history=_history,
        stage_title=stage_title,
    )
    return ModelCard(signed_card(str(card)))


def find_report(folder: Path, checkpoint: Checkpoint) -> EvaluationReport | None:
    """The evaluation of the checkpoint in `folder`: beside it, in its run's `evaluation`, or of its fine-tuning.

    A report that contradicts what training measured of these very weights is of others, and is left out.
    """
    run = folder.parent if folder.name in {RunDirectory(folder).best.name, RunDirectory(folder).last.name} else folder
    places = dict.fromkeys((folder, folder / "evaluation", run / "evaluation", run))
    measured = TrainingFacts.of(checkpoint.training).metrics
    for path in (*(place / EVALUATION for place in places), run / COMPARISON):
        if not path.is_file():
            continue
        try:
            values = read_json(path)
            report = from_dict(values["after"] if path.name == COMPARISON else values, where=path)
        except (MetrError, KeyError) as error:
            _logger.warning("no results in the model card: %s", error)
            continue
        if _contradicts(report, measured):
            _logger.warning("%s is of other weights than %s: left out of the model card", path, folder)
            continue
        return report
    return None


def _contradicts(report: EvaluationReport, measured: dict[str, float]) -> bool:
    """Whether training measured something else on the validation splits that both have."""
    pairs = [(one.ap("own"), measured.get(f"AP {one.name}")) for one in report.datasets if one.split == "val"]
    apart = [abs(one - other) for one, other in pairs if one is not None and other is not None]
    return bool(apart) and sum(apart) / len(apart) > _SAME_AP


def _header(facts: CardFacts) -> ModelCardData:
    """The header by which the hub finds and shows a model."""
    results = list(_eval_results(facts))
    return ModelCardData(
        license=facts.licence,
        library_name="metr",
        pipeline_tag="object-detection",
        tags=list(TAGS),
        datasets=[_slug(name) for name in facts.datasets] or None,
        metrics=["map"] if results else None,
        model_name=facts.title,
        eval_results=results or None,
    )


def _eval_results(facts: CardFacts) -> Iterator[EvalResult]:
    if facts.report is None:
        for name in facts.datasets:
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


# what the template calls


def _history(stage: TrainingFacts) -> Iterator[str]:
    """What is recorded of one stage of training."""
    if stage.started_from is not None:
        yield f"started from {markdown(stage.started_from)}"
    if stage.step is not None:
        yield f"{counted(stage.step, 'step')}" + (f" of {counted(stage.batch, 'image')}" if stage.batch else "")
    if stage.images is not None:
        yield f"{counted(stage.images, 'image')} seen"
    if stage.learning_rate is not None:
        yield f"learning rate {stage.learning_rate:g}"
    if stage.unannotated is not None:
        yield f"`unannotated = {stage.unannotated}`"
    if stage.seed is not None:
        yield f"seed {stage.seed}"
    if stage.hardware is not None:
        yield f"on {markdown(stage.hardware)}"
    if stage.software:
        yield "with " + ", ".join(f"{name} {version}" for name, version in stage.software.items())


def _licences(data: DataFacts) -> str:
    """What each file of a dataset says of its licence."""
    told = [
        f"{one.stated_in}{'' if one.images is None else ', ' + counted(one.images, 'image')}: {one.text}"
        for one in data.licences
    ]
    return " / ".join(told) or UNKNOWN


def _is_restricted(data: DataFacts) -> bool:
    return any(_RESTRICTED.search(f"{one.text} {one.url or ''}") for one in data.licences)


def _first(names: Sequence[str]) -> str:
    """The names in a line, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMES:,} more (vocabulary.json)" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(markdown, names[:_MOST_NAMES])) + more


def _slug(name: str) -> str:
    """A dataset's name as the hub's headers want it."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "dataset"
