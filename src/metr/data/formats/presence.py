"""Whether datasets are there, as far as a look at their paths tells: before torch is imported, which takes seconds."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from metr.bounded_yaml import load_yaml_file
from metr.data.formats.files import expanded, glance, there
from metr.data.hub_datasets.address import HubAddress, is_hub_dataset
from metr.errors import DataError, did_you_mean

LISTS = frozenset({".yaml", ".yml"})
"""Suffixes of datasets files."""
# Addresses in stores, commands, and patterns: what these mean is found out by asking, later.
_ASKED_LATER = re.compile(r"[a-z][a-z0-9+.-]+://|pipe:|.*(\{.*\}|[*?\[])", re.IGNORECASE)


def check_datasets_there(arguments: Iterable[str], *, listed: bool = True) -> None:
    """Checks that the paths exist that a command line names as datasets: `path` or `name=path`.

    Args:
        arguments: The datasets of a command line.
        listed: Whether to look for the paths too that datasets files list. A file that is no such list says nothing.

    Raises:
        ConfigError: the address of a dataset on the hub is none.
        DataError: a path does not exist.
    """
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        named = equals and name and not re.search(r"[\\/]", name) and not there(expanded(argument))
        _check_there(rest if named else argument, Path())
        file = expanded(argument)
        if listed and file.suffix.lower() in LISTS and there(file, Path.is_file):
            for path in _listed(file):
                _check_there(path, file.parent)


def _check_there(path: str, base: Path) -> None:
    """Checks one path, which is relative to `base`.

    Raises:
        ConfigError: the address of a dataset on the hub is none.
        DataError: it does not exist.
    """
    if is_hub_dataset(path):
        HubAddress.parsed(path)
    elif not _ASKED_LATER.match(path) and not there(full := base / expanded(path)):
        raise no_such_dataset(Path(os.path.abspath(full)))  # noqa: PTH100  (as the reader names it)


def _listed(file: Path) -> Iterator[str]:
    """The paths in a datasets file. What is wrong with the file itself is told where it is read."""
    try:
        values = load_yaml_file(file)
    except (yaml.YAMLError, OSError):
        return
    entries = values.get("datasets") if isinstance(values, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        path = entry.get("path") if isinstance(entry, dict) else entry
        if isinstance(path, str) and path.strip() and "\0" not in path:
            yield path if isinstance(entry, dict) else _without_name(path)


def _without_name(entry: str) -> str:
    """The path of an entry `path` or `name=path`; an address may have equals signs of its own."""
    if is_hub_dataset(entry) or _ASKED_LATER.match(entry):
        return entry
    after = entry.partition("=")[2]
    return after if is_hub_dataset(after) or _ASKED_LATER.match(after) else entry.rpartition("=")[2]


def no_such_dataset(path: Path) -> DataError:
    """The error of a path that is not there, with the entry beside it that is called nearly so."""
    near = did_you_mean(path.name, [entry.name for entry in glance(path.parent)])
    return DataError("no such dataset", where=path, hint=near if near.startswith("did") else "check the path")
