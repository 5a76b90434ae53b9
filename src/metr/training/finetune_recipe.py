"""The configuration of a fine-tuning run: the checkpoint's, the defaults for this much data, and what the user says."""

import logging
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import yaml

from metr.checkpoint import Checkpoint
from metr.config import Tree, merge, parse_overrides, read_yaml
from metr.errors import ConfigError
from metr.training.config import Freeze
from metr.training.finetune_defaults import defaults_for
from metr.training.recipe import RunConfig

RECIPE = "recipe"
"""The key of a checkpoint's `training` under which pretraining leaves what fine-tuning begins with."""
_FROZEN: dict[Freeze, str] = {
    "none": "nothing more frozen than in pretraining",
    "half": "first half of the backbone frozen",
    "backbone": "backbone frozen",
    "encoder": "backbone and encoder frozen",
}
_logger = logging.getLogger(__name__)


def left_to_finetuning(recipe: RunConfig) -> Tree:
    """Of the configuration of a run what its checkpoints tell: losses, augmentation, batch, optimizer."""
    told = recipe.model_dump(mode="json", include={"criterion", "augmentation"})
    told["augmentation"].pop("resize")  # the checkpoint tells that anyway
    optimizer = recipe.train.optimizer.model_dump(mode="json")
    return told | {"loader": {"batch_size": recipe.loader.batch_size}, "train": {"optimizer": optimizer}}


def finetune_recipe(
    checkpoint: Checkpoint, images: int, file: Path | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The configuration for fine-tuning a checkpoint on so many images.

    Later ones win: what all fine-tuning has in common, the checkpoint, the defaults for the number of images, a YAML
    file, `section.key=value` overrides.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong kind.
    """
    text = (resources.files("metr") / "recipes" / "finetune.yaml").read_text(encoding="utf-8")
    tree = merge(yaml.safe_load(text), _told_by(checkpoint))
    defaults = defaults_for(images).tree(tree["train"]["optimizer"]["learning_rate"])
    layers = [read_yaml(file)] if file is not None else []
    where = "fine-tuning" + (f" with {file}" if file is not None else "") + (" and --set" if overrides else "")
    return RunConfig.checked(merge(tree, defaults, *layers, parse_overrides(overrides)), where=where)


def described(recipe: RunConfig, images: int) -> str:
    """How fine-tuning will go, in a few words."""
    train, loop = recipe.train, recipe.train.loop
    parts = [
        f"{loop.steps:,} steps of {recipe.loader.batch_size * loop.accumulation} at "
        f"{_plainly(train.optimizer.learning_rate)} after a warm-up of {train.schedule.warmup_steps}",
        _FROZEN[train.freeze],
    ]
    if train.optimizer.layer_decay < 1:
        parts.append(f"each depth below at {train.optimizer.layer_decay:g} of the rate above it")
    parts.append(f"weights averaged over about {1 / (1 - train.ema.decay):,.0f} steps" if train.ema.enabled else "")
    shares = recipe.augmentation
    parts.append(f"{shares.crop:.0%} cropped, {shares.zoom_out:.0%} zoomed out, {shares.colour:.0%} recoloured")
    if loop.evaluate_every:
        parts.append(f"evaluated every {loop.evaluate_every:,} steps")
    if loop.evaluate_every and loop.patience:
        parts.append(f"stops when {loop.best_metric} has not risen for {loop.patience} evaluations")
    return f"{images:,} image{'' if images == 1 else 's'}: {', '.join(part for part in parts if part)}."


def _told_by(checkpoint: Checkpoint) -> Tree:
    """The checkpoint's share of the configuration."""
    text = {key: value for key, value in checkpoint.text_encoder.items() if key != "identity"}
    own: Tree = {
        "model": checkpoint.model.model_dump(mode="json"),
        "text": text,
        "augmentation": {"resize": dict(checkpoint.preprocessing)},
    }
    if "unannotated" in checkpoint.training:
        own["unannotated"] = checkpoint.training["unannotated"]
    told = checkpoint.training.get(RECIPE) or {}
    try:
        RunConfig.checked(told)
    except ConfigError as error:
        _logger.warning("what the checkpoint tells of its training is not understood and left out: %s", error.what)
        told = {}
    return merge(told, own)


def _plainly(rate: float) -> str:
    """2e-4 and not 2.0e-04."""
    figures, _, power = f"{rate:.1e}".partition("e")
    return f"{figures.removesuffix('.0')}e{int(power)}"
