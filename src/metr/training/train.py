"""Training one detector on many datasets (`metr train`), and the plan of such a run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from torch import nn

from metr.checkpoint import Checkpoint
from metr.config import Config
from metr.data.joint import JointData
from metr.data.loading import build_train_loader
from metr.data.records import Annotations
from metr.evaluation.report import main_console, show
from metr.evaluation.results import EvaluationConfig
from metr.evaluation.runner import EvaluationRunner
from metr.fitting import Hanging
from metr.inference.config import InferenceConfig, without_presence
from metr.losses.criterion import SetCriterion
from metr.models.config import DetectorConfig
from metr.models.detector import Detector, skeleton
from metr.processes import in_main_process
from metr.run_directory import RunDirectory
from metr.text.config import MULTILINGUAL
from metr.text.encoder import TextEncoder
from metr.text.same_names import listed, spelt_alike
from metr.text.similar_names import read_alike
from metr.training.config import RunConfig
from metr.training.finetune_recipe import RECIPE, left_to_finetuning
from metr.training.fitted import lost_fits
from metr.training.images import ValImages
from metr.training.name_variation import OtherWords, other_words
from metr.training.parts import Evaluated, Outcome, TrainingParts
from metr.training.plan import advice, header, page, tell_end
from metr.training.provenance import provenance
from metr.training.resumption import DATASETS, check_apart, save_request
from metr.training.run_log import RunLog, log_page, tell
from metr.training.seen import seen_notes
from metr.training.start import (
    Start,
    described_start,
    forgotten,
    history,
    kept_network,
    restore_backbone,
    say_new_names,
    with_text_encoder,
)
from metr.training.state import check_place, log_changed_settings, seed_everything
from metr.training.step_targets import PseudoLabeler
from metr.training.train_request import (
    KEEPS,
    REQUEST,
    Asked,
    Data,
    Prepared,
    arguments,
    check_fresh,
    check_recipe,
    check_same,
    options_of,
    prepared,
)
from metr.training.trainer import Trainer
from metr.writable import check_folder_to_write

# How many names of a group that is read alike are told.
_ALIKE = 6


def train(
    data: Data | None,
    out: str | Path,
    config: str | Path | RunConfig | None = None,
    *,
    size: str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    evaluation: EvaluationConfig | None = None,
    console: Console | None = None,
    **more: Any,
) -> Outcome:
    """Trains one detector on all datasets together and keeps everything in the run folder `out`.

        train(["photos/", "cells=old/voc"], "runs/joint", size="small", overrides=["train.loop.steps=20000"])
        train(["photos/", "cells=old/voc"], "runs/joint", start="user/name")
        train(None, "runs/joint", resume=True)

    With a `start` the network is that detector's, with all its weights, and its names come before those of the data.
    The schedule is fresh.

    Args:
        data: One dataset or several: folders, name=folder, or YAML files that list some. None resumes with the run's.
        out: The run folder: configuration, metrics, curves, log, images, best and last checkpoint, the state to resume
            from.
        config: Laid over the size's recipe: a YAML file, or a whole configuration.
        size: Whose recipe is the beginning: "nano" (by default), "small", "base" or "vit".
        overrides: Laid over both: `["section.key=value", ...]`.
        resume: Go on where the run in `out` stopped, with its datasets and its configuration. `config`, `overrides`
            and `epochs` change that configuration, but not the network.
        evaluation: How evaluations during training are made. By default each dataset is evaluated with its own names,
            and with all of them, which is what detection will look for.
        console: Where progress is shown; None shows none.
        **more: Fields of `JointOptions` by name: start, same_names, prompts, shots, fraction, seed, epochs,
            allow_empty.

    Raises:
        MetrError: data, configuration or the run folder do not fit; the message says what and where.
    """
    console, run = main_console(console), RunDirectory(Path(out))
    asked = Asked(config=config, size=size, overrides=tuple(overrides), options=options_of(more))
    with RunLog(run.path, console) as log:
        check_place(run, resume)
        check_folder_to_write(run.path)
        if run.resumable or not resume:
            run.check_free()
        check_apart(run, arguments(data))
        begun = prepared(data, asked, run, resume, console)
        joint, recipe = begun.plan.joint, begun.plan.recipe
        tell(console, *_notes_of_start(begun), header(begun.plan), *_advice(begun, resume))
        if begun.start is not None:
            say_new_names(begun.start.model, joint.vocabulary, console)
        tell(console, *_names_spelt_alike(joint))
        parts = training_parts(joint, recipe, console, begun.start)
        told = spelt_alike(joint.vocabulary.datasets)
        tell(console, *names_read_alike(parts.checkpoint, joint, told=told, kept=begun.start is not None))
        if resume:
            check_same(run, joint.vocabulary, parts.checkpoint.text_encoder)
        log.begin(recipe.train.loop.device)
        if in_main_process():
            save_request(run, REQUEST, begun.request, {DATASETS: begun.given})
        sets = joint.evaluation()
        outcome = fit(parts, sets, recipe, run.path, resume=resume, console=console, evaluation=evaluation)
        if begun.start is not None and not outcome.interrupted:
            tell(console, *lost_fits(begun.start.model.checkpoint, run))
        tell_end(outcome, run, recipe, begun.data, joint.sources, console, from_nothing=begun.start is None)
    return outcome


def plan(
    data: Data | None,
    config: str | Path | RunConfig | None = None,
    *,
    size: str | None = None,
    overrides: Sequence[str] = (),
    resumed: str | Path | None = None,
    **more: Any,
) -> RenderableType:
    """What `train` would do with these arguments, as a page for `rich.print`. It writes only dataset indices.

    Args:
        data: As for `train`, as `config`, `size`, `overrides` and `more` are.
        config: Laid over the size's recipe.
        size: Whose recipe is the beginning.
        overrides: Laid over both.
        resumed: The folder of the run to resume, if one is.
        **more: Fields of `JointOptions` by name.

    Raises:
        MetrError: data or configuration do not fit; the message says what and where.
    """
    asked = Asked(config=config, size=size, overrides=tuple(overrides), options=options_of(more))
    run = RunDirectory(Path("" if resumed is None else resumed))
    begun = prepared(data, asked, run, resumed is not None, Console(quiet=True))
    notes = *_advice(begun, resumed is not None), *_names_spelt_alike(begun.plan.joint)
    return Group(*_notes_of_start(begun), page(begun.plan), *notes)


def _advice(begun: Prepared, resume: bool) -> list[Hanging]:
    return [] if resume else advice(begun.plan, from_nothing=begun.start is None)


def _notes_of_start(begun: Prepared) -> list[Hanging]:
    """What a run begins with, and what of that it might lose; nothing where it begins with no detector."""
    if begun.start is None:
        return []
    model = begun.start.model
    notes = described_start(model, begun.plan.recipe), forgotten(model, begun.plan.joint, "add a dataset that has them")
    return [Hanging(note) for note in notes if note] + seen_notes(model, begun.plan.joint.sources)


def _names_spelt_alike(joint: JointData) -> list[Hanging]:
    """The pairs that are learnt apart though they differ in case, separators or the plural alone."""
    alike = spelt_alike(joint.vocabulary.datasets)
    pairs = listed([f'"{one}" and "{two}"' for one, two in alike])
    hint = f"names that are learnt apart and spelt alike: {pairs}; metr inspect --write makes a file that joins them"
    return [Hanging(hint)] if alike else []


def names_read_alike(
    checkpoint: Checkpoint, joint: JointData, told: Sequence[tuple[str, ...]] = (), *, kept: bool
) -> list[Hanging]:
    """A warning of names that are the same text to the language model, where one of them is in the data at hand.

    Args:
        checkpoint: The names, which may be of earlier trainings too, and their embeddings.
        joint: The data at hand.
        told: Pairs that were told already.
        kept: Whether the language model is that of a detector to begin with, and stays.
    """
    here = {name for source in joint.sources for name in source.categories}
    alike = read_alike(checkpoint.vocabulary.names, checkpoint.text_embeddings)
    groups = [group for group in alike if here.intersection(group) and set(group) not in map(set, told)]
    if not groups:
        return []
    ordered = [sorted(group, key=lambda name: name not in here) for group in groups]  # what is at hand is named first
    found = listed([" = ".join(f'"{name}"' for name in group[:_ALIKE]) for group in ordered])
    meant = "say in a datasets file what each means (prompts: {name: in other words})"
    one = "give things that are one a single name (renames)"
    other = f"take a language model that reads them (--set text.source={MULTILINGUAL})"
    what = "warning: the language model reads these names alike, so the detector cannot tell them apart"
    hint = f"{meant}, or {one}" if kept else f"{meant}, {one}, or {other}"
    return [Hanging(f"{what}: {found}. What to try: {hint}")]


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
        evaluation: How evaluations during training are made; by default with each dataset's own names and with those
            that detection will look for.

    Raises:
        MetrError: the run folder does not fit; the message says what and where.
    """
    inference = recipe.inference if parts.checkpoint.detection.presence else without_presence(recipe.inference)
    runner = EvaluationRunner(
        parts.checkpoint.vocabulary,
        parts.checkpoint.text_embeddings,
        sets,
        recipe.augmentation.resize,
        recipe.evaluation_loader,
        evaluation or _quick_evaluation(inference, parts.checkpoint, sets),
    )

    images = ValImages(runner, inference) if recipe.train.loop.images and in_main_process() else None

    def evaluate(network: nn.Module) -> Evaluated:
        report = runner.report(network, unannotated=recipe.unannotated)
        calibration, thresholds = report.calibration(), report.thresholds()
        show(report, console)
        with log_page() as paper:
            show(report, paper)
        if images is not None:
            images.draw(network, trainer.counters.step, trainer.folder.val_images, calibration, thresholds)
        return Evaluated(metrics=report.metrics(), calibration=calibration, thresholds=thresholds)

    if resume and console.quiet:  # else the header has told them
        log_changed_settings(RunDirectory(out).state, recipe)
    trainer = Trainer(parts, recipe.train, out, evaluate=evaluate, resolved=recipe, console=console)
    return trainer.fit(resume=resume)


