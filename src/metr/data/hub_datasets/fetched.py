"""The files of a dataset on the hub: fetched once, all of one commit, and laid out as a folder of their own.

They stay where the hub's library keeps them. METR's cache gets a folder of links to those that an address means, so
that other configurations, and what else of the repository was fetched, are no part of the dataset.
"""

import glob
import hashlib
import logging
import posixpath
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from metr.data.containers.features import card_values
from metr.data.containers.huggingface import names_files
from metr.data.containers.store import shown_size
from metr.data.formats.imagefolder import METADATA_NAMES, ImageFolderReader
from metr.data.hub_datasets.address import HubAddress
from metr.data.hub_datasets.layout import Chosen, choose
from metr.errors import DataError, StoreError, counted, quiet_log
from metr.hub import fetch, listed_sizes
from metr.text.cache import cache_root

__all__ = ["HubDataset", "fetch_dataset"]

_logger = logging.getLogger(__name__)
_CARD = "README.md"
# what tells of a dataset; the first is in nearly all repositories
_ABOUT = (".gitattributes", _CARD, "dataset_info.json", "LICENSE", "LICENSE.txt", "LICENSE.md")
_BOXES = "name a repository or a configuration with boxes for each image (objects, bbox, category)"
# So many files are named one by one; of more, patterns are.
_NAMED = 100
_fetched: dict[str, Path] = {}


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A dataset of the hub that is here: its address at the commit that was found, and the folder with its files."""

    address: HubAddress
    folder: Path


def fetch_dataset(address: HubAddress) -> HubDataset:
    """Fetches a dataset's tables, or its metadata and images; nothing else, and no code is run.

    Files that are here are not fetched again. Where the hub is not to be asked, or cannot be, they suffice.

    Raises:
        DataError: there is no such repository, revision, configuration or split, its owner has not granted access, it
            has no annotations that METR reads, or the disk refuses.
        StoreError: the hub cannot be reached, or the files are not here and nothing is to be fetched.
    """
    known = _fetched.get(str(address))
    if known is not None and address.is_pinned and known.is_dir():
        return HubDataset(address=address, folder=known)
    with quiet_log("huggingface_hub"):
        snapshot = fetch(address.repository, _ABOUT, revision=address.revision, kind="dataset")
        pinned = address.pinned(snapshot.name)
        sizes = _sizes(pinned, snapshot)
        chosen = choose(pinned, list(sizes), card_values(snapshot))
        wanted = _annotated_files(pinned, chosen, snapshot, sizes)
        _fetch(pinned, wanted, snapshot, sizes)
    about = [name for name in _ABOUT[1:] if (snapshot / name).is_file()]
    folder = _folder_of_links(pinned, chosen, [*wanted, *about], snapshot)
    _fetched[str(pinned)] = folder
    return HubDataset(address=pinned, folder=folder)


def _sizes(pinned: HubAddress, snapshot: Path) -> dict[str, int]:
    """The files of a commit with their bytes: as the hub lists them, or did once; else those that are here."""
    note = cache_root() / "hub" / pinned.repository.replace("/", "--") / f"{pinned.revision}.json"
    try:
        return msgspec.json.decode(note.read_bytes(), type=dict[str, int])
    except (OSError, msgspec.MsgspecError) as error:
        _logger.debug("%s is not there, or damaged: %s", note, error)
    try:
        listed = listed_sizes(pinned.repository, str(pinned.revision))
        sizes = {name: size for name, size in listed.items() if _is_inside(name)}
    except StoreError:
        here = (path for path in snapshot.rglob("*") if path.is_file())
        return {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in here}
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        building = note.with_name(f".{note.name}-{secrets.token_hex(4)}")
        building.write_bytes(msgspec.json.encode(sizes))
        building.replace(note)
    except OSError as error:
        _logger.debug("%s cannot be written: %s", note, error)  # it is asked for again
    return sizes


def _is_inside(name: str) -> bool:
    """Whether a name leads to a file in its repository, and not out of it."""
    return not name.startswith("/") and "\\" not in name and ".." not in name.split("/")


def _annotated_files(pinned: HubAddress, chosen: Chosen, snapshot: Path, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The files that make the dataset. Only the smallest table, or the metadata, is fetched, to see what is in it.

    Raises:
        DataError: there are no images with boxes in it.
    """
    if chosen.kind == "tables":
        first = min(chosen.files, key=lambda name: (sizes[name], name))
        _fetch(pinned, [first], snapshot, sizes, quietly=True)
        try:
            return (*chosen.files, *(chosen.beside if names_files(snapshot / first) else ()))
        except DataError as error:
            raise DataError(error.what, where=f"{pinned}: {first}", hint=_BOXES) from None
    metadata = [name for name in chosen.files if posixpath.basename(name) in METADATA_NAMES]
    _fetch(pinned, metadata, snapshot, sizes, quietly=True)
    if ImageFolderReader.recognise(snapshot) is None:
        what = f"no boxes in its metadata ({metadata[0]}), which has no column `objects`"
        raise DataError(what, where=pinned, hint=_BOXES)
    return (*chosen.files, *chosen.beside)


