"""The plan of a training run, shown before it or instead of it; and what is said at its end."""

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from metr.data.config import Mixture
from metr.data.datasets_file import DatasetSource, parse_data_arguments
from metr.data.joint import JointData
from metr.data.records import TEST, Annotations
from metr.data.sampling import mixture_weights
from metr.devices import resolved_device, resolved_precision
from metr.processes import process_count
from metr.run_directory import RunDirectory
from metr.training.comparison import COMPARISON
from metr.training.config import RunConfig, changed_lines
from metr.training.parts import Outcome
from metr.training.run_log import tell

# What the header of a run shows of datasets and of settings that differ from the recipe, so that it stays on a screen.
_DATASETS, _CHANGES = 4, 3


def page(joint: JointData, recipe: RunConfig, notes: Sequence[str]) -> RenderableType:
    """What a run would do: a table of the datasets, then lines on steps, device and sizes, then `notes`."""
    table = _table(joint, recipe, joint.mixture(recipe.loader.mixture), joint.evaluation())
    table.box = SIMPLE_HEAD
    return Group(table, *map(Text, [*_lines(joint, recipe), "", *notes]))


def header(
    joint: JointData,
    recipe: RunConfig,
    base: RunConfig,
    name: str,
    *,
    mixture: Mixture | None = None,
    evaluated: Mapping[str, Annotations] | None = None,
) -> RenderableType:
    """What a run is going to do, in at most 14 lines.

    Args:
        joint: The data to train on.
        recipe: The configuration.
        base: What `recipe` is compared with.
        name: How `base` is called.
        mixture: How datasets are mixed; by default as `recipe` says.
        evaluated: What each dataset is evaluated on; by default its val split.
    """
    mixture = joint.mixture(recipe.loader.mixture) if mixture is None else mixture
    table = _table(joint, recipe, mixture, joint.evaluation() if evaluated is None else evaluated, _DATASETS)
    changes = changed_lines(base, recipe)
    if len(changes) > _CHANGES:
        changes = [*changes[: _CHANGES - 1], f"and {len(changes) - _CHANGES + 1} more in config.yaml"]
    title = f"configuration: {name}, {'but for' if changes else 'unchanged'}"
    return Group(table, *map(Text, [*_lines(joint, recipe), title, *(f"  {change}" for change in changes)]))


def _table(
    joint: JointData,
    recipe: RunConfig,
    mixture: Mixture,
    evaluated: Mapping[str, Annotations],
    most: int | None = None,
) -> Table:
    """A row for each dataset: images, categories, share of the samples, and epochs; at most so many rows."""
    lengths = joint.lengths
    fractions = mixture_weights(lengths, mixture)
    total = images_a_step(recipe) * recipe.train.loop.steps
    table = Table(box=None, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("dataset", overflow="fold")
    table.add_column("format")
    for head in ("categories", "train images", "evaluated on", "of samples", "epochs"):
        table.add_column(head, justify="right")
    sources = joint.sources if most is None or len(joint.sources) <= most else joint.sources[: most - 1]
    for source in sources:
        name, split = source.name, evaluated[source.name]
        part = " of train" if source.held_out and split.split == "val" else ""
        numbers = [f"{len(source.categories):,}", f"{lengths[name]:,}", f"{split.split} {len(split):,}{part}"]
        numbers += [f"{fractions[name]:.0%}", f"{total * fractions[name] / lengths[name]:,.1f}"]
        table.add_row(escape(name), source.format, *numbers)
    if others := [source.name for source in joint.sources[len(sources) :]]:
        numbers = ["", f"{sum(lengths[name] for name in others):,}"]
        numbers += [f"{sum(len(evaluated[name]) for name in others):,}"]
        table.add_row(f"and {len(others)} more", "", *numbers, f"{sum(fractions[name] for name in others):.0%}", "")
    return table


def _lines(joint: JointData, recipe: RunConfig) -> list[str]:
    """Names, steps, device and sizes, a line each."""
    loop, model, resize = recipe.train.loop, recipe.model, recipe.augmentation.resize
    owners = Counter(name for source in joint.sources for name in set(source.categories))
    shared = sum(count > 1 for count in owners.values())
    device = resolved_device(loop.device)
    shape = f"{resize.size} x {resize.size}" if resize.mode == "stretch" else f"{resize.size} to {resize.longest}"
    sizes = f", in training {', '.join(map(str, recipe.augmentation.sizes))}" if recipe.augmentation.sizes else ""
    return [
        f"names: {len(joint.vocabulary):,}, {shared:,} of them in several datasets; unannotated: {recipe.unannotated}",
        *length_lines(recipe, sum(joint.lengths.values())),
        f"device: {device}, {resolved_precision(loop.precision, device)}, processes: {_processes(recipe)}; "
        f"images: {shape} pixels ({resize.mode}){sizes}",
        f"network: {model.backbone.name}, {model.encoder.kind} encoder, {model.decoder.layers} decoder layers, "
        f"width {model.width}, {model.queries.number} queries; text: {recipe.text.source}",
    ]


def _processes(recipe: RunConfig) -> str:
    """How many processes there are, and what each of them keeps."""
    count, parallel = process_count(), recipe.train.parallel
    if count > 1:
        return f"{count} ({parallel})"
    return "1" if parallel == "ddp" else f"1 ({parallel}: nothing to shard)"


def length_lines(recipe: RunConfig, images: int) -> list[str]:
    """How long a run with so many training images is, and what follows from that, in two lines."""
    train, a_step = recipe.train, images_a_step(recipe)
    loop, total = train.loop, train.loop.steps * a_step
    every = f"every {loop.evaluate_every:,} steps and at the end" if loop.evaluate_every else "at the end"
    saved = f"every {loop.checkpoint_every:,} steps" if loop.checkpoint_every else "at evaluations and at the end"
    average = f"over about {1 / (1 - train.ema.decay):,.0f} steps" if train.ema.enabled else "not"
    return [
        f"steps: {loop.steps:,} of {a_step:,} images, {total:,} images in all, {total / max(images, 1):,.1f} epochs; "
        f"evaluated {every}",
        f"warm-up: {train.schedule.warmup_steps:,} steps; weights averaged {average}; checkpoints {saved}",
    ]


def steps_of(epochs: float | None, images: int, recipe: RunConfig) -> list[str]:
    """The override that makes a run so many passes over the training images; none without `epochs`."""
    if epochs is None:
        return []
    # rounded, because 0.1 * 30 is a little more than 3
    return [f"train.loop.steps={max(1, math.ceil(round(epochs * images / images_a_step(recipe), 6)))}"]


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
    lines = [f"Done: {outcome.step:,} steps{early}{best}. Everything is in {run.path}:"]
    lines += [f"  {name:16} {what}" for name, what in there.items()]
    tell(console, "\n".join([*lines, "Next:", *(f"  {command}" for command in _next(run, data, sources))]))


def _next(run: RunDirectory, data: Sequence[str], sources: Sequence[DatasetSource]) -> Iterator[str]:
    """Commands for what mostly follows: the last word on test where there is one, and detection."""
    tested = {source.name for source in sources if TEST in source.splits}
    wholly = [one for one in data if {spec.name for spec in parse_data_arguments([one])} <= tested]
    if wholly:
        yield shlex.join(["metr", "evaluate", str(run.path), *wholly, "--split", TEST])
    else:
        yield shlex.join(["metr", "evaluate", str(run.path), *data])
    yield f"metr detect {shlex.quote(str(run.path))} IMAGE"
