"""Training one detector on many datasets (`metr train`), and the plan of such a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from torch import nn

from metr.checkpoint import CONFIG, Checkpoint, load_checkpoint
from metr.config import Config, Tree
from metr.data.config import SubsetConfig
from metr.data.guard import log_issues
from metr.data.joint import JointData, open_joint
from metr.data.loading import build_train_loader
from metr.data.records import Annotations
from metr.errors import ConfigError
from metr.evaluation.report import main_console, show
from metr.evaluation.results import EvaluationConfig
from metr.evaluation.runner import EvaluationRunner
from metr.fitting import Hanging
from metr.inference.config import InferenceConfig
from metr.inference.postprocess import ScoreThresholds
from metr.losses.criterion import SetCriterion
from metr.models.config import DetectorConfig
from metr.models.detector import Detector, skeleton
from metr.processes import in_main_process
from metr.run_directory import RunDirectory, existing_folder
from metr.text.encoder import TextEncoder
from metr.text.same_names import listed, spelt_alike
from metr.text.vocabulary import Vocabulary
from metr.training.config import (
    RunConfig,
    TrainOptions,
    check_epochs,
    load_recipe,
)
from metr.training.finetune_recipe import RECIPE, left_to_finetuning
from metr.training.images import ValImages
from metr.training.logger import check_trackers
from metr.training.parts import Evaluated, Outcome, TrainingParts
from metr.training.plan import RunPlan, advice, header, page, steps_of, tell_end
from metr.training.provenance import provenance
from metr.training.resumed_recipe import resumed_recipe
from metr.training.resumption import (
    DATASETS,
    check_same_request,
    dataset_facts,
    kept_datasets,
    kept_request,
    log_changed_datasets,
    made_so_far,
    save_request,
)
from metr.training.run_log import RunLog, log_page, tell
from metr.training.state import check_place, log_changed_settings, seed_everything
from metr.training.step_targets import PseudoLabeler
from metr.training.trainer import Trainer

Data = str | Path | Sequence[str | Path]
"""One dataset or several, as arguments of a command: a folder, name=folder, or a YAML file that lists some."""


REQUEST = "training.json"
"""The file of the run folder that says what was asked for, besides the configuration and the datasets."""


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
        train(None, "runs/joint", resume=True)

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
        **more: Fields of `TrainOptions` by name: shots, fraction, seed, epochs, allow_empty.

    Raises:
        MetrError: data, configuration or the run folder do not fit; the message says what and where.
    """
    console, run = main_console(console), RunDirectory(Path(out))
    asked = _Asked(config=config, size=size, overrides=tuple(overrides), options=_options(more))
    with RunLog(run.path) as log:
        check_place(run, resume)
        prepared = _resumed(data, run, asked) if resume else _begun(data, asked)
        joint, recipe = prepared.plan.joint, prepared.plan.recipe
        tell(console, header(prepared.plan), *([] if resume else advice(prepared.plan, from_nothing=True)))
        _hint_at_names_spelt_alike(joint, console)
        parts = training_parts(joint, recipe, console)
        if resume:
            check_same(run, joint.vocabulary, parts.checkpoint.text_encoder)
        log.begin(recipe.train.loop.device)
        if in_main_process():
            save_request(run, REQUEST, prepared.request, {DATASETS: joint.sources})
        sets = joint.evaluation()
        outcome = fit(parts, sets, recipe, run.path, resume=resume, console=console, evaluation=evaluation)
        tell_end(outcome, run, recipe, prepared.data, joint.sources, console)
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
        **more: Fields of `TrainOptions` by name.

    Raises:
        MetrError: data or configuration do not fit; the message says what and where.
    """
    asked = _Asked(config=config, size=size, overrides=tuple(overrides), options=_options(more))
    prepared = _begun(data, asked) if resumed is None else _resumed(data, RunDirectory(Path(resumed)), asked)
    return Group(page(prepared.plan), *([] if resumed else advice(prepared.plan, from_nothing=True)))


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a command asks of the configuration; `size` is None where it names none."""

    config: str | Path | RunConfig | None
    size: str | None
    overrides: tuple[str, ...]
    options: TrainOptions

    @property
    def given(self) -> Tree:
        """What of the request is given explicitly."""
        size = {} if self.size is None else {"size": self.size}
        return size | self.options.model_dump(include=self.options.model_fields_set - {"epochs", "allow_empty"})


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """Data, also as arguments of a command, and plan of a run; `request` is what is kept of what was asked for."""

    data: list[str]
    plan: RunPlan
    request: Tree


def _options(values: Mapping[str, Any]) -> TrainOptions:
    return TrainOptions.checked({key: value for key, value in values.items() if value is not None}, where="train")


def _begun(data: Data | None, asked: _Asked) -> _Prepared:
    """Opens the datasets of a new run and puts its configuration together."""
    options, size = asked.options, asked.size or "nano"
    seed = [f"train.loop.seed={options.seed}"] if "seed" in options.model_fields_set else []

    def resolve(more: Sequence[str]) -> RunConfig:
        return load_recipe(size, asked.config, [*seed, *asked.overrides, *more])

    check_epochs(options.epochs, asked.overrides)
    check_recipe(recipe := resolve([]))
    given = arguments(data)
    joint = open_joint(given, options)
    if not options.allow_empty:
        joint.check_usable()
    log_issues(joint.sources)
    recipe = resolve(steps_of(options.epochs, sum(joint.lengths.values()), recipe))
    asked_for = options.model_dump(mode="json", include={"shots", "fraction", "seed", "allow_empty"})
    request = {"size": size, **asked_for, "datasets": dataset_facts(joint.sources)}
    plan = RunPlan(joint=joint, recipe=recipe, base=load_recipe(size), name=f"the recipe {size}")
    return _Prepared(data=given, plan=plan, request=request)


