"""Configuration of training, one class for each part, and recipes: the whole configuration of a run."""

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from metr.bounded_yaml import load_yaml
from metr.config import (
    Config,
    Tree,
    differences,
    leaves,
    merge,
    parse_overrides,
    read_yaml,
    unflattened,
)
from metr.data.config import AugmentationConfig, LoaderConfig, SubsetConfig, Unannotated
from metr.errors import ConfigError, counted, did_you_mean
from metr.idle_settings import check_effects
from metr.inference.config import InferenceConfig
from metr.losses.config import CriterionConfig
from metr.models.config import DetectorConfig
from metr.text.config import TextEncoderConfig

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Freeze = Literal["none", "half", "backbone", "encoder"]
Parallel = Literal["ddp", "fsdp"]


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
    done: Count = 0
    """Steps of the schedule that an earlier training made, whose weights this one begins with: all that it was meant to
    make are these and `loop.steps`. The warm-up is this training's own."""
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
    batch_norm_images: Count = 0
    """Training images from which the statistics of the average's batch norms are estimated, before each evaluation and
    at the end; frozen norms keep theirs. 0: they are the average of the trained network's running statistics."""


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
    """Batches of a step, whose gradient is that of all their images together: losses are divided by all objects."""
    vocabulary_sample: Count = 0
    """Maximum number of names that a step uses: all those present in the batch, even if more, then sampled negatives.
    0 uses the whole vocabulary."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the network (autocast); `auto` is bf16 on GPUs that have it and processors with AMX or
    AVX512_BF16, otherwise fp32. Losses are fp32."""
    compile: bool = False
    """Compile backbone, encoder and decoder (torch.compile). The first steps take minutes, the others less time. It
    needs a C++ compiler on CPUs, and Triton on GPUs."""
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
    """Whether to draw curves.png at each evaluation and whenever training ends."""
    images: bool = True
    """Whether to draw train_batch.jpg, the first batch as the network sees it, and at each evaluation val_images.jpg:
    eight val images with their annotations and with what is detected."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate that get every number of metrics.jsonl too: tensorboard, wandb, mlflow, comet_ml, ..."""
    progress_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Seconds between lines of progress where there is no terminal."""


class NameVariationConfig(Config):
    """What a training step calls the names, and what else it asks for, so that other words are understood later."""

    synonyms: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How often a name is called by one of the `synonyms` that its dataset gives for it."""
    noise: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Length of the noise on a name's embedding, whose own length is 1."""
    absent: Count = 8
    """Words that a step is asked for besides, from what datasets list as `absent`, so that it learns to say no."""


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
    pretrained_backbone: Fraction = 0.0
    """Where training begins with a detector: how much of the backbone's weights are those of its own pretraining
    (ImageNet's), 0 to 1; the rest are the detector's. 1 puts them back whole, as may pay on few images of new
    things."""
    pseudo_labels: PseudoLabelConfig = PseudoLabelConfig()
    """Thresholds of `unannotated: pseudo_label`."""
    names: NameVariationConfig = NameVariationConfig()
    """Other words for names."""
    parallel: Parallel = "ddp"
    """What each of several processes keeps: `ddp`, the whole network; `fsdp`, a part of every weight, gradient and
    moment of the optimizer, for networks that are too large otherwise. A single process keeps everything."""
    loop: LoopConfig = LoopConfig()
    """How long, on what, and how often something is written."""

    @model_validator(mode="after")
    def _is_not_both_compiled_and_sharded(self) -> "TrainConfig":
        if self.loop.compile and self.parallel == "fsdp":
            raise ValueError("loop.compile makes one graph of each part, which parallel fsdp gathers block by block")
        return self


Size = Literal["nano", "small", "base", "vit"]
SIZES: tuple[Size, ...] = ("nano", "small", "base", "vit")


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


class TrainOptions(SubsetConfig):
    """What a command asks of a run besides its configuration. `seed` also seeds training, if it is given."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training images of all datasets together, in place of a number of steps."""
    allow_empty: bool = False
    """Whether splits without a box are used, and splits of which most boxes or images were lost while reading."""


