"""log.txt in the run folder: what METR logs and shows while it trains, one call after the other."""

import logging
import platform
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch
from filelock import FileLock, Timeout
from rich.console import Console, RenderableType

import metr
from metr.errors import MetrError, shown
from metr.lost_output import lasting
from metr.processes import in_main_process
from metr.run_directory import RunDirectory, explained_disk_errors
from metr.training.provenance import hardware

LOG_FILE = logging.getLogger("metr.training.log_file")
"""What is logged here goes into the log.txt of runs that are open, and to no screen: a console shows it already."""
LOG_FILE.propagate = False
LOG_FILE.addHandler(logging.NullHandler())  # without a run that is open, logging would show it on the screen after all
LOG_FILE.setLevel(logging.INFO)
_LISTENED_TO = ("metr", LOG_FILE.name, "py.warnings")
_WIDTH = 160  # columns of tables in log.txt


class RunLog(logging.Handler):
    """Keeps the log of one run in its folder, as a context manager; in other than the main process it does nothing.

    Until `begin` it writes nothing, so that a command that is refused leaves the folder as it was. An exception that
    leaves the block is written too.

    Training does not end because nobody reads what it shows, such as a `tee` that was ended: it goes on in silence.

    Args:
        folder: The run folder.
        console: Where training shows what it does.
    """

    def __init__(self, folder: Path, console: Console | None = None) -> None:
        super().__init__(logging.INFO)
        self._shown: AbstractContextManager[None] = nullcontext() if console is None else lasting(console, _tell_unread)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.path = RunDirectory(folder).log
        self._early: list[str] = []
        self._file: TextIO | None = None
        self._lock: FileLock | None = None

    def __enter__(self) -> "RunLog":
        self._shown.__enter__()
        if in_main_process():
            for name in _LISTENED_TO:
                logging.getLogger(name).addHandler(self)
            for fact in environment():
                LOG_FILE.info("%s", shown(fact))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            LOG_FILE.warning("interrupted")
        elif isinstance(error, MetrError):
            LOG_FILE.error("%s", shown(str(error)))
        elif error is not None:
            LOG_FILE.error("%s", shown("".join(traceback.format_exception(error)).rstrip()))
        self._stop_listening()
        self._shown.__exit__(None, None, None)
        if self._file is not None:
            with suppress(OSError):  # a full disk: that has been said
                self._file.close()
        if self._lock is not None:
            self._lock.release()
        self.close()

    def begin(self, device: str) -> None:
        """Opens the file and writes what was logged until now: first what this call runs on.

        Args:
            device: What the run asks for (`train.loop.device`).

        Raises:
            CheckpointError: the file cannot be written.
            MetrError: another process trains in this folder.
        """
        if not in_main_process():
            return
        with explained_disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_folder()
            self._file = self.path.open("a", encoding="utf-8")
        early, self._early = self._early, []
        for line in early:
            self._write(line)
        LOG_FILE.info("device: %s", hardware(device))

    def _take_folder(self) -> None:
        """Locks the run folder until the log is closed, or this process ends, however it does."""
        run = RunDirectory(self.path.parent)
        lock = FileLock(run.lock)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise run.taken_error() from None
        except NotImplementedError:  # a file system without locks
            return
        self._lock = lock

    def format(self, record: logging.LogRecord) -> str:
        """The message after the time, and after what it is unless it is information."""
        line = shown(super().format(record))
        if record.levelno <= logging.INFO:
            return line
        date, time, message = line.split(" ", 2)
        return f"{date} {time} {record.levelname.lower()}: {message}"

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a message, or keeps it until the file is open."""
        line = self.format(record)
        if self._file is None:
            self._early.append(line)
        else:
            self._write(line)

    def _write(self, line: str) -> None:
        assert self._file is not None
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:  # a full disk: training itself ends where a checkpoint cannot be written
            self._stop_listening()
            with suppress(OSError):  # nobody reads it
                sys.stderr.write(f"{self.path} cannot be written: {error}\n")

    def _stop_listening(self) -> None:
        for name in _LISTENED_TO:
            logging.getLogger(name).removeHandler(self)


def _tell_unread() -> None:
    LOG_FILE.warning("nobody reads the output of this call any more; it goes on, and this file says the same")


def environment() -> tuple[str, ...]:
    """What a call runs on, in lines: versions, machine, command."""
    command = shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])
    versions = f"metr {metr.__version__}, torch {torch.__version__}, python {platform.python_version()}"
    return (
        f"{versions}, {platform.platform()}",
        f"command: {command}",
        f"working directory: {Path.cwd()}",
    )


def tell(console: Console, *parts: RenderableType) -> None:
    """Prints on the console, and writes into the log of the run that is open.

    A text is left to the terminal to wrap, so that commands and paths can be copied; `Hanging` is for sentences.
    """
    with log_page() as page:
        for one in (console, page):
            for part in parts:
                one.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str), crop=False)


@contextmanager
def log_page() -> Iterator[Console]:
    """A console whose page goes into the log of the run that is open, and nowhere else."""
    page = Console(file=StringIO(), width=_WIDTH, force_terminal=False, no_color=True)
    yield page
    assert isinstance(page.file, StringIO)
    text = "\n".join(line.rstrip() for line in page.file.getvalue().splitlines())
    LOG_FILE.info("%s", text)