def _resumed(data: Data | None, run: RunDirectory, asked: _Asked) -> _Prepared:
    """Opens the datasets of a run to resume; its configuration changes only where that is asked for."""

    def resolve(more: Sequence[str]) -> tuple[RunConfig, RunConfig]:
        return resumed_recipe(run, asked.config, [*asked.overrides, *more])

    check_epochs(asked.options.epochs, asked.overrides)
    began, recipe = resolve([])
    check_recipe(recipe)
    request = kept_request(run, REQUEST)
    check_same_request(run, request, asked.given)
    chosen = {key: value for key, value in (request or asked.given).items() if key in SubsetConfig.model_fields}
    subset = SubsetConfig.checked(chosen, where=run.path / REQUEST)
    given = kept_datasets(run, arguments(data))
    joint = open_joint(given, subset)
    allow_empty = asked.options.allow_empty or request.get("allow_empty", False)
    if not allow_empty:
        joint.check_usable()
    log_issues(joint.sources)
    made = made_so_far(run)
    _, recipe = resolve(steps_of(asked.options.epochs, sum(joint.lengths.values()), recipe, made))
    facts = dataset_facts(joint.sources)
    log_changed_datasets(request.get("datasets", {}), facts)
    check_same(run, joint.vocabulary)
    request = {**request, "datasets": facts, "allow_empty": allow_empty}
    plan = RunPlan(joint=joint, recipe=recipe, base=began, name="the run's recipe", made=made)
    return _Prepared(data=given, plan=plan, request=request)


def _hint_at_names_spelt_alike(joint: JointData, console: Console) -> None:
    """Names the pairs that are learnt apart though they differ in case or separators alone."""
    if alike := spelt_alike(joint.vocabulary.datasets):
        pairs = listed([f'"{one}" and "{two}"' for one, two in alike])
        hint = (
            f"names that are learnt apart and spelt alike: {pairs}; metr inspect --write makes a file that joins them"
        )
        tell(console, Hanging(hint))


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
    runner = EvaluationRunner(
        parts.checkpoint.vocabulary,
        parts.checkpoint.text_embeddings,
        sets,
        recipe.augmentation.resize,
        recipe.evaluation_loader,
        evaluation or _quick_evaluation(recipe.inference, parts.checkpoint, sets),
    )

    images = ValImages(runner, recipe.inference) if recipe.train.loop.images and in_main_process() else None

    def evaluate(network: nn.Module) -> Evaluated:
        report = runner.report(network, unannotated=recipe.unannotated)
        thresholds = report.thresholds()
        show(report, console)
        with log_page() as paper:
            show(report, paper)
        if images is not None:
            shown = ScoreThresholds(names=thresholds)
            images.draw(network, trainer.counters.step, trainer.folder.val_images, shown)
        return Evaluated(metrics=report.metrics(), thresholds=thresholds)

    if resume and console.quiet:  # else the header has told them
        log_changed_settings(RunDirectory(out).state, recipe)
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
    skeleton(recipe.model, encoder.width)  # refuses a network of an absurd size before memory is taken for it
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


def arguments(data: Data | None) -> list[str]:
    """The datasets as a list of command-line arguments."""
    if data is None:
        return []
    return [str(data)] if isinstance(data, str | Path) else [str(one) for one in data]


def _quick_evaluation(
    config: InferenceConfig, checkpoint: Checkpoint, sets: Mapping[str, Annotations]
) -> EvaluationConfig:
    """Each dataset with its own names, and with those that detection looks for unless that is the same everywhere."""
    default = checkpoint.detection.names
    names = set(default or checkpoint.vocabulary.names)
    if all({*map(str.strip, one.categories)} == names for one in sets.values()):
        return EvaluationConfig(modes=("own",), inference=config)
    return EvaluationConfig(modes=("own", "default" if default else "joint"), default_names=default, inference=config)


def check_same(run: RunDirectory, vocabulary: Vocabulary, text_encoder: Mapping[str, Any] | None = None) -> None:
    """Checks that a resumed run has the vocabulary that it began with and, if given, the text encoder.

    Raises:
        ConfigError: one of them differs.
    """
    if not (existing_folder(run.last) / CONFIG).is_file():
        return
    began = load_checkpoint(run.last)
    hint = "resume with the datasets and the text encoder that it began with, or start a new run"
    if began.vocabulary != vocabulary:
        before, now = set(began.vocabulary.names), set(vocabulary.names)
        lost, new = ", ".join(sorted(before - now)) or "none", ", ".join(sorted(now - before)) or "none"
        what = f"the run has other datasets, names or prompts; names only there: {lost}; only here: {new}"
        raise ConfigError(what, where=run.path, hint=hint)
    if text_encoder is None:
        return
    before_encoder, encoder = (one.get("identity") for one in (began.text_encoder, text_encoder))
    if before_encoder != encoder:
        raise ConfigError(f"the run has the text encoder {before_encoder}, not {encoder}", where=run.path, hint=hint)


def rebuildable(config: DetectorConfig, network: Detector) -> DetectorConfig:
    """The configuration that rebuilds the network without downloading pretrained backbone weights."""
    return config.model_copy(update={"backbone": network.backbone.config})


def plain(config: Config) -> dict[str, object]:
    """A configuration as JSON values, for a checkpoint."""
    return config.model_dump(mode="json")
