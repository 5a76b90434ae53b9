"""`metr train`: joint training on one or many datasets."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Data = Annotated[
    list[str],
    typer.Argument(help="Datasets: a folder, name=folder, or a YAML file that lists some.", metavar="DATA..."),
]


def train(
    data: Data,
    out: Annotated[Path, typer.Option("-o", "--out", help="The run folder to write.")],
    size: Annotated[str, typer.Option(help="nano, small or base.")] = "nano",
    config: Annotated[Path | None, typer.Option(help="A YAML file laid over the size's recipe.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One number: section.key=value; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, in place of the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in OUT stopped.")] = False,
) -> None:
    """Train one detector on all datasets together; labels are never merged by hand."""
    from metr.api.training import train as run
    from metr.engine.recipe import load_recipe

    overrides = [*(set_ or []), *([f"train.loop.steps={steps}"] if steps is not None else [])]
    recipe = load_recipe(size, config, overrides)
    run(data, out, recipe, resume=resume, console=Console())
