"""Arguments that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

INTERRUPTED = 130
"""The exit code after Ctrl-C, by which scripts tell that training is not done."""

Data = Annotated[
    list[str],
    typer.Argument(help="Datasets: a folder, name=folder, or a YAML file that lists some.", metavar="DATA"),
]
Run = Annotated[Path, typer.Argument(help="A run folder, a checkpoint folder, or a name on the hub.", metavar="RUN")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="One value of the recipe: section.key=value; may be repeated."),
]
BatchSize = Annotated[int, typer.Option(help="Images a step.", min=1)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
