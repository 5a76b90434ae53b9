"""What a joint training is made of: data, configuration and the detector that it begins with, new or to resume."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from metr.checkpoint import CONFIG, load_checkpoint
from metr.config import Tree
from metr.data.config import SubsetConfig
from metr.data.datasets_file import DatasetSource
from metr.data.guard import log_issues
from metr.data.joint import JointData, open_joint
from metr.errors import ConfigError
from metr.model import METR
from metr.run_directory import RunDirectory, existing_folder
from metr.text.same_names import listed
from metr.text.vocabulary import Vocabulary
from metr.training.config import RunConfig, check_epochs, load_recipe
from metr.training.logger import check_trackers
from metr.training.plan import RunPlan, steps_of
from metr.training.resumed_recipe import resumed_recipe
from metr.training.resumption import (
    TRAINING,
    check_same_request,
    dataset_facts,
    kept_datasets,
    kept_request,
    log_changed_datasets,
    made_so_far,
)
from metr.training.start import (
    JointOptions,
    Start,
    begin_with,
    check_kept,
    check_same_text,
    open_detector,
    pinned,
    pretrained_weights,
    start_recipe,
)
from metr.training.taken_names import Renames

Data = str | Path | Sequence[str | Path]
"""One dataset or several, as arguments of a command: a folder, name=folder, or a YAML file that lists some."""


REQUEST = TRAINING
"""The file of the run folder that says what was asked for, besides the configuration and the datasets."""
KEEPS = "training that begins with a detector", "leave --from out, which makes a network of any shape"
"""What keeps the network of a detector to begin with, and what to do about it, for messages."""
_KEEPS_TEXT = KEEPS[0], "leave --from out, which takes any text encoder"
"""What keeps a network, and what to do about it."""
_FROM = "from"
# what a command may ask again or otherwise when a run is resumed
_NO_DATA = {"epochs", "allow_empty", "start", "same_names", "prompts"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a command asks of the configuration; `size` is None where it names none."""

    config: str | Path | RunConfig | None
    size: str | None
    overrides: tuple[str, ...]
    options: JointOptions

    @property
    def given(self) -> Tree:
        """What of the request is given explicitly."""
        size = {} if self.size is None else {"size": self.size}
        return size | self.options.model_dump(include=self.options.model_fields_set - _NO_DATA)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data, also as arguments of a command, and plan of a run.

    `request` is what is kept of what was asked for, `start` the detector that the run begins with, if there is one.
    """

    data: list[str]
    plan: RunPlan
    request: Tree
    start: Start | None = None

    @property
    def given(self) -> Sequence[DatasetSource]:
        """The datasets as they were given, before names were taken as others."""
        return self.plan.joint.sources if self.start is None else self.start.given


def options_of(values: Mapping[str, Any]) -> JointOptions:
    """What a command asks besides the configuration, from keywords of which some may be None.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong kind.
    """
    given = {key: str(value) if key == "start" else value for key, value in values.items() if value is not None}
    return JointOptions.checked(given, where="train")


def prepared(data: Data | None, asked: Asked, run: RunDirectory, resume: bool, console: Console) -> Prepared:
    """What a run is made of, which is new or resumed.

    Args:
        data: The datasets; None resumes with the run's.
        asked: What is asked for.
        run: The run folder.
        resume: Whether the run there goes on.
        console: Where to ask which names mean the same.

    Raises:
        MetrError: something does not fit; the message says what and where.
    """
    return (_resumed if resume else _begun)(data, asked, run, console)


def _begun(data: Data | None, asked: Asked, run: RunDirectory, console: Console) -> Prepared:
    """Opens the detector to begin with and the datasets of a new run, and puts its configuration together."""
    options, size = asked.options, asked.size or "nano"
    seed = [f"train.loop.seed={options.seed}"] if "seed" in options.model_fields_set else []
    check_epochs(options.epochs, asked.overrides)
    _check_goes_with_a_start(options)
    model = None if options.start is None else _opened_start(options.start, run, asked)

    def resolve(config: str | Path | RunConfig | None = None, more: Sequence[str] = ()) -> RunConfig:
        return load_recipe(size, config, more) if model is None else start_recipe(model.checkpoint, config, more)

    given, overrides = arguments(data), [*seed, *asked.overrides]
    check_recipe(recipe := resolve(asked.config, overrides))
    if model is None:
        check_fresh(recipe)
    else:
        check_kept(model, recipe.model, *KEEPS)
        if recipe.train.pretrained_backbone:
            pretrained_weights(
                model.network.backbone, recipe.model.backbone.revision
            )  # refused before anything is done
        check_same_text(model, recipe.text, *_KEEPS_TEXT)
    joint, start = _opened(given, options, options, model, console)
    if not options.allow_empty:
        joint.check_usable()
    log_issues(joint.sources)
    recipe = resolve(asked.config, [*overrides, *steps_of(options.epochs, sum(joint.lengths.values()), recipe)])
    asked_for = options.model_dump(mode="json", include={"shots", "fraction", "seed", "allow_empty"})
    begun = {"size": size} if start is None else _kept_of(start, options)
    request = {**begun, **asked_for, "datasets": dataset_facts(joint.sources)}
    base, name = resolve(), f"the recipe {size}" if model is None else "the recipe start"
    plan = RunPlan(joint=joint, recipe=recipe, base=base, name=name)
    return Prepared(data=given, plan=plan, request=request, start=start)


def _resumed(data: Data | None, asked: Asked, run: RunDirectory, console: Console) -> Prepared:
    """Opens the datasets of a run to resume; its configuration changes only where that is asked for."""

    def resolve(more: Sequence[str]) -> tuple[RunConfig, RunConfig]:
        return resumed_recipe(run, asked.config, [*asked.overrides, *more])

    check_epochs(asked.options.epochs, asked.overrides)
    began, recipe = resolve([])
    check_recipe(recipe)
    request = kept_request(run, REQUEST)
    check_same_request(run, request, asked.given)
    if asked.options.start is not None and request and _FROM not in request:
        hint = "leave --from out, or start a new run in another folder"
        raise ConfigError("the run was begun with no detector, now --from names one", where=run.path, hint=hint)
    chosen = {key: value for key, value in (request or asked.given).items() if key in SubsetConfig.model_fields}
    subset = SubsetConfig.checked(chosen, where=run.path / REQUEST)
    given, source = kept_datasets(run, arguments(data)), asked.options.start or request.get(_FROM)
    model = None if source is None else open_detector(source, run)
    if model is not None:
        check_same_text(model, recipe.text, *_KEEPS_TEXT)
    options = asked.options.model_copy(update={"prompts": request.get("prompts")})
    joint, start = _opened(given, subset, options, model, console, request.get("same_names", {}))
    allow_empty = asked.options.allow_empty or request.get("allow_empty", False)
    if not allow_empty:
        joint.check_usable()
    log_issues(joint.sources)
    made = made_so_far(run)
    _, recipe = resolve(steps_of(asked.options.epochs, sum(joint.lengths.values()), recipe, made))
    facts = dataset_facts(joint.sources)
    log_changed_datasets(request.get("datasets", {}), facts)
    check_same(run, joint.vocabulary)
    begun = {} if start is None else _kept_of(start, options)
    request = {**request, **begun, "datasets": facts, "allow_empty": allow_empty}
    plan = RunPlan(joint=joint, recipe=recipe, base=began, name="the run's recipe", made=made)
    return Prepared(data=given, plan=plan, request=request, start=start)


def _check_goes_with_a_start(options: JointOptions) -> None:
    """Checks that nothing is asked about the names of a detector to begin with where there is none.

    Raises:
        ConfigError: something is.
    """
    for key in ("same_names", "prompts") if options.start is None else ():
        if getattr(options, key) is not None:
            what = "is about the names of a detector to begin with, and none is named"
            raise ConfigError(what, where=f"--{key.replace('_', '-')}", hint="--from SOURCE, or leave it out")


def _opened_start(source: str, run: RunDirectory, asked: Asked) -> METR:
    """The detector that a new run begins with.

    Raises:
        ConfigError: a size is asked for, too.
    """
    if asked.size is not None:
        what = f"{source} has a size of its own: network and images are those of the detector to begin with"
        raise ConfigError(what, where="--size", hint="give one of --size and --from")
    return open_detector(source, run)


def _opened(
    given: Sequence[str],
    subset: SubsetConfig,
    options: JointOptions,
    model: METR | None,
    console: Console,
    kept: Renames | None = None,
) -> tuple[JointData, Start | None]:
    """The datasets; with the names of the detector that the run begins with, where there is one."""
    if model is None:
        return open_joint(given, subset), None
    start = begin_with(model, open_joint(given), subset, options, console, kept)
    return start.joint, start


def _kept_of(start: Start, options: JointOptions) -> Tree:
    """What a run folder keeps of the detector that the run begins with."""
    return {_FROM: pinned(start.model, options.start), "same_names": start.taken, "prompts": options.prompts}


def arguments(data: Data | None) -> list[str]:
    """The datasets as a list of command-line arguments."""
    if data is None:
        return []
    return [str(data)] if isinstance(data, str | Path) else [str(one) for one in data]


def check_recipe(recipe: RunConfig) -> None:
    """Checks that pseudo-labels have an average of the weights, and that trackers are installed.

    Raises:
        ConfigError: pseudo-labels are asked for without an average of the weights, or a tracker is not installed.
    """
    check_trackers(recipe.train.loop.trackers)
    if recipe.unannotated == "pseudo_label" and not recipe.train.ema.enabled:
        what = "pseudo-labels come from the average of the weights, which is off"
        raise ConfigError(what, where="unannotated", hint="set train.ema.enabled=true, or unannotated=ignore")


def check_fresh(recipe: RunConfig) -> None:
    """Checks that the configuration of a new network asks for nothing of a detector to begin with.

    Raises:
        ConfigError: it does.
    """
    if recipe.train.pretrained_backbone:
        what = "is about the backbone of a detector to begin with, and none is named"
        hint = "--from SOURCE, or train.pretrained_backbone=0: a new backbone is pretrained anyway (model.backbone)"
        raise ConfigError(what, where="train.pretrained_backbone", hint=hint)


def check_same(run: RunDirectory, vocabulary: Vocabulary, text_encoder: Mapping[str, Any] | None = None) -> None:
    """Checks that a resumed run has the vocabulary that it began with and, if given, the text encoder.

    Raises:
        ConfigError: one of them differs.
    """
    if not (existing_folder(run.last) / CONFIG).is_file():
        return
    began = load_checkpoint(run.last)
    hint = "resume with the datasets and the text encoder that it began with, or start a new run"
    if began.vocabulary != vocabulary:
        before, now = set(began.vocabulary.names), set(vocabulary.names)
        lost, new = listed(sorted(before - now)) or "none", listed(sorted(now - before)) or "none"
        what = f"the run has other datasets, names or prompts; names only there: {lost}; only here: {new}"
        raise ConfigError(what, where=run.path, hint=hint)
    if text_encoder is None:
        return
    before_encoder, encoder = (one.get("identity") for one in (began.text_encoder, text_encoder))
    if before_encoder != encoder:
        raise ConfigError(f"the run has the text encoder {before_encoder}, not {encoder}", where=run.path, hint=hint)
