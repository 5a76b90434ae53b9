"""Which files a URL or a path with braces and globs means, and what their stores say of them."""

import hashlib
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec

from metr.data.formats.files import expanded, signature, there
from metr.data.hub_datasets.address import is_hub_dataset
from metr.data.records import canonical_split
from metr.data.regular_files import is_hidden
from metr.data.shards.refusals import bucket_of, is_denied
from metr.data.shards.stores import WEB, NoRangesError, StoredFile, filesystem, is_url, read_range, scheme, tried
from metr.errors import DataError, StoreError

# Patterns may name so many files at most.
_MOST = 100_000
_REQUESTS_AT_ONCE = 16
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)$")
# What stores call the marks of a file's content, or the time of its last change.
_MARKS = (
    *("etag", "ETag", "md5Hash", "Content-MD5", "Digest", "generation", "blob_id", "version_id"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "created"),
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The files that a pattern means, in their order, and addresses that it spells out where there is no file."""

    files: tuple[StoredFile, ...]
    missing: tuple[str, ...] = field(default=())


def is_pattern(path: str | Path) -> bool:
    """Whether a path means files by braces or a glob: `train-{000..127}.tar`, `*.parquet`."""
    return re.search(r"\{.*\}|[*?\[]", str(path)) is not None


def is_address(path: object) -> bool:
    """Whether this is a URL or a dataset on the Hugging Face hub, and no path of this machine."""
    return is_url(path) or is_hub_dataset(path)


def path_or_address(path: Path | str) -> Path | str:
    """A path as a `Path`, an address as it is written."""
    return path if is_address(path) else Path(path)


def name_of_pattern(path: str) -> str:
    """The name of a dataset of shards: the last folder before the first brace or glob that is not called like a split.

    The shards themselves give it where there is no such folder.
    """
    path = path.partition("://")[2] if is_url(path) else path
    folders = [part for part in path.split("/")[:-1] if part]
    plain = [part for part in folders if not is_pattern(part) and canonical_split(part) is None]
    return plain[-1] if plain else re.split(r"[-_.{*?\[]", path.rpartition("/")[2], maxsplit=1)[0] or "shards"


def find_files(pattern: str | Path, suffixes: Sequence[str]) -> Found:
    """The files that a URL or path means, which may have braces and globs; of a folder those with one of `suffixes`.

    Raises:
        DataError: it means no file, or too many.
        DependencyError: the package for this kind of store is not installed.
        StoreError: the store does not answer.
    """
    files: dict[str, StoredFile] = {}
    spelt: list[str] = []
    for one in islice(_braces_expanded(_plain(pattern)), _MOST + 1):
        if _is_glob(one):
            files |= _described(one, _globbed(one))
        else:
            spelt.append(one)
    if len(spelt) + len(files) > _MOST:
        raise DataError(f"more than {_MOST:,} files", where=pattern, hint="look at the numbers in the braces")
    missing = []
    for one, found in _spelt_out(spelt).items():
        if found is None:
            missing.append(one)
        elif found.size >= 0:
            files[one] = found
        else:
            files |= _described(one, (entry for entry in _listed(one) if str(entry["name"]).endswith(tuple(suffixes))))
    if not files:
        raise _nothing_there(pattern, missing)
    return Found(files=tuple(files[address] for address in sorted(files)), missing=tuple(missing))


def _nothing_there(pattern: str | Path, missing: Sequence[str]) -> DataError:
    """Why a pattern means no file: there is no bucket, or nothing in it fits.

    Raises:
        StoreError: what is there may not be listed, which a glob passes over in silence.
    """
    what = f"no file is there; the first that was looked for: {missing[0]}" if missing else "no file fits"
    hint = "check the address, and that you may list what is there"
    bucket = bucket_of(first := next(_braces_expanded(_plain(pattern))))
    if bucket is not None:
        folder = re.split(r"[*?\[]", first, maxsplit=1)[0].rpartition("/")[0]
        files, _ = filesystem(first)
        if not _listed(folder) and not tried(first, lambda: files.exists(bucket)):
            what, hint = (
                f"there is no bucket {bucket!r} that these credentials may see",
                "check its name and the endpoint",
            )
    return DataError(what, where=pattern, hint=hint)


def read_small(address: str, most: int) -> bytes:
    """The first bytes of a file that need not be there; none where it is not."""
    with_size = _spelt_out([address])[address]
    if with_size is None or with_size.size <= 0:
        return b""
    try:
        return read_range(address, 0, min(most, with_size.size))
    except NoRangesError:
        return b""


def base_of(addresses: Sequence[str]) -> str:
    """The folder that files have in common, with the slash at its end."""
    folders = [address.rpartition("/")[0] + "/" for address in addresses]
    first, last = min(folders), max(folders)
    differs = next(
        (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(min(first, last))
    )
    return first[: first.rfind("/", 0, differs) + 1]


def _plain(pattern: str | Path) -> str:
    """An address, with a local one as an absolute path."""
    text = str(pattern)
    if text.startswith("pipe:"):
        hint = "name the files themselves, such as s3://bucket/train-{000..127}.tar"
        raise DataError("a command whose output would be read, which is not done", where=text, hint=hint)
    if not text.lower().startswith(("file://", "local://")):
        return text if is_url(text) else os.path.abspath(expanded(text))  # noqa: PTH100
    return os.path.abspath(text.partition("://")[2])  # noqa: PTH100


def _braces_expanded(pattern: str) -> Iterator[str]:
    """The addresses that `{000..127}` and `{a,b}` stand for; braces may stand in braces."""
    start = pattern.find("{")
    depth, commas, end = 0, [start], -1
    for place in range(max(0, start), len(pattern)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if depth == 1 and pattern[place] == ",":
            commas.append(place)
        if depth == 0:
            end = place
            break
    if end < 0:
        yield pattern
        return
    inner, rest = pattern[start + 1 : end], pattern[end + 1 :]
    numbers = _NUMBERS.match(inner)
    if numbers is not None:
        first, last, width = int(numbers[1]), int(numbers[2]), len(numbers[1]) if numbers[1].startswith("0") else 0
        options: Iterable[str] = (f"{number:0{width}d}" for number in range(first, last + 1))
    else:
        ends = [*commas[1:], end]
        options = [part for a, b in zip(commas, ends, strict=True) for part in _braces_expanded(pattern[a + 1 : b])]
    for option in options:
        for tail in _braces_expanded(rest):
            yield f"{pattern[:start]}{option}{tail}"


def _is_glob(address: str) -> bool:
    return scheme(address) not in WEB and re.search(r"[*?\[]", address) is not None


def _globbed(pattern: str) -> Iterable[Mapping[str, Any]]:
    if not is_url(pattern):
        names: list[str] = fsspec.filesystem("file").glob(pattern)
        return [{"name": name} for name in names if there(Path(name), Path.is_file)]
    files, path = filesystem(pattern)
    files.invalidate_cache()
    try:
        found: Mapping[str, Mapping[str, Any]] = tried(pattern, lambda: files.glob(path, detail=True))
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    return [{**info, "name": name} for name, info in found.items() if info.get("type") != "directory"]


def _listed(folder: str) -> list[Mapping[str, Any]]:
    """The files right in a folder; none where it is not there."""
    if not is_url(folder):
        entries = sorted(Path(folder).iterdir()) if there(Path(folder), Path.is_dir) else []
        return [{"name": str(entry)} for entry in entries if there(entry, Path.is_file)]
    files, path = filesystem(folder)
    files.invalidate_cache()
    try:
        found: list[Mapping[str, Any]] = tried(folder, lambda: files.ls(path, detail=True))
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    return [info for info in found if info.get("type") != "directory"]


def _listed_if_allowed(folder: str) -> list[Mapping[str, Any]] | None:
    """The files right in a folder; None where they may not be listed, which says nothing of reading them."""
    try:
        return _listed(folder)
    except StoreError as error:
        if error.__cause__ is not None and is_denied(error.__cause__):
            return None
        raise


def _described(asked: str, entries: Iterable[Mapping[str, Any]]) -> dict[str, StoredFile]:
    """Files but hidden ones by their addresses, from what the store says of each."""
    found = {}
    for info in entries:
        name = str(info["name"])
        if is_hidden(posixpath.basename(name)):
            continue
        address = name if not is_url(asked) or is_url(name) else f"{scheme(asked)}://{name.lstrip('/')}"
        found[address] = _local(address) if not is_url(asked) else _stored(address, info)
    return found


def _spelt_out(addresses: Sequence[str]) -> dict[str, StoredFile | None]:
    """What is at each address: a file, a folder (of size -1), or nothing (None).

    Of several addresses in one folder the folder is listed: that is one request in place of many.
    """
    found: dict[str, StoredFile | None] = {}
    folders: dict[str, list[str]] = {}
    for address in addresses:
        if is_url(address):
            folders.setdefault(posixpath.dirname(address), []).append(address)
        else:
            found[address] = _local(address) if there(Path(address)) else None
    for folder, inside in folders.items():
        if len(inside) > 1 and scheme(folder) not in WEB and (entries := _listed_if_allowed(folder)) is not None:
            known = _described(folder, entries)
            found |= {address: known.get(address) for address in inside}
            continue
        filesystem(inside[0])
        with ThreadPoolExecutor(min(len(inside), _REQUESTS_AT_ONCE)) as pool:
            found |= zip(inside, pool.map(_asked, inside), strict=True)
    return {address: found[address] for address in addresses}


def _asked(address: str) -> StoredFile | None:
    files, path = filesystem(address)
    files.invalidate_cache()
    try:
        return _stored(address, tried(address, lambda: files.info(path)))
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _local(path: str) -> StoredFile:
    if there(Path(path), Path.is_dir):
        return StoredFile(path, -1, "")
    size, *times = signature(Path(path))
    return StoredFile(path, size, _digest(times))


def _stored(address: str, info: Mapping[str, Any]) -> StoredFile:
    if info.get("type") == "directory":
        return StoredFile(address, -1, "")
    size = info.get("size")
    if not isinstance(size, int):
        raise StoreError("the server does not tell how large it is", where=address, hint="copy it to another store")
    return StoredFile(address, size, _digest({key: str(info[key]) for key in _MARKS if info.get(key) is not None}))


def _digest(values: object) -> str:
    return hashlib.sha256(ascii(values).encode()).hexdigest()[:24]
