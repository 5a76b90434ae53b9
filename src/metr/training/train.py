"""The verb train: many datasets, one detector."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from torch import nn

from metr.checkpoint import CONFIG, Checkpoint, load_checkpoint
from metr.config import Config
from metr.data.joint import JointData, open_joint
from metr.data.loading import build_train_loader
from metr.data.records import Annotations
from metr.errors import ConfigError
from metr.evaluation.report import show
from metr.evaluation.results import EvaluationConfig
from metr.evaluation.runner import EvaluationRunner
from metr.inference.config import InferenceConfig
from metr.losses.criterion import SetCriterion
from metr.models.config import DetectorConfig
from metr.models.detector import Detector
from metr.run_directory import RunDirectory, existing_folder
from metr.text.encoder import TextEncoder
from metr.training.finetune_recipe import RECIPE, left_to_finetuning
from metr.training.provenance import provenance
from metr.training.pseudo_labels import PseudoLabeler
from metr.training.random_state import seed_everything
from metr.training.recipe import RunConfig
from metr.training.state import check_place
from metr.training.trainer import Outcome, Trainer, TrainingParts


def train(
    data: Sequence[str],
    out: Path,
    recipe: RunConfig,
    *,
    resume: bool = False,
    console: Console | None = None,
    judged: EvaluationConfig | None = None,
) -> Outcome:
    """Trains one detector on all datasets together and keeps everything in the run folder `out`.

    Args:
        data: Datasets: folders, name=folder, or YAML files that list some.
        out: The run folder: configuration, metrics, curves, best and last checkpoint, the state to resume from.
        recipe: Everything else.
        resume: Go on where the run in `out` stopped.
        console: Where progress is shown.
        judged: How evaluations during training are made; own names by default, which is the quickest.

    Raises:
        MetrError: data, configuration or the run folder do not fit; the message says what and where.
    """
    console = console or Console(quiet=True)
    check_place(RunDirectory(out), resume)
    joint = open_joint(data)
    parts = training_parts(joint, recipe, console)
    return fit(parts, joint.evaluation(), recipe, out, resume=resume, console=console, judged=judged)


def fit(
    parts: TrainingParts,
    sets: Mapping[str, Annotations],
    recipe: RunConfig,
    out: Path,
    *,
    resume: bool,
    console: Console,
    judged: EvaluationConfig | None = None,
) -> Outcome:
    """Trains what is put together already.

    Args:
        parts: Network, criterion, loader and the rest of the checkpoint.
        sets: What is evaluated on during training, by dataset.
        recipe: The whole configuration, shown and saved.
        out: The run folder.
        resume: Go on where the run in `out` stopped.
        console: Where progress is shown.
        judged: How evaluations during training are made; own names by default.

    Raises:
        MetrError: the run folder does not fit; the message says what and where.
    """
    if resume:
        _check_same(RunDirectory(out), parts.checkpoint)
    judge = EvaluationRunner(
        parts.checkpoint.vocabulary,
        parts.checkpoint.text_embeddings,
        sets,
        recipe.augmentation.resize,
        recipe.evaluation_loader,
        judged or _quick_evaluation(recipe.inference),
    )

    def evaluate(network: nn.Module) -> dict[str, float]:
        report = judge.report(network, unannotated=recipe.unannotated)
        show(report, console)
        return report.metrics()

    trainer = Trainer(parts, recipe.train, out, evaluate=evaluate, resolved=recipe, console=console)
    return trainer.fit(resume=resume)


def training_parts(joint: JointData, recipe: RunConfig, console: Console) -> TrainingParts:
    """Network, criterion, loader and the rest of the checkpoint, made from data and recipe."""
    check_teacher(recipe)
    encoder = TextEncoder(recipe.text)
    with console.status("embedding the names"):
        embeddings = encoder.embed(joint.vocabulary)
    encoder.release()
    seed_everything(recipe.train.loop.seed)
    network = Detector(recipe.model, encoder.width)
    if recipe.model.categories.whitening and len(embeddings) > 1:
        network.category_extraction.whiten(embeddings, recipe.model.categories.whitening)
    datasets = joint.training(recipe.augmentation, recipe.unannotated)
    mixed = recipe.loader.with_base_mixture(joint.mixture(recipe.loader.base_mixture))
    checkpoint = Checkpoint(
        model=rebuildable(recipe.model, network),
        vocabulary=joint.vocabulary,
        text_embeddings=embeddings,
        text_encoder=plain(encoder.pinned_config) | {"identity": encoder.identity},
        preprocessing=plain(recipe.augmentation.resize),
        training={"unannotated": recipe.unannotated, RECIPE: left_to_finetuning(recipe), **provenance(joint, recipe)},
    )
    return TrainingParts(
        network=network,
        criterion=SetCriterion(recipe.criterion),
        loader=partial(build_train_loader, datasets, mixed),
        checkpoint=checkpoint,
        teacher=teacher_of(joint, recipe),
    )


def check_teacher(recipe: RunConfig) -> None:
    """Whether there is a teacher where one is asked for.

    Raises:
        ConfigError: there is none.
    """
    if recipe.unannotated == "pseudo_label" and not recipe.train.ema.enabled:
        what = "the teacher is the average of the weights, which is off"
        raise ConfigError(what, where="unannotated", hint="set train.ema.enabled=true, or unannotated=ignore")


def teacher_of(joint: JointData, recipe: RunConfig) -> PseudoLabeler | None:
    """The average's say in the categories that each dataset does not annotate, where it has one."""
    return (
        PseudoLabeler(recipe.train.pseudo_labels, joint.unannotated()) if recipe.unannotated == "pseudo_label" else None
    )


def _quick_evaluation(config: InferenceConfig) -> EvaluationConfig:
    """Own names alone, answered and finished as the recipe says."""
    return EvaluationConfig(modes=("own",), precision=config.precision, postprocess=config.postprocess)


def _check_same(run: RunDirectory, checkpoint: Checkpoint) -> None:
    """A run goes on with the names and the text encoder that it began with.

    Raises:
        ConfigError: they are others.
    """
    if not (existing_folder(run.last) / CONFIG).is_file():
        return
    began = load_checkpoint(run.last)
    hint = "resume with the datasets and the text encoder that it began with, or start a new run"
    if began.vocabulary != checkpoint.vocabulary:
        before, now = set(began.vocabulary.names), set(checkpoint.vocabulary.names)
        lost, new = ", ".join(sorted(before - now)) or "none", ", ".join(sorted(now - before)) or "none"
        what = f"the run has other datasets, names or prompts; names only there: {lost}; only here: {new}"
        raise ConfigError(what, where=run.path, hint=hint)
    before_encoder, encoder = (one.text_encoder.get("identity") for one in (began, checkpoint))
    if before_encoder != encoder:
        raise ConfigError(f"the run has the text encoder {before_encoder}, not {encoder}", where=run.path, hint=hint)


def rebuildable(config: DetectorConfig, network: Detector) -> DetectorConfig:
    """The configuration with which the network is built again without fetching its backbone's first weights."""
    return config.model_copy(update={"backbone": network.backbone.config})


def plain(config: Config) -> dict[str, object]:
    """A configuration as the plain values of a checkpoint."""
    return config.model_dump(mode="json")
