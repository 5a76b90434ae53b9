"""The plan of a training run: its datasets, how long it is and what follows from that, device and sizes."""

import math
from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from metr.data.joint import JointData
from metr.data.sampling import mixture_weights
from metr.devices import process_count, resolved_device, resolved_precision
from metr.training.config import RunConfig


def page(joint: JointData, recipe: RunConfig, notes: Sequence[str]) -> RenderableType:
    """What a run would do: a table of the datasets, then lines on steps, device and sizes, then `notes`."""
    return Group(_table(joint, recipe), *map(Text, [*_lines(joint, recipe), "", *notes]))


def _table(joint: JointData, recipe: RunConfig) -> Table:
    """A row for each dataset: images, categories, share of the samples, and epochs."""
    lengths, evaluated = joint.lengths, joint.evaluation()
    fractions = mixture_weights(lengths, joint.mixture(recipe.loader.mixture))
    total = images_a_step(recipe) * recipe.train.loop.steps
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
        f"device: {device}, {resolved_precision(loop.precision, device)}, processes: {process_count()}",
        f"images: {shape} pixels ({resize.mode}){sizes}",
        f"network: {model.backbone.name}, {model.encoder.kind} encoder, {model.decoder.layers} decoder layers, "
        f"width {model.width}, {model.queries.number} queries; text: {recipe.text.source}",
    ]


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
