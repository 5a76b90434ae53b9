"""Configuration of training, one class for each part, and recipes: the whole configuration of a run."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from metr.config import Config, Tree, differences, merge, parse_overrides, read_yaml
from metr.data.config import AugmentationConfig, LoaderConfig, Unannotated
from metr.errors import ConfigError, did_you_mean
from metr.inference.config import InferenceConfig
from metr.losses.config import CriterionConfig
from metr.models.config import DetectorConfig
from metr.text.config import TextEncoderConfig

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Freeze = Literal["none", "half", "backbone", "encoder"]


class OptimizerConfig(Config):
    """AdamW, its parameter groups and gradient clipping."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of everything but the backbone."""
    backbone_multiplier: Annotated[float, Field(ge=0)] = 0.1
    """The backbone's learning rate as a multiple of `learning_rate`; 0 freezes it."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of a depth as a multiple of the rate one depth above. From the top: all that follows the encoder,
    the encoder, the backbone's last stage, ..., its stem. 1: all alike. `backbone_multiplier` multiplies it further."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW's decoupled weight decay; norms, biases and embeddings have none."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the running averages of the gradient and of its square."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the averaged squared gradient, for numerical stability."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.1
    """Largest Euclidean norm of the whole gradient; 0 clips nothing."""


class ScheduleConfig(Config):
    """The learning rate over the steps, as a fraction of its peak."""

    kind: Literal["cosine", "flat_cosine", "constant"] = "cosine"
    """What follows the warm-up: cosine decay, a constant stretch and then cosine decay, or a constant rate."""
    warmup_steps: Count = 500
    """Steps of linear warm-up, at most all of them."""
    flat_fraction: Fraction = 0.5
    """Fraction of all steps that the warm-up and the flat stretch take together (`flat_cosine`)."""
    floor: Fraction = 0.01
    """Fraction of the peak at which the cosine ends."""


class EmaConfig(Config):
    """The exponential moving average of the weights."""

    enabled: bool = True
    """Whether the average is kept, evaluated and saved as the model's weights."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Fraction of the old average that a step keeps, after the warm-up of the decay."""
    tau: Annotated[float, Field(gt=0)] = 2000.0
    """Time constant of the decay's warm-up, in steps: after n steps it is decay * (1 - exp(-n / tau))."""


class PseudoLabelConfig(Config):
    """When the average of the weights gives pseudo-labels for categories that an image's dataset does not annotate."""

    absent_below: Fraction = 0.5
    """Presence probability under which a category is a negative."""
    present_above: Fraction = 0.9
    """Presence probability over which detections of the category may become pseudo-labels."""
    object_above: Fraction = 0.6
    """Score over which such a detection becomes a pseudo-label."""
    objects: PositiveCount = 20
    """Maximum number of pseudo-labels per image."""
    same_object: Fraction = 0.5
    """IoU over which two boxes of one category are one object."""


class LoopConfig(Config):
    """How long, on what, and how often something is written."""

    steps: PositiveCount = 10_000
    """Updates of the weights."""
    accumulation: PositiveCount = 1
    """Batches whose gradients are averaged for one step."""
    vocabulary_sample: Count = 0
    """Maximum number of names that a step uses: all those present in the batch, even if more, then sampled negatives.
    0 uses the whole vocabulary."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network (autocast); `auto` is bf16 on GPUs that have it, otherwise fp32. Losses are fp32."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` takes an accelerator where there is one."""
    seed: Count = 0
    """Decides every random number in training."""
    log_every: PositiveCount = 20
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Count = 1000
    """Steps between evaluations; 0 evaluates at the end only."""
    checkpoint_every: Count = 500
    """Steps between savings of the last checkpoint. It is also saved at evaluations and at the end; 0: only then."""
    best_metric: str = "AP"
    """The metric of the evaluation whose highest value marks the best checkpoint."""
    patience: Count = 0
    """Evaluations without a new best after which training ends early; 0 goes on to the last step."""
    max_skipped: PositiveCount = 20
    """Steps in a row that may be skipped for numbers that are not finite, before training gives up."""
    curves: bool = True
    """Whether to draw curves.png whenever training ends."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate that get every number of metrics.jsonl too: tensorboard, wandb, mlflow, comet_ml, ..."""
    progress_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Seconds between lines of progress where there is no terminal."""


class TrainConfig(Config):
    """Everything that configures the trainer itself."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, its parameter groups and gradient clipping."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the steps."""
    ema: EmaConfig = EmaConfig()
    """The exponential moving average of the weights."""
    freeze: Freeze = "none"
    """Which parts keep their weights, besides what the network's own configuration freezes: the stem and the first
    `half` of the backbone's stages, the whole `backbone`, backbone and `encoder`, or `none`. They stay in evaluation
    mode."""
    pseudo_labels: PseudoLabelConfig = PseudoLabelConfig()
    """Thresholds of `unannotated: pseudo_label`."""
    loop: LoopConfig = LoopConfig()
    """How long, on what, and how often something is written."""


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
    extraction learns that it is absent; predicted boxes of it are penalised only in `negative_slots`. `pseudo_label`:
    what the average of the weights is confident about (`train.pseudo_labels`), otherwise nothing."""
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
        config: Laid over it: a YAML file, or a whole configuration, which replaces the recipe.
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
    """A value in YAML, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
