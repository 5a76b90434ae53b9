"""Where a verb writes: a console that wraps nothing unless a terminal does, and the log on the standard error."""

import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment

from metr.errors import counted, shown
from metr.lost_output import UNREAD, let_go
from metr.processes import in_main_process, process_index

__all__ = ["PIPED_WIDTH", "LogHandler", "Once", "SafeConsole", "output_console", "say_names", "show_log"]

PIPED_WIDTH = 10_000
"""Columns where the output is piped: nobody's terminal is narrower than that, so no table and no line is wrapped."""

# where it is logged that an image cannot be read
_READS_IMAGES = "metr.data.loading"
# loggers of what reads datasets
_READING = "metr.data."
# characters of a line across, where there is no terminal
_RULE = 80
# names that a line tells
_NAMES = 12


class SafeConsole(Console):
    """A console on which names and paths from elsewhere cannot act: their control characters are written out.

    Where nobody reads the standard output any more, as after `| head`, it ends the command in silence.
    """

    def on_broken_pipe(self) -> None:
        """Ends the command with the exit code by which shells tell; messages on the standard error are just lost.

        Raises:
            SystemExit: it is the standard output.
        """
        self.quiet = True
        let_go(self.file)
        if not self.stderr:
            raise SystemExit(UNREAD)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """The segments of what is printed; styles and what moves the cursor are the console's own, and stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=shown(segment.text))

    def rule(self, title: Any = "", **options: Any) -> None:
        """A title in a line across the terminal; of 80 characters where there is none."""
        wide, self.width = self.width, self.width if self.is_terminal else min(self.width, _RULE)
        try:
            super().rule(title, **options)
        finally:
            self.width = wide


def output_console(*, stderr: bool = False) -> Console:
    """The console on the standard output (or error): as wide as the terminal, or without limit where there is none.

    Of several processes only the main one shows anything.
    """
    console = SafeConsole(stderr=stderr, quiet=not in_main_process())
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


def say_names(what: str, names: tuple[str, ...], known: int, console: Console | None = None) -> None:
    """Which names a detector looks for, and how to ask it for the rest of the `known` ones."""
    console = console or output_console()
    shown = ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")
    rest = "" if len(names) == known else f"; --categories all: all {counted(known, 'name')} that it knows"
    console.print(f"{what}: {shown}{rest}", markup=False, highlight=False, soft_wrap=True)


class LogHandler(logging.Handler):
    """Writes each message to the standard error as a line of its own; what is more than information says so first.

    It looks `sys.stderr` up for every message: under a live screen that is a stand-in, which prints above the screen.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The message, after `warning:` or `error:` if it is one."""
        message = shown(super().format(record))
        if record.levelno <= logging.INFO:
            return message
        where = "" if in_main_process() else f"process {process_index()}: "
        return f"{record.levelname.lower()}: {where}{message}"

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a message, yellow on a terminal if it is a warning."""
        stream = sys.stderr
        try:
            line = self.format(record)
            if record.levelno > logging.INFO and stream.isatty() and not os.environ.get("NO_COLOR"):
                line = f"\x1b[33m{line}\x1b[0m"
            stream.write(line + "\n")
            stream.flush()
        except OSError:  # closed by whoever read it
            let_go(stream)
        except ValueError:
            self.handleError(record)


def show_log() -> None:
    """Shows what METR logs on the standard error: progress where there is no terminal, what is skipped, warnings.

    Of several processes the others show only what the main one cannot know: their errors, and the images that they
    alone could not read.
    """
    handler = LogHandler()
    handler.addFilter(Once())
    if not in_main_process():
        handler.addFilter(_concerns_this_process)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    logging.captureWarnings(True)
    for noisy in ("httpx", "httpx2", "PIL", "matplotlib", "accelerate", "botocore", "aiobotocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class Once(logging.Filter):
    """Leaves out what reading data has said already: a command may open a dataset several times."""

    def __init__(self) -> None:
        super().__init__()
        self._said = set[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        if not record.name.startswith(_READING):
            return True
        text = record.getMessage()
        new = text not in self._said
        self._said.add(text)
        return new


def _concerns_this_process(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or (record.name == _READS_IMAGES and record.levelno >= logging.WARNING)
