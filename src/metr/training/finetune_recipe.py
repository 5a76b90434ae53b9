"""The configuration of a fine-tuning run: the checkpoint's, the defaults for this much data, and what the user says.

The defaults are a table by the number of training images. Between two rows values are interpolated over the logarithm
of the number: fractions linearly, step counts and rates geometrically. Below the first row that row holds; above the
last row, the last. By default nothing is frozen and all depths have the same rate: even with few images, freezing and
layer decay cost more than they saved (docs/decisions.md).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from metr.checkpoint import Checkpoint
from metr.config import Tree, leaves, merge
from metr.data.config import LoaderConfig
from metr.errors import ConfigError, counted
from metr.training.config import Freeze, RunConfig, averaged_over, finetune_layers, laid_over, packaged

RECIPE = "recipe"
"""The key in a checkpoint's `training` of the settings that pretraining passes on to fine-tuning."""
_FROZEN: dict[Freeze, str] = {
    "none": "nothing more frozen than in pretraining",
    "half": "first half of the backbone frozen",
    "backbone": "backbone frozen",
    "encoder": "backbone and encoder frozen",
}
# Time constant of the EMA's warm-up, as a fraction of the steps that the EMA covers.
_WARMING = 0.4
# Where the first weights of a network come from that is made anew.
_FRESH = ("model.backbone.pretrained", "model.backbone.revision")
_logger = logging.getLogger(__name__)


def left_to_finetuning(recipe: RunConfig) -> Tree:
    """What a run's checkpoints keep of its configuration for fine-tuning: losses, augmentation, batch, optimizer."""
    kept = recipe.model_dump(mode="json", include={"criterion", "augmentation"})
    kept["augmentation"].pop("resize")  # the checkpoint has that anyway
    optimizer = recipe.train.optimizer.model_dump(mode="json")
    loader = {"batch_size": recipe.loader.batch_size}
    if recipe.loader.multiple != LoaderConfig().multiple:  # as the windows of a vision transformer need
        loader["multiple"] = recipe.loader.multiple
    return kept | {"loader": loader, "train": {"optimizer": optimizer}}