def training_parts(joint: JointData, recipe: RunConfig, console: Console, start: Start | None = None) -> TrainingParts:
    """Builds network, criterion, loader and the rest of the checkpoint from data, recipe and, if given, a start."""
    check_recipe(recipe)
    build = partial(_fresh, joint) if start is None else partial(_begun_with, start)
    with console.status("embedding the names"):
        network, checkpoint, words = build(recipe)
    datasets = joint.training(recipe.augmentation, recipe.unannotated)
    loader = recipe.loader.model_copy(update={"mixture": joint.mixture(recipe.loader.mixture)})
    facts = {"unannotated": recipe.unannotated, RECIPE: left_to_finetuning(recipe), **provenance(joint, recipe)}
    return TrainingParts(
        network=network,
        criterion=SetCriterion(recipe.criterion),
        loader=partial(build_train_loader, datasets, loader),
        checkpoint=replace(checkpoint, training={**facts, **checkpoint.training}),
        teacher=teacher_of(joint, recipe),
        words=words,
    )


def _fresh(joint: JointData, recipe: RunConfig) -> tuple[Detector, Checkpoint, OtherWords | None]:
    """A network that begins with its backbone's weights, its checkpoint but for facts about training, and words."""
    check_fresh(recipe)
    encoder = TextEncoder(recipe.text)
    embeddings = encoder.embed(joint.vocabulary)
    words = other_words(joint.sources, joint.vocabulary, encoder.embed)
    encoder.release()
    seed_everything(recipe.train.loop.seed)
    skeleton(recipe.model, encoder.width)  # refuses a network of an absurd size before memory is taken for it
    network = Detector(recipe.model, encoder.width)
    if recipe.model.categories.whitening and len(embeddings) > 1:
        network.category_extraction.whiten(embeddings, recipe.model.categories.whitening)
    checkpoint = Checkpoint(
        model=rebuildable(recipe.model, network),
        vocabulary=joint.vocabulary,
        text_embeddings=embeddings,
        text_encoder=plain(encoder.pinned_config) | {"identity": encoder.identity},
        preprocessing=plain(recipe.augmentation.resize),
    )
    return network, checkpoint, words


