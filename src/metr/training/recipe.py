"""Recipes: the whole configuration of a run, by size, file and single overrides."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from metr.config import Config, Tree, differences, merge, parse_overrides, read_yaml
from metr.data.config import AugmentationConfig, LoaderConfig
from metr.data.dataset import Unannotated
from metr.errors import ConfigError, did_you_mean
from metr.inference.postprocess import InferenceConfig
from metr.losses.config import CriterionConfig
from metr.models.config import DetectorConfig
from metr.text.encoder import TextEncoderConfig
from metr.training.config import TrainConfig

Size = Literal["nano", "small", "base"]
SIZES: tuple[Size, ...] = ("nano", "small", "base")


class RunConfig(Config):
    """Everything that decides a training run, but for its data."""

    text: TextEncoderConfig = TextEncoderConfig()
    """The language model that embeds names."""
    model: DetectorConfig = DetectorConfig()
    """The network."""
    criterion: CriterionConfig = CriterionConfig()
    """The losses and the matching."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Random changes of training images."""
    loader: LoaderConfig = LoaderConfig()
    """How training images are mixed and loaded."""
    unannotated: Unannotated = "negative"
    """What is learnt of a category that an image's dataset does not annotate. `ignore`: nothing. `negative`: category
    extraction learns that it is not there; a box of it is still no mistake. `pseudo_label`: what the average of the
    weights clearly answers (`train.pseudo_labels`), otherwise nothing."""
    train: TrainConfig = TrainConfig()
    """How the network is trained."""
    inference: InferenceConfig = InferenceConfig()
    """How evaluations during training detect. Later evaluations, and detection, have their own settings."""

    @property
    def evaluation_loader(self) -> LoaderConfig:
        """How images are loaded in evaluations: as in training, in batches of `inference.batch_size`."""
        return self.loader.model_copy(update={"batch_size": self.inference.batch_size})


def load_recipe(
    size: str = "nano",
    config: str | Path | RunConfig | None = None,
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration of a run.

    Args:
        size: Whose recipe is the beginning: "nano", "small" or "base".
        config: Laid over it: a YAML file, or a whole configuration, which leaves nothing of the size's recipe.
        overrides: Laid over that: `["section.key=value", ...]`.
        changes: Laid over that: a nested mapping.

    Raises:
        ConfigError: the size or a key is unknown, or a value is of the wrong kind.
    """
    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r}", where="--size", hint=did_you_mean(size, SIZES))
    if isinstance(config, RunConfig):
        layer, origin = config.model_dump(mode="json"), f"recipe {size} with a RunConfig"
    elif config is not None:
        layer, origin = read_yaml(Path(config)), f"recipe {size} with {config}"
    else:
        layer, origin = {}, f"recipe {size}"
    tree = merge(packaged(size), layer, parse_overrides(overrides), changes or {})
    return RunConfig.checked(tree, where=origin + (" and --set" if overrides else ""))


def packaged(name: str) -> Tree:
    """A recipe that comes with METR, as plain values."""
    text = (resources.files("metr") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    tree: Tree = yaml.safe_load(text)
    return tree


def changed_lines(recipe: RunConfig, config: RunConfig) -> list[str]:
    """`key: recipe's value -> value` of every setting that differs from the recipe."""
    return [f"{key}: {_short(old)} -> {_short(new)}" for key, old, new in differences(recipe, config)]


def _short(value: object) -> str:
    """A value as YAML has it, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
