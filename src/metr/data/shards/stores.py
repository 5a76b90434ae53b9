"""Files on this disk and in stores far away, through fsspec: ranges of their bytes.

An address is a URL such as `s3://bucket/train-000000.tar`, or the absolute path of a local file. Stores fail now and
then, so each request has a time limit and is tried a few times. What still fails is a `StoreError` that names the file.
"""

import io
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from metr.data.regular_files import open_regular
from metr.data.shards.refusals import check_endpoint, is_final, what_to_try
from metr.errors import DataError, DependencyError, MetrError, StoreError

# Seconds that one request may take, and the pauses before the next attempts.
TIMEOUT = 60.0
PAUSES = (0.5, 2.0, 8.0)
# Bytes of one request where a file is read from its start to its end.
BLOCK = 8 << 20
# A slower transfer of a whole file than this, in bytes a second, counts as no answer.
_SLOWEST = 1 << 20

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
WEB = frozenset({"http", "https"})
# Stores that answer at once, in the thread that asks.
_AT_HAND = frozenset({"memory"})
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(WEB, "aiohttp"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "adlfs"),
}
# The extras of METR that bring some of them.
_EXTRAS = {"s3fs": "metr[s3]", "gcsfs": "metr[gcs]"}

Result = TypeVar("Result")
# The file system of each process, store and host. One must not be used after a fork: its thread is not there any more.
_filesystems: dict[tuple[int, str], Any] = {}
# Stores that were there when they were first asked. Processes that are forked know them too.
_met: set[str] = set()


class NoRangesError(Exception):
    """A store sends a whole file where a range of it is asked for."""


class StoredFile(msgspec.Struct, frozen=True):
    """A file as a store describes it: its size in bytes, and a mark that changes with its content."""

    address: str
    size: int
    mark: str


def is_url(path: object) -> bool:
    """Whether a path is an address such as `s3://bucket/name`, or one of WebDataset's commands (`pipe:`)."""
    return isinstance(path, str) and (_SCHEME.match(path) is not None or path.startswith("pipe:"))


def read_range(address: str, start: int, size: int) -> bytes:
    """Bytes `start` to `start + size` of a file, in one request.

    Raises:
        NoRangesError: the store sends whole files only.
        StoreError: it cannot be read, or is shorter than that.
    """
    if not is_url(address):
        return _read_local(address, start, size)
    files, path = filesystem(address)

    def attempt() -> bytes:
        data: bytes = files.cat_file(path, start=start, end=start + size)
        if len(data) > size:
            raise NoRangesError(address)
        if len(data) < size:
            raise OSError(f"{len(data):,} bytes in place of {size:,}")
        return data

    return tried(address, attempt)


def read_whole(address: str) -> bytes:
    """All bytes of a file in a store, in one request.

    Raises:
        StoreError: it cannot be read.
    """
    files, path = filesystem(address)
    return tried(address, lambda: bytes(files.cat_file(path)))


def open_file(file: StoredFile) -> io.BufferedReader:
    """A file to read from its start to its end; a part of it at a time is in memory.

    Raises:
        StoreError: it cannot be opened; or, while it is read, the store does not answer.
    """
    if is_url(file.address):
        return io.BufferedReader(_Ranges(file), BLOCK)
    try:
        return open_regular(Path(file.address))
    except OSError as error:
        raise _unreachable(file.address, error, 1) from None


def fetch(file: StoredFile, target: Path) -> None:
    """Copies a file to this disk.

    Raises:
        StoreError: the store does not answer.
        OSError: it cannot be written.
    """
    try:
        with target.open("wb") as copy:
            for start in range(0, file.size, BLOCK):
                copy.write(read_range(file.address, start, min(BLOCK, file.size - start)))
    except NoRangesError:
        files, path = filesystem(file.address)

        def attempt() -> None:
            with files.open(path, "rb", block_size=0) as source, target.open("wb") as copy:
                while piece := source.read(BLOCK):
                    copy.write(piece)
            if target.stat().st_size != file.size:
                raise OSError(f"{target.stat().st_size:,} bytes in place of {file.size:,}")

        tried(file.address, attempt, max(TIMEOUT, file.size / _SLOWEST))


