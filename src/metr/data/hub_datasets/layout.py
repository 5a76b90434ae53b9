"""What a dataset's repository holds: its configurations, their splits, and the files of these, by their names alone."""

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from metr.data.containers.features import configs_of
from metr.data.containers.huggingface import is_table_name
from metr.data.containers.shards import shards_by_split
from metr.data.formats.files import is_image
from metr.data.formats.imagefolder import METADATA_NAMES, NAMES_OF_NUMBERS
from metr.data.hub_datasets.address import HUB_PREFIX, HubAddress
from metr.data.records import canonical_split
from metr.errors import DataError, did_you_mean

__all__ = ["Chosen", "choose"]

Splits = Mapping[str, tuple[str, ...]]
_COPIES = "refs/convert/parquet"
_ARCHIVES = (".tar", ".zip", ".gz", ".bz2", ".xz", ".7z", ".rar", ".tgz")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The files of a repository that an address means.

    Attributes:
        kind: `tables`: Parquet or Arrow, mostly with the images inside; `imagefolder`: metadata and images.
        config: The configuration.
        splits: The names of files by split.
        beside: Of tables, images that these may name; of an imagefolder, files that name numbered categories.
    """

    kind: Literal["tables", "imagefolder"]
    config: str
    splits: Splits
    beside: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all splits, each once."""
        return tuple(dict.fromkeys(name for names in self.splits.values() for name in names))


def choose(address: HubAddress, names: Sequence[str], card: Mapping[str, Any]) -> Chosen:
    """The files that an address means.

    Args:
        address: The address.
        names: All files of the repository.
        card: The header of its card.

    Raises:
        DataError: the repository has no files that METR reads, no such configuration or split, or several
            configurations of which none is named.
    """
    called = {name: posixpath.basename(name) for name in names}
    tables = sorted(name for name in names if is_table_name(called[name]))
    images = tuple(name for name in names if is_image(name))
    metadata = tuple(name for name in names if called[name] in METADATA_NAMES)
    if not tables and not metadata:
        raise _nothing_read(address, names)
    configs = _configs(tables, card) if tables else {"default": _by_split([*metadata, *images])}
    config, split = _one_config(address, configs)
    splits = configs[config]
    if tables:
        splits = splits if split is None else _one_split(address, split, splits)
        return Chosen(kind="tables", config=config, splits=splits, beside=images)
    if split is not None:
        splits = {name: files for name, files in splits.items() if set(files) & set(metadata)}
        if list(splits) == ["all"]:
            what = f"its metadata lists the images of all splits, so {split!r} cannot be fetched alone"
            hint = "leave the split out, and choose by `splits` in a datasets file"
            raise DataError(what, where=address, hint=hint)
        splits = _one_split(address, split, splits)
    beside = tuple(name for name in names if called[name] in NAMES_OF_NUMBERS)
    return Chosen(kind="imagefolder", config=config, splits=splits, beside=beside)


def _configs(tables: Sequence[str], card: Mapping[str, Any]) -> dict[str, Splits]:
    """The configurations of tables: as the card says, as the hub's own copies lie (CONFIG/SPLIT/0000.parquet), or one.

    One that the card does not name is called "default".
    """
    described = configs_of(card, tables)
    if described:
        return {name or "default": splits for name, splits in described.items()}
    folders = dict(_folders(tables))
    if len(folders) == len(tables) and len(set(folders.values())) > 1:
        groups = {config: [name for name in tables if folders[name] == config] for config in folders.values()}
        return {config: _by_split(own) for config, own in groups.items()}
    return {"default": _by_split(tables)}


def _folders(tables: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The tables that lie as CONFIG/SPLIT/0000.parquet, with CONFIG."""
    for name in tables:
        parts = name.split("/")
        if len(parts) == 3 and canonical_split(parts[0]) is None and canonical_split(parts[1]) is not None:
            yield name, parts[0]


def _by_split(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    groups = shards_by_split([Path(name) for name in names], Path())
    return {split: tuple(path.as_posix() for path in paths) for split, paths in groups.items()}


def _one_config(address: HubAddress, configs: Mapping[str, Splits]) -> tuple[str, str | None]:
    """The configuration that an address means, and the split.

    Raises:
        DataError: there is no such configuration, or there are several and none is named.
    """
    only = next(iter(configs)) if len(configs) == 1 or "default" in configs else None
    only = "default" if "default" in configs else only
    if address.config is None:
        if only is None:
            listed = ", ".join(sorted(configs))
            hint = f"name one: {HUB_PREFIX}{address.repository}/{min(configs)}"
            raise DataError(f"several datasets (configurations): {listed}", where=address, hint=hint)
        return only, None
    if address.config in configs:
        return address.config, address.split
    if address.split is None and only is not None and _own_split(address.config, configs[only]) is not None:
        return only, address.config  # hf:user/name/train
    if address.config == "default" and only is not None:
        return only, address.split
    known = [*configs, *(configs[only] if only is not None and address.split is None else ())]
    what = f"no configuration {'or split ' if address.split is None else ''}{address.config!r} in this repository"
    raise DataError(what, where=address, hint=did_you_mean(address.config, known))


def _one_split(address: HubAddress, split: str, splits: Splits) -> Splits:
    """The one split that is asked for.

    Raises:
        DataError: there is no such split.
    """
    own = _own_split(split, splits)
    if own is None:
        raise DataError(f"no split {split!r} in this dataset", where=address, hint=did_you_mean(split, splits))
    return {own: splits[own]}


def _own_split(split: str, splits: Splits) -> str | None:
    """The split that a name means, by the dataset's own name or by METR's; None where it means none."""
    meant = [own for own in splits if own == split] or [own for own in splits if canonical_split(own) == split]
    return meant[0] if meant else None


def _nothing_read(address: HubAddress, names: Sequence[str]) -> DataError:
    """Why nothing in a repository can be read, and what to try."""
    read = "Parquet or Arrow files, or images with metadata.jsonl, .csv or .parquet"
    copy = f"the hub may keep a copy in Parquet: {replace(address, revision=_COPIES)}"
    by_hand = f"hf download {address.repository} --repo-type dataset --local-dir FOLDER, then name FOLDER"
    scripts = [name for name in names if "/" not in name and name.endswith(".py")]
    packed = [name for name in names if name.lower().endswith(_ARCHIVES)]
    tars = [name for name in packed if name.endswith(".tar")]
    if scripts:
        what = f"it has only a loading script ({scripts[0]}), which METR never runs"
        return DataError(f"{what}; read are {read}", where=address, hint=copy)
    if tars:
        pattern = f"hf://datasets/{address.repository}/{posixpath.dirname(tars[0])}/*.tar".replace("//*", "/*")
        return DataError(f"its data are tars; read are {read}", where=address, hint=f"{pattern}, if it is a WebDataset")
    what = f"its data are archives ({packed[0]})" if packed else "it holds no dataset that METR reads from the hub"
    return DataError(f"{what}; read are {read}", where=address, hint=by_hand if names else "check the name")
