"""What training says last."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from metr.cli.arguments import INTERRUPTED

if TYPE_CHECKING:  # the engine is imported when a verb runs, so that help comes at once
    from metr.training.trainer import Outcome


def say_done(outcome: "Outcome", out: Path) -> None:
    """Where everything is and what to do next.

    Raises:
        typer.Exit: the run was interrupted.
    """
    console = Console(soft_wrap=True, highlight=False)
    if outcome.interrupted:
        console.print("To go on, give the same command again with --resume.")
        raise typer.Exit(INTERRUPTED)
    early = " (stopped early)" if outcome.stalled else ""
    best = "" if outcome.best is None else f", the best of step {outcome.best_step}"
    console.print(f"Done: {outcome.step} steps{early}{best}; everything is in {out}", markup=False)
    console.print(f"What it finds:  metr detect {out} IMAGE", markup=False)
