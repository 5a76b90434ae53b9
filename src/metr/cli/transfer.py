"""`metr transfer`: weights to other detectors, and from them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from metr.errors import ConfigError

_TARGETS = "deformable_detr, dab_detr, conditional_detr, detr, rt_detr, rt_detr_v2 or d_fine"


def transfer(
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the detector goes.")],
    run: Annotated[
        Path | None, typer.Argument(help="A run folder, a checkpoint folder, or a name on the hub.", metavar="RUN")
    ] = None,
    to: Annotated[str | None, typer.Option(help=f"A detector of transformers: {_TARGETS}.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Make a METR of this: a folder of transformers, or a .pth of DINO or METR."),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(help='What it is to find: "penguin, shark", or a dataset; by default what it knows.'),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="With --from: the text encoder's folder or hub name; by default the bundled one."),
    ] = None,
) -> None:
    """Move weights to a detector of transformers, or from other detectors. Reports the way of every weight."""
    from metr.conversion.transfer import adopt_file, transfer_run

    console = Console()
    if source is not None:
        if run is not None or to is not None:
            hint = "metr transfer --from FOLDER -o OUT"
            raise ConfigError("expected --from alone, without RUN and --to", where="--from", hint=hint)
        adopt_file(source, out, names=names, text=text, console=console)
        return
    if run is None or to is None:
        hint = "metr transfer RUN --to rt_detr -o OUT, or metr transfer --from FOLDER -o OUT"
        raise ConfigError("expected RUN and --to", where="transfer", hint=hint)
    if text is not None:
        raise ConfigError("goes with --from only: a METR has its text encoder", where="--text", hint="leave it out")
    transfer_run(run, to, out, names=names, console=console)
