"""`metr detect`: images in, drawn images and COCO results out."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from metr.cli.arguments import BatchSize, Device, Run


def detect(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.", metavar="IMAGE")],
    categories: Annotated[
        str | None, typer.Option(help='Names to look for, "penguin, shark"; by default all that were trained.')
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where drawn images and JSON go.")] = Path("detections"),
    threshold: Annotated[float, typer.Option(help="Least score that is shown.", min=0, max=1)] = 0.3,
    batch_size: BatchSize = 8,
    device: Device = "auto",
) -> None:
    """Find objects in images. Any names can be asked for, trained or not."""
    from metr.inference.config import InferenceConfig, PostprocessConfig
    from metr.inference.detect_files import detect_files
    from metr.model import METR

    names = None if categories is None else [name.strip() for name in categories.split(",")]
    config = InferenceConfig(batch_size=batch_size, postprocess=PostprocessConfig.to_show(threshold))
    predictor = METR.from_pretrained(run, device=device).predictor(names, config)
    detect_files(predictor, images, out, console=Console())
