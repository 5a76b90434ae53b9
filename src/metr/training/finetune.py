"""The verb finetune: a trained detector, new data, and what becomes of what it knew."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from metr.checkpoint import Checkpoint
from metr.config import Config, Tree
from metr.data.config import ResizeConfig
from metr.data.few_shot import SubsetConfig
from metr.data.loading import build_train_loader
from metr.devices import resolved_device
from metr.errors import CheckpointError, ConfigError
from metr.evaluation.results import EvaluationConfig, EvaluationReport
from metr.evaluation.runner import EvaluationRunner
from metr.losses.criterion import SetCriterion
from metr.model import METR
from metr.models.config import DetectorConfig
from metr.models.detector import Detector
from metr.models.new_names import decorrelate_names
from metr.run_directory import RunDirectory
from metr.serialization import read_json, write_json
from metr.training.comparison import Comparison, keep_before, kept_before, show_comparison
from metr.training.finetune_data import FinetuneData, Rehearsal, open_finetune_data
from metr.training.finetune_recipe import RECIPE, described, finetune_recipe
from metr.training.provenance import provenance
from metr.training.recipe import RunConfig
from metr.training.state import check_place, has_state
from metr.training.train import check_teacher, fit, plain, rebuildable, teacher_of
from metr.training.trainer import Outcome, TrainingParts
from metr.weights import load_weights

REQUEST = "finetuning.json"
"""The file of the run folder that says what was asked for, besides the configuration."""
# what of a backbone's configuration says where its first weights came from, and not what it is
_ORIGINS = {"model.backbone.pretrained", "model.backbone.revision"}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """How to fine-tune, besides the defaults for this much data.

    `file` and `overrides` (`section.key=value`) are laid over them; `subset` is the part of the new datasets that is
    trained on, whose seed is that of training too; `compare` evaluates old and new datasets before and after.
    `decorrelate_names` first moves the projections of new names further from each other, where those of old names stay untouched.
    """

    file: Path | None = None
    overrides: tuple[str, ...] = ()
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    rehearse: Rehearsal = field(default_factory=Rehearsal)
    compare: bool = True
    decorrelate_names: bool = False


@dataclass(frozen=True, kw_only=True)
class FinetuneOutcome:
    """How training ended, and what it did to each dataset; that is None where it was interrupted or not asked for."""

    training: Outcome
    comparison: Comparison | None


def finetune(
    data: Sequence[str],
    source: str | Path,
    out: Path,
    options: FinetuneOptions | None = None,
    *,
    resume: bool = False,
    console: Console | None = None,
    judged: EvaluationConfig | None = None,
) -> FinetuneOutcome:
    """Trains a detector further on new data and keeps everything in the run folder `out`.

    The network is the checkpoint's, with all its weights; names are strings, so nothing is begun anew. The checkpoint
    that is written knows the old names first, then the new ones. Without `rehearse` nothing is taught about old names:
    they are not presumed absent in new images.

    Args:
        data: New datasets: folders, name=folder, or YAML files that list some.
        source: A checkpoint folder, a run folder (its best checkpoint), or a name on the hub.
        out: The run folder, as of `train`; besides, what was asked for, and AP before and after as comparison.json.
        options: What is not to go by the defaults.
        resume: Go on where the run in `out` stopped.
        console: Where the plan, progress and the comparison are shown.
        judged: How evaluations during training (of the new datasets alone) are made.

    Raises:
        MetrError: checkpoint, data, configuration or the run folder do not fit; the message says what and where.
    """
    console, options = console or Console(quiet=True), options or FinetuneOptions()
    check_place(RunDirectory(out), resume)
    if Path(source).resolve() == out.resolve():
        what, hint = "a run cannot begin with itself", "--from the run that it began with, or another -o"
        raise ConfigError(what, where=out, hint=hint)
    model = METR.from_pretrained(source, device="cpu")
    opened = open_finetune_data(data, model.vocabulary, options.subset, options.rehearse)
    overrides = [f"train.loop.seed={options.subset.seed}", *options.overrides]
    recipe = finetune_recipe(model.checkpoint, opened.images, options.file, overrides)
    console.print(described(recipe, opened.images), highlight=False, markup=False, soft_wrap=True)
    _tell_what_is_remembered(model, opened, console)
    _check_same_request(out, request := _request(source, opened, options), resume)
    parts, model = _parts(model, opened, recipe, options.decorrelate_names)
    before = None
    if _in_main_process():
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / REQUEST, request)
        before = _before(model, opened, recipe, out, console) if options.compare else None
    outcome = fit(parts, opened.new_splits, recipe, out, resume=resume, console=console, judged=judged)
    if before is None or outcome.interrupted:
        return FinetuneOutcome(training=outcome, comparison=None)
    return FinetuneOutcome(training=outcome, comparison=_comparison(before, opened, recipe, out, console))


def _in_main_process() -> bool:
    """Whether this is the one of several processes that writes; the trainer, which knows, is not made yet."""
    return os.environ.get("RANK", "0") == "0"


def _parts(model: METR, opened: FinetuneData, recipe: RunConfig, apart: bool) -> tuple[TrainingParts, METR]:
    """What the trainer wants, and the checkpoint's own detector with the text encoder that the recipe names."""
    check_teacher(recipe)
    own, joint = model.checkpoint, opened.joint
    encoder = plain(recipe.text) | {key: own.text_encoder[key] for key in ("identity",) if key in own.text_encoder}
    model = METR(model.network, replace(own, text_encoder=encoder))
    network, embeddings = _network(model, recipe.model), model.embed(joint.vocabulary)
    if apart:  # new names come after the old
        decorrelate_names(
            network.category_extraction.projection, embeddings[: len(model.names)], embeddings[len(model.names) :]
        )
    datasets = joint.training(recipe.augmentation, recipe.unannotated)
    mixed = recipe.loader.with_base_mixture(opened.mixture(recipe.loader.base_mixture))
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
        loader=partial(build_train_loader, datasets, mixed),
        checkpoint=checkpoint,
        teacher=teacher_of(joint, recipe),
    )
    return parts, model