def finetune_recipe(
    checkpoint: Checkpoint, images: int, file: Path | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The configuration for fine-tuning a checkpoint on a number of images.

    Later layers win: the packaged fine-tuning recipe, the checkpoint, the defaults for the number of images, a YAML
    file, `section.key=value` overrides. Warm-up, average and intervals follow the number of steps (`laid_over`).

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong kind.
    """
    tree = merge(packaged("finetune"), settings_of(checkpoint))
    defaults = defaults_for(images).tree(tree["train"]["optimizer"]["learning_rate"])
    layers, where = finetune_layers(file, overrides)
    return laid_over_start(merge(tree, defaults), layers, where)


def laid_over_start(base: Tree, layers: Sequence[Tree], where: str) -> RunConfig:
    """A configuration that follows a detector to begin with, with what a user lays over it (`laid_over`).

    Raises:
        ConfigError: a key is unknown, a value is of the wrong kind, or a setting has no effect: also one that only a
            network without weights has.
    """
    recipe = laid_over(base, layers, where=where)
    own = [layer for layer in layers if not layer.keys() >= RunConfig.model_fields.keys()]  # not a whole configuration
    given = leaves(merge({}, *own))
    idle = [key for key in _FRESH if given.get(key) and not (key != _FRESH[0] and recipe.train.pretrained_backbone)]
    if idle:
        what = f"{idle[0]}={given[idle[0]]} has no effect: the weights are those of the detector to begin with"
        hint = "leave it out; train.pretrained_backbone=1 puts the weights of the backbone's own pretraining back"
        raise ConfigError(what, where=where, hint=hint)
    return recipe


def described(recipe: RunConfig, images: int) -> str:
    """A summary of a fine-tuning run's configuration, in one sentence."""
    train, loop = recipe.train, recipe.train.loop
    parts = [
        f"{counted(loop.steps, 'step')} of {recipe.loader.batch_size * loop.accumulation} at "
        f"{plainly(train.optimizer.learning_rate)} after a warm-up of {min(train.schedule.warmup_steps, loop.steps)}",
        _FROZEN[train.freeze],
    ]
    parts.append(restored(recipe))
    if train.optimizer.layer_decay < 1:
        parts.append(f"each depth below at {train.optimizer.layer_decay:g} of the rate above it")
    parts.append(f"weights averaged {averaged_over(train)}" if train.ema.enabled else "")
    changed = recipe.augmentation
    parts.append(f"{changed.crop:.0%} cropped, {changed.zoom_out:.0%} zoomed out, {changed.colour:.0%} recoloured")
    if 0 < loop.evaluate_every < loop.steps:
        parts.append(f"evaluated every {counted(loop.evaluate_every, 'step')}")
        if loop.patience:
            evaluations = counted(loop.patience, "evaluation")
            parts.append(f"stops when {loop.best_metric} has not risen for {evaluations}")
    return f"{counted(images, 'image')}: {', '.join(part for part in parts if part)}."


def restored(recipe: RunConfig) -> str:
    """How much of the weights of its own pretraining the backbone begins with, in words; empty where nothing."""
    share = recipe.train.pretrained_backbone
    return f"{100 * share:.3g}% of the backbone's original weights" if share else ""


def settings_of(checkpoint: Checkpoint) -> Tree:
    """The part of a run's configuration that the checkpoint that it begins with decides."""
    text = {key: value for key, value in checkpoint.text_encoder.items() if key != "identity"}
    own: Tree = {
        "model": checkpoint.model.model_dump(mode="json"),
        "text": text,
        "augmentation": {"resize": dict(checkpoint.preprocessing)},
    }
    if "unannotated" in checkpoint.training:
        own["unannotated"] = checkpoint.training["unannotated"]
    kept = checkpoint.training.get(RECIPE) or {}
    try:
        RunConfig.checked(kept)
    except ConfigError as error:
        _logger.warning("the checkpoint's recipe of its training is not understood and left out: %s", error.what)
        kept = {}
    return merge(kept, own)


def plainly(rate: float) -> str:
    """A rate as people write it: 2e-4, not 2.0e-04."""
    figures, _, power = f"{rate:.1e}".partition("e")
    return f"{figures.removesuffix('.0')}e{int(power)}"


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """One row of the table of defaults.

    `rate` is the peak learning rate as a multiple of pretraining's; `average` is the number of steps that
    the EMA covers; `crop`, `zoom_out` and `colour` are the fractions of images with that augmentation.
    """

    images: int
    steps: int
    rate: float
    warmup: int
    average: int
    evaluate_every: int
    crop: float
    zoom_out: float
    colour: float

    def tree(self, pretraining_rate: float) -> Tree:
        """The row as a part of a run's configuration."""
        return {
            "augmentation": {"crop": self.crop, "zoom_out": self.zoom_out, "colour": self.colour},
            "train": {
                "optimizer": {"learning_rate": _rounded(self.rate * pretraining_rate)},
                "schedule": {"warmup_steps": self.warmup},
                "ema": {"decay": round(1 - 1 / self.average, 6), "tau": _WARMING * self.average},
                "loop": {
                    "steps": self.steps,
                    "evaluate_every": self.evaluate_every,
                    "checkpoint_every": self.evaluate_every,
                },
            },
        }


# fmt: off
TABLE = (
    Defaults(images=20,     steps=300,    rate=1.0,  warmup=30,  average=60,   evaluate_every=30,   crop=0.50, zoom_out=0.30, colour=0.8),  # noqa: E501
    Defaults(images=200,    steps=1_000,  rate=1.0,  warmup=50,  average=200,  evaluate_every=100,  crop=0.50, zoom_out=0.20, colour=0.7),  # noqa: E501
    Defaults(images=2_000,  steps=5_000,  rate=0.5,  warmup=200, average=1000, evaluate_every=500,  crop=0.35, zoom_out=0.10, colour=0.5),  # noqa: E501
    Defaults(images=20_000, steps=20_000, rate=0.5,  warmup=500, average=4000, evaluate_every=2000, crop=0.35, zoom_out=0.10, colour=0.5),  # noqa: E501
)
# fmt: on


def defaults_for(images: int) -> Defaults:
    """The row for a number of training images, at least 1."""
    images = max(1, images)
    if images <= TABLE[0].images:
        return TABLE[0]
    for lower, upper in pairwise(TABLE):
        if images <= upper.images:
            fraction = math.log(images / lower.images) / math.log(upper.images / lower.images)
            return _between(lower, upper, fraction, images)
    return TABLE[-1]


def _between(lower: Defaults, upper: Defaults, fraction: float, images: int) -> Defaults:
    def counted(first: int, second: int) -> int:
        return int(_rounded(first ** (1 - fraction) * second**fraction))

    def mixed(first: float, second: float) -> float:
        return round((1 - fraction) * first + fraction * second, 3)

    return Defaults(
        images=images,
        steps=counted(lower.steps, upper.steps),
        rate=_rounded(lower.rate ** (1 - fraction) * upper.rate**fraction),
        warmup=counted(lower.warmup, upper.warmup),
        average=counted(lower.average, upper.average),
        evaluate_every=counted(lower.evaluate_every, upper.evaluate_every),
        crop=mixed(lower.crop, upper.crop),
        zoom_out=mixed(lower.zoom_out, upper.zoom_out),
        colour=mixed(lower.colour, upper.colour),
    )


def _rounded(value: float) -> float:
    """The value rounded to two significant digits."""
    return float(f"{value:.1e}")
