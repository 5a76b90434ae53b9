"""Training that begins with a detector: which one, its network as it was, its names before those of the data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from metr.checkpoint import Checkpoint, DetectionDefaults
from metr.config import Tree, differences, merge
from metr.data.config import SubsetConfig
from metr.data.datasets_file import DatasetSource
from metr.data.joint import JointData, chosen_parts, vocabulary_of
from metr.errors import CheckpointError, ConfigError, MetrError, counted
from metr.fitting import Hanging
from metr.model import METR
from metr.models.backbones import Backbone, build_backbone
from metr.models.config import DetectorConfig
from metr.models.detector import Detector, skeleton
from metr.run_directory import RunDirectory
from metr.serialization import check_weights, load_weights
from metr.text.config import TextEncoderConfig
from metr.text.encoder import TextEncoder
from metr.text.same_names import PromptChoice, listed, with_trained_prompts
from metr.text.vocabulary import Vocabulary
from metr.training.config import RunConfig, TrainOptions, packaged, recipe_layers
from metr.training.finetune_recipe import RECIPE, laid_over_start, plainly, restored, settings_of
from metr.training.run_log import tell
from metr.training.taken_names import NameChoice, Renames, aliases_of, taken_names

# where the backbone's pretrained weights came from: changing these does not change the network
_ORIGINS = {"backbone.pretrained", "backbone.revision"}
# the key of what a text encoder is, beside where it lies
_IDENTITY = "identity"
# how a network is taught, which is not what it is
_TEACHING = {"decoder.look_forward"}
# so many images were seen to gain by ImageNet's backbone
_FEW_IMAGES = 250
# the setting that gives a backbone its own pretraining back
_RESTORED = "train.pretrained_backbone"
# what the weights were trained with, though other values would leave their shapes as they are
_TRAINED_WITH = (
    "backbone.name",
    "backbone.options",
    "backbone.pixel_mean",
    "backbone.pixel_std",
    "backbone.strides",
    "categories.heads",
    "categories.prior",
    "categories.self_attention",
    "categories.whitening",
    "decoder.",
    "encoder.",
    "queries.content",
    "similarity.form",
)


class JointOptions(TrainOptions):
    """What a command asks of a joint training besides its configuration."""

    start: str | None = None
    """The detector to begin with, as `METR.from_pretrained` takes it; none begins with the backbone's weights alone."""
    same_names: NameChoice | None = None
    """Whether names that seem to mean one of the start's, as `Person` and `person`, are taken as that name; by default
    `ask`."""
    prompts: PromptChoice | None = None
    """What becomes of a prompt for a name that the start was trained on without it: `trained` (the default) leaves it
    out; `given` uses it."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A detector to begin with, and the data with its names.

    Attributes:
        model: The detector, on the CPU.
        joint: The data. The vocabulary is the detector's, then the new names.
        taken: By dataset, names that were taken as one of the detector's.
        given: The datasets as they were given, before names were taken as others.
        resumed: Whether a run goes on that began with the detector.
    """

    model: METR
    joint: JointData
    taken: Renames
    given: tuple[DatasetSource, ...]
    resumed: bool = False

    @property
    def detection(self) -> DetectionDefaults:
        """What is detected by default: all names, those of the detector and those of the data."""
        presence = presence_is_taught(self.model.checkpoint, self.joint)
        return DetectionDefaults(
            presence=presence,
            aliases=aliases_of(self.taken, self.model.checkpoint.detection.aliases, self.joint.vocabulary),
        )


def open_detector(source: str | Path | None, run: RunDirectory) -> METR:
    """The detector that a run begins with, on the CPU.

    Raises:
        MetrError: none is named, it is the run itself, or it cannot be loaded.
    """
    if source is None:
        raise ConfigError("no detector to begin with is named", where="--from", hint="--from RUN")
    if Path(source).resolve() == run.path.resolve():
        what, hint = "a run cannot begin with itself", "--from the run that it began with, or another -o"
        raise ConfigError(what, where=run.path, hint=hint)
    return METR.from_pretrained(source, device="cpu")


def with_text_encoder(model: METR, text: TextEncoderConfig) -> METR:
    """The same detector with a text encoder that may lie elsewhere; whether it is the same is found when it is used."""
    own = model.checkpoint
    encoder = text.model_dump(mode="json") | {
        key: own.text_encoder[key] for key in (_IDENTITY,) if key in own.text_encoder
    }
    moved = METR(model.network, replace(own, text_encoder=encoder))
    moved.source = model.source
    return moved


def pinned(model: METR, source: str | Path | None) -> str:
    """What finds the same detector again: an absolute path, or a commit of the hub."""
    return str(source) if model.source is None else model.source.pinned


