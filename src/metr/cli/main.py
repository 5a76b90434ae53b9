"""The command `metr`: its verbs, and errors that end in one message instead of a traceback."""

import logging
import os
import sys

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler

import metr
from metr.cli.demo import demo
from metr.cli.detect import detect
from metr.cli.evaluate import evaluate
from metr.cli.finetune import finetune
from metr.cli.inspect import inspect
from metr.cli.push import push
from metr.cli.train import train
from metr.cli.transfer import transfer
from metr.errors import MetrError

app = typer.Typer(
    name="metr",
    help="One object detector from many isolated datasets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (inspect, train, finetune, evaluate, detect, transfer, push, demo):
    app.command()(verb)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Show the version and stop.")) -> None:
    """One object detector from many isolated datasets."""
    if version:
        Console().print(f"metr {metr.__version__}")
        raise typer.Exit


def run() -> None:
    """The console script: runs a verb. A mistake ends in one clear message and exit code 1, Ctrl-C in 130.

    With METR_DEBUG=1 in the environment errors show their traceback.
    """
    show_log()
    try:
        app()
    except (MetrError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        if os.environ.get("METR_DEBUG"):
            raise
        told = error if isinstance(error, MetrError) else _translated(error)
        Console(stderr=True, soft_wrap=True).print(f"error: {told}", style="red", markup=False, highlight=False)
        sys.exit(1)


def show_log() -> None:
    """Shows what METR logs on the standard error: progress where there is no terminal, what is skipped, warnings."""
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    for noisy in ("httpx", "PIL", "matplotlib", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _translated(error: Exception) -> MetrError:
    """What the operating system or the device refuses, in our words."""
    if isinstance(error, OSError):
        hint = "check the path, its permissions and the room on the disk"
        return MetrError(error.strerror or str(error), where=error.filename, hint=hint)
    hint = "a smaller batch (loader.batch_size in training, --batch-size otherwise) or smaller images"
    return MetrError(f"out of memory: {str(error).splitlines()[0] if str(error) else 'no more to be had'}", hint=hint)
