"""The command `metr`: its verbs, and errors that end in one message instead of a traceback."""

import logging
import os
import sys

import typer
from rich.console import Console
from rich.logging import RichHandler

import metr
from metr.cli.demo import demo
from metr.cli.detect import detect
from metr.cli.evaluate import evaluate
from metr.cli.inspect import inspect
from metr.cli.train import train
from metr.errors import MetrError

app = typer.Typer(
    name="metr",
    help="One object detector from many isolated datasets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (inspect, train, evaluate, detect, demo):
    app.command()(verb)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Show the version and stop.")) -> None:
    """One object detector from many isolated datasets."""
    if version:
        Console().print(f"metr {metr.__version__}")
        raise typer.Exit


def run() -> None:
    """The console script: runs a verb; a mistake ends in one clear message and exit code 1.

    With METR_DEBUG=1 in the environment errors show their traceback.
    """
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    for noisy in ("httpx", "PIL", "matplotlib", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except MetrError as error:
        if os.environ.get("METR_DEBUG"):
            raise
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        sys.exit(130)
