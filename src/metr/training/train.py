"""Training one detector on many datasets (`metr train`), and the plan of such a run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import nn

from metr.checkpoint import CONFIG, Checkpoint, load_checkpoint
from metr.config import Config
from metr.data.joint import JointData, open_joint
from metr.data.loading import build_train_loader
from metr.data.records import Annotations
from metr.data.sampling import mixture_weights
from metr.devices import in_main_process, process_count, resolved_device, resolved_precision
from metr.errors import ConfigError
from metr.evaluation.report import show
from metr.evaluation.results import EvaluationConfig
from metr.evaluation.runner import EvaluationRunner
from metr.inference.postprocess import InferenceConfig
from metr.losses.criterion import SetCriterion
from metr.models.config import DetectorConfig
from metr.models.detector import Detector
from metr.run_directory import RunDirectory, existing_folder
from metr.text.encoder import TextEncoder
from metr.text.same_names import listed, spelt_alike
from metr.training.config import RunConfig, changed_lines, load_recipe
from metr.training.finetune_recipe import RECIPE, left_to_finetuning
from metr.training.logger import check_trackers
from metr.training.provenance import provenance
from metr.training.state import check_place, seed_everything
from metr.training.step_targets import PseudoLabeler
from metr.training.trainer import Evaluated, Outcome, Trainer, TrainingParts

Data = str | Path | Sequence[str | Path]
"""One dataset or several, as arguments of a command: a folder, name=folder, or a YAML file that lists some."""


def train(
    data: Data,
    out: str | Path,
    config: str | Path | RunConfig | None = None,
    *,
    size: str = "nano",
    overrides: Sequence[str] = (),
    resume: bool = False,
    evaluation: EvaluationConfig | None = None,
    console: Console | None = None,
) -> Outcome:
    """Trains one detector on all datasets together and keeps everything in the run folder `out`.

        train(["photos/", "cells=old/voc"], "runs/joint", size="small", overrides=["train.loop.steps=20000"])

    Args:
        data: One dataset or several: folders, name=folder, or YAML files that list some.
        out: The run folder: configuration, metrics, curves, best and last checkpoint, the state to resume from.
        config: Laid over the size's recipe: a YAML file, or a whole configuration.
        size: Whose recipe is the beginning: "nano", "small" or "base".
        overrides: Laid over both: `["section.key=value", ...]`.
        resume: Go on where the run in `out` stopped.
        evaluation: How evaluations during training are made. By default each dataset is evaluated with its own names
            alone, which is quickest.
        console: Where progress is shown; None shows none.

    Raises:
        MetrError: data, configuration or the run folder do not fit; the message says what and where.
    """
    console, run = main_console(console), RunDirectory(Path(out))
    recipe = load_recipe(size, config, overrides)
    check_recipe(recipe)
    check_place(run, resume)
    joint = open_joint(arguments(data))
    if alike := spelt_alike(joint.vocabulary.datasets):
        pairs = listed([f'"{one}" and "{two}"' for one, two in alike])
        hint = (
            f"names that are learnt apart and spelt alike: {pairs}; metr inspect --write makes a file that joins them"
        )
        console.print(hint, highlight=False, markup=False, soft_wrap=True)
    show_changes(load_recipe(size), recipe, f"the recipe {size}", console)
    parts = training_parts(joint, recipe, console)
    return fit(parts, joint.evaluation(), recipe, run.path, resume=resume, console=console, evaluation=evaluation)


def plan(
    data: Data, config: str | Path | RunConfig | None = None, *, size: str = "nano", overrides: Sequence[str] = ()
) -> RenderableType:
    """What `train` would do with these arguments, as a page for `rich.print`. It writes only dataset indices.

    Raises:
        MetrError: data or configuration do not fit; the message says what and where.
    """
    recipe = load_recipe(size, config, overrides)
    check_recipe(recipe)
    joint = open_joint(arguments(data))
    changes = changed_lines(load_recipe(size), recipe)
    title = f"It differs from the recipe {size} in:" if changes else f"It is the recipe {size}, unchanged."
    lines = [*_plan_lines(joint, recipe), "", title, *(f"  {change}" for change in changes)]
    return Group(_plan_table(joint, recipe), *map(Text, lines))


def fit(
    parts: TrainingParts,
    sets: Mapping[str, Annotations],
    recipe: RunConfig,
    out: Path,
    *,
    resume: bool,
    console: Console,
    evaluation: EvaluationConfig | None = None,
) -> Outcome:
    """Trains from parts that are already built.

    Args:
        parts: Network, criterion, loader and the rest of the checkpoint.
        sets: The annotations to evaluate on during training, by dataset name.
        recipe: The whole configuration, saved in the run folder.
        out: The run folder.
        resume: Go on where the run in `out` stopped.
        console: Where progress is shown.
        evaluation: How evaluations during training are made; by default with each dataset's own names alone.

    Raises:
        MetrError: the run folder does not fit; the message says what and where.
    """
    if resume:
        _check_same(RunDirectory(out), parts.checkpoint)
    runner = EvaluationRunner(
        parts.checkpoint.vocabulary,
        parts.checkpoint.text_embeddings,
        sets,
        recipe.augmentation.resize,
        recipe.evaluation_loader,
        evaluation or _quick_evaluation(recipe.inference),
    )

    def evaluate(network: nn.Module) -> Evaluated:
        report = runner.report(network, unannotated=recipe.unannotated)
        show(report, console)
        return Evaluated(metrics=report.metrics(), thresholds=report.thresholds())

    trainer = Trainer(parts, recipe.train, out, evaluate=evaluate, resolved=recipe, console=console)
    return trainer.fit(resume=resume)


def training_parts(joint: JointData, recipe: RunConfig, console: Console) -> TrainingParts:
    """Builds network, criterion, loader and the rest of the checkpoint from data and recipe."""
    check_recipe(recipe)
    encoder = TextEncoder(recipe.text)
    with console.status("embedding the names"):
        embeddings = encoder.embed(joint.vocabulary)
    encoder.release()
    seed_everything(recipe.train.loop.seed)
    network = Detector(recipe.model, encoder.width)
    if recipe.model.categories.whitening and len(embeddings) > 1:
        network.category_extraction.whiten(embeddings, recipe.model.categories.whitening)
    datasets = joint.training(recipe.augmentation, recipe.unannotated)
    loader = recipe.loader.model_copy(update={"mixture": joint.mixture(recipe.loader.mixture)})
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
        loader=partial(build_train_loader, datasets, loader),
        checkpoint=checkpoint,
        teacher=teacher_of(joint, recipe),
    )


def check_recipe(recipe: RunConfig) -> None:
    """Checks that pseudo-labels have an average of the weights, and that trackers are installed.

    Raises:
        ConfigError: pseudo-labels are asked for without an average of the weights, or a tracker is not installed.
    """
    check_trackers(recipe.train.loop.trackers)
    if recipe.unannotated == "pseudo_label" and not recipe.train.ema.enabled:
        what = "pseudo-labels come from the average of the weights, which is off"
        raise ConfigError(what, where="unannotated", hint="set train.ema.enabled=true, or unannotated=ignore")


def teacher_of(joint: JointData, recipe: RunConfig) -> PseudoLabeler | None:
    """The pseudo-labeler for categories that a dataset does not annotate; None unless the recipe asks for it."""
    if recipe.unannotated != "pseudo_label":
        return None
    return PseudoLabeler(recipe.train.pseudo_labels, joint.unannotated())


def arguments(data: Data) -> list[str]:
    """The datasets as a list of command-line arguments."""
    return [str(data)] if isinstance(data, str | Path) else [str(one) for one in data]


def main_console(console: Console | None) -> Console:
    """The console in the main process; a silent one in the other processes, or where none is given."""
    return console if console is not None and in_main_process() else Console(quiet=True)


def show_changes(recipe: RunConfig, config: RunConfig, name: str, console: Console) -> None:
    """Prints what in a configuration differs from a recipe."""
    if changes := changed_lines(recipe, config):
        lines = "\n".join([f"configuration: {name}, but for", *(f"  {change}" for change in changes)])
        console.print(lines, highlight=False, markup=False, soft_wrap=True)


def _quick_evaluation(config: InferenceConfig) -> EvaluationConfig:
    """Each dataset with its own names alone, at the recipe's precision and postprocessing."""
    return EvaluationConfig(modes=("own",), inference=config)


