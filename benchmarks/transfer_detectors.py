"""Transfer to detectors of transformers: are METR's weights a better beginning than a backbone, or own pretraining?

    python benchmarks/transfer_detectors.py --profile trial --data ../shared/data

Leaves a dataset out and fine-tunes RT-DETR, Deformable DETR and DAB-DETR on it with transformers' Trainer, from

- `own`: the ImageNet backbone alone, everything else as transformers initialises it,
- `untrained`: the same backbone, everything else as `metr transfer` leaves it before METR has learnt anything: what
  this gains is the gain of a better start (of queries above all), and not of weights,
- `joint`: the detector's own pretraining on the other datasets, labels side by side; its classification head begins
  anew, as transformers does it,
- `metr`: `metr transfer` of a METR of the detector's family, pretrained on the same pictures in the same order.

COCO AP on the left-out dataset's val split. It can be stopped and run again: it goes on where it was, and finished
runs are not run again. `--minutes 9` stops it by itself. The result is written to
`results/transfer-detectors-PROFILE.json`, `.md` and `.png` beside this file whenever it ends, with what is finished
until then; the runs go to `--out`.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from machine import commit, hardware
from metr.cli.main import show_log
from metr.config import read_yaml
from metr.engine.hardware import resolved_device
from metr.errors import MetrError
from transfer import DATASETS, check_data, stopping_after
from transfer_detectors_comparison import Comparison, as_markdown, draw_bars
from transfer_detectors_runs import Profile, finished, pretraining_seconds, run_all
from transfer_runs import Workplace

HERE = Path(__file__).resolve().parent
PROFILES = ("trial", "gpu")
DETECTORS = ("rt_detr", "deformable_detr", "dab_detr")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says."""

    profile: str
    data: Path
    out: Path
    results: Path
    overrides: tuple[str, ...]
    detectors: tuple[str, ...]
    minutes: float | None


def main(arguments: list[str] | None = None) -> int:
    """Runs the protocol; the exit status is 0, 1 with one message where something is missing, 130 where it stopped."""
    console = Console()
    show_log()
    try:
        settings = _settings(arguments)
        profile = load_profile(settings.profile)
        check_data(settings.data)
        place = Workplace(
            data=settings.data, out=settings.out, datasets=DATASETS, overrides=settings.overrides, console=console
        )
        done = _run(place, profile, settings)
        _write(settings, profile, place)
    except MetrError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    if not done:
        console.print("not done yet; to go on, give the same command again")
    return 0 if done else 130


def load_profile(name: str) -> Profile:
    """A profile by name.

    Raises:
        ConfigError: a key is unknown, or a value of the wrong kind.
    """
    return Profile.checked(read_yaml(HERE / "profiles" / f"transfer-detectors-{name}.yaml"))


def _run(place: Workplace, profile: Profile, settings: Settings) -> bool:
    """Runs what is not finished yet; False where it was stopped."""
    try:
        with stopping_after(settings.minutes):
            return run_all(place, profile, settings.detectors)
    except KeyboardInterrupt:
        return False


def _settings(arguments: list[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="trial")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of the seven datasets")
    parser.add_argument("--out", type=Path, help="the folder of all runs; runs/transfer-detectors-PROFILE by default")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS, help="only some of them")
    parser.add_argument("--minutes", type=float, help="stop by itself after so long, to be run again")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every METR")
    given = parser.parse_args(arguments)
    return Settings(
        profile=given.profile,
        data=given.data,
        out=given.out or Path("runs") / f"transfer-detectors-{given.profile}",
        results=given.results,
        overrides=tuple(given.set),
        detectors=tuple(given.detectors),
        minutes=given.minutes,
    )


def _write(settings: Settings, profile: Profile, place: Workplace) -> dict[str, Any] | None:
    """Writes what is known; None where no detector has all its arms yet."""
    results, pretraining = finished(place, profile), pretraining_seconds(place, profile)
    comparison = Comparison.of(results, tuple(profile.detectors))
    if not comparison.rows:
        return None
    complete = len(results) == len(profile.seeds) * len(comparison.rows[0].ap) * len(profile.detectors)
    seconds = sum(one.training_seconds for one in results) + sum(sum(kinds.values()) for kinds in pretraining.values())
    written: dict[str, Any] = {
        "benchmark": "transfer_detectors",
        "profile": settings.profile,
        "complete": complete,
        "hardware": hardware(resolved_device("auto")),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "settings": profile.model_dump(mode="json") | {"set": list(settings.overrides)},
        "training_seconds": round(seconds),
        "pretraining_seconds": pretraining,
        "runs": [asdict(one) for one in results],
        "rows": [asdict(row) | {"gain": row.gain, "over_joint": row.over_joint} for row in comparison.rows],
        "bars": [asdict(bar) for bar in comparison.bars],
    }
    settings.results.mkdir(parents=True, exist_ok=True)
    stem = settings.results / f"transfer-detectors-{settings.profile}"
    stem.with_suffix(".json").write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    facts = (
        f"Profile `{written['profile']}`{'' if complete else ' (not complete)'}: {seconds / 60:.0f} minutes of "
        f"training steps on {written['hardware']}, torch {written['torch']}, transformers {written['transformers']}, "
        f"commit {written['commit']}."
    )
    page = as_markdown(comparison, profile, pretraining)
    title = f"# Transfer to other detectors: {settings.profile}"
    stem.with_suffix(".md").write_text(f"{title}\n\n{facts}\n\n{page}", encoding="utf-8")
    draw_bars(comparison, stem.with_suffix(".png"))
    place.console.print(page, markup=False, soft_wrap=True)
    place.console.print(f"written: {stem}.json, .md and .png", markup=False, soft_wrap=True)
    return written


if __name__ == "__main__":
    sys.exit(main())
