"""`metr demo`: from nothing to a trained detector in a few minutes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from metr.cli.arguments import INTERRUPTED, Overrides


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where everything goes.")] = Path("demo"),
    set_: Overrides = None,
) -> None:
    """Try it all on made images. Draws three small datasets, trains on them jointly, evaluates, detects."""
    from metr.demo.run import run_demo

    if run_demo(out, Console(), tuple(set_ or ())) is None:
        raise typer.Exit(INTERRUPTED)
