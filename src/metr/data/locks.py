"""One process at a time, where the file system can tell."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: several processes may do the same work
    fcntl = None

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds the lock file `path`, which is made and removed again; others that ask for it wait meanwhile.

    A lock ends with its process, so nobody waits for one that died. Where the file system knows no locks, nobody waits.

    Raises:
        OSError: the file cannot be made.
    """
    descriptor = _locked(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _locked(path: Path) -> int:
    """The descriptor of the lock file, locked where that can be."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(descriptor, path) or _is_at(descriptor, path):
                return descriptor
        except BaseException:  # Ctrl-C while waiting
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has removed it: the next one is locked in its place


def _lock(descriptor: int, path: Path) -> bool:
    """Waits for the lock; False where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("another process builds in %s; waiting for it", path.parent)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
