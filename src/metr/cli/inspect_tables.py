"""What `metr inspect` shows: tables where numbers are compared, else a line for each thing that is worth one."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metr.errors import counted
from metr.inspection import InspectionConfig
from metr.inspection.coverage import Cell, Coverage, Homonym
from metr.inspection.datasets_file import prompts_line
from metr.inspection.facts import BoxSizes, DatasetFacts
from metr.inspection.label_report import Inspection
from metr.inspection.similar_names import SimilarNames
from metr.text.config import BUNDLED, MULTILINGUAL

# How much of each list is shown without --verbose: issues of a kind, pairs of names, rows of the matrix, hints of a
# dataset, names in a line.
_ISSUES, _PAIRS, _ROWS, _HINTS, _NAMES = 3, 15, 20, 5, 12
# So many names that are doubted for the same reasons share a line.
_ALIKE = 3
# Columns of a console in which there is room for sums.
_WIDE = 100
# The narrowest column of the matrix; where columns would be narrower, it is written as lines.
_NARROWEST = 9


def print_inspection(
    console: Console, inspection: Inspection, config: InspectionConfig, *, verbose: bool = False
) -> None:
    """Everything that was found; without `verbose`, of long lists the beginning."""
    console.print(_overview(inspection, console.width >= _WIDE))
    _print_issues(console, inspection, verbose)
    if verbose:
        for facts in inspection.facts:
            console.print(_categories(facts))
    _print_foreign(console, inspection, verbose)
    if len(inspection.facts) > 1:
        _print_near(console, inspection, config, verbose)
        _print_homonyms(console, inspection, verbose)
        _print_coverage(console, inspection.coverage, verbose)


def _overview(inspection: Inspection, wide: bool) -> Table:
    """A line for each dataset."""
    splits = list(dict.fromkeys(["train", "val", "test", *(name for one in inspection.facts for name in one.images)]))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("dataset", overflow="fold")
    table.add_column("format", no_wrap=True)
    for column in (*(["images"] if wide else []), *splits, "boxes", "side", "S/M/L %", "names", "empty", "issues"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in inspection.facts:
        table.add_row(
            escape(one.name),
            one.format,
            *([f"{sum(one.images.values()):,}"] if wide else []),
            *(f"{one.images[split]:,}" if split in one.images else "-" for split in splits),
            f"{one.boxes:,}",
            *_sizes(one.sizes),
            f"{len(one.names):,}",
            f"{one.empty:,}",
            f"{sum(inspection.issues[one.name].counts.values()):,}",
        )
    return table


def _sizes(sizes: BoxSizes | None) -> tuple[str, str]:
    """The median side in hundredths of the image, and the shares of small, medium and large boxes."""
    if sizes is None:
        return "-", "-"
    shares = "/".join(f"{share:.0%}".rstrip("%") for share in (sizes.small, sizes.medium, sizes.large))
    return f"{sizes.side:.0%}", shares


def _print_issues(console: Console, inspection: Inspection, verbose: bool) -> None:
    """The issues of each dataset by kind, the first of each; then what datasets have in common."""
    _line(console, "side: median of sqrt(box / image); S/M/L: boxes up to 32 x 32 pixels, 96 x 96, larger")
    for one in inspection.facts:
        if one.ignored:
            ignored = counted(one.ignored, "box besides is", "boxes besides are")
            _line(console, f"{one.name}: {ignored} to be ignored (crowds, groups, names in `ignore`)")
        if one.unread:
            left_out = f"{', '.join(one.unread[:_ISSUES])}{', ...' if len(one.unread) > _ISSUES else ''}"
            _line(console, f"{one.name}: {counted(len(one.unread), 'name')} left out by its datasets file: {left_out}")
        issues = inspection.issues[one.name]
        if one.looked_at < issues.images:
            _line(console, f"{one.name}: sizes from {one.looked_at:,} of {counted(issues.images, 'image')}")
        if issues.opened < issues.images:
            _line(
                console, f"{one.name}: {issues.opened:,} of {counted(issues.images, 'image')} opened; --check opens all"
            )
        for kind, count in issues.counts.items():
            console.print(f"[bold]{escape(one.name)}[/bold]: {count:,} x {escape(kind)}", highlight=False)
            found = [f"{issue.where}: {issue.detail}" for issue in issues.first if issue.kind == kind]
            _listed(console, found if verbose else found[:_ISSUES], count)
    for overlap in inspection.overlaps:
        first, second = overlap.first, overlap.second
        told = f"{overlap.images:,} x the same image, such as {first.shown} and {second.shown}"
        _line(console, f"{first.dataset} ({first.split}) and {second.dataset} ({second.split}): {told}")


def _categories(facts: DatasetFacts) -> Table:
    """The categories of a dataset with their boxes in each split, most frequent first."""
    table = Table(escape(facts.name), box=None, header_style="bold")
    for column in ("boxes", *facts.images, "side"):
        table.add_column(column, justify="right")
    for name in sorted(facts.names.values(), key=lambda name: -name.count):
        side = "-" if name.side is None else f"{name.side:.0%}"
        table.add_row(escape(name.name), f"{name.count:,}", *(f"{name.boxes[split]:,}" for split in facts.images), side)
    return table


def _print_foreign(console: Console, inspection: Inspection, verbose: bool) -> None:
    """The names that the bundled language model does not read, and what can be done about them."""
    if not inspection.foreign:
        return
    _heading(console, f"Names that seem not to be English, which {BUNDLED} does not read:")
    for one in inspection.foreign:
        _line(console, f"    {one.dataset}: {_some(one.names, verbose)}")
    first = inspection.foreign[0]
    _line(console, "Other names of these datasets may be foreign as well. A detector learns less from a name that the")
    _line(console, "language model does not read. Either say in a datasets file what each means (--write makes one):")
    _line(console, f"    {prompts_line(first.names[:2])}   # below {first.dataset}")
    _line(console, "or take a language model of the hub that reads them, here and in metr train:")
    _line(console, f"    --set text.source={MULTILINGUAL}")


def _print_near(console: Console, inspection: Inspection, config: InspectionConfig, verbose: bool) -> None:
    """How many names there are, and which may mean the same."""
    shared = sum(len(datasets) > 1 for datasets in inspection.owners.values())
    console.print()
    _line(
        console,
        f"{counted(len(inspection.owners), 'name')} in all, {shared:,} of them in several datasets, each then one "
        "category. No others are joined unless you rename them.",
    )
    reads = f"{BUNDLED}, which reads English" if config.text.source == BUNDLED else config.text.source
    by = f"spelling or meaning ({reads}; similarity {config.similar:.2f} or more)"
    if inspection.text_issue is not None:
        _line(console, f"Names are compared by spelling alone: {' '.join(inspection.text_issue.split())}")
        by = "spelling"
    elif config.text.source != BUNDLED:
        _line(
            console,
            f"The similarities at which names are told were found with {BUNDLED}; --set similar=... sets another.",
        )
    by += "" if inspection.detector_hints is None else f" or by sight ({inspection.detector_hints.model})"
    if not inspection.similar:
        _line(console, f"No {'other ' if inspection.homonyms else ''}names are near in {by}.")
        return
    _heading(console, f"Names that may mean the same, by {by}:")
    shown = inspection.similar if verbose else inspection.similar[:_PAIRS]
    _listed(console, (_pair(one, verbose) for one in shown), len(inspection.similar))


def _pair(pair: SimilarNames, verbose: bool) -> str:
    one, two = (f"{name} ({_some(owners, verbose)})" for name, owners in zip(pair.names, pair.owners, strict=True))
    return f"{one} / {two}: {pair.why}"


def _print_homonyms(console: Console, inspection: Inspection, verbose: bool) -> None:
    """The names that are equal, or nearly, and perhaps not the same thing."""
    if not inspection.homonyms:
        return
    _heading(console, "Equal names, or nearly so, that perhaps do not mean the same:")
    alike: dict[tuple[str, str, tuple[str, ...]], list[Homonym]] = {}
    for one in inspection.homonyms:
        alike.setdefault((one.dataset, one.other, one.reasons), []).append(one)
    lines = [line for group in alike.values() for line in _homonym_lines(group, verbose)]
    _listed(console, lines if verbose else lines[:_PAIRS], len(lines))


def _homonym_lines(group: Sequence[Homonym], verbose: bool) -> list[str]:
    """Names of two datasets that are doubted for the same reasons: a line each, or one for many."""
    first, reasons = group[0], "; ".join(group[0].reasons)
    if len(group) < _ALIKE:
        pairs = ((one, _some(one.others, verbose)) for one in group)
        return [f"{one.name} ({one.dataset}) / {others} ({one.other}): {reasons}" for one, others in pairs]
    names = [one.name if one.equal else f"{one.name} / {_some(one.others, verbose)}" for one in group]
    return [f"{len(group)} names of {first.dataset} / {first.other} ({_some(names, verbose)}): {reasons}"]


def _print_coverage(console: Console, coverage: Coverage, verbose: bool) -> None:
    """The matrix of the names that concern several datasets, the others in a line a dataset, and the hints."""
    telling = coverage.telling()
    shown = telling if verbose else telling[:_ROWS]
    hinted = {dataset: coverage.hinted(dataset) for dataset in coverage.datasets}
    legend = "boxes; - not annotated" + ("; ~ annotated in some images" if _any_partly(coverage, shown) else "")
    legend += "; ? not annotated, but perhaps there" if any(hinted.values()) else ""
    if shown:
        _heading(console, f"Names that concern several datasets ({legend}):")
        _print_matrix(console, coverage, shown)
        if len(telling) > len(shown):
            _line(console, f"    and {len(telling) - len(shown):,} more (--verbose)")
    several = set(telling)
    _heading(console, "Names of one dataset alone:" if shown else "No two datasets have a name in common:")
    for dataset in coverage.datasets:
        alone = [
            name for name in coverage.names if name not in several and coverage.cell(dataset, name).boxes is not None
        ]
        if alone:
            _line(console, f"    {dataset}: {_some(alone, verbose)}")
    _heading(console, f"Perhaps standing unlabelled ({coverage.evidence}):")
    for dataset, found in hinted.items():
        lines = [f"{dataset}, {name}: {'; '.join(hint.why for hint in cell.hints)}" for name, cell in found]
        _listed(console, lines if verbose else lines[:_HINTS], len(lines))
    if not any(hinted.values()):
        _line(console, "    nothing")


def _print_matrix(console: Console, coverage: Coverage, names: Sequence[str]) -> None:
    """The matrix; as lines where it does not fit."""
    widest = max(len(name) for name in names)
    if widest + sum(min(len(one), _NARROWEST) + 1 for one in coverage.datasets) > console.width:
        for name in names:
            cells = ((dataset, _cell(coverage.cell(dataset, name))) for dataset in coverage.datasets)
            _line(console, f"    {name}: {', '.join(f'{dataset} {text}' for dataset, text in cells if text != '-')}")
        return
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", min_width=widest, overflow="fold")
    for dataset in coverage.datasets:
        table.add_column(escape(dataset), justify="right", overflow="fold")
    for name in names:
        table.add_row(escape(name), *(_cell(coverage.cell(dataset, name)) for dataset in coverage.datasets))
    console.print(table)


def _cell(cell: Cell) -> str:
    if cell.boxes is not None:
        return f"{'~' if cell.partly else ''}{cell.boxes:,}"
    return "?" if cell.hints else "-"


def _any_partly(coverage: Coverage, names: Iterable[str]) -> bool:
    return any(coverage.cell(dataset, name).partly for dataset in coverage.datasets for name in names)


def _some(names: Sequence[str], verbose: bool) -> str:
    """Names in a line, of many the first."""
    shown = names if verbose else names[:_NAMES]
    return ", ".join(shown) + (f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else "")


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{escape(text)}[/bold]", highlight=False, soft_wrap=True)


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _listed(console: Console, lines: Iterable[str], count: int) -> None:
    """Lines below a heading, and how many of `count` are not among them."""
    shown = 0
    for line in lines:
        _line(console, f"    {line}")
        shown += 1
    if count > shown:
        _line(console, f"    and {count - shown:,} more")
