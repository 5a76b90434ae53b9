"""Output whose reader is gone: a pipe that was closed, a terminal that is no more."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from rich.console import Console

__all__ = ["UNREAD", "lasting", "let_go", "settle_output"]

UNREAD = 141
"""The exit code of a command whose output nobody reads any more: 128 and the number of SIGPIPE, as shells have it."""


def let_go(stream: Any) -> None:
    """Sends what is still to be written to a stream nowhere; also what others write to it, and what Python flushes."""
    with suppress(OSError, ValueError):  # it has no number, or is closed
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def settle_output() -> None:
    """Before the process ends: what cannot be flushed is let go, which Python would else turn into an exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            let_go(stream)
        except ValueError:  # it is closed
            continue


@contextmanager
def lasting(console: Console, lost: Callable[[], None] | None = None) -> Iterator[None]:
    """In this block a console whose reader is gone shows nothing more, instead of ending the program.

    Args:
        console: The console; afterwards it is as it was.
        lost: Called once, when that is noticed.
    """
    before = console.file
    console.file = cast("IO[str]", _Lasting(before, lost))
    try:
        yield
    finally:
        console.file = before


class _Lasting:
    """A stream that writes nothing more once it could not."""

    def __init__(self, stream: Any, lost: Callable[[], None] | None) -> None:
        self._stream, self._tell = stream, lost
        self._lost = False

    def write(self, text: str) -> int:
        """Writes a text if it can be."""
        with self._noticed():
            if not self._lost:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes what was written if it can be."""
        with self._noticed():
            if not self._lost:
                self._stream.flush()

    @contextmanager
    def _noticed(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._lost = True
            let_go(self._stream)
            if self._tell is not None:
                self._tell()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
