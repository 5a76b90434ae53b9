"""Remembering: does a detector that is fine-tuned on a new dataset still find the categories of the old ones?

    python benchmarks/rehearsal.py --profile trial --data ../shared/data

Takes a detector of the old datasets (`--from RUN`; by default it trains one itself), fine-tunes it on the new dataset
twice, without rehearsal and with a share of the images from the old datasets, for the same steps with the same
seed, and judges all datasets before and after: AP with each dataset's own names, and with all names of all of them. It
can be stopped and run again: it goes on where it was, and finished runs are not run again. `--minutes 9` stops it by
itself. When both arms are finished, the result is written to `results/rehearsal-PROFILE.json` and `.md` beside this
file; the runs go to `--out`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
from rehearsal_comparison import Comparison, as_dict, as_markdown
from rehearsal_runs import Profile, finished, pretraining, run_all
from resumable import check_data, command_line, done_within, exit_status, parsed, write_result
from transfer_runs import Workplace

HERE = Path(__file__).resolve().parent
PROFILES = ("trial", "gpu")


@dataclass(frozen=True, kw_only=True)
class Settings(resumable.Settings):
    """What the command line says; `source` is the checkpoint to begin with, where it is not to be trained here."""

    source: str | None
    minutes: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the protocol; the exit status is 0, 1 with one message where something is missing, 130 where it stopped."""
    return exit_status(partial(_protocol, _settings(arguments)))


def load_profile(name: str) -> Profile:
    """A profile by name.

    Raises:
        ConfigError: a key is unknown, or a value of the wrong kind.
    """
    return Profile.checked(read_yaml(HERE / "profiles" / f"rehearsal-{name}.yaml"))


def _protocol(settings: Settings, console: Console) -> bool:
    """Runs what is not finished yet, and writes the result when all is; False where it was stopped."""
    profile = load_profile(settings.profile)
    names = (*profile.old, profile.new)
    check_data(settings.data, names)
    place = Workplace(
        data=settings.data, out=settings.out, datasets=names, overrides=settings.overrides, console=console
    )
    done = done_within(settings.minutes, partial(run_all, place, profile, settings.source))
    if done:
        _write(settings, profile, place)
    return done


def _settings(arguments: Sequence[str] | None) -> Settings:
    parser = command_line(__doc__, "rehearsal", PROFILES, overridden="every run")
    parser.add_argument("--from", dest="source", metavar="RUN", help="a run or checkpoint of the old datasets")
    parser.add_argument("--minutes", type=float, help="stop by itself after so long, to be run again")
    return Settings(**parsed(parser, arguments))


def _write(settings: Settings, profile: Profile, place: Workplace) -> None:
    results = finished(place, profile, settings.source)
    before = pretraining(place, profile) if settings.source is None else None
    comparison = Comparison.of(results, profile)
    made = [("pretraining", before.commit)] if before is not None else []
    made += [(one.title, one.commit) for one in results]
    seconds = sum(one.training_seconds for one in results) + (before.training_seconds if before is not None else 0.0)
    # the path to a checkpoint is of this machine alone
    began = "its own pretraining" if settings.source is None else Path(settings.source).name
    written: dict[str, Any] = {
        "benchmark": "rehearsal",
        "profile": settings.profile,
        "hardware": hardware(resolved_device("auto")),
        "torch": torch.__version__,
        "commit": commits_of(made),
        "written_by": commit(),
        "settings": profile.model_dump(mode="json") | {"set": list(settings.overrides), "from": began},
        "training_seconds": round(seconds),
        "pretraining_seconds": before.training_seconds if before is not None else None,
        "arms": {
            one.arm: {"steps": one.steps, "training_seconds": one.training_seconds, "commit": one.commit}
            for one in results
        },
        **as_dict(comparison),
    }
    facts = (
        f"Profile `{settings.profile}`, from {began}: {seconds / 60:.0f} minutes of training steps on "
        f"{written['hardware']}, torch {written['torch']}, commit {written['commit']}."
    )
    page = as_markdown(comparison, profile)
    whole = [f"# Remembering: {settings.profile}", page.rstrip(), facts, runs_by_commit(made)]
    write_result(settings.stem, written, "\n\n".join(part for part in whole if part) + "\n")
    place.console.print(page, markup=False, soft_wrap=True)
    place.console.print(f"written: {settings.stem}.json and .md", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
