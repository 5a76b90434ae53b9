"""Transfer to detectors of transformers: are METR's weights a better beginning than a backbone, or own pretraining?

    python benchmarks/transfer_detectors.py --profile trial --data ../shared/data

Leaves a dataset out and fine-tunes RT-DETR, Deformable DETR and DAB-DETR on it with transformers' Trainer, from

- `own`: the ImageNet backbone alone, everything else as transformers initialises it,
- `untrained`: the same backbone, everything else as `metr transfer` leaves it before METR has learnt anything: what
  this gains is the gain of a better start (of queries above all), and not of weights,
- `joint`: the detector's own pretraining on the other datasets, labels side by side; its classification head begins
  anew, as transformers does it,
- `metr`: `metr transfer` of a METR of the detector's family, pretrained on the same images in the same order.

COCO AP on the left-out dataset's val split. It can be stopped and run again: it goes on where it was, and finished
runs are not run again. `--minutes 9` stops it by itself. The result is written to
`results/transfer-detectors-PROFILE.json`, `.md` and `.png` beside this file whenever it ends, with what is finished
until then; the runs go to `--out`.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import resumable
from kept_runs import commits_of, runs_by_commit
from machine import commit, hardware
from metr.config import read_yaml
from metr.devices import resolved_device
from resumable import check_data, command_line, done_within, exit_status, parsed, write_result
from transfer_detectors_comparison import Comparison, as_markdown, draw_bars
from transfer_detectors_runs import Profile, finished, pretrainings, run_all
from transfer_runs import DATASETS, Workplace

HERE = Path(__file__).resolve().parent
PROFILES = ("trial", "gpu")
DETECTORS = ("rt_detr", "deformable_detr", "dab_detr")


@dataclass(frozen=True, kw_only=True)
class Settings(resumable.Settings):
    """What the command line says."""

    detectors: tuple[str, ...]
    minutes: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the protocol; the exit status is 0, 1 with one message where something is missing, 130 where it stopped."""
    return exit_status(partial(_protocol, _settings(arguments)))


def _protocol(settings: Settings, console: Console) -> bool:
    """Runs what is not finished yet, and writes what is; False where it was stopped."""
    profile = load_profile(settings.profile)
    check_data(settings.data, DATASETS)
    place = Workplace(
        data=settings.data, out=settings.out, datasets=DATASETS, overrides=settings.overrides, console=console
    )
    done = done_within(settings.minutes, partial(run_all, place, profile, settings.detectors))
    _write(settings, profile, place)
    return done


def load_profile(name: str) -> Profile:
    """A profile by name.

    Raises:
        ConfigError: a key is unknown, or a value of the wrong kind.
    """
    return Profile.checked(read_yaml(HERE / "profiles" / f"transfer-detectors-{name}.yaml"))


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = command_line(__doc__, "transfer-detectors", PROFILES, overridden="every METR")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS, help="only some of them")
    parser.add_argument("--minutes", type=float, help="stop by itself after so long, to be run again")
    given = parsed(parser, arguments)
    return Settings(**given | {"detectors": tuple(given["detectors"])})


def _write(settings: Settings, profile: Profile, place: Workplace) -> None:
    """Writes what is known, once a detector has all its arms."""
    results, pretraining = finished(place, profile), pretrainings(place, profile)
    comparison = Comparison.of(results, tuple(profile.detectors))
    if not comparison.rows:
        return
    complete = len(results) == len(profile.seeds) * len(comparison.rows[0].ap) * len(profile.detectors)
    seconds = sum(one.training_seconds for one in results) + sum(one.training_seconds for one in pretraining)
    made = [(one.title, one.commit) for one in pretraining] + [(one.title, one.commit) for one in results]
    written: dict[str, Any] = {
        "benchmark": "transfer_detectors",
        "profile": settings.profile,
        "complete": complete,
        "hardware": hardware(resolved_device("auto")),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commits_of(made),
        "written_by": commit(),
        "settings": profile.model_dump(mode="json") | {"set": list(settings.overrides)},
        "training_seconds": round(seconds),
        "pretraining": [asdict(one) for one in pretraining],
        "runs": [asdict(one) for one in results],
        "rows": [asdict(row) | {"gain": row.gain, "over_joint": row.over_joint} for row in comparison.rows],
        "bars": [asdict(bar) for bar in comparison.bars],
    }
    facts = (
        f"Profile `{written['profile']}`{'' if complete else ' (not complete)'}: {seconds / 60:.0f} minutes of "
        f"training steps on {written['hardware']}, torch {written['torch']}, transformers {written['transformers']}, "
        f"commit {written['commit']}."
    )
    page = as_markdown(comparison, profile, pretraining)
    whole = [f"# Transfer to other detectors: {settings.profile}", facts, page.rstrip(), runs_by_commit(made)]
    write_result(settings.stem, written, "\n\n".join(part for part in whole if part) + "\n")
    draw_bars(comparison, settings.stem.with_suffix(".png"))
    place.console.print(page, markup=False, soft_wrap=True)
    place.console.print(f"written: {settings.stem}.json, .md and .png", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
