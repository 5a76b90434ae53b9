"""The configuration of a run to resume: what may change is laid over it, and what may not is refused.

All of this is found without torch, without the datasets and without the hub.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metr.config import Tree, leaves, merge, parse_overrides, read_yaml, unflattened
from metr.errors import ConfigError
from metr.run_directory import RunDirectory, existing_folder
from metr.text.config import BUNDLED, TextEncoderConfig
from metr.training.config import RunConfig, check_settings, short

SETTINGS = "settings.json"
"""The file of a saved state that holds the configuration of its steps, by dotted key."""
# where the text encoder lies may change: whether it is the same one is found when it is opened
_MOVES = {"text.source", "text.revision"}
_BEGUN_WITH = "train.pretrained_backbone"  # what decides the first weights
_FROZEN = ("none", "half", "backbone", "encoder")  # from little to much
_ELSEWHERE = "start a new run in another folder"


def resumed_recipe(
    run: RunDirectory, config: str | Path | RunConfig | None = None, overrides: Sequence[str] = ()
) -> tuple[RunConfig, RunConfig]:
    """The configuration of the steps that a run has made, and the one that it goes on with.

    Only what is given now changes. Nothing else follows a changed number of steps.

    Args:
        run: The run folder.
        config: Laid over its config.yaml: a YAML file, or a whole configuration.
        overrides: Laid over both: `["section.key=value", ...]`.

    Raises:
        ConfigError: nothing is saved there, the run's config.yaml is missing or damaged, a key is unknown, a value is
            of the wrong kind, or the network, its trained part or the text encoder would be another one.
    """
    if not run.resumable:
        if run.taken:
            what = "there is nothing to resume yet: another process trains in this folder and has saved nothing so far"
            raise ConfigError(what, where=run.path, hint="wait for it; Ctrl-C there saves, and ends it")
        hint = "leave --resume out to begin a run here, or check the folder after -o"
        raise ConfigError("there is nothing to resume: this folder holds no saved state", where=run.path, hint=hint)
    if not run.config.is_file():
        hint = "put the config.yaml of the run back, or start a new run in another folder"
        raise ConfigError("the run to resume has no configuration", where=run.config, hint=hint)
    began = RunConfig.checked(read_yaml(run.config), where=run.config)
    layers = [parse_overrides(overrides)]
    if config is not None:
        own = config.model_dump(mode="json") if isinstance(config, RunConfig) else read_yaml(Path(config))
        layers = [own, *layers]
    where = f"{run.config}" + (f" with {config}" if isinstance(config, str | Path) else "")
    where += " and --set" if overrides else ""
    recipe = RunConfig.checked(merge(began.model_dump(mode="json"), *layers), where=where)
    check_settings(layers, recipe, began, where=where)
    saved = _kept_json(existing_folder(run.state) / SETTINGS) or leaves(began.model_dump(mode="json"))
    _check_structure(run, saved, leaves(recipe.model_dump(mode="json")), leaves(merge({}, *layers)))
    _check_text_source(run, saved, recipe.text)
    return _as_saved(began, saved), recipe


def _as_saved(began: RunConfig, saved: Tree) -> RunConfig:
    """The configuration of the saved steps: config.yaml may have been changed by hand since."""
    own = began.model_dump(mode="json")
    known = {key: value for key, value in saved.items() if key in leaves(own)}
    try:
        return RunConfig.checked(merge(own, unflattened(known)))
    except ConfigError:  # of a version with other values
        return began


def _check_structure(run: RunDirectory, saved: Tree, now: Tree, given: Tree) -> None:
    """Checks that network, text encoder and trained parts are those of the saved steps.

    A key that only one version of METR knows is no difference.

    Args:
        run: The run folder.
        saved: The configuration of the saved steps, by dotted key.
        now: The one to go on with.
        given: What of it is given now, by `--set` or a file, rather than kept in config.yaml.

    Raises:
        ConfigError: they are not.
    """
    saved = {_BEGUN_WITH: 0.0, **saved}  # what it is where it is not known
    changed = [key for key in now if key in saved and saved[key] != now[key] and _is_structural(key, saved, now)]
    if not changed:
        return
    found = "; ".join(f"{key} {short(saved[key])}, now {short(now[key])}" for key in changed)
    what = f"a resumed run keeps its network and its text encoder, and what it began with: it was begun with {found}"
    back = "leave these settings out" if set(changed) & given.keys() else f"put the first value back in {run.config}"
    raise ConfigError(what, where=run.path, hint=f"{back}, or {_ELSEWHERE}")


def _is_structural(key: str, saved: Tree, now: Tree) -> bool:
    """Whether a changed key asks for weights or for an optimizer that the saved state does not have."""
    if key == "train.ema.enabled":  # an average may be given up, but not begun
        return bool(now[key])
    if key == "train.freeze":  # more may be trained, but not less
        return saved[key] in _FROZEN and _FROZEN.index(now[key]) > _FROZEN.index(saved[key])
    return key.startswith(("model.", "text.", _BEGUN_WITH)) and key not in _MOVES


def _check_text_source(run: RunDirectory, saved: Tree, text: TextEncoderConfig) -> None:
    """Checks that the text encoder can be the run's, as far as its place tells.

    A folder may have moved, but no folder becomes a name on the hub, and a name on the hub stays as it is. Whether a
    folder or a bundled model is the run's is found when it is opened.

    Raises:
        ConfigError: it cannot be.
    """
    encoder = _kept_json(existing_folder(run.last) / "config.json").get("text_encoder", {})
    identity = str(encoder.get("identity", "")) if isinstance(encoder, Mapping) else ""
    if not identity or text.source.startswith("bundled:") or Path(text.source).expanduser().is_dir():
        return
    before, commit = saved.get("text.source", text.source), identity.partition(" commit:")[2].partition(" ")[0]
    if not commit:
        known = "the bundled one" if before == BUNDLED else f"the folder {before}"
        found = "which is not there" if text.source == before else f"found {text.source}, which is no folder here"
        hint = "if the folder was moved, --set text.source=FOLDER" if before != BUNDLED else "leave text.source out"
        what = f"a resumed run keeps its text encoder: expected {known}, {found}"
        raise ConfigError(what, where="text.source", hint=f"{hint}; or {_ELSEWHERE}")
    for key, expected, given in (
        ("text.source", (before,), text.source),
        ("text.revision", (saved.get("text.revision"), commit), text.revision),
    ):
        if given not in expected:
            what = f"a resumed run keeps its text encoder: expected {before} at commit {commit}, found {given}"
            raise ConfigError(what, where=key, hint=f"leave {key} out, or {_ELSEWHERE}")


def _kept_json(path: Path) -> dict[str, Any]:
    """A mapping in JSON; empty where it cannot be read, of which those tell who need it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
