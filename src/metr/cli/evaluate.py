"""`metr evaluate`: the COCO protocol on each dataset, with its own names and with the joint vocabulary."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from metr.cli.arguments import BatchSize, Data, Device, Run


def evaluate(
    run: Run,
    data: Data,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Where JSON, Markdown and chart go; by default evaluation, in RUN if local."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="The split; by default val, else test.")] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
) -> None:
    """Measure average precision on datasets. Own names, the joint vocabulary, confusion between datasets."""
    from metr.evaluation.evaluate import evaluate as evaluate_datasets

    # a name on the hub is no folder to write into
    out = out or (run / "evaluation" if run.is_dir() else Path("evaluation"))
    evaluate_datasets(run, data, out, split=split, batch_size=batch_size, device=device, console=Console())
