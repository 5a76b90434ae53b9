"""What a run folder keeps of the command that began it, so that resuming needs no more than the folder."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metr.config import Tree, differences
from metr.data.datasets_file import DatasetConfig, DatasetSource, parse_data_arguments
from metr.data.hub_datasets.address import same_dataset
from metr.data.shards.addresses import is_address, is_pattern
from metr.errors import ConfigError, DataError, counted
from metr.run_directory import COUNTERS, RunDirectory, existing_folder, explained_disk_errors, replaced_file
from metr.serialization import read_json, write_json

DATASETS, REHEARSED, EVALUATED = "datasets.yaml", "rehearsed.yaml", "evaluated.yaml"
"""The files of the run folder that list its datasets, rehearsed ones and those that are only evaluated."""
TRAINING, FINETUNING = "training.json", "finetuning.json"
"""The files of the run folder that say what was asked for, by `metr train` and by `metr finetune`."""
_VERBS = {TRAINING: "metr train", FINETUNING: "metr finetune"}
_HEAD = "# Datasets of this run. The file may itself be given as DATA. If a folder is moved, change its path here.\n"
_logger = logging.getLogger(__name__)


def save_request(run: RunDirectory, name: str, request: Tree, listings: Mapping[str, Sequence[DatasetSource]]) -> None:
    """Writes what was asked for (JSON) and the datasets (YAML), each file whole or not at all.

    Args:
        run: The run folder; made if it is missing.
        name: The file of the request.
        request: What was asked for; plain values.
        listings: The datasets of each listing, by file name; an empty listing has no file.

    Raises:
        CheckpointError: the disk refuses.
    """
    with explained_disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        for file, sources in listings.items():
            if not sources:
                (run.path / file).unlink(missing_ok=True)  # of an earlier run that came to nothing
                continue
            entries = [_entry(source.config) for source in sources]
            text = _HEAD + yaml.safe_dump({"datasets": entries}, sort_keys=False, allow_unicode=True)
            with replaced_file(run.path / file, flush=True) as fresh:
                fresh.write_text(text, encoding="utf-8")
        with replaced_file(run.path / name, flush=True) as fresh:
            write_json(fresh, request)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a run has done so far: its steps, and the images that these saw."""

    steps: int = 0
    images: int = 0


NOTHING = Made()


def made_so_far(run: RunDirectory) -> Made:
    """What a run to resume has done; nothing where no state is saved.

    Raises:
        CheckpointError: the state is damaged.
    """
    path = existing_folder(run.state) / COUNTERS
    if not path.is_file():
        return NOTHING
    counters = read_json(path)
    return Made(steps=int(counters.get("step", 0)), images=int(counters.get("images", 0)))


def kept_request(run: RunDirectory, name: str) -> Tree:
    """What was asked for when the run was begun; empty if it was not kept.

    Raises:
        ConfigError: the other command began the run.
    """
    path = run.path / name
    if path.is_file():
        return read_json(path)
    for verb in (verb for file, verb in _VERBS.items() if (run.path / file).is_file()):
        hint = f"{verb} --resume -o {run.path}"
        raise ConfigError(
            f"the run was begun with {verb}, and {_VERBS[name]} cannot go on with it", where=run.path, hint=hint
        )
    return {}


def kept_datasets(run: RunDirectory, given: Sequence[str], file: str = DATASETS) -> list[str]:
    """The datasets of a run to resume, as arguments of a command: those that it was begun with.

    Args:
        run: The run folder.
        given: Datasets that are given again, as arguments of a command; may be empty.
        file: The listing in the run folder.

    Raises:
        ConfigError: other datasets are given than the run's, or none are given and the run keeps none.
    """
    listing = run.path / file
    if not (run.path / DATASETS).is_file():  # lost, or never written: all has to be given again
        if not given and file == DATASETS:
            hint = "give the datasets that it was begun with"
            raise ConfigError("the run does not say which datasets it was begun with", where=listing, hint=hint)
        return list(given)
    kept = [str(listing)] if listing.is_file() else []
    if kept and not given:
        _check_there(listing)
    before, now = (parse_data_arguments(each) if each else () for each in (kept, given))
    if given and (other := _differing(before, now)):
        hint = f"give no datasets to go on with the run's; if a folder was moved, change its path in {listing}"
        raise ConfigError(f"the run was begun with other datasets: {'; '.join(other)}", where=run.path, hint=hint)
    return kept


