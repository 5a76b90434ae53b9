"""The verb `metr export`. What it needs is imported when it runs."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from metr.cli.output import output_console
from metr.cli.verbs import Offline, check_source, stay_offline

__all__ = ["export"]

_OPEN_NAMES = 64


def export(
    source: Annotated[
        str, typer.Argument(help="A run folder, a checkpoint folder, or a name on the hub.", metavar="RUN")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write; with --format names, a .npz file.")],
    *,
    format_: Annotated[
        str,
        typer.Option(
            "--format", help="onnx, openvino or torch (torch.export); names: names for a model with open names."
        ),
    ] = "onnx",
    names: Annotated[
        str | None,
        typer.Option(
            help='What it looks for, "penguin, shark"; "all": every trained name; "open": chosen when it runs. By '
            "default what metr detect looks for."
        ),
    ] = None,
    most_names: Annotated[
        int | None,
        typer.Option(help="With --names open: how many names it takes; by default 64, or more if it has more.", min=1),
    ] = None,
    pixels: Annotated[str, typer.Option(help="Images as bytes (uint8) or as numbers in 0..1 (float32).")] = "uint8",
    int8: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --format openvino: quantise to 8 bits with the images of this folder; may be repeated.",
            metavar="IMAGES",
        ),
    ] = None,
    offline: Offline = False,
) -> None:
    """Write a detector as a model that runs without METR and torch: ONNX Runtime, OpenVINO or torch.export."""
    from metr.export.request import ExportConfig, check_request
    from metr.inference.request import names_to_find

    is_open = names == "open"
    asked = None if is_open or names is None else names_to_find(names, None)
    values: Any = {"format": format_, "pixels": pixels, "int8": tuple(int8 or ())}
    config = ExportConfig(**values, open_names=most_names or _OPEN_NAMES if is_open else None)
    # mistakes are found before torch is imported and the detector is loaded
    check_request(config, out)
    stay_offline(offline)
    check_source(source)
    from metr.export.export import export as run_export
    from metr.model import METR

    model = METR.from_pretrained(source, device="cpu")
    if is_open and most_names is None:
        config = replace(config, open_names=max(_OPEN_NAMES, len(model.default_names)))
    if asked == ["all"]:
        asked = list(model.names)
    run_export(model, out, asked, config=config, console=output_console())