class _Ranges(io.RawIOBase):
    """A file in a store as a stream of ranges."""

    mode = "rb"

    def __init__(self, file: StoredFile) -> None:
        super().__init__()
        self.file, self.name, self._place = file, file.address, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.file.size}[whence]
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        size = max(0, min(len(buffer), self.file.size - self._place))
        if size:
            buffer[:size] = read_range(self.file.address, self._place, size)
            self._place += size
        return size


def scheme(address: str) -> str:
    """The kind of store, such as `s3`; empty of a local file."""
    found = _SCHEME.match(address)
    return found[1].lower() if found else ""


def _read_local(path: str, start: int, size: int) -> bytes:
    try:
        with open_regular(Path(path)) as file:
            file.seek(start)
            data = file.read(size)
    except OSError as error:
        raise _unreachable(path, error, 1) from error
    if len(data) < size:
        raise _unreachable(path, OSError(f"{len(data):,} bytes in place of {size:,}"), 1)
    return data


def filesystem(address: str) -> tuple[Any, str]:
    """The file system of an address in this process, and the path there.

    Raises:
        DependencyError: the package for this kind of store is not installed.
        DataError: there is no such kind of store.
        StoreError: nothing listens at the store's endpoint.
    """
    import fsspec  # most commands need no store, and do not wait for it

    kind, _, rest = address.partition("://")
    host = f"{kind.lower()}://{rest.partition('/')[0]}"
    key = os.getpid(), host
    try:
        if key not in _filesystems:
            _quiet("gcsfs", "google.auth")
            files = fsspec.core.url_to_fs(address, skip_instance_cache=True)[0]
            if host not in _met:
                check_endpoint(address, files)
                _met.add(host)
            _filesystems[key] = files
    except ImportError as error:
        raise _not_installed(address, error) from None
    except ValueError as error:
        raise DataError(f"no such kind of store: {error}", where=address, hint="s3://, gs://, https://") from None
    return _filesystems[key], _filesystems[key]._strip_protocol(address)


def _not_installed(address: str, error: ImportError) -> DependencyError:
    from fsspec.registry import known_implementations

    kind = scheme(address)
    package = _PACKAGES.get(kind)
    hint = known_implementations.get(kind, {}).get("err", str(error))
    if package in _EXTRAS:
        hint = f"pip install '{_EXTRAS[package]}', or pip install {package}"
    elif package:
        hint = f"pip install {package}"
    missing = getattr(error.__cause__, "name", None)
    why = f"which cannot be imported: {error.__cause__}" if missing not in {None, package} else "which is not installed"
    return DependencyError(
        f"{kind}:// needs the package {package or 'that fsspec names'}, {why}", where=address, hint=hint
    )


def _quiet(*libraries: str) -> None:
    """Keeps libraries from logging the tracebacks of requests that failed: METR tells what became of them."""
    for log in map(logging.getLogger, libraries):
        if log.level == logging.NOTSET:
            log.setLevel(logging.CRITICAL)


def tried(address: str, call: Callable[[], Result], seconds: float | None = None) -> Result:
    """The result of a request, which is tried again after a pause where it fails.

    Raises:
        StoreError: it failed each time.
    """
    for attempt, pause in enumerate([*PAUSES, None], start=1):
        try:
            return call() if scheme(address) in _AT_HAND else _in_time(call, seconds or TIMEOUT)
        except (NoRangesError, MetrError):
            raise
        except Exception as error:  # each store raises errors of its own library
            if pause is None or is_final(error):
                raise _unreachable(address, error, attempt) from error
            time.sleep(pause)
    raise AssertionError


def _in_time(call: Callable[[], Result], seconds: float) -> Result:
    """The result of a call that may take so long; it goes on in a thread where it takes longer, and is forgotten.

    Raises:
        TimeoutError: it took longer.
    """
    outcomes: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((call(), None))
        except BaseException as error:  # raised below, in the thread that asked
            outcomes.put((None, error))

    threading.Thread(target=run, daemon=True, name="request").start()
    try:
        result, error = outcomes.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} seconds") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _unreachable(address: str, error: BaseException, attempts: int) -> StoreError:
    told = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        told = "no such file"
    tried = f" after {attempts} attempts" if attempts > 1 else ""
    hint = "check that it is there and may be read"
    hint = f"{what_to_try(error, scheme(address)) or hint}; then run the same command again: what is done is kept"
    return StoreError(f"cannot be read{tried}: {told}", where=address, hint=hint)