def begin_with(
    model: METR, opened: JointData, subset: SubsetConfig, options: JointOptions, console: Console, kept: Renames | None
) -> Start:
    """The data of a joint training with the names of the detector that it begins with.

    Args:
        model: The detector.
        opened: The datasets, whole, as they were given.
        subset: Which part of their training images is used.
        options: What becomes of names that seem to mean one of the detector's, and of prompts.
        console: Where to ask.
        kept: What a resumed run began with.
    """
    given = opened.sources
    taken = taken_names(given, len(given), model, options.same_names or "ask", console, kept)
    sources = tuple(source.renamed(taken.get(source.name, {})) for source in given)
    names = vocabulary_of(sources)
    if options.prompts != "given":
        names = with_trained_prompts(names, model.vocabulary)
    chosen = {} if subset.whole else chosen_parts(sources, subset)
    joint = JointData(sources=sources, vocabulary=model.vocabulary.extended(names), chosen=chosen)
    return Start(model=model, joint=joint, taken=taken, given=given, resumed=kept is not None)


def start_recipe(
    checkpoint: Checkpoint, config: str | Path | RunConfig | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """The configuration of a joint training that begins with a detector.

    Later layers win: the packaged recipe `start`, the detector's own settings, `config`, `section.key=value` overrides.
    Warm-up, average and intervals follow the number of steps (`laid_over`).

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong kind.
    """
    layers, where = recipe_layers("training that begins with a detector", config, overrides)
    return laid_over_start(merge(packaged("start"), settings_of(checkpoint)), layers, where)


def kept_network(model: METR, config: DetectorConfig, doing: str, way_out: str) -> Detector:
    """The detector's network, with its weights.

    Args:
        model: The detector.
        config: The network that the run's configuration describes.
        doing: What keeps the network, for messages.
        way_out: What else may be tried, for messages.

    Raises:
        ConfigError: the configuration describes another network.
    """
    check_kept(model, config, doing, way_out)
    bare = config.model_copy(update={"backbone": config.backbone.model_copy(update={"pretrained": False})})
    network = Detector(bare, model.checkpoint.text_width)
    load_weights(network, model.network.state_dict())
    return network


def restore_backbone(network: Detector, share: float) -> None:
    """Moves the backbone's weights towards those of its own pretraining, mostly ImageNet's.

    A long training on some datasets takes the backbone away from what it knew of other images. Two networks with one
    beginning can be mixed weight by weight (Wortsman et al., 2022: "Robust fine-tuning of zero-shot models", who mix
    after fine-tuning).

    Args:
        network: Its backbone is changed in place.
        share: The part of the pretrained weights, 0 to 1; 0 leaves the backbone as it is.

    Raises:
        ConfigError: the backbone has no pretrained weights of its own, or they cannot be had.
    """
    if not share:
        return
    own = pretrained_weights(network.backbone, network.backbone.config.revision)
    with torch.no_grad():
        for key, value in network.backbone.pretrained_part.state_dict().items():
            if value.is_floating_point():
                value.lerp_(own[key], share)


def advised_backbone(model: METR, joint: JointData, recipe: RunConfig) -> str:
    """Whether ImageNet's weights in the backbone are worth a try on these data, in words; empty where it is not known.

    They were for new things on some ten to two hundred images (docs/results/fields.md).

    Args:
        model: The detector.
        joint: All that is trained on, with the detector's names where names were taken as them.
        recipe: The configuration.
    """
    backbone, known = model.checkpoint.model.backbone, set(model.names)
    bundled = backbone.name == "efficientnet_lite0" and not backbone.options
    few = sum(joint.lengths.values()) <= _FEW_IMAGES
    new = known.isdisjoint(name for source in joint.sources for name in source.categories)
    if recipe.train.pretrained_backbone or not (bundled and few and new):
        return ""
    return (
        "advice: the checkpoint knows none of these names. If they are new things to it, too, --pretrained-backbone 1 "
        "is worth a try: it begins with ImageNet's backbone and the rest of the checkpoint, and forgets more old names"
    )


def pretrained_weights(backbone: Backbone, revision: str | None) -> dict[str, Tensor]:
    """The weights of a backbone's own pretraining, by the keys of its `pretrained_part`.

    Args:
        backbone: The backbone.
        revision: Which of them, of the hub.

    Raises:
        ConfigError: it has none, or they cannot be had.
    """
    try:
        with torch.random.fork_rng(devices=()):
            config = backbone.config.model_copy(update={"pretrained": True, "revision": revision})
            part = build_backbone(config).pretrained_part
        weights: dict[str, Tensor] = part.state_dict()
        check_weights(backbone.pretrained_part, weights)
    except MetrError as error:
        what = f"the pretrained weights of the backbone {backbone.config.name} cannot be had: {error.what}"
        hint = f"{_RESTORED}=0, which begins with the detector's own weights"
        raise ConfigError(what, where=_RESTORED, hint=hint) from None
    return weights


def check_kept(model: METR, config: DetectorConfig, doing: str, way_out: str) -> None:
    """Checks that a configuration describes the detector's network, without building it.

    Raises:
        ConfigError: it describes another one; the message names the keys.
    """
    changed = [one for one in differences(model.checkpoint.model, config) if one[0] not in _ORIGINS | _TEACHING]
    try:
        check_weights(skeleton(config, model.checkpoint.text_width), model.network.state_dict())
        changed, why = [one for one in changed if _contradicts(*one)], ""
    except CheckpointError as error:
        why = f": {error.what}"
    if changed or why:
        settings = [f"model.{key}={new} (the checkpoint's: {old})" for key, old, new in changed]
        what = (
            f"{doing} keeps the checkpoint's network, which {', '.join(settings) or 'this configuration'} would change"
        )
        raise ConfigError(what + why, where="model", hint=f"leave these settings as they are, or {way_out}")


def check_same_text(model: METR, text: TextEncoderConfig, doing: str, way_out: str) -> None:
    """Checks that a configuration describes the detector's text encoder, which may lie elsewhere.

    Args:
        model: The detector.
        text: The text encoder that the run's configuration describes.
        doing: What keeps the text encoder, for messages.
        way_out: What else may be tried, for messages.

    Raises:
        ConfigError: it describes another one, or one that is not there.
    """
    described = {key: value for key, value in model.checkpoint.text_encoder.items() if key != _IDENTITY}
    changed, why = differences(TextEncoderConfig.checked(described), text), ""
    if not changed:
        return
    try:
        found, expected = TextEncoder(text).identity, model.checkpoint.text_encoder.get(_IDENTITY)
        if expected in {None, found}:
            return
        why = f"expected {expected}, found {found}"
    except MetrError as error:
        why = str(error.what)
    settings = ", ".join(f"text.{key}={new} (the checkpoint's: {old})" for key, old, new in changed)
    what = f"{doing} keeps the checkpoint's text encoder, which {settings} would change: {why}"
    raise ConfigError(what, where="text", hint=f"leave these settings as they are, or {way_out}")


def history(own: Checkpoint) -> Tree:
    """What a new checkpoint tells of the one that its training began with."""
    return {key: value for key, value in own.training.items() if key != RECIPE}


def described_start(model: METR, recipe: RunConfig) -> str:
    """What of a detector a joint training begins with, in a line."""
    resize, optimizer = model.resize, recipe.train.optimizer
    shape = f"{resize.size} x {resize.size}" if resize.mode == "stretch" else f"{resize.size} to {resize.longest}"
    rate, multiplier = plainly(optimizer.learning_rate), optimizer.backbone_multiplier
    changed = f" ({restored(recipe)})" if recipe.train.pretrained_backbone else ""
    return (
        f"begins with {title(model)}: {shape}, {counted(len(model.names), 'name')} kept; its own network{changed} and "
        f"normalisation; rate {rate} (backbone x {multiplier:g}), batches of {recipe.loader.batch_size}"
    )


def title(model: METR) -> str:
    """What a detector is, and where it was found."""
    training = model.checkpoint.training
    if "started from" in training and "step" not in training:
        return str(training["started from"])
    return "METR" if model.source is None else f"METR ({model.source.called})"


def _contradicts(key: str, old: object, new: object) -> bool:
    """Whether a setting is not what the weights were trained with, though they would fit."""
    return key.startswith(_TRAINED_WITH) or (key == "queries.layout" and "places" in {old, new})


def presence_is_taught(own: Checkpoint, joint: JointData) -> bool:
    """Whether every name's presence is taught: by the training of the detector to begin with, or by these data."""
    return own.detection.presence or bool(joint.covered_names.all())


def forgotten(model: METR, joint: JointData, way_out: str) -> str:
    """How many names of the detector are in no training data, and what to do about it, in words; empty if all are."""
    trained = {name for source in joint.sources for name in source.categories}
    lost = [name for name in model.names if name not in trained]
    if not lost:
        return ""
    known, are = counted(len(model.names), "name"), "is" if len(lost) == 1 else "are"
    note = f"{len(lost):,} of the checkpoint's {known} {are} in none of this data: detection may find less of "
    return f"{note}{'it' if are == 'is' else 'them'} afterwards; {way_out}."


def say_new_names(model: METR, vocabulary: Vocabulary, console: Console) -> None:
    """Prints the names that the detector does not know, each with the nearest ones that it knows."""
    if new := model.untrained(vocabulary):
        tell(console, Hanging(f"learnt as new names: {listed(new)}"))
