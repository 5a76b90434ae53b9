"""`metr demo`: from nothing to a trained detector in a few minutes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where everything goes.")] = Path("demo"),
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One number of the recipe: section.key=value; may be repeated.")
    ] = None,
) -> None:
    """Draw three small datasets, train on them jointly, evaluate, detect, and show the result."""
    from metr.demo.run import run_demo

    run_demo(out, Console(), tuple(set_ or ()))