def _check_same(run: RunDirectory, checkpoint: Checkpoint) -> None:
    """Checks that a resumed run has the vocabulary and the text encoder that it began with.

    Raises:
        ConfigError: one of them differs.
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
    """The configuration that rebuilds the network without downloading pretrained backbone weights."""
    return config.model_copy(update={"backbone": network.backbone.config})


def plain(config: Config) -> dict[str, object]:
    """A configuration as JSON values, for a checkpoint."""
    return config.model_dump(mode="json")


def _plan_table(joint: JointData, recipe: RunConfig) -> Table:
    """A row for each dataset: images, categories, share of the samples, and epochs."""
    lengths, evaluated = joint.lengths, joint.evaluation()
    fractions = mixture_weights(lengths, joint.mixture(recipe.loader.mixture))
    total = _images_a_step(recipe) * recipe.train.loop.steps
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("dataset", overflow="fold")
    table.add_column("format")
    for head in ("categories", "train images", "evaluated on", "of samples", "epochs"):
        table.add_column(head, justify="right")
    for source in joint.sources:
        name, split = source.name, evaluated[source.name]
        numbers = [f"{len(source.categories):,}", f"{lengths[name]:,}", f"{split.split} {len(split):,}"]
        numbers += [f"{fractions[name]:.0%}", f"{total * fractions[name] / lengths[name]:,.1f}"]
        table.add_row(escape(name), source.format, *numbers)
    return table


def _plan_lines(joint: JointData, recipe: RunConfig) -> list[str]:
    """Names, steps, device and sizes, a line each."""
    loop, model, resize = recipe.train.loop, recipe.model, recipe.augmentation.resize
    owners = Counter(name for source in joint.sources for name in set(source.categories))
    shared = sum(count > 1 for count in owners.values())
    device, images = resolved_device(loop.device), _images_a_step(recipe)
    shape = f"{resize.size} x {resize.size}" if resize.mode == "stretch" else f"{resize.size} to {resize.longest}"
    sizes = f", in training {', '.join(map(str, recipe.augmentation.sizes))}" if recipe.augmentation.sizes else ""
    every = f"every {loop.evaluate_every:,} steps and at the end" if loop.evaluate_every else "at the end"
    return [
        f"names: {len(joint.vocabulary):,}, {shared:,} of them in several datasets; unannotated: {recipe.unannotated}",
        f"steps: {loop.steps:,} of {images:,} images, {loop.steps * images:,} images in all; evaluated {every}",
        f"device: {device}, {resolved_precision(loop.precision, device)}, processes: {process_count()}",
        f"images: {shape} pixels ({resize.mode}){sizes}",
        f"network: {model.backbone.name}, {model.encoder.kind} encoder, {model.decoder.layers} decoder layers, "
        f"width {model.width}, {model.queries.number} queries; text: {recipe.text.source}",
    ]


def _images_a_step(recipe: RunConfig) -> int:
    return recipe.loader.batch_size * recipe.train.loop.accumulation * process_count()
