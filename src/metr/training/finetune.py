"""Fine-tuning a trained detector on new data (`metr finetune`), and AP before and after."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from metr.checkpoint import Checkpoint
from metr.config import Tree, differences
from metr.data.config import ResizeConfig
from metr.data.loading import build_train_loader
from metr.devices import in_main_process, resolved_device
from metr.errors import CheckpointError, ConfigError
from metr.evaluation.results import EvaluationConfig, EvaluationReport
from metr.evaluation.runner import EvaluationRunner
from metr.losses.criterion import SetCriterion
from metr.model import METR
from metr.models.category_extraction import decorrelate_names
from metr.models.config import DetectorConfig
from metr.models.detector import Detector
from metr.run_directory import RunDirectory
from metr.serialization import load_weights
from metr.training.comparison import Comparison, keep_before, kept_before, show_comparison
from metr.training.config import RunConfig, check_epochs, resumed_recipe
from metr.training.finetune_data import FinetuneData, FinetuneOptions, open_finetune_data
from metr.training.finetune_recipe import RECIPE, described, finetune_recipe
from metr.training.plan import header, steps_of, tell_end
from metr.training.provenance import provenance
from metr.training.resumption import (
    EVALUATED,
    REHEARSED,
    check_same_request,
    dataset_facts,
    kept_datasets,
    kept_request,
    log_changed_datasets,
    log_changed_settings,
    save_request,
)
from metr.training.run_log import RunLog, log_page, tell
from metr.training.state import check_place, has_state
from metr.training.train import (
    Data,
    arguments,
    check_recipe,
    check_same,
    fit,
    main_console,
    plain,
    rebuildable,
    teacher_of,
)
from metr.training.trainer import Outcome, TrainingParts

REQUEST = "finetuning.json"
"""The file of the run folder that says what was asked for, besides the configuration."""
_KEPT = {"rehearse_fraction", "shots", "fraction", "seed", "decorrelate_names"}
# where the backbone's pretrained weights came from: changing these does not change the network
_ORIGINS = {"backbone.pretrained", "backbone.revision"}


@dataclass(frozen=True, kw_only=True)
class FinetuneOutcome:
    """How training ended, and AP before and after; no comparison if training was interrupted or `compare` is off."""

    training: Outcome
    comparison: Comparison | None


def finetune(
    data: Data | None,
    source: str | Path | None,
    out: str | Path,
    options: FinetuneOptions | None = None,
    *,
    resume: bool = False,
    evaluation: EvaluationConfig | None = None,
    console: Console | None = None,
    **more: Any,
) -> FinetuneOutcome:
    """Trains a detector further on new data and keeps everything in the run folder `out`.

        finetune("cells/", "runs/joint", "runs/cells", shots=10, rehearse=["old/voc"], overrides=["loader.workers=2"])
        finetune(None, None, "runs/cells", resume=True)

    The network is the checkpoint's, with all its weights; names are strings, so nothing is initialised anew. The
    checkpoint that is written knows the old names first, then the new ones. Without `rehearse` nothing is learnt about
    old names: they are not negatives in new images.

    Args:
        data: One new dataset or several: folders, name=folder, or YAML files that list some. None resumes with the
            run's.
        source: A checkpoint folder, a run folder (its best checkpoint), or a name on the hub. None resumes with the
            run's.
        out: The run folder, as in `train`; also finetuning.json (the request), comparison.json (AP before and after).
        options: What differs from the defaults.
        resume: Go on where the run in `out` stopped, with its datasets, its configuration and what else was asked for.
            `config`, `overrides` and `epochs` change that configuration, but not the network.
        evaluation: How evaluations during training (of the new datasets alone) are made.
        console: Where the plan, progress and the comparison are shown; None shows none.
        **more: Fields of `FinetuneOptions` by name, laid over `options`.

    Raises:
        MetrError: checkpoint, data, configuration or the run folder do not fit; the message says what and where.
    """
    asked = {} if options is None else options.model_dump(exclude_unset=True)
    options = FinetuneOptions.checked(asked | more, where="finetune")
    console, run = main_console(console), RunDirectory(Path(out))
    with RunLog(run.path) as log:
        check_place(run, resume)
        check_epochs(options.epochs, options.overrides)
        prepared = _resumed(data, source, run, options) if resume else _begun(data, source, run, options)
        return _finetuned(prepared, run, resume, evaluation, console, log)


def _finetuned(
    prepared: "_Prepared",
    run: RunDirectory,
    resume: bool,
    evaluation: EvaluationConfig | None,
    console: Console,
    log: RunLog,
) -> FinetuneOutcome:
    """Does what was prepared, and keeps the log from where nothing can be refused any more."""
    model, opened, recipe, options = prepared.model, prepared.opened, prepared.recipe, prepared.options
    check_recipe(recipe)
    mixture, name = opened.mixture(recipe.loader.mixture), "the run's recipe" if resume else "the defaults"
    tell(console, header(opened.joint, recipe, prepared.base, name, mixture=mixture, evaluated=opened.splits))
    tell(console, described(recipe, opened.images))
    _warn_of_forgetting(model, opened, console)
    parts, model = _parts(model, opened, recipe, options.decorrelate_names)
    if resume:
        check_same(run, parts.checkpoint)
    log.begin(recipe.train.loop.device)
    before = None
    if in_main_process():
        save_request(run, REQUEST, prepared.request, opened.listings())
        before = _before(model, opened, recipe, run.path, console) if options.compare else None
    outcome = fit(parts, opened.new_splits, recipe, run.path, resume=resume, console=console, evaluation=evaluation)
    compared = None
    if before is not None and not outcome.interrupted:
        compared = _comparison(before, opened, recipe, run.path, console)
    tell_end(outcome, run, recipe, prepared.data, opened.joint.sources[: opened.new], console)
    return FinetuneOutcome(training=outcome, comparison=compared)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """Checkpoint, data (also as arguments of a command) and configuration of a run, and what is kept of the request."""

    data: list[str]
    model: METR
    opened: FinetuneData
    options: FinetuneOptions
    recipe: RunConfig
    base: RunConfig
    request: Tree


def _begun(data: Data | None, source: str | Path | None, run: RunDirectory, options: FinetuneOptions) -> _Prepared:
    """Opens checkpoint and datasets of a new run and puts its configuration together."""
    model = _model(source, run)
    listed = arguments(data)
    opened = open_finetune_data(listed, model.vocabulary, options)
    seed = [f"train.loop.seed={options.seed}"] if "seed" in options.model_fields_set else []

    def resolve(more: Sequence[str]) -> RunConfig:
        return finetune_recipe(model.checkpoint, opened.images, options.config, [*seed, *options.overrides, *more])

    recipe = resolve([])
    recipe = resolve(_steps(options, opened, recipe))
    base = finetune_recipe(model.checkpoint, opened.images, overrides=seed)
    request = _request(source, opened, options)
    return _Prepared(
        data=listed, model=model, opened=opened, options=options, recipe=recipe, base=base, request=request
    )


def _resumed(data: Data | None, source: str | Path | None, run: RunDirectory, options: FinetuneOptions) -> _Prepared:
    """Opens checkpoint and datasets of a run to resume; its configuration changes only where that is asked for."""

    def resolve(more: Sequence[str]) -> tuple[RunConfig, RunConfig]:
        return resumed_recipe(run, options.config, [*options.overrides, *more])

    began, recipe = resolve([])
    kept = kept_request(run, REQUEST)
    check_same_request(run, kept, options.model_dump(include=options.model_fields_set & _KEPT))
    listings = {
        "rehearse": tuple(kept_datasets(run, options.rehearse, REHEARSED)),
        "rehearse_evaluate": tuple(kept_datasets(run, options.rehearse_evaluate, EVALUATED)),
    }
    options = options.model_copy(update={key: kept[key] for key in _KEPT & kept.keys()} | listings)
    model = _model(kept.get("from") if source is None else source, run)
    listed = kept_datasets(run, arguments(data))
    opened = open_finetune_data(listed, model.vocabulary, options)
    _, recipe = resolve(_steps(options, opened, recipe))
    request = _request(source or kept.get("from"), opened, options)
    log_changed_datasets(kept.get("datasets", {}), request["datasets"])
    log_changed_settings(began, recipe)
    return _Prepared(
        data=listed, model=model, opened=opened, options=options, recipe=recipe, base=began, request=request
    )


def _model(source: str | Path | None, run: RunDirectory) -> METR:
    """The detector to begin with.

    Raises:
        MetrError: none is named, it is the run itself, or it cannot be loaded.
    """
    if source is None:
        raise ConfigError("no detector to begin with is named", where="--from", hint="--from RUN")
    if Path(source).resolve() == run.path.resolve():
        what, hint = "a run cannot begin with itself", "--from the run that it began with, or another -o"
        raise ConfigError(what, where=run.path, hint=hint)
    return METR.from_pretrained(source, device="cpu")


def _steps(options: FinetuneOptions, opened: FinetuneData, recipe: RunConfig) -> list[str]:
    """The override that makes a run so many passes over the new images, whatever is rehearsed between them."""
    return steps_of(options.epochs, math.ceil(opened.images / opened.new_fraction), recipe)


def _parts(model: METR, opened: FinetuneData, recipe: RunConfig, decorrelate: bool) -> tuple[TrainingParts, METR]:
    """What the trainer needs, and the checkpoint's own detector with the text encoder that the recipe names."""
    own, joint = model.checkpoint, opened.joint
    encoder = plain(recipe.text) | {key: own.text_encoder[key] for key in ("identity",) if key in own.text_encoder}
    model = METR(model.network, replace(own, text_encoder=encoder))
    network, embeddings = _network(model, recipe.model), model.embed(joint.vocabulary)
    if decorrelate:  # new names come after the old
        decorrelate_names(
            network.category_extraction.projection, embeddings[: len(model.names)], embeddings[len(model.names) :]
        )
    datasets = joint.training(recipe.augmentation, recipe.unannotated)
    loader = recipe.loader.model_copy(update={"mixture": opened.mixture(recipe.loader.mixture)})
    checkpoint = Checkpoint(
        model=rebuildable(recipe.model, network),
        vocabulary=joint.vocabulary,
        text_embeddings=embeddings,
        text_encoder=encoder,
        preprocessing=plain(recipe.augmentation.resize),
        training=_history(own, recipe) | provenance(joint, recipe),
    )
    parts = TrainingParts(
        network=network,
        criterion=SetCriterion(recipe.criterion),
        loader=partial(build_train_loader, datasets, loader),
        checkpoint=checkpoint,
        teacher=teacher_of(joint, recipe),
    )
    return parts, model


