"""Fine-tuning a trained detector on new data (`metr finetune`), and AP before and after."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType

from metr.checkpoint import Checkpoint, DetectionDefaults
from metr.data.config import ResizeConfig
from metr.data.loading import build_train_loader
from metr.evaluation.report import main_console
from metr.evaluation.results import EvaluationConfig, EvaluationReport
from metr.evaluation.runner import EvaluationRunner
from metr.fitting import Hanging
from metr.losses.criterion import SetCriterion
from metr.model import METR
from metr.models.category_extraction import decorrelate_names
from metr.process_group import from_main, joined_device
from metr.processes import in_main_process
from metr.run_directory import RunDirectory
from metr.training.comparison import COMPARED, Comparison, keep_before, kept_before, show_comparison
from metr.training.config import RunConfig, check_epochs
from metr.training.finetune_data import FinetuneData, FinetuneOptions
from metr.training.finetune_recipe import RECIPE, described
from metr.training.finetune_request import REQUEST, Prepared, begun, resumed
from metr.training.fitted import keep_fitted, lost_fits
from metr.training.name_variation import other_words
from metr.training.parts import Outcome, TrainingParts
from metr.training.plan import advice, header, page, tell_end
from metr.training.provenance import provenance
from metr.training.resumption import check_apart, save_request
from metr.training.run_log import RunLog, log_page, tell
from metr.training.seen import seen_before, seen_notes
from metr.training.start import (
    advised_backbone,
    check_kept,
    forgotten,
    history,
    kept_network,
    presence_is_taught,
    restore_backbone,
    say_new_names,
    with_text_encoder,
)
from metr.training.state import check_place, has_state
from metr.training.train import fit, names_read_alike, plain, rebuildable, teacher_of
from metr.training.train_request import Data, arguments, check_recipe, check_same
from metr.writable import check_folder_to_write

# what keeps the network, and what to do about it
_KEEPS = "fine-tuning", "make a network of that shape with metr train"


@dataclass(frozen=True, kw_only=True)
class FinetuneOutcome:
    """How training ended, and AP before and after; no comparison if training was interrupted or `compare` is off.

    The detector looks for `default_names` unless it is asked for others; it knows `known` names in all.
    """

    training: Outcome
    comparison: Comparison | None
    default_names: tuple[str, ...]
    known: int


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

    The network is the checkpoint's, with all its weights, but for the backbone's if `train.pretrained_backbone` says
    so; names are strings, so nothing is initialised anew. The checkpoint that is written knows the old names first,
    then the new ones. Without `rehearse` nothing is learnt about old names: they are not negatives in new images.

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
    with RunLog(run.path, console) as log:
        check_place(run, resume)
        check_folder_to_write(run.path)
        if run.resumable or not resume:
            run.check_free()
        check_apart(run, arguments(data))
        check_epochs(options.epochs, options.overrides)
        prepared = (resumed if resume else begun)(data, source, run, options, console)
        return _finetuned(prepared, run, resume, evaluation, console, log)


def finetune_plan(
    data: Data | None,
    source: str | Path | None,
    options: FinetuneOptions | None = None,
    *,
    resumed_run: str | Path | None = None,
    **more: Any,
) -> RenderableType:
    """What `finetune` would do with these arguments, as a page for `rich.print`. It writes only dataset indices.

    It asks nothing: names that seem to mean a trained one are new names, unless the options say otherwise.

    Args:
        data: As for `finetune`, as `source`, `options` and `more` are.
        source: The detector to begin with.
        options: What differs from the defaults.
        resumed_run: The folder of the run to resume, if one is.
        **more: Fields of `FinetuneOptions` by name, laid over `options`.

    Raises:
        MetrError: checkpoint, data or configuration do not fit; the message says what and where.
    """
    asked = {} if options is None else options.model_dump(exclude_unset=True)
    options, resume = FinetuneOptions.checked(asked | more, where="finetune"), resumed_run is not None
    check_epochs(options.epochs, options.overrides)
    run = RunDirectory(Path("" if resumed_run is None else resumed_run))
    prepared = (resumed if resume else begun)(data, source, run, options, Console(quiet=True))
    check_recipe(prepared.plan.recipe)
    check_kept(prepared.model, prepared.plan.recipe.model, *_KEEPS)
    return Group(page(prepared.plan), *_notes(prepared, resume))


def _notes(prepared: Prepared, resume: bool) -> list[RenderableType]:
    """What is said of a run besides its plan."""
    model, joint = prepared.model, prepared.opened.joint
    notes = [Hanging(described(prepared.plan.recipe, prepared.opened.images))]
    if not resume:
        notes += advice(prepared.plan, from_nothing=False)
        nothing_kept = not (prepared.opened.evaluated or prepared.opened.lengths("rehearsed"))
        if nothing_kept and (advised := advised_backbone(model, joint, prepared.plan.recipe)):
            notes.append(Hanging(advised))
    if lost := forgotten(model, joint, "--rehearse mixes old datasets in"):
        notes.append(Hanging(lost))
    return [*notes, *seen_notes(model, prepared.opened.sources)]


def _finetuned(
    prepared: Prepared,
    run: RunDirectory,
    resume: bool,
    evaluation: EvaluationConfig | None,
    console: Console,
    log: RunLog,
) -> FinetuneOutcome:
    """Does what was prepared, and keeps the log from where nothing can be refused any more."""
    model, opened, recipe, options = prepared.model, prepared.opened, prepared.plan.recipe, prepared.options
    check_recipe(recipe)
    tell(console, header(prepared.plan), *_notes(prepared, resume))
    parts, model = _parts(model, opened, recipe, options.decorrelate_names, resume)
    tell(console, *names_read_alike(parts.checkpoint, opened.joint, kept=True))
    if resume:
        check_same(run, opened.joint.vocabulary, parts.checkpoint.text_encoder)
    say_new_names(model, opened.joint.vocabulary, console)
    log.begin(recipe.train.loop.device)
    if in_main_process():
        save_request(run, REQUEST, prepared.request, opened.listings())
    before = _before(model, opened, recipe, run.path, console) if options.compare else None
    outcome = fit(parts, opened.new_splits, recipe, run.path, resume=resume, console=console, evaluation=evaluation)
    compared = None
    if before is not None and not outcome.interrupted:
        compared = _comparison(before, opened, recipe, run.path, console)
        keep_fitted(compared.after, run, outcome)
    if not outcome.interrupted:
        tell(console, *lost_fits(prepared.model.checkpoint, run))
    tell_end(outcome, run, recipe, prepared.data, opened.joint.sources[: opened.new], console, "finetune")
    names, known = opened.default_names, len(opened.joint.vocabulary)
    return FinetuneOutcome(training=outcome, comparison=compared, default_names=names, known=known)


def _parts(
    model: METR, opened: FinetuneData, recipe: RunConfig, decorrelate: bool, resume: bool
) -> tuple[TrainingParts, METR]:
    """What the trainer needs, and the checkpoint's own detector with the text encoder that the recipe names."""
    own, joint = model.checkpoint, opened.joint
    model = with_text_encoder(model, recipe.text)
    network, embeddings = kept_network(model, recipe.model, *_KEEPS), model.embed(joint.vocabulary, tell=False)
    if not resume:  # else its saved weights follow
        restore_backbone(network, recipe.train.pretrained_backbone)
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
        text_encoder=model.checkpoint.text_encoder,
        preprocessing=plain(recipe.augmentation.resize),
        training=_history(own, recipe) | provenance(joint, recipe),
        detection=_detection(own, opened),
    )
    parts = TrainingParts(
        network=network,
        criterion=SetCriterion(recipe.criterion),
        loader=partial(build_train_loader, datasets, loader),
        checkpoint=checkpoint,
        teacher=teacher_of(joint, recipe),
        words=other_words(joint.sources, joint.vocabulary, partial(model.embed, tell=False)),
    )
    return parts, model


