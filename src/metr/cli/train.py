"""`metr train`: joint training on one or many datasets."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from metr.cli.arguments import Data, Overrides
from metr.cli.outcome import say_done


def train(
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="The run folder to write.")],
    size: Annotated[str, typer.Option(help="nano, small or base.")] = "nano",
    config: Annotated[Path | None, typer.Option(help="A YAML file laid over the size's recipe.")] = None,
    set_: Overrides = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, in place of the recipe's.", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in OUT stopped.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show datasets, steps and sizes; train nothing and write nothing.")
    ] = False,
) -> None:
    """Train one detector on many datasets. Their labels are never merged by hand."""
    from metr.training.train import plan
    from metr.training.train import train as run

    overrides = [*(set_ or []), *([f"train.loop.steps={steps}"] if steps is not None else [])]
    if dry_run:
        Console(soft_wrap=True).print(plan(data, config, size=size, overrides=overrides))
        return
    outcome = run(data, out, config, size=size, overrides=overrides, resume=resume, console=Console())
    say_done(outcome, out)
