"""Transfer: is a detector that was pretrained on other datasets a better beginning than an ImageNet backbone alone?

    python benchmarks/transfer.py --profile trial --data ../shared/data

Leaves a dataset out, pretrains on the others, and fine-tunes on shares of the left-out one's training images;
against the same detector that starts from the ImageNet backbone, on the same images, for the same steps. AP on the
left-out dataset's val split, own names, last weights. It can be stopped and run again: it goes on where it was, and
finished runs are not run again. `--minutes 9` stops it by itself. The result is written to
`results/transfer-PROFILE.json`, `.md` and `.png` beside this file whenever it ends, with what is finished until then;
the runs go to `--out`.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import resumable
from kept_runs import commits_of, runs_by_commit
from machine import commit, hardware
from metr.config import read_yaml
from metr.devices import resolved_device
from resumable import check_data, command_line, done_within, exit_status, parsed, write_result
from transfer_comparison import Comparison, as_markdown, draw_curves
from transfer_runs import DATASETS, Profile, Workplace, finished, pretrainings, run_all

HERE = Path(__file__).resolve().parent
PROFILES = ("trial", "gpu")


@dataclass(frozen=True, kw_only=True)
class Settings(resumable.Settings):
    """What the command line says."""

    minutes: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the protocol; the exit status is 0, 1 with one message where something is missing, 130 where it stopped."""
    return exit_status(partial(_protocol, _settings(arguments)))


def _protocol(settings: Settings, console: Console) -> bool:
    """Runs what is not finished yet, and writes what is; False where it was stopped."""
    profile = Profile.checked(read_yaml(HERE / "profiles" / f"transfer-{settings.profile}.yaml"))
    check_data(settings.data, DATASETS)
    place = Workplace(
        data=settings.data, out=settings.out, datasets=DATASETS, overrides=settings.overrides, console=console
    )
    done = done_within(settings.minutes, partial(run_all, place, profile))
    _write(settings, profile, place, done)
    return done


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = command_line(__doc__, "transfer", PROFILES, overridden="every run")
    parser.add_argument("--minutes", type=float, help="stop by itself after so long, to be run again")
    return Settings(**parsed(parser, arguments))


def _write(settings: Settings, profile: Profile, place: Workplace, done: bool) -> None:
    """Writes what is known, once something can be compared."""
    results, before = finished(place, profile), pretrainings(place, profile)
    comparison = Comparison.of(results, profile.left_out)
    if not comparison.points:
        return
    made = [(one.title, one.commit) for one in before] + [(one.title, one.commit) for one in results]
    written: dict[str, Any] = {
        "benchmark": "transfer",
        "profile": settings.profile,
        "complete": done,
        "hardware": hardware(resolved_device("auto")),
        "torch": torch.__version__,
        "commit": commits_of(made),
        "written_by": commit(),
        "settings": profile.model_dump(mode="json") | {"set": list(settings.overrides)},
        "training_seconds": round(sum(one.training_seconds for one in results)),
        "pretraining": [asdict(one) for one in before],
        "runs": [asdict(one) for one in results],
        "points": [asdict(point) for point in comparison.points],
        "bars": [asdict(bar) for bar in comparison.bars],
    }
    pretraining = sum(one.training_seconds for one in before)
    facts = (
        f"Profile `{written['profile']}`{'' if done else ' (not complete)'}: {written['training_seconds'] / 60:.0f} "
        f"minutes of training steps, besides {pretraining / 60:.0f} of pretraining, on {written['hardware']}, "
        f"torch {written['torch']}, commit {written['commit']}."
    )
    page = as_markdown(comparison, profile)
    whole = [f"# Transfer: {settings.profile}", facts, page.rstrip(), runs_by_commit(made)]
    write_result(settings.stem, written, "\n\n".join(part for part in whole if part) + "\n")
    draw_curves(comparison, settings.stem.with_suffix(".png"))
    place.console.print(page, markup=False, soft_wrap=True)
    place.console.print(f"written: {settings.stem}.json, .md and .png", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
