"""Whether datasets are there, as far as a look at their paths tells: before torch is imported, which takes seconds."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from metr.data.formats.files import expanded, glance, there
from metr.data.hub_datasets.address import HubAddress, is_hub_dataset
from metr.errors import DataError, did_you_mean

# Addresses in stores, commands, and patterns: what these mean is found out by asking, later.
_ASKED_LATER = re.compile(r"[a-z][a-z0-9+.-]+://|pipe:|.*(\{.*\}|[*?\[])", re.IGNORECASE)


def check_datasets_there(arguments: Iterable[str]) -> None:
    """Checks that the paths exist that a command line names as datasets: `path` or `name=path`.

    What a datasets file lists is not looked for.

    Raises:
        ConfigError: the address of a dataset on the hub is none.
        DataError: a path does not exist.
    """
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        named = equals and name and not re.search(r"[\\/]", name) and not there(expanded(argument))
        path = rest if named else argument
        if is_hub_dataset(path):
            HubAddress.parsed(path)
            continue
        if not there(expanded(path)) and not _ASKED_LATER.match(path):
            raise no_such_dataset(Path(os.path.abspath(expanded(path))))  # noqa: PTH100  (as the reader names it)


def no_such_dataset(path: Path) -> DataError:
    """The error of a path that is not there, with the entry beside it that is called nearly so."""
    near = did_you_mean(path.name, [entry.name for entry in glance(path.parent)])
    return DataError("no such dataset", where=path, hint=near if near.startswith("did") else "check the path")
