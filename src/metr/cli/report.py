"""The verb `report`, and the pages that other verbs write. What a verb needs is imported when it runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metr.cli.output import output_console
from metr.errors import ConfigError
from metr.processes import in_main_process

if TYPE_CHECKING:
    from metr.evaluation.results import EvaluationReport
    from metr.evaluation.runner import Detailed

__all__ = ["Compare", "Html", "check_compared", "check_page_of", "read_arms", "report", "write_page_of"]

Html = Annotated[
    bool, typer.Option("--html", help="Write evaluation.html too: one page, offline, with errors and worst images.")
]
Compare = Annotated[
    list[str] | None,
    typer.Option(
        "--compare",
        help="With --html: another evaluation of the datasets, NAME=PATH of its folder or evaluation.json; repeatable.",
        metavar="NAME=PATH",
    ),
]


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a training run.", metavar="RUN")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The HTML file; by default RUN/report.html.")] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            help="Another evaluation of the datasets, NAME=PATH of its folder, run or evaluation.json: shows what the "
            "datasets gave each other; repeatable.",
            metavar="NAME=PATH",
        ),
    ] = None,
) -> None:
    """Show a training run as one page. Curves, data seen, configuration, environment, examples, evaluation."""
    compared = check_compared(compare, html=True)
    from metr.report import write_run_page

    _say(write_run_page(run, out, read_arms(compared)))


def check_compared(compare: Sequence[str] | None, html: bool) -> dict[str, Path]:
    """The evaluations to compare with, by what they are called.

    Raises:
        ConfigError: --compare stands without --html, is not NAME=PATH, or two have one name.
    """
    if compare and not html:
        raise ConfigError("goes with --html only", where="--compare", hint="add --html")
    arms: dict[str, Path] = {}
    for one in compare or ():
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"expected NAME=PATH, found {one!r}", where="--compare", hint="alone=runs/alone")
        if name in arms:
            raise ConfigError(f"two evaluations are called {name!r}", where="--compare", hint="name them apart")
        arms[name] = Path(path)
    return arms


def read_arms(compared: Mapping[str, Path]) -> "dict[str, EvaluationReport]":
    """The evaluations to compare with, before the detector is loaded: a path may be mistyped.

    Raises:
        DataError: there is none at a path.
    """
    if not compared:
        return {}
    from metr.report import read_report

    return {name: read_report(path) for name, path in compared.items()}


def check_page_of(out: Path) -> None:
    """Checks that evaluation.html can be written into a folder, before the evaluation is made.

    Raises:
        CheckpointError: it cannot.
    """
    from metr.report.evaluation_page import PAGE
    from metr.writable import check_file_to_write

    check_file_to_write(out / PAGE)


def write_page_of(detailed: "Detailed", out: Path, source: str, arms: "dict[str, EvaluationReport]") -> None:
    """Writes evaluation.html into a folder, in the main process, and says so."""
    if in_main_process():
        from metr.report import write_evaluation_page
        from metr.report.evaluation_page import PAGE

        _say(write_evaluation_page(detailed, out / PAGE, f"Evaluation of {source}", arms))


def _say(page: Path) -> None:
    megabytes = page.stat().st_size / 1e6
    line = f"{page} is one file of {megabytes:.1f} MB that needs no network: open it in a browser"
    output_console().print(line, markup=False, highlight=False, soft_wrap=True)
