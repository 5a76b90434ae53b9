"""`metr evaluate`: the COCO protocol on each dataset, with its own names and with all names."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder or checkpoint.")],
    data: Annotated[list[str], typer.Argument(help="Datasets to evaluate on.", metavar="DATA...")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where JSON, Markdown and chart go; RUN/evaluation by default.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split; by default val, else test.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures a step.")] = 8,
) -> None:
    """Average precision on every dataset: own names, all names together, and what is confused between fields."""
    from metr.api.evaluation import evaluate_run

    evaluate_run(run, data, out or run / "evaluation", split=split, batch_size=batch_size, console=Console())