def _network(model: METR, config: DetectorConfig) -> Detector:
    """The checkpoint's network, with its weights.

    Raises:
        ConfigError: the configuration describes another network.
    """
    bare = config.model_copy(update={"backbone": config.backbone.model_copy(update={"pretrained": False})})
    network = Detector(bare, model.checkpoint.text_width)
    try:
        load_weights(network, model.network.state_dict())
    except CheckpointError as error:
        found = differences(model.checkpoint.model, config)
        settings = [f"model.{key}={new} (the checkpoint's: {old})" for key, old, new in found if key not in _ORIGINS]
        changed = ", ".join(settings) or "this configuration"
        what = f"fine-tuning keeps the checkpoint's network, which {changed} would change: {error.what}"
        hint = "leave these settings as they are, or make a network of that shape with metr train"
        raise ConfigError(what, where="model", hint=hint) from None
    return network


def _history(own: Checkpoint, recipe: RunConfig) -> dict[str, Any]:
    """The new checkpoint's training facts. They keep pretraining's recipe for a second fine-tuning."""
    began = {key: value for key, value in own.training.items() if key != RECIPE}
    kept = {RECIPE: own.training[RECIPE]} if RECIPE in own.training else {}
    return {"unannotated": recipe.unannotated, **kept, "finetuned_from": began}