def _network(model: METR, config: DetectorConfig) -> Detector:
    """The checkpoint's network, with its weights.

    Raises:
        ConfigError: the configuration describes another one.
    """
    bare = config.model_copy(update={"backbone": config.backbone.model_copy(update={"pretrained": False})})
    network = Detector(bare, model.checkpoint.text_width)
    try:
        load_weights(network, model.network.state_dict())
    except CheckpointError as error:
        changed = ", ".join(_differences(model.checkpoint.model, config)) or "this configuration"
        what = f"fine-tuning keeps the checkpoint's network, which {changed} would change: {error.what}"
        hint = "leave these settings as they are, or make a network of that shape with metr train"
        raise ConfigError(what, where="model", hint=hint) from None
    return network


def _history(own: Checkpoint, recipe: RunConfig) -> dict[str, Any]:
    """What the new checkpoint tells of its training: a second fine-tuning begins with pretraining's recipe again."""
    began = {key: value for key, value in own.training.items() if key != RECIPE}
    kept = {RECIPE: own.training[RECIPE]} if RECIPE in own.training else {}
    return {"unannotated": recipe.unannotated, **kept, "finetuned_from": began}


def _comparison(
    before: EvaluationReport, opened: FinetuneData, recipe: RunConfig, out: Path, console: Console
) -> Comparison:
    """What became of all datasets by the best checkpoint of the run, written and shown."""
    tuned = METR.from_pretrained(out, device=_device(recipe))
    after = _judged(tuned, opened, recipe.augmentation.resize, recipe, console)
    comparison = Comparison.of(before, after, opened.roles)
    comparison.write(out)
    show_comparison(comparison, console)
    return comparison


def _before(model: METR, opened: FinetuneData, recipe: RunConfig, out: Path, console: Console) -> EvaluationReport:
    """What the checkpoint itself does to all datasets: judged now, unless this run did so before."""
    # a report without a state is of a run that never began, perhaps from another checkpoint
    report = kept_before(out) if has_state(RunDirectory(out).state) else None
    if report is None:
        console.print("before fine-tuning:", highlight=False)
        model.network.to(_device(recipe))
        report = _judged(model, opened, model.resize, recipe, console)
        model.network.to("cpu")
        keep_before(out, report)
    return report


def _judged(
    model: METR, opened: FinetuneData, resize: ResizeConfig, recipe: RunConfig, console: Console
) -> EvaluationReport:
    """New and old datasets, asked for their own names and for all."""
    vocabulary = opened.judged_vocabulary()
    config = EvaluationConfig(precision=recipe.inference.precision, postprocess=recipe.inference.postprocess)
    judge = EvaluationRunner(
        vocabulary, model.embed(vocabulary), opened.splits, resize, recipe.evaluation_loader, config
    )
    return judge.report(model.network, console, recipe.unannotated)


def _device(recipe: RunConfig) -> str:
    return str(resolved_device(recipe.train.loop.device))


def _tell_what_is_remembered(model: METR, opened: FinetuneData, console: Console) -> None:
    """Says which old names nothing in training keeps alive."""
    known = {name for source in opened.joint.sources for name in source.categories}
    forgotten = [name for name in model.names if name not in known]
    if not forgotten:
        return
    told = f"{len(forgotten)} of the checkpoint's {len(model.names)} names are in none of this data: they can still be "
    told += "asked for, but may be found less well afterwards; --rehearse mixes old datasets in."
    console.print(told, highlight=False, markup=False, soft_wrap=True)


def _request(source: str | Path, opened: FinetuneData, options: FinetuneOptions) -> Tree:
    """What was asked for, with the number of training images of each dataset."""
    subset = options.subset
    return {
        "from": str(source),
        "new": opened.lengths("new"),
        "rehearsed": opened.lengths("rehearsed"),
        "rehearse_fraction": options.rehearse.share,
        "shots": subset.shots,
        "share": subset.share,
        "seed": subset.seed,
        "decorrelate_names": options.decorrelate_names,
    }


def _check_same_request(out: Path, request: Mapping[str, Any], resume: bool) -> None:
    """A run goes on with what it was asked for; where the checkpoint lies now does not matter.

    Raises:
        ConfigError: it was asked for something else.
    """
    if not resume or not (out / REQUEST).is_file():
        return
    began = read_json(out / REQUEST)
    changed = [key for key in request if key != "from" and began.get(key) != request[key]]
    if changed:
        told = ", ".join(f"{key} {began.get(key)!r}, now {request[key]!r}" for key in changed)
        hint = "give the same command as at first, or start a new run"
        raise ConfigError(f"the run was begun with {told}", where=out, hint=hint)


def _differences(first: Config, second: Config) -> Iterator[str]:
    """The settings in which two configurations of a network differ, as the second has them."""
    theirs = dict(_leaves(second.model_dump(mode="json"), "model"))
    for key, value in _leaves(first.model_dump(mode="json"), "model"):
        if key not in _ORIGINS and (new := theirs.get(key)) != value:
            yield f"{key}={new} (the checkpoint's: {value})"


def _leaves(tree: Tree, path: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        place = f"{path}.{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, place)
        else:
            yield place, value