def _fetch(
    pinned: HubAddress, names: Iterable[str], snapshot: Path, sizes: Mapping[str, int], *, quietly: bool = False
) -> None:
    """Fetches those files of a commit that are not here.

    Raises:
        DataError, StoreError: the hub refuses or cannot be reached.
    """
    lacking = [name for name in names if not (snapshot / name).is_file()]
    if not lacking:
        return
    if not quietly:
        size = shown_size(sum(sizes[name] for name in lacking))
        _logger.info("%s: fetching %s (%s) from the hub", pinned, counted(len(lacking), "file"), size)
    patterns = sorted({glob.escape(name) if len(lacking) <= _NAMED else _pattern(name) for name in lacking})
    fetch(pinned.repository, patterns, revision=pinned.revision, kind="dataset")
    if lost := next((name for name in lacking if not (snapshot / name).is_file()), None):
        what = f"{lost} is not among what was fetched before"
        raise StoreError(
            what, where=pinned, hint="leave --offline and HF_HUB_OFFLINE out once, or check the connection"
        )


def _pattern(name: str) -> str:
    """A pattern that fits a file, and others that are called alike: there must not be as many as there are files."""
    folder, base = posixpath.split(name)
    stem, suffix = posixpath.splitext(base)
    if suffix in {".parquet", ".arrow"} or base in METADATA_NAMES:
        return re.sub(r"\d", "[0-9]", glob.escape(name))
    return f"{glob.escape(folder)}{'/' if folder else ''}*{glob.escape(suffix)}" if stem else glob.escape(name)


def _folder_of_links(pinned: HubAddress, chosen: Chosen, names: Iterable[str], snapshot: Path) -> Path:
    """A folder in METR's cache with links to files of a commit, and with a card that names its splits.

    Raises:
        DataError: it cannot be written.
    """
    names = sorted(names)
    digest = hashlib.sha256(repr((chosen.config, sorted(chosen.splits.items()), names)).encode()).hexdigest()[:12]
    called = f"{pinned.repository.replace('/', '--')}-{str(pinned.revision)[:12]}-{digest}"
    folder = cache_root() / "hub" / called
    if folder.is_dir():
        return folder
    building = folder.with_name(f".{called}-{secrets.token_hex(4)}")
    try:
        for name in names:
            place = building / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if name == _CARD and chosen.kind == "tables":
                continue
            try:
                place.symlink_to(snapshot / name)
            except OSError:  # this file system has no links
                shutil.copyfile(snapshot / name, place)
        if chosen.kind == "tables":
            (building / _CARD).write_text(_card(chosen, snapshot / _CARD), encoding="utf-8")
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():  # no other process was faster
                raise
    except OSError as error:
        hint = "name a folder on a disk with room in METR_CACHE"
        raise DataError(f"cannot be written into {folder.parent}: {error}", where=pinned, hint=hint) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _card(chosen: Chosen, original: Path) -> str:
    """The card of the one configuration: its splits, and its names of categories among those of all."""
    text = original.read_text(encoding="utf-8", errors="replace") if original.is_file() else ""
    values = card_values(original.parent)
    infos = values.get("dataset_info")
    if isinstance(infos, list):
        own = [one for one in infos if isinstance(one, dict) and one.get("config_name") == chosen.config]
        values = {**values, "dataset_info": own or infos}
    files = [{"split": split, "path": list(names)} for split, names in chosen.splits.items()]
    header: dict[str, Any] = {**values, "configs": [{"config_name": chosen.config, "data_files": files}]}
    body = re.sub(r"\A---\s*\n.*?\n---", "", text, count=1, flags=re.DOTALL)
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n{body}"