def _comparison(
    before: EvaluationReport, opened: FinetuneData, recipe: RunConfig, out: Path, console: Console
) -> Comparison:
    """Evaluates all datasets with the best checkpoint of the run; writes and shows the comparison."""
    tuned = METR.from_pretrained(out, device=_device(recipe))
    after = _evaluated(tuned, opened, recipe.augmentation.resize, recipe, console)
    comparison = Comparison.of(before, after, opened.roles)
    comparison.write(out)
    show_comparison(comparison, console)
    with log_page() as paper:
        show_comparison(comparison, paper)
    return comparison


def _before(model: METR, opened: FinetuneData, recipe: RunConfig, out: Path, console: Console) -> EvaluationReport:
    """Evaluates the checkpoint itself on all datasets, unless this run has done so before."""
    # a report without a state belongs to a run that never began, perhaps from another checkpoint
    report = kept_before(out) if has_state(RunDirectory(out).state) else None
    if report is None:
        tell(console, "evaluating the checkpoint before fine-tuning")
        model.network.to(_device(recipe))
        report = _evaluated(model, opened, model.resize, recipe, console)
        model.network.to("cpu")
        keep_before(out, report)
    return report


def _evaluated(
    model: METR, opened: FinetuneData, resize: ResizeConfig, recipe: RunConfig, console: Console
) -> EvaluationReport:
    """Evaluates new and old datasets with their own names and with all names."""
    vocabulary = opened.evaluated_vocabulary()
    config = EvaluationConfig(inference=recipe.inference)
    runner = EvaluationRunner(
        vocabulary,
        model.embed(vocabulary),
        opened.splits,
        resize,
        recipe.evaluation_loader,
        config,
        trained=model.vocabulary,
    )
    return runner.report(model.network, console, recipe.unannotated)


def _device(recipe: RunConfig) -> str:
    return str(resolved_device(recipe.train.loop.device))


def _warn_of_forgetting(model: METR, opened: FinetuneData, console: Console) -> None:
    """Warns how many old names are in no training data."""
    known = {name for source in opened.joint.sources for name in source.categories}
    forgotten = [name for name in model.names if name not in known]
    if not forgotten:
        return
    note = f"{len(forgotten)} of the checkpoint's {len(model.names)} names are in none of this data: they can still be "
    note += "detected, but perhaps less well afterwards; --rehearse mixes old datasets in."
    tell(console, note)


def _request(source: str | Path | None, opened: FinetuneData, options: FinetuneOptions) -> Tree:
    """What was asked for, with the number of training images of each dataset."""
    here = source is not None and Path(source).exists()
    asked = options.model_dump(mode="json", include=_KEPT)
    return {
        "from": str(Path(str(source)).resolve() if here else source),
        "new": opened.lengths("new"),
        "rehearsed": opened.lengths("rehearsed"),
        **asked,
        "datasets": dataset_facts([*opened.joint.sources, *opened.evaluated]),
    }