def _begun_with(start: Start, recipe: RunConfig) -> tuple[Detector, Checkpoint, OtherWords | None]:
    """The network of a detector, its checkpoint with the names of the data, but for facts about training, and words."""
    model = with_text_encoder(start.model, recipe.text)
    embeddings = model.embed(start.joint.vocabulary, tell=False)
    words = other_words(start.joint.sources, start.joint.vocabulary, partial(model.embed, tell=False))
    seed_everything(recipe.train.loop.seed)
    network = kept_network(model, recipe.model, *KEEPS)
    if not start.resumed:  # else its saved weights follow
        restore_backbone(network, recipe.train.pretrained_backbone)
    checkpoint = Checkpoint(
        model=rebuildable(recipe.model, network),
        vocabulary=start.joint.vocabulary,
        text_embeddings=embeddings,
        text_encoder=model.checkpoint.text_encoder,
        preprocessing=plain(recipe.augmentation.resize),
        training={"finetuned_from": history(model.checkpoint)},
        detection=start.detection,
    )
    return network, checkpoint, words


def teacher_of(joint: JointData, recipe: RunConfig) -> PseudoLabeler | None:
    """The pseudo-labeler for categories that a dataset does not annotate; None unless the recipe asks for it."""
    if recipe.unannotated != "pseudo_label":
        return None
    return PseudoLabeler(recipe.train.pseudo_labels, joint.unannotated())


def _quick_evaluation(
    config: InferenceConfig, checkpoint: Checkpoint, sets: Mapping[str, Annotations]
) -> EvaluationConfig:
    """Each dataset with its own names, and with those that detection looks for unless that is the same everywhere."""
    default = checkpoint.detection.names
    names = set(default or checkpoint.vocabulary.names)
    if all({*map(str.strip, one.categories)} == names for one in sets.values()):
        return EvaluationConfig(modes=("own",), inference=config)
    return EvaluationConfig(modes=("own", "default" if default else "joint"), default_names=default, inference=config)


def rebuildable(config: DetectorConfig, network: Detector) -> DetectorConfig:
    """The configuration that rebuilds the network without downloading pretrained backbone weights."""
    return config.model_copy(update={"backbone": network.backbone.config})


def plain(config: Config) -> dict[str, object]:
    """A configuration as JSON values, for a checkpoint."""
    return config.model_dump(mode="json")
