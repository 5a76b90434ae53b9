"""`metr inspect`: what is in these datasets, and the label assistant."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from metr.cli.output import SafeConsole
from metr.cli.verbs import Data, Offline, check_data, stay_offline
from metr.errors import ConfigError, DataError, MetrError, counted, did_you_mean, quiet_log

if TYPE_CHECKING:  # what the verb needs is imported when it runs, so that help comes at once
    from metr.data.datasets_file import DatasetConfig, DatasetSource
    from metr.inspection.facts import DatasetFacts
    from metr.model import METR

__all__ = ["inspect"]

# A table that is piped into a file is as wide as it needs to be.
_PIPED_WIDTH = 160
_WRITERS = ("coco", "yolo", "voc", "csv", "labelme", "cvat", "label_studio", "webdataset")

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
    typer.Option(
        help="Write each dataset as coco, yolo, voc, csv, labelme, cvat, label_studio or webdataset, into a folder of "
        "its own in OUT.",
        metavar="FORMAT OUT",
    ),
]
Draw = Annotated[
    Path | None,
    typer.Option(help="Draw some images of each dataset with their labels, as NAME.jpg in OUT.", metavar="OUT"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="How to look: images=100, threshold=0.5, similar=0.8, text.source=...; may be repeated."
    ),
]


def inspect(
    data: Data,
    *,
    verbose: Verbose = False,
    check: Check = False,
    model: Model = None,
    write: Write = None,
    force: Force = False,
    export: Export = None,
    draw: Draw = None,
    set_: Settings = None,
    offline: Offline = False,
) -> None:
    """Show what is in datasets: issues, labels that agree or clash, objects that perhaps stand unlabelled.

    A dataset that cannot be read is reported below the others; the exit code is then 1.
    """
    stay_offline(offline)
    if len(data) == 1:  # of several, those that can be read are shown
        check_data(data, listed=False)
    from metr.cli.inspect_tables import print_inspection
    from metr.config import parse_overrides
    from metr.inspection import InspectionConfig
    from metr.inspection.datasets_file import check_target, write_datasets_file
    from metr.inspection.label_report import inspect_datasets
    from metr.inspection.sheets import check_folder

    config = InspectionConfig.checked(parse_overrides(set_ or []), where="--set")
    if write is not None:
        check_target(write, force)
    if export is not None:
        _check_format(export[0])
    console = SafeConsole()
    if not console.is_terminal:
        console.width = max(console.width, _PIPED_WIDTH)
    detector = None if model is None else _loaded(model, config.device)
    sources, failures = _opened(data, console)
    if draw is not None:
        check_folder(draw, sources)
    if export is not None:
        _check_exports(sources, export[1])
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
    if draw is not None:
        _draw(sources, inspection.facts, draw, console)
    if failures:
        raise _unread(failures, sources)


def _opened(data: Sequence[str], console: Console) -> "tuple[list[DatasetSource], list[MetrError]]":
    """The datasets that can be read, and why the others cannot.

    Raises:
        MetrError: none can be read.
    """
    from metr.data.datasets_file import check_names, open_dataset, parse_data_arguments

    sources: list[DatasetSource] = []
    failures: list[MetrError] = []
    specs: list[DatasetConfig] = []
    for argument in data:
        try:
            specs += parse_data_arguments([argument])
        except MetrError as error:
            failures.append(error)
    check_names(specs)
    with quiet_log("metr.data.datasets_file", logging.WARNING):
        for spec in specs:
            with console.status(f"reading {escape(spec.name)}"):
                try:
                    sources.append(open_dataset(spec))
                except MetrError as error:
                    failures.append(error)
    if not sources:
        raise _unread(failures, sources)
    return sources, failures


def _unread(failures: Sequence[MetrError], sources: "Sequence[DatasetSource]") -> MetrError:
    """One error for all datasets that cannot be read; that of the only one as it is."""
    if not sources and len(failures) == 1:
        return failures[0]
    told = f"{len(failures)} of {counted(len(failures) + len(sources), 'dataset')} cannot be read"
    told += " and are left out above" if sources else ""
    if len(failures) == 1:
        return DataError(f"{told}: {failures[0].where}: {failures[0].what}", hint=failures[0].hint)
    lines = "".join(f"\n  {error.where}: {' '.join(error.what.split())}" for error in failures)
    return DataError(f"{told}:{lines}", hint="inspect one of them alone, to read what may help")


def _loaded(model: str, device: str) -> "METR":
    from metr.model import METR

    return METR.from_pretrained(model, device=device)


def _check_format(name: str) -> None:
    if name not in _WRITERS:
        raise ConfigError(f"no format {name!r} to write", where="--export", hint=did_you_mean(name, _WRITERS))


def _check_exports(sources: "Sequence[DatasetSource]", out: Path) -> None:
    """Checks that each dataset can be written into its own folder, before all are looked at."""
    from metr.data.export import check_new_export
    from metr.inspection.sheets import file_stem
    from metr.writable import check_folder_to_write

    check_folder_to_write(out)
    for source in sources:
        check_new_export(source, out / file_stem(source.name))


def _export(sources: "Sequence[DatasetSource]", name: str, out: Path, console: Console) -> None:
    """Writes each dataset into its own folder."""
    from metr.data.export_tools import WRITERS
    from metr.inspection.sheets import file_stem

    write = WRITERS[name]
    for source in sources:
        folder = out / file_stem(source.name)
        with console.status(f"writing {escape(source.name)}"):
            report = write(source, folder, "link")
        size = f"{counted(report.images, 'image')}, {counted(report.boxes, 'box', 'boxes')}"
        told = f"{source.name}: {size} as {name} in {folder}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)


def _draw(sources: "Sequence[DatasetSource]", facts: "Sequence[DatasetFacts]", out: Path, console: Console) -> None:
    """Writes a contact sheet of each dataset."""
    from metr.inspection.sheets import draw_sheet

    for source, one in zip(sources, facts, strict=True):
        with console.status(f"drawing {escape(source.name)}"):
            sheet = draw_sheet(source, one, out)
        told = f"{source.name}: {sheet.images:,} of {counted(sum(one.images.values()), 'image')} drawn in {sheet.path}"
        told += f"; not shown: {', '.join(sheet.missing)}" if sheet.missing else ""
        console.print(told, markup=False, highlight=False, soft_wrap=True)