def _check_there(listing: Path) -> None:
    """Checks that the datasets of a run to resume are where they were.

    Raises:
        DataError: one is not.
    """
    for config in parse_data_arguments([str(listing)]):
        if not is_address(config.path) and not is_pattern(config.path) and not Path(config.path).exists():
            hint = f"if it was moved, change its path in {listing}"
            raise DataError(f"the dataset {config.name} of this run is no longer here", where=config.path, hint=hint)


def dataset_facts(sources: Sequence[DatasetSource]) -> Tree:
    """What a resumed run compares of each dataset: the version of its index, and the images of each split."""
    return {
        source.name: {
            "version": next((split.path.parent.name for split in source.splits.values()), ""),
            "images": {name: len(split) for name, split in source.splits.items()},
        }
        for source in sources
    }


def log_changed_datasets(began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warns of each dataset that is new, gone, or has other files than when the run was begun or last resumed."""
    if began and (gone := [name for name in began if name not in now]):
        _logger.warning("datasets of the run that are not there any more: %s", ", ".join(gone))
    for name, facts in now.items():
        before = began.get(name)
        if began and before is None:
            _logger.warning("%s: the run was begun without this dataset", name)
        if before is None or before == facts:
            continue
        old, new = before.get("images"), facts["images"]
        counts = "as many images as before"
        if old != new:
            counts = ", ".join(f"{split} {counted(number, 'image')}" for split, number in (old or {}).items())
            counts += ", now " + ", ".join(f"{split} {number}" for split, number in new.items())
        _logger.warning("%s: its files have changed since the run was here last (%s)", name, counts)


def check_same_request(run: RunDirectory, began: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Checks that what is asked for again is what the run was begun with.

    Raises:
        ConfigError: it is something else.
    """
    changed = [key for key in given if key in began and began[key] != given[key]]
    if changed:
        before = {key: f"no {key}" if began[key] is None else f"{key} {began[key]!r}" for key in changed}
        differing = ", ".join(f"{before[key]}, now {given[key]!r}" for key in changed)
        hint = "give the same as at first or leave it out, or start a new run"
        raise ConfigError(f"the run was begun with {differing}", where=run.path, hint=hint)


def check_apart(run: RunDirectory, given: Sequence[str]) -> None:
    """Checks that a new run is not written into the folder of one of its datasets.

    Args:
        run: The run folder.
        given: Its datasets, as arguments of a command.

    Raises:
        MetrError: it would be, or a datasets file does not fit.
    """
    for config in parse_data_arguments(given) if given else ():
        if not is_address(config.path) and run.path.resolve() == Path(config.path).resolve():
            hint = "name another folder for the run after -o"
            raise ConfigError(f"this is the dataset {config.name}, not a folder for a run", where=run.path, hint=hint)


def _entry(config: DatasetConfig) -> Tree:
    """A dataset as an entry of a datasets file."""
    entry = _located(config).model_dump(mode="json", exclude_defaults=True)
    return {"name": config.name, **entry}


def _located(config: DatasetConfig) -> DatasetConfig:
    """The same with an absolute path; an address is one."""
    if is_address(config.path):
        return config
    return config.model_copy(update={"path": Path(os.path.abspath(config.path))})  # noqa: PTH100 (keeps links)


def _differing(began: Sequence[DatasetConfig], given: Sequence[DatasetConfig]) -> list[str]:
    """What differs between two lists of datasets, in words. Their order does not count."""
    before, now = ({config.name: _located(config) for config in configs} for configs in (began, given))
    found = [f"{name} ({before[name].path}) is not given" for name in before.keys() - now.keys()]
    found += [f"{name} ({now[name].path}) is new" for name in now.keys() - before.keys()]
    for name in before.keys() & now.keys():
        again = now[name]
        if same_dataset(before[name].path, again.path):
            again = again.model_copy(update={"path": before[name].path})
        changes = differences(before[name], again)
        found += [f"{name}: {key} {old!r}, now {new!r}" for key, old, new in changes]
    return sorted(found)
