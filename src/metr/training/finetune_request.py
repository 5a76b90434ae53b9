"""What a fine-tuning run is made of: checkpoint, data and configuration, for a new run or one to resume."""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from metr.config import Tree
from metr.model import METR
from metr.run_directory import RunDirectory
from metr.training.config import RunConfig, check_rehearsal
from metr.training.finetune_data import FinetuneData, FinetuneOptions, open_finetune_data
from metr.training.finetune_recipe import finetune_recipe
from metr.training.plan import RunPlan, steps_of
from metr.training.resumed_recipe import resumed_recipe
from metr.training.resumption import (
    EVALUATED,
    FINETUNING,
    NOTHING,
    REHEARSED,
    Made,
    check_same_request,
    dataset_facts,
    kept_datasets,
    kept_request,
    log_changed_datasets,
    made_so_far,
)
from metr.training.start import check_same_text, open_detector, pinned, pretrained_weights
from metr.training.taken_names import taken_names
from metr.training.train_request import Data, arguments

REQUEST = FINETUNING
"""The file of the run folder that says what was asked for, besides the configuration."""
_KEPT = {"rehearse_fraction", "shots", "fraction", "seed", "decorrelate_names", "prompts"}
_ALLOWED = "allow_empty"
# what keeps the text encoder, and what to do about it
_KEEPS = "fine-tuning", "train a new detector with it: metr train"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Checkpoint, data (also as arguments of a command) and plan of a run, and what is kept of the request."""

    data: list[str]
    model: METR
    opened: FinetuneData
    options: FinetuneOptions
    plan: RunPlan
    request: Tree


def begun(
    data: Data | None, source: str | Path | None, run: RunDirectory, options: FinetuneOptions, console: Console
) -> Prepared:
    """Opens checkpoint and datasets of a new run and puts its configuration together.

    Raises:
        MetrError: checkpoint, data or configuration do not fit.
    """
    _check_rehearsal(options, options.model_fields_set)
    model = open_detector(source, run)
    given, take = arguments(data), partial(taken_names, model=model, choice=options.same_names, console=console)
    opened = open_finetune_data(given, model.vocabulary, options, take)
    seed = [f"train.loop.seed={options.seed}"] if "seed" in options.model_fields_set else []

    def resolve(more: Sequence[str]) -> RunConfig:
        return finetune_recipe(model.checkpoint, opened.images, options.config, [*seed, *options.overrides, *more])

    recipe = resolve([])
    check_same_text(model, recipe.text, *_KEEPS)
    if recipe.train.pretrained_backbone:
        pretrained_weights(model.network.backbone, recipe.model.backbone.revision)  # refused before anything is done
    recipe = resolve(_steps(options, opened, recipe, NOTHING))
    base = finetune_recipe(model.checkpoint, opened.images, overrides=seed)
    plan = _plan(opened, recipe, base, "the defaults", NOTHING)
    request = _request(pinned(model, source), opened, options)
    return Prepared(data=given, model=model, opened=opened, options=options, plan=plan, request=request)


def resumed(
    data: Data | None, source: str | Path | None, run: RunDirectory, options: FinetuneOptions, console: Console
) -> Prepared:
    """Opens checkpoint and datasets of a run to resume; its configuration changes only where that is asked for.

    Raises:
        MetrError: checkpoint, data or configuration do not fit, or are not those of the run.
    """

    def resolve(more: Sequence[str]) -> tuple[RunConfig, RunConfig]:
        return resumed_recipe(run, options.config, [*options.overrides, *more])

    began, recipe = resolve([])
    kept = kept_request(run, REQUEST)
    check_same_request(run, kept, options.model_dump(include=options.model_fields_set & _KEPT))
    listings = {
        "rehearse": tuple(kept_datasets(run, options.rehearse, REHEARSED)),
        "rehearse_evaluate": tuple(kept_datasets(run, options.rehearse_evaluate, EVALUATED)),
    }
    _check_rehearsal(options.model_copy(update=listings), options.model_fields_set)
    allowed = {_ALLOWED: options.allow_empty or kept.get(_ALLOWED, False)}
    options = options.model_copy(update={key: kept[key] for key in _KEPT & kept.keys()} | listings | allowed)
    model = open_detector(kept.get("from") if source is None else source, run)
    check_same_text(model, recipe.text, *_KEEPS)
    given, names = kept_datasets(run, arguments(data)), kept.get("same_names", {})
    take = partial(taken_names, model=model, choice=options.same_names, console=console, kept=names)
    opened = open_finetune_data(given, model.vocabulary, options, take)
    check_same_request(run, kept, {"same_names": opened.taken})
    made = made_so_far(run)
    _, recipe = resolve(_steps(options, opened, recipe, made))
    plan = _plan(opened, recipe, began, "the run's recipe", made)
    request = _request(pinned(model, source), opened, options)
    log_changed_datasets(kept.get("datasets", {}), request["datasets"])
    return Prepared(data=given, model=model, opened=opened, options=options, plan=plan, request=request)


def _check_rehearsal(options: FinetuneOptions, asked: Set[str]) -> None:
    """Checks that a fraction of rehearsal that is asked for has something to rehearse."""
    check_rehearsal(options.rehearse_fraction if "rehearse_fraction" in asked else None, options.rehearse)


def _steps(options: FinetuneOptions, opened: FinetuneData, recipe: RunConfig, made: Made) -> list[str]:
    """The override that makes a run so many passes over the new images, whatever is rehearsed between them."""
    return steps_of(options.epochs, math.ceil(opened.images / opened.new_fraction), recipe, made)


def _plan(opened: FinetuneData, recipe: RunConfig, base: RunConfig, name: str, made: Made) -> RunPlan:
    mixture, evaluated = opened.mixture(recipe.loader.mixture), opened.splits
    return RunPlan(
        joint=opened.joint, recipe=recipe, base=base, name=name, mixture=mixture, evaluated=evaluated, made=made
    )


def _request(source: str, opened: FinetuneData, options: FinetuneOptions) -> Tree:
    """What was asked for, with the number of training images of each dataset."""
    asked = options.model_dump(mode="json", include=_KEPT | {_ALLOWED})
    return {
        "from": source,
        "new": opened.lengths("new"),
        "rehearsed": opened.lengths("rehearsed"),
        **asked,
        "same_names": opened.taken,
        "datasets": dataset_facts([*opened.joint.sources, *opened.evaluated]),
    }
