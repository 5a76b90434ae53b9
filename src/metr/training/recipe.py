"""Recipes: the whole configuration of a run, by size, file and single overrides."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from metr.config import Config, merge, parse_overrides, read_yaml
from metr.data.config import AugmentationConfig, LoaderConfig
from metr.data.dataset import Unannotated
from metr.errors import ConfigError, did_you_mean
from metr.inference.config import InferenceConfig
from metr.losses.config import CriterionConfig
from metr.models.config import DetectorConfig
from metr.text.encoder import TextEncoderConfig
from metr.training.config import TrainConfig

Size = Literal["nano", "small", "base"]
SIZES: tuple[Size, ...] = ("nano", "small", "base")


class RunConfig(Config):
    """Everything that decides a training run, but for its data."""

    text: TextEncoderConfig = TextEncoderConfig()
    model: DetectorConfig = DetectorConfig()
    criterion: CriterionConfig = CriterionConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    loader: LoaderConfig = LoaderConfig()
    unannotated: Unannotated = "negative"
    """What is made of a category that an image's dataset does not annotate. `ignore`: nothing. `negative`:
    category extraction learns that it is not there; boxes of it are still no mistakes. `teacher`: as the average of the
    weights clearly says (`train.pseudo_labels`), otherwise nothing."""
    train: TrainConfig = TrainConfig()
    inference: InferenceConfig = InferenceConfig()
    """Of evaluations in this run; those after it, and detection, are told theirs anew."""

    @property
    def evaluation_loader(self) -> LoaderConfig:
        """How images are loaded in evaluations: as in training, in batches of `inference.batch_size`."""
        return self.loader.model_copy(update={"batch_size": self.inference.batch_size})


def load_recipe(
    size: str = "nano",
    file: Path | None = None,
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration of a size, with a YAML file, `section.key=value` overrides and a mapping laid over it.

    Raises:
        ConfigError: the size or a key is unknown, or a value is of the wrong kind.
    """
    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r}", where="--size", hint=did_you_mean(size, SIZES))
    recipe = resources.files("metr") / "recipes" / f"{size}.yaml"
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    layers = [read_yaml(file)] if file is not None else []
    where = f"recipe {size}" + (f" with {file}" if file is not None else "") + (" and --set" if overrides else "")
    return RunConfig.checked(merge(tree, *layers, parse_overrides(overrides), changes or {}), where=where)
