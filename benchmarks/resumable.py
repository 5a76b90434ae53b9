"""Benchmarks of hours that are stopped and run again until they are done: their commands, and what they write."""

import argparse
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from metr.cli.main import show_log
from metr.errors import DataError, MetrError
from metr.training.logger import read_metrics

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every command line says; results are called after benchmark and profile."""

    benchmark: str
    profile: str
    data: Path
    out: Path
    results: Path
    overrides: tuple[str, ...]

    @property
    def stem(self) -> Path:
        """Where the result is written, but for a suffix."""
        return self.results / f"{self.benchmark}-{self.profile}"


def command_line(
    about: str | None, benchmark: str, profiles: Sequence[str], overridden: str
) -> argparse.ArgumentParser:
    """The options of every command; `overridden` are the runs that `--set` changes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(benchmark=benchmark)
    parser.add_argument("--profile", choices=profiles, default="trial")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of the seven datasets")
    parser.add_argument("--out", type=Path, help=f"the folder of all runs; runs/{benchmark}-PROFILE by default")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help=f"for {overridden}"
    )
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> dict[str, Any]:
    """The values of `Settings`, and those of the options that a benchmark added."""
    given = vars(parser.parse_args(arguments))
    out = given["out"] or Path("runs") / f"{given['benchmark']}-{given['profile']}"
    return given | {"out": out, "overrides": tuple(given["overrides"])}


def exit_status(work: Callable[[Console], bool]) -> int:
    """Works, and says how it ended: 0 if done, 1 with one message where something is missing, 130 where it stopped."""
    console = Console()
    show_log()
    try:
        done = work(console)
    except MetrError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        done = False
    if not done:
        console.print("not done yet; to go on, give the same command again")
    return 0 if done else 130


def done_within(minutes: float | None, work: Callable[[], bool]) -> bool:
    """Works as long as that, if it is limited; False where the work says so or was stopped."""
    try:
        with stopping_after(minutes):
            return work()
    except KeyboardInterrupt:
        return False


@contextmanager
def stopping_after(minutes: float | None) -> Iterator[None]:
    """After so many minutes this process gets a Ctrl-C: training saves and ends, anything else is left at once."""
    if minutes is None:
        yield
        return
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    # a process that a script started in the background ignores Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


def check_data(folder: Path, names: Sequence[str]) -> None:
    """Whether these datasets are in a folder.

    Raises:
        DataError: some are not.
    """
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        hint = "name the folder that holds them with --data"
        raise DataError(f"expected the datasets {', '.join(missing)}", where=folder, hint=hint)


def training_seconds(metrics: Path) -> float:
    """Seconds of a run's training steps, however often it was stopped, by its folder or metrics.jsonl."""
    return max((float(record.get("seconds", 0.0)) for record in read_metrics(metrics)), default=0.0)


def write_result(stem: Path, result: Mapping[str, Any], page: str) -> None:
    """The result as JSON, and a page of Markdown beside it; `stem` is their path but for a suffix."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    told = json.dumps(result, indent=1, ensure_ascii=False)
    stem.with_suffix(".json").write_text(f"{told}\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(page, encoding="utf-8")