def _detection(own: Checkpoint, opened: FinetuneData) -> DetectionDefaults:
    """What detection does by default: it looks for the names that are trained on now, unless these are all."""
    names = opened.default_names
    every = set(names) == set(opened.joint.vocabulary.names)
    return DetectionDefaults(
        names=() if every else names,
        aliases=opened.aliases(own.detection.aliases),
        presence=presence_is_taught(own, opened.joint),
    )


def _history(own: Checkpoint, recipe: RunConfig) -> dict[str, Any]:
    """The new checkpoint's training facts. They keep pretraining's recipe for a second fine-tuning."""
    kept = {RECIPE: own.training[RECIPE]} if RECIPE in own.training else {}
    return {"unannotated": recipe.unannotated, **kept, "finetuned_from": history(own)}


def _comparison(
    before: EvaluationReport, opened: FinetuneData, recipe: RunConfig, out: Path, console: Console
) -> Comparison:
    """Evaluates all datasets with the best checkpoint of the run; writes and shows the comparison."""
    tuned = METR.from_pretrained(out, device=joined_device(recipe.train.loop.device))
    after = _evaluated(tuned, opened, recipe.augmentation.resize, recipe, console)
    comparison = Comparison.of(before, after, opened.roles)
    if in_main_process():
        comparison.write(out)
    show_comparison(comparison, console)
    with log_page() as paper:
        show_comparison(comparison, paper)
    return comparison


def _before(model: METR, opened: FinetuneData, recipe: RunConfig, out: Path, console: Console) -> EvaluationReport:
    """Evaluates the checkpoint itself on all datasets, unless this run has done so before."""
    device = joined_device(recipe.train.loop.device)
    # a report without a state belongs to a run that never began, perhaps from another checkpoint
    report = from_main(
        lambda: kept_before(out) if has_state(RunDirectory(out).state) else None, EvaluationReport | None
    )
    if report is None:
        tell(console, "evaluating the checkpoint before fine-tuning")
        model.network.to(device)
        report = _evaluated(model, opened, model.resize, recipe, console)
        model.network.to("cpu")
        if in_main_process():
            keep_before(out, report)
    return report


def _evaluated(
    model: METR, opened: FinetuneData, resize: ResizeConfig, recipe: RunConfig, console: Console
) -> EvaluationReport:
    """Evaluates new and old datasets with their own names, with the default names and with all names."""
    vocabulary = opened.evaluated_vocabulary()
    config = EvaluationConfig(
        modes=COMPARED, default_names=opened.default_names, inference=model.inference(recipe.inference)
    )
    text = model.embed(vocabulary, tell=False)
    runner = EvaluationRunner(
        vocabulary, text, opened.splits, resize, recipe.evaluation_loader, config, trained=model.vocabulary
    )
    seen = {one.dataset: one.fact for one in seen_before(model, opened.sources)}
    return runner.report(model.network, console, recipe.unannotated).with_seen(seen)