def load_recipe(
    size: str = "nano",
    config: str | Path | RunConfig | None = None,
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration of a run. With another number of steps than the size's, see `laid_over`.

    Args:
        size: Whose recipe is the beginning: "nano", "small", "base" or "vit".
        config: Laid over it: a YAML file, or a whole configuration, which replaces the recipe.
        overrides: Laid over that: `["section.key=value", ...]`.
        changes: Laid over that: a nested mapping.

    Raises:
        ConfigError: the size or a key is unknown, or a value is of the wrong kind.
    """
    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r}", where="--size", hint=did_you_mean(size, SIZES))
    base, layers, origin = packaged(size), [parse_overrides(overrides), changes or {}], f"recipe {size}"
    if isinstance(config, RunConfig):
        base, origin = config.model_dump(mode="json"), f"{origin} with a RunConfig"
    elif config is not None:
        layers, origin = [read_yaml(Path(config)), *layers], f"{origin} with {config}"
    return laid_over(base, layers, where=origin + (" and --set" if overrides else ""))


def laid_over(base: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], *, where: object = None) -> RunConfig:
    """A recipe with layers laid over it; warm-up, average and intervals follow the number of steps.

    If the layers change the number of steps, each of `train.schedule.warmup_steps`, `train.ema.decay`,
    `train.ema.tau`, `train.loop.evaluate_every` and `train.loop.checkpoint_every` that they do not set keeps the share
    of the run that it has in the recipe. A short run logs more often than the recipe, 50 times in all. Checkpoints are
    never further apart than in the recipe, because a longer run should not lose more to a crash, and at least 20 steps
    apart; evaluations at least 10. A length that is asked for is trained to its end: `train.loop.patience` is then 0,
    unless the layers set it.

    Raises:
        ConfigError: a key is unknown, a value is of the wrong kind, or a setting has no effect beside others.
    """
    given = merge({}, *layers)
    config = RunConfig.checked(merge(base, given), where=where)
    recipe = RunConfig.checked(base, where=where)
    check_settings(layers, config, recipe, where=where)
    if config.train.loop.steps == recipe.train.loop.steps:
        return config
    own = leaves(given)
    following = {key: value for key, value in _scaled(recipe.train, config.train.loop.steps).items() if key not in own}
    return RunConfig.checked(merge(base, unflattened(following), given), where=where)


def check_settings(
    layers: Sequence[Mapping[str, Any]], config: RunConfig, before: RunConfig, *, where: object = None
) -> None:
    """Checks that what layers change has an effect.

    Args:
        layers: What a user sets; later ones win. One that has all sections is stored, as config.yaml of a run.
        config: The configuration with them.
        before: The configuration without them.
        where: What the message is about.

    Raises:
        ConfigError: a setting has none beside others.
    """
    stored = [layer for layer in layers if layer.keys() >= RunConfig.model_fields.keys()]
    own = [layer for layer in layers if layer not in stored]
    anyway = [*(one.model_dump(mode="json") for one in (before, RunConfig())), *map(dict, stored)]
    check_effects(own, config.model_dump(mode="json"), anyway=anyway, where=where)


_APART, _EVALUATED_APART = 20, 10  # steps between checkpoints, and between evaluations, at least
_LOGGED = 50  # lines of metrics.jsonl that a short run has


def _scaled(train: TrainConfig, steps: int) -> Tree:
    """What follows the number of steps, by dotted key, for another number than that of `train`."""
    schedule, ema, loop = train.schedule, train.ema, train.loop
    factor = steps / loop.steps

    def share(number: int) -> int:
        return max(1, round(number * factor)) if number else 0

    covered = max(1.0, factor / (1 - ema.decay)) if ema.decay else 1.0  # steps that the average covers
    return {
        "train.schedule.warmup_steps": share(schedule.warmup_steps),
        "train.ema.decay": round(1 - 1 / covered, max(6, math.ceil(math.log10(covered)) + 2)),
        "train.ema.tau": float(f"{ema.tau * factor:.3g}"),
        "train.loop.evaluate_every": max(share(loop.evaluate_every), min(_EVALUATED_APART, loop.evaluate_every)),
        "train.loop.patience": 0,
        "train.loop.log_every": max(1, min(loop.log_every, steps // _LOGGED)),
        "train.loop.checkpoint_every": min(max(share(loop.checkpoint_every), _APART), loop.checkpoint_every),
    }


def averaged_over(train: TrainConfig) -> str:
    """Over how many steps the weights are averaged at the end of a run, in words: its decay is warmed up, too."""
    if not train.ema.enabled:
        return "not"
    decay = train.ema.decay * (1 - math.exp(-train.loop.steps / train.ema.tau))
    return f"over about {counted(max(1, round(1 / (1 - decay))), 'step')}"


def check_epochs(epochs: float | None, overrides: Sequence[str]) -> None:
    """Checks that not both epochs and steps are asked for.

    Raises:
        ConfigError: both are.
    """
    if epochs is not None and "train.loop.steps" in leaves(parse_overrides(overrides)):
        what = "steps and epochs exclude each other"
        raise ConfigError(what, where="--epochs", hint="give one of --epochs and --steps (train.loop.steps)")


def check_rehearsal(fraction: float | None, rehearsed: Sequence[str]) -> None:
    """Checks that a fraction of the samples is asked for only where something is rehearsed.

    Args:
        fraction: What is asked for; None asks for nothing.
        rehearsed: The old datasets that are mixed into training.

    Raises:
        ConfigError: nothing is.
    """
    if fraction is not None and not rehearsed:
        what = f"{fraction:g} of the images would come from old datasets, but nothing is rehearsed"
        hint = "--rehearse DATA mixes an old dataset in; or leave the fraction out"
        raise ConfigError(what, where="--rehearse-fraction", hint=hint)


def finetune_layers(file: Path | None = None, overrides: Sequence[str] = ()) -> tuple[list[Tree], str]:
    """What a user lays over the defaults of fine-tuning, and how messages call it. See `recipe_layers`."""
    return recipe_layers("fine-tuning", file, overrides)


def recipe_layers(what: str, config: str | Path | RunConfig | None, overrides: Sequence[str]) -> tuple[list[Tree], str]:
    """What a user lays over defaults that follow a detector, and how messages call it.

    Keys and kinds of values are checked, as far as that can be told without the detector.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong kind.
    """
    own = config.model_dump(mode="json") if isinstance(config, RunConfig) else None
    given = [] if config is None else [read_yaml(Path(config)) if own is None else own]  # type: ignore[arg-type]
    layers = [*given, parse_overrides(overrides)]
    where = what + ("" if config is None or own else f" with {config}") + (" and --set" if overrides else "")
    RunConfig.check_keys(merge({}, *layers), where=where)
    return layers, where


def packaged(name: str) -> Tree:
    """A recipe that comes with METR, as plain values."""
    text = (resources.files("metr") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    tree: Tree = load_yaml(text)
    return tree


def changed_lines(recipe: RunConfig, config: RunConfig) -> list[str]:
    """`key: recipe's value -> value` of every setting that differs from the recipe."""
    return [f"{key}: {short(old)} -> {short(new)}" for key, old, new in differences(recipe, config)]


def short(value: object) -> str:
    """A value in YAML, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
