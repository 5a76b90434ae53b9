"""The plan of a training run, shown before it or instead of it; and what is said at its end."""

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD, Box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from metr.checkpoint import CONFIG, found_nothing
from metr.data.config import Mixture
from metr.data.datasets_file import DatasetSource, parse_data_arguments
from metr.data.joint import JointData
from metr.data.records import TEST, Annotations
from metr.data.sampling import mixture_weights
from metr.devices import resolved_device, resolved_precision
from metr.errors import counted
from metr.fitting import Fitting, Hanging
from metr.processes import process_count
from metr.run_directory import RunDirectory
from metr.training.comparison import COMPARISON
from metr.training.config import RunConfig, averaged_over, changed_lines
from metr.training.parts import Outcome
from metr.training.resumption import NOTHING, Made
from metr.training.run_log import tell

# What the header of a run shows of datasets and of settings that differ from the recipe, so that it stays on a screen.
_DATASETS, _CHANGES = 4, 3
# Columns of a dataset's name on a console where not all columns have room.
_FOLDED = 24
# Detectors that begin without weights are trained for 300 to 500 epochs in the longest of published schedules (DETR,
# YOLO): twice that is no plan, but a number of steps that was made for more images.
_EXTREME_EPOCHS, _MANY_EPOCHS = 1000, 300
# Training images below which a run should begin with a trained detector.
_FEW_IMAGES = 100


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run is going to do.

    Attributes:
        joint: The data to train on.
        recipe: The configuration.
        base: What `recipe` is compared with.
        name: How `base` is called.
        mixture: How datasets are mixed; by default as `recipe` says.
        evaluated: What each dataset is evaluated on; by default its val split.
        made: What a run to resume has done already.
    """

    joint: JointData
    recipe: RunConfig
    base: RunConfig
    name: str
    mixture: Mixture | None = None
    evaluated: Mapping[str, Annotations] | None = None
    made: Made = NOTHING

    @property
    def images(self) -> int:
        """Images that the run sees in all, those before it is resumed included."""
        return images_in_all(self.recipe, self.made)

    @property
    def changes(self) -> list[str]:
        """The settings that differ, a line each."""
        return changed_lines(self.base, self.recipe)


def page(plan: RunPlan) -> RenderableType:
    """What a run would do: a table of the datasets, lines on steps, device and sizes, and all that differs."""
    table = Fitting(_tables(plan, None, SIMPLE_HEAD))
    title = f"configuration: {plan.name}, {'but for' if plan.changes else 'unchanged'}"
    lines = [*_lines(plan), "", title, *(f"  {change}" for change in plan.changes)]
    return Group(table, *map(Hanging, lines))


def header(plan: RunPlan) -> RenderableType:
    """What a run is going to do, in at most 14 lines; one to resume tells all that is changed."""
    changes = plan.changes
    if len(changes) > _CHANGES and not plan.made.steps:
        changes = [*changes[: _CHANGES - 1], f"and {len(changes) - _CHANGES + 1} more in config.yaml"]
    title = f"configuration: {plan.name}, {'but for' if changes else 'unchanged'}"
    lines = [*_lines(plan), title, *(f"  {change}" for change in changes)]
    return Group(Fitting(_tables(plan, _DATASETS, None)), *map(Hanging, lines))


def advice(plan: RunPlan, *, from_nothing: bool) -> list[Hanging]:
    """What to do otherwise, where a new run is not what its data ask for.

    Args:
        plan: The run.
        from_nothing: Whether it begins without a trained detector.
    """
    images, found = sum(plan.joint.lengths.values()), []
    epochs = plan.images / max(images, 1)
    if epochs > _EXTREME_EPOCHS:
        what = f"{counted(round(epochs), 'epoch')} are far more than images need, which is some hundreds at most"
        found.append(f"{what}; shorten the run: --epochs {_MANY_EPOCHS}")
    if from_nothing and images < _FEW_IMAGES:
        shipped = shipped_checkpoint()
        such = "" if shipped is None else f", such as {shipped}"
        what = f"{counted(images, 'training image is', 'training images are')} few to train a detector from the start"
        found.append(f"{what}; metr finetune DATA --from CHECKPOINT begins with a trained one{such}")
    return [Hanging(f"advice: {one}") for one in found]


def shipped_checkpoint() -> Path | None:
    """The trained detector that comes with the source of METR; None where only the package is installed."""
    here = Path("checkpoints/metr-nano")
    beside = Path(__file__).parents[3] / here  # src/metr/training
    return next((path for path in (here, beside) if (path / CONFIG).is_file()), None)


def _tables(plan: RunPlan, most: int | None, box: Box | None) -> Iterator[Table]:
    """The table of the datasets: as it is, with folded names, and without columns that tell least."""
    for longest, left_out in ((None, ()), (_FOLDED, ()), (_FOLDED, ("format", "of samples"))):
        table = _table(plan, most, longest, left_out)
        table.box = box
        yield table


def _table(plan: RunPlan, most: int | None, longest: int | None, left_out: Sequence[str]) -> Table:
    """A row for each dataset: images, categories, share of the samples, and epochs.

    At most `most` rows; names are folded at `longest` columns; `left_out` are the heads of columns that are left out.
    """
    joint, total, lengths = plan.joint, plan.images, plan.joint.lengths
    mixture = joint.mixture(plan.recipe.loader.mixture) if plan.mixture is None else plan.mixture
    evaluated = joint.evaluation() if plan.evaluated is None else plan.evaluated
    fractions = mixture_weights(lengths, mixture)
    heads = ("dataset", "format", "categories", "train images", "evaluated on", "of samples", "epochs")
    kept = [column for column, head in enumerate(heads) if head not in left_out]
    table = Table(box=None, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("dataset", overflow="fold", max_width=longest)
    for column in kept[1:]:
        table.add_column(heads[column], justify="left" if heads[column] == "format" else "right")
    sources = joint.sources if most is None or len(joint.sources) <= most else joint.sources[: most - 1]
    rows = []
    for source in sources:
        name, split = source.name, evaluated[source.name]
        part = " of train" if source.held_out and split.split == "val" else ""
        numbers = [f"{len(source.categories):,}", f"{lengths[name]:,}", f"{split.split} {len(split):,}{part}"]
        numbers += [f"{fractions[name]:.0%}", f"{total * fractions[name] / lengths[name]:,.1f}"]
        rows.append([escape(name), source.format, *numbers])
    if others := [source.name for source in joint.sources[len(sources) :]]:
        numbers = ["", f"{sum(lengths[name] for name in others):,}"]
        numbers += [f"{sum(len(evaluated[name]) for name in others):,}", f"{sum(fractions[n] for n in others):.0%}"]
        rows.append([f"and {len(others)} more", "", *numbers, ""])
    for row in rows:
        table.add_row(*(row[column] for column in kept))
    return table


def _lines(plan: RunPlan) -> list[str]:
    """Names, steps, device and sizes, a line each."""
    joint, recipe = plan.joint, plan.recipe
    loop, model, resize = recipe.train.loop, recipe.model, recipe.augmentation.resize
    owners = Counter(name for source in joint.sources for name in set(source.categories))
    shared = sum(count > 1 for count in owners.values())
    device = resolved_device(loop.device)
    shape = f"{resize.size} x {resize.size}" if resize.mode == "stretch" else f"{resize.size} to {resize.longest}"
    sizes = f", in training {', '.join(map(str, recipe.augmentation.sizes))}" if recipe.augmentation.sizes else ""
    layers = counted(model.decoder.layers, "decoder layer")
    return [
        f"names: {len(joint.vocabulary):,}, {shared:,} of them in several datasets; unannotated: {recipe.unannotated}",
        *_length_lines(recipe, sum(joint.lengths.values()), plan.made),
        f"device: {device}, {resolved_precision(loop.precision, device)}, processes: {_processes(recipe)}; "
        f"images: {shape} pixels ({resize.mode}){sizes}",
        f"network: {model.backbone.name}, {model.encoder.kind} encoder, {layers}, "
        f"width {model.width}, {counted(model.queries.number, 'query', 'queries')}; text: {recipe.text.source}",
    ]


def _processes(recipe: RunConfig) -> str:
    """How many processes there are, and what each of them keeps."""
    count, parallel = process_count(), recipe.train.parallel
    if count > 1:
        return f"{count} ({parallel})"
    return "1" if parallel == "ddp" else f"1 ({parallel}: nothing to shard)"


def _length_lines(recipe: RunConfig, images: int, made: Made) -> list[str]:
    """How long a run with so many training images is, and what follows from that, in two lines."""
    train, loop, total = recipe.train, recipe.train.loop, images_in_all(recipe, made)
    of, warmup = counted(images_a_step(recipe), "image"), train.schedule.warmup_steps
    steps = f"{loop.steps:,} of {of}"
    if made.steps:
        steps = f"{made.steps:,} made, {loop.steps - made.steps:,} to go of {of}"
    every = f"every {counted(loop.evaluate_every, 'step')} and at the end"
    saved = f"every {counted(loop.checkpoint_every, 'step')}"
    warm = "all steps" if warmup >= loop.steps else counted(warmup, "step")
    return [
        f"steps: {steps}, {counted(total, 'image')} in all, {counted(round(total / max(images, 1), 1), 'epoch')}; "
        f"evaluated {every if 0 < loop.evaluate_every < loop.steps else 'at the end'}",
        f"warm-up: {warm}; weights averaged {averaged_over(train)}; "
        f"checkpoints {saved if 0 < loop.checkpoint_every < loop.steps else 'at evaluations and at the end'}",
    ]


def steps_of(epochs: float | None, images: int, recipe: RunConfig, made: Made = NOTHING) -> list[str]:
    """The override that makes a run so many passes over the training images; none without `epochs`.

    Of a run to resume, the images that it has seen count, however many a step had.
    """
    if epochs is None:
        return []
    # rounded, because 0.1 * 30 is a little more than 3
    left = math.ceil(round((epochs * images - made.images) / images_a_step(recipe), 6))
    return [f"train.loop.steps={max(1, made.steps + left)}"]


def images_in_all(recipe: RunConfig, made: Made) -> int:
    """Images that a run sees from its beginning to its end."""
    return made.images + (recipe.train.loop.steps - made.steps) * images_a_step(recipe)


def images_a_step(recipe: RunConfig) -> int:
    """Images of one step, those of all processes together."""
    return recipe.loader.batch_size * recipe.train.loop.accumulation * process_count()


def tell_end(
    outcome: Outcome,
    run: RunDirectory,
    recipe: RunConfig,
    data: Sequence[str],
    sources: Sequence[DatasetSource],
    console: Console,
    verb: str = "train",
    *,
    from_nothing: bool = False,
) -> None:
    """Says where everything of a run is that is done, and what to do next; of an interrupted one how to go on.

    Args:
        outcome: How it ended.
        run: The run folder.
        recipe: The configuration.
        data: The datasets as arguments of a command.
        sources: The opened datasets.
        console: Where it is printed, besides the log.
        verb: The command that goes on with an interrupted run.
        from_nothing: Whether it began without a trained detector.
    """
    if outcome.interrupted:
        tell(console, run.how_to_go_on(verb))
        return
    early = " (stopped early)" if outcome.stalled else ""
    best = ""
    if outcome.best is not None:
        best = f", best {recipe.train.loop.best_metric} {outcome.best:.1f} on val, of step {outcome.best_step:,}"
    places = {
        run.best: "the best checkpoint" if outcome.best is not None else "",
        run.last: "the newest checkpoint",
        run.path / COMPARISON: "AP before and after",
        run.metrics: "losses and AP by step",
        run.curves: "the same, drawn",
        run.val_images: "val images with what was found at the end",
        run.train_batch: "the first batch as the network saw it",
        run.log: "all that was said",
    }
    there = {path.name: what for path, what in places.items() if what and path.exists()}
    tell(console, Hanging(f"Done: {counted(outcome.step, 'step')}{early}{best}. Everything is in {run.path}:"))
    lines = [f"  {name:16} {what}" for name, what in there.items()]
    if found_nothing(outcome.metrics):
        tell(console, "\n".join(lines), Hanging(_what_to_try(run, from_nothing)))
        lines = []
    tell(console, "\n".join([*lines, "Next:", *(f"  {command}" for command in _next(run, data, sources))]))


def _what_to_try(run: RunDirectory, from_nothing: bool) -> str:
    """What helps a run that ended with an AP of 0."""
    tried = "train for longer (--steps, --epochs), or with a higher learning rate (train.optimizer.learning_rate)"
    if from_nothing:
        shipped = shipped_checkpoint()
        such = "" if shipped is None else f", such as {shipped}"
        tried = "train for longer (--steps, --epochs), or begin with a trained detector (metr finetune DATA --from "
        tried += f"CHECKPOINT{such})"
    if run.train_batch.exists():
        tried += f". Look at {run.train_batch.name} first, where wrong boxes are easiest to see"
    return f"It has learnt next to nothing: AP is 0 on val. What to try: {tried}."


def _next(run: RunDirectory, data: Sequence[str], sources: Sequence[DatasetSource]) -> Iterator[str]:
    """Commands for what mostly follows: the last word on test where there is one, the run as a page, and detection."""
    tested = {source.name for source in sources if TEST in source.splits}
    wholly = [one for one in data if {spec.name for spec in parse_data_arguments([one])} <= tested]
    if wholly:
        yield shlex.join(["metr", "evaluate", str(run.path), *wholly, "--split", TEST])
    else:
        yield shlex.join(["metr", "evaluate", str(run.path), *data])
    yield shlex.join(["metr", "report", str(run.path)])
    yield f"metr detect {shlex.quote(str(run.path))} IMAGE"
