"""`metr inspect`: what is in these datasets."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metr.cli.arguments import Data
from metr.data.images import check_picture
from metr.data.records import Fault
from metr.data.sources import DetectionSource, open_dataset, parse_data_arguments

# Faults of one kind that are shown; the others are counted.
_SHOWN = 3
# A table that is piped into a file is as wide as it needs to be.
_PIPED_WIDTH = 160

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="List the categories of each dataset with their boxes.")]
Check = Annotated[bool, typer.Option("--check", help="Look at the header of every picture: broken ones, other sizes.")]


def inspect(data: Data, verbose: Verbose = False, check: Check = False) -> None:
    """Show what is in datasets. Format, pictures, boxes, categories, faults, names that several share."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _PIPED_WIDTH)
    sources = []
    for spec in parse_data_arguments(data):
        with console.status(f"reading {escape(spec.name)}"):
            sources.append(open_dataset(spec))
    console.print(_overview(sources))
    for source in sources:
        _print_faults(console, source, check)
    if verbose:
        for source in sources:
            console.print(_categories(source))
    _print_shared_names(console, sources)


def _overview(sources: Sequence[DetectionSource]) -> Table:
    """A line for each dataset."""
    splits = list(dict.fromkeys(["train", "val", "test", *(split for source in sources for split in source.splits)]))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("dataset", overflow="fold")
    table.add_column("format", no_wrap=True)
    for column in ("images", *splits, "boxes", "ignored", "categories", "empty", "faults"):
        table.add_column(column, justify="right", no_wrap=True)
    for source in sources:
        counts = {split: annotations.counts() for split, annotations in source.splits.items()}
        table.add_row(
            escape(source.name),
            source.format,
            f"{sum(count.images for count in counts.values()):,}",
            *(f"{counts[split].images:,}" if split in counts else "-" for split in splits),
            f"{sum(int(count.boxes.sum()) for count in counts.values()):,}",
            f"{sum(int(count.ignored.sum()) for count in counts.values()):,}",
            f"{len(source.categories):,}",
            f"{sum(count.empty for count in counts.values()):,}",
            f"{sum(source.fault_counts.values()):,}",
        )
    return table


def _print_faults(console: Console, source: DetectionSource, check: bool) -> None:
    """The faults of a dataset by kind, the first of each."""
    counts, faults = Counter(source.fault_counts), list(source.faults)
    if check:
        with console.status(f"looking at the pictures of {escape(source.name)}"):
            found = _picture_faults(source)
        counts.update(fault.kind for fault in found)
        faults += found
    for kind, count in counts.items():
        console.print(f"[bold]{escape(source.name)}[/bold]: {count:,} x {escape(kind)}")
        shown = [fault for fault in faults if fault.kind == kind][:_SHOWN]
        for fault in shown:
            console.print(f"    {escape(fault.where)}: {escape(fault.detail)}", highlight=False, soft_wrap=True)
        if count > len(shown):
            console.print(f"    and {count - len(shown):,} more")


def _picture_faults(source: DetectionSource) -> list[Fault]:
    found = (check_picture(record) for annotations in source.splits.values() for record in annotations)
    return [fault for fault in found if fault is not None]


def _categories(source: DetectionSource) -> Table:
    """The categories of a dataset with their boxes in each split, most frequent first."""
    counts = {split: annotations.counts().boxes for split, annotations in source.splits.items()}
    total = np.sum(list(counts.values()), axis=0)
    table = Table(escape(source.name), box=None, header_style="bold")
    for column in ("boxes", *counts):
        table.add_column(column, justify="right")
    for row in np.argsort(-total, kind="stable"):
        cells = (f"{int(count[row]):,}" for count in counts.values())
        table.add_row(escape(source.categories[row]), f"{int(total[row]):,}", *cells)
    return table


def _print_shared_names(console: Console, sources: Sequence[DetectionSource]) -> None:
    """Names that several datasets have: one entry of the vocabulary, meant alike or not."""
    owners: dict[str, list[str]] = {}
    for source in sources:
        for name in source.categories:
            owners.setdefault(name, []).append(source.name)
    shared = {name: names for name, names in owners.items() if len(names) > 1}
    if len(sources) > 1:
        console.print(f"{len(owners):,} names in all, {len(shared):,} of them in several datasets")
    for name, names in sorted(shared.items()):
        console.print(f"    {escape(name)}: {escape(', '.join(names))}", highlight=False, soft_wrap=True)
    if shared:
        console.print(
            "Equal names are one category. Where they mean different things, rename one (`renames` in a listing)."
        )
