"""`metr inspect`: what is in these datasets, and the label assistant."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from metr.cli.verbs import Data
from metr.errors import ConfigError, did_you_mean

if TYPE_CHECKING:  # what the verb needs is imported when it runs, so that help comes at once
    from metr.data.datasets_file import DatasetSource
    from metr.model import METR

__all__ = ["inspect"]

# A table that is piped into a file is as wide as it needs to be.
_PIPED_WIDTH = 160
_WRITERS = ("coco", "yolo")

Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Leave nothing out; list every category with its boxes.")
]
Check = Annotated[bool, typer.Option("--check", help="Open every image, not only up to 5,000 of a dataset.")]
Model = Annotated[
    str | None,
    typer.Option(help="A run or checkpoint that looks for unlabelled objects, in 30 images a dataset.", metavar="RUN"),
]
Write = Annotated[
    Path | None,
    typer.Option(help="Leave a datasets file of the datasets with all suggestions, to edit.", metavar="DATA.YAML"),
]
Force = Annotated[bool, typer.Option("--force", help="Write over a datasets file that exists.")]
Export = Annotated[
    tuple[str, Path] | None,
    typer.Option(help="Write each dataset as coco or yolo, into a folder of its own in OUT.", metavar="FORMAT OUT"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="How to look: images=100, threshold=0.5, similar=0.8, text.source=...; may be repeated."
    ),
]


def inspect(
    data: Data,
    verbose: Verbose = False,
    check: Check = False,
    model: Model = None,
    write: Write = None,
    force: Force = False,
    export: Export = None,
    set_: Settings = None,
) -> None:
    """Show what is in datasets: issues, labels that agree or clash, objects that perhaps stand unlabelled."""
    from metr.cli.inspect_tables import print_inspection
    from metr.config import parse_overrides
    from metr.inspection import InspectionConfig
    from metr.inspection.datasets_file import check_target, write_datasets_file
    from metr.inspection.label_report import inspect_datasets

    config = InspectionConfig.checked(parse_overrides(set_ or []), where="--set")
    if write is not None:
        check_target(write, force)
    if export is not None:
        _check_format(export[0])
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _PIPED_WIDTH)
    detector = None if model is None else _loaded(model, config.device)
    sources = _opened(data, console)
    with console.status("looking") as status:
        inspection = inspect_datasets(
            sources,
            config,
            model=detector,
            detector_name=model or "",
            every_image=check,
            progress=lambda stage: status.update(escape(stage)),
        )
    print_inspection(console, inspection, config, verbose=verbose)
    if write is not None:
        write_datasets_file(write, sources, inspection.suggestions, inspection.coverage)
        told = f"\nA datasets file with these suggestions is in {write}. Edit it, then: metr train {write} -o RUN"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    if export is not None:
        _export(sources, *export, console)


def _opened(data: Sequence[str], console: Console) -> "list[DatasetSource]":
    from metr.data.datasets_file import open_dataset, parse_data_arguments

    sources = []
    with _without_hints_to_this_verb():
        for spec in parse_data_arguments(data):
            with console.status(f"reading {escape(spec.name)}"):
                sources.append(open_dataset(spec))
    return sources


@contextmanager
def _without_hints_to_this_verb() -> Iterator[None]:
    """Opening a dataset logs that `metr inspect` tells more of its issues, which is now about to happen."""
    logger = logging.getLogger("metr.data.datasets_file")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _loaded(model: str, device: str) -> "METR":
    from metr.model import METR

    return METR.from_pretrained(model, device=device)


def _check_format(name: str) -> None:
    if name not in _WRITERS:
        raise ConfigError(f"no format {name!r} to write", where="--export", hint=did_you_mean(name, _WRITERS))


def _export(sources: "Sequence[DatasetSource]", name: str, out: Path, console: Console) -> None:
    """Writes each dataset into its own folder."""
    from metr.data.export import write_coco, write_yolo

    write = {"coco": write_coco, "yolo": write_yolo}[name]
    for source in sources:
        folder = out / (re.sub(r"[\\/:]+", "_", source.name).lstrip(".") or "dataset")
        with console.status(f"writing {escape(source.name)}"):
            report = write(source, folder)
        told = f"{source.name}: {report.images:,} images, {report.boxes:,} boxes as {name} in {folder}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
