"""`metr detect`: pictures in, drawn pictures and COCO results out."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def detect(
    run: Annotated[Path, typer.Argument(help="A run folder or checkpoint.")],
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.", metavar="PICTURE...")],
    categories: Annotated[
        str | None, typer.Option(help='Names to look for, "penguin, shark"; by default all that were trained.')
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where pictures and detections.json go.")] = Path(
        "detections"
    ),
    threshold: Annotated[float, typer.Option(help="Least score that is shown.", min=0, max=1)] = 0.3,
    batch_size: Annotated[int, typer.Option(help="Pictures a step.", min=1)] = 8,
) -> None:
    """Find objects in pictures; any names can be asked for, trained or not."""
    from metr.api.detection import detect_files

    names = None if categories is None else [name.strip() for name in categories.split(",")]
    detect_files(run, pictures, out, names=names, threshold=threshold, batch_size=batch_size, console=Console())
