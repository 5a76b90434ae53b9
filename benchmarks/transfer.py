"""Transfer: is a detector that was pretrained on other datasets a better beginning than an ImageNet backbone alone?

    python benchmarks/transfer.py --profile trial --data ../shared/data

Leaves a dataset out, pretrains on the others, and fine-tunes on shares of the left-out one's training pictures;
against the same detector that starts from the ImageNet backbone, on the same pictures, for the same steps. AP on the
left-out dataset's val split, own names, last weights. It can be stopped and run again: it goes on where it was, and
finished runs are not run again. `--minutes 9` stops it by itself. The result is written to
`results/transfer-PROFILE.json`, `.md` and `.png` beside this file whenever it ends, with what is finished until then;
the runs go to `--out`.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from machine import commit, hardware
from metr.cli.main import show_log
from metr.config import read_yaml
from metr.engine.hardware import resolved_device
from metr.errors import DataError, MetrError
from transfer_comparison import Comparison, as_markdown, draw_curves
from transfer_runs import Profile, RunResult, Workplace, finished, run_all

HERE = Path(__file__).resolve().parent
DATASETS = (
    "aquarium",
    "bccd",
    "chess_pieces",
    "coco_mini",
    "doc_tables",
    "endangered_animals",
    "playing_cards",
)
PROFILES = ("trial", "gpu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says."""

    profile: str
    data: Path
    out: Path
    results: Path
    overrides: tuple[str, ...]
    minutes: float | None


def main(arguments: list[str] | None = None) -> int:
    """Runs the protocol; the exit status is 0, 1 with one message where something is missing, 130 where it stopped."""
    console = Console()
    show_log()
    try:
        settings = _settings(arguments)
        profile = Profile.checked(read_yaml(HERE / "profiles" / f"transfer-{settings.profile}.yaml"))
        check_data(settings.data)
        place = Workplace(
            data=settings.data, out=settings.out, datasets=DATASETS, overrides=settings.overrides, console=console
        )
        done = _run(place, profile, settings.minutes)
        _write(settings, profile, finished(place, profile), done, console)
    except MetrError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    if not done:
        console.print("not done yet; to go on, give the same command again")
    return 0 if done else 130


def _run(place: Workplace, profile: Profile, minutes: float | None) -> bool:
    """Runs what is not finished yet; False where it was stopped."""
    try:
        with stopping_after(minutes):
            return run_all(place, profile)
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


def _settings(arguments: list[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="trial")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of the seven datasets")
    parser.add_argument("--out", type=Path, help="the folder of all runs; runs/transfer-PROFILE by default")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--minutes", type=float, help="stop by itself after so long, to be run again")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every run")
    given = parser.parse_args(arguments)
    return Settings(
        profile=given.profile,
        data=given.data,
        out=given.out or Path("runs") / f"transfer-{given.profile}",
        results=given.results,
        overrides=tuple(given.set),
        minutes=given.minutes,
    )


def check_data(folder: Path) -> None:
    """Whether the seven datasets are there.

    Raises:
        DataError: some are not.
    """
    missing = [name for name in DATASETS if not (folder / name).is_dir()]
    if missing:
        hint = "name the folder that holds them with --data"
        raise DataError(f"expected the datasets {', '.join(missing)}", where=folder, hint=hint)


def _write(
    settings: Settings, profile: Profile, results: Sequence[RunResult], done: bool, console: Console
) -> dict[str, Any] | None:
    """Writes what is known; None where nothing can be compared yet."""
    comparison = Comparison.of(results, profile.left_out)
    if not comparison.points:
        return None
    written: dict[str, Any] = {
        "benchmark": "transfer",
        "profile": settings.profile,
        "complete": done,
        "hardware": hardware(resolved_device("auto")),
        "torch": torch.__version__,
        "commit": commit(),
        "settings": profile.model_dump(mode="json") | {"set": list(settings.overrides)},
        "training_seconds": round(sum(one.training_seconds for one in results)),
        "runs": [asdict(one) for one in results],
        "points": [asdict(point) for point in comparison.points],
        "bars": [asdict(bar) for bar in comparison.bars],
    }
    settings.results.mkdir(parents=True, exist_ok=True)
    stem = settings.results / f"transfer-{settings.profile}"
    stem.with_suffix(".json").write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    facts = (
        f"Profile `{written['profile']}`{'' if done else ' (not complete)'}: {written['training_seconds'] / 60:.0f} "
        f"minutes of training steps on {written['hardware']}, torch {written['torch']}, commit {written['commit']}."
    )
    page = as_markdown(comparison, profile)
    stem.with_suffix(".md").write_text(f"# Transfer: {settings.profile}\n\n{facts}\n\n{page}", encoding="utf-8")
    draw_curves(comparison, stem.with_suffix(".png"))
    console.print(page, markup=False, soft_wrap=True)
    console.print(f"written: {stem}.json, .md and .png", markup=False, soft_wrap=True)
    return written


if __name__ == "__main__":
    sys.exit(main())
