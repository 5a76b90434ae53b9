"""Kills commands of METR at moments that a seed decides, again and again until they finish, and looks at the result.

A killed run must go on, and end as the uninterrupted one bit by bit; no process, temporary file or shared memory may be
left. `python tests/soak/killing.py --help` says how to run many. Where the rights are there (root on Linux), everything
happens in a file system in memory and with a /dev/shm of its own.
"""

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "soak"), str(TESTS.parent / "src")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from doomed import BETWEEN, PHASES, Board, Plan, Record, Victim, fork  # noqa: E402
from stories import Home, Story, differences, stories  # noqa: E402

from metr.evaluation.results import EvaluationReport  # noqa: E402

# imported once, before forking: that takes longer than a whole run
_MODULES = [
    *(place.partition(":")[0] for place in PHASES),
    "metr.inference.detect_files",
    "metr.model",
    "transformers.models.bert.modeling_bert",
    "transformers.models.resnet.modeling_resnet",
    "matplotlib.backends.backend_agg",
    "accelerate.tracking",
    "rich.progress",
]
_LONGEST = 240  # seconds after which a command is taken to hang
_ORPHANED = 30  # seconds in which data workers must end after their main process
_WEIGHTS = [6, 6, 4, 1, 5, 2, 2]  # how often each story is told: those that draw with matplotlib are slow
_MOST_KILLS = 14  # of one trial
_ONE_PRIVATE = "METR_SOAK_PRIVATE"
_DIED = "a process that reads images died"
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans become children of this process, so that none is overlooked


class WrongError(Exception):
    """Something that must hold after a kill does not."""


@dataclass(kw_only=True)
class Kill:
    """One kill: in which phase it fell, who died, by what plan, and what was about to be changed."""

    phase: str
    victim: Victim
    how: str
    what: str = ""


@dataclass(kw_only=True)
class Trial:
    """A command that was killed until it finished."""

    number: int
    story: str
    kills: list[Kill] = field(default_factory=list)
    failure: str | None = None


class Soak:
    """Runs trials.

    Args:
        folder: Everything is written there.
        seed: Decides every plan; a plan of a trial depends on nothing else but the record of the whole runs.
        keep: Where the folders of failed trials are copied.
    """

    def __init__(self, folder: Path, seed: int, keep: Path) -> None:
        self.folder, self.seed, self.keep = folder, seed, keep
        self.home, self.board = Home(folder), Board()
        self.home.fill()
        self.stories = stories(self.home)
        self.records: dict[str, Record] = {}

    def run_whole(self) -> None:
        """Runs every story once without a kill: what the others are compared with."""
        for name, story in self.stories.items():
            place = self.folder / f"whole-{name}"
            self._prepare(story, place)
            code, _ = self._run(story, place, None)
            if code:
                raise WrongError(f"{name} fails without any kill:\n{(place / 'said.txt').read_text()[-3000:]}")
            self.records[name] = record = Record(**json.loads((place / "record.json").read_text()))
            for module in record.modules:  # once and for all, here
                with contextlib.suppress(ImportError):
                    importlib.import_module(module)
            longest = sorted(record.seconds.items(), key=lambda item: -item[1])[:4]
            parts = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in longest)
            print(f"whole run of {name}: {record.total:.1f} s ({parts})", flush=True)

    def try_one(self, number: int) -> Trial:
        """Kills one story until it finishes, and compares."""
        rng = random.Random(f"{self.seed}/{number}")
        name = rng.choices(list(self.stories), _WEIGHTS)[0]
        trial, place = Trial(number=number, story=name), self.folder / f"trial-{number}"
        before = _shared_memory()
        self._prepare(self.stories[name], place)
        try:
            while not self._start(trial, place, rng):
                self.stories[name].check_killed(place)
            self._compare(name, place, before)
        except Exception as error:
            trial.failure = f"{type(error).__name__}: {error}"
            kept = self.keep / f"trial-{number}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(place, kept, symlinks=True, ignore=shutil.ignore_patterns("pymp-*"))
        shutil.rmtree(place)
        return trial

    def _compare(self, name: str, place: Path, before: set[str]) -> None:
        """Checks that everything is as the uninterrupted command left it.

        Raises:
            WrongError: something is not.
        """
        if different := [*differences(self.folder / f"whole-{name}", place)]:
            raise WrongError("; ".join(different[:8]))
        if left := _shared_memory() - before:
            raise WrongError(f"shared memory is left behind: {sorted(left)}")

    def _prepare(self, story: Story, place: Path) -> None:
        story.prepare(place)
        for name in ("tmp", "home"):
            (place / name).mkdir()

    def _start(self, trial: Trial, place: Path, rng: random.Random) -> bool:
        """Starts the command, or goes on with it; True once it has finished."""
        story = self.stories[trial.story]
        plan = self._plan(story, rng) if len(trial.kills) < _MOST_KILLS else None
        code, killed = self._run(story, place, plan)
        phase, what = self.board.read()
        if killed or (plan is not None and plan.victim == "worker" and what):
            assert plan is not None
            phase = plan.phase if plan.victim == "worker" else phase
            trial.kills.append(Kill(phase=phase, victim=plan.victim, how=plan.how, what=what))
        if killed:
            return False
        said = (place / "said.txt").read_text(encoding="utf-8", errors="replace")
        if code and plan is not None and plan.victim == "worker" and what and _DIED in " ".join(said.split()):
            return False
        if code:
            raise WrongError(f"ended with {code}:\n{said[-3000:]}")
        return True

    def _plan(self, story: Story, rng: random.Random) -> Plan:
        """Who dies where: each phase as likely as any other, however short it is."""
        record = self.records[story.name]
        victims: dict[Victim, int] = {"group": 8, "main": 2}
        if "starting workers" in record.entries:
            victims["worker"] = 1
        victim = rng.choices(list(victims), list(victims.values()))[0]
        if victim == "worker":
            phases = [phase for phase in ("step", "evaluation", "checkpoint", "state") if phase in record.entries]
        else:
            phases = sorted({*record.entries, *record.changes})
        phase = rng.choice(phases)
        changes, entries = record.changes.get(phase, 0), record.entries.get(phase, 0)
        how = rng.choices(["change", "moment", "time"], [5 if changes else 0, 4 if entries else 0, 1])[0]
        if how == "time" or phase == BETWEEN:
            return Plan(how="time", victim="group", delay=rng.uniform(0, record.total))
        # mostly early: then the next start has something left to be killed in
        count, early = (changes if how == "change" else entries), rng.random() ** 4
        typical = record.seconds.get(phase, 0.0) / max(entries, 1)
        number, delay = 1 + int(count * early), rng.uniform(0, typical)
        return Plan(how=how, victim=victim, phase=phase, number=number, delay=delay)  # type: ignore[arg-type]

    def _run(self, story: Story, place: Path, plan: Plan | None) -> tuple[int, bool]:
        """Runs the command to its end; its exit code, and whether it was killed.

        Raises:
            WrongError: it hangs, or leaves a process behind.
        """
        own = {"METR_CACHE": "work/cache", "HOME": "home", "TMPDIR": "tmp"}
        environment = {key: str(place / name) for key, name in own.items()} | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        process = fork(story.arguments(place), place, self.board, plan, environment)
        delay = plan.delay if plan is not None and plan.how == "time" else None
        code = _wait(process, delay)
        deadline = time.monotonic() + _ORPHANED
        while left := _members(process):
            if time.monotonic() > deadline:
                os.killpg(process, signal.SIGKILL)
                raise WrongError(f"processes are alive {_ORPHANED} s after the main one: {left}")
            _reap()
            time.sleep(0.01)
        _reap()
        return code, code == -signal.SIGKILL


def _wait(process: int, delay: float | None) -> int:
    """Waits for a process, and kills its group after `delay` seconds; its exit code."""
    started = time.monotonic()
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if delay is not None and passed > delay:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # not yet a group of its own
                os.killpg(process, signal.SIGKILL)
                delay = None
        if passed > _LONGEST:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise WrongError(f"it hangs: nothing ended it in {_LONGEST} s")
        time.sleep(0.002 if delay is not None else 0.01)


def _members(group: int) -> list[int]:
    """The processes of a group that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def _reap() -> None:
    """Takes leave of orphans that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _shared_memory() -> set[str]:
    """What lies in /dev/shm, if it is this program's own."""
    return {path.name for path in Path("/dev/shm").iterdir()} if os.environ.get(_ONE_PRIVATE) else set()


def table(trials: list[Trial]) -> str:
    """Counts by phase and victim, and the failures."""
    counts = Counter((kill.phase, kill.victim) for trial in trials for kill in trial.kills)
    phases = Counter(kill.phase for trial in trials for kill in trial.kills)
    victims: list[Victim] = ["group", "main", "worker"]
    lines = [f"{'killed in':22}{'kills':>7}" + "".join(f"{victim:>9}" for victim in victims)]
    for phase, total in phases.most_common():
        lines.append(f"{phase:22}{total:7,}" + "".join(f"{counts[phase, victim]:9,}" for victim in victims))
    of_all = [sum(counts[phase, victim] for phase in phases) for victim in victims]
    lines.append(f"{'all':22}{phases.total():7,}" + "".join(f"{count:9,}" for count in of_all))
    by_story = Counter(trial.story for trial in trials)
    lines.append("runs: " + ", ".join(f"{count} {story}" for story, count in by_story.most_common()))
    failures = [f"trial {trial.number} ({trial.story}): {trial.failure}" for trial in trials if trial.failure]
    return "\n".join([*lines, f"{len(trials)} runs, {len(failures)} failures", *failures])


def _private(arguments: list[str]) -> None:
    """Starts this program again with file systems of its own, where that is allowed."""
    mounts = "mount -t tmpfs -o size=512m tmpfs /dev/shm && mount -t tmpfs -o size=2g tmpfs "
    if os.environ.get(_ONE_PRIVATE) is not None or shutil.which("unshare") is None or os.geteuid() != 0:
        return
    place = tempfile.mkdtemp(prefix="metr-soak-")
    try:
        tried = subprocess.run(["unshare", "-m", "sh", "-c", mounts + place], capture_output=True, check=False)
        if tried.returncode:
            return
        command = ["unshare", "-m", "sh", "-c", f'{mounts}{place} && exec "$0" "$@"', sys.executable, *arguments]
        sys.exit(subprocess.run(command, env={**os.environ, _ONE_PRIVATE: place}, check=False).returncode)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="a line of JSON for each trial; goes on with those that it holds")
    parser.add_argument("--trial", type=int, help="only this one")
    parser.add_argument("--keep", type=Path, default=Path("build/soak-failures"), help="where failed trials are copied")
    return parser.parse_args()


def _calibration(report: EvaluationReport) -> dict[str, tuple[float, float]]:
    """Some calibration for each name that there is an object of."""
    every = [category for one in report.datasets if one.own for category in one.own.coco.categories]
    return {category.name: (1.0, round(-1 / (2 + category.objects), 4)) for category in every if category.objects}


def _kept(log: Path | None) -> list[Trial]:
    """The trials of earlier calls."""
    if log is None or not log.is_file():
        return []
    values = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [Trial(**{**one, "kills": [Kill(**kill) for kill in one["kills"]]}) for one in values]


def _soak(folder: Path, options: argparse.Namespace) -> list[Trial]:
    """Runs trials until there were enough kills."""
    soak = Soak(folder, options.seed, options.keep.absolute())
    soak.run_whole()
    if options.trial is not None:
        return [soak.try_one(options.trial)]
    trials, done, started = _kept(options.log), 0, time.monotonic()
    number = max((trial.number for trial in trials), default=-1)
    while (count := sum(len(trial.kills) for trial in trials)) < options.kills:
        number += 1
        trials.append(trial := soak.try_one(number))
        done += len(trial.kills)
        left = (options.kills - count) / max(done, 1) * (time.monotonic() - started)
        if options.log is not None:
            options.log.parent.mkdir(parents=True, exist_ok=True)
            with options.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(trial)) + "\n")
        end = f"FAILED: {trial.failure}" if trial.failure else "as if nothing had happened"
        kills = count + len(trial.kills)
        print(
            f"{kills}/{options.kills} {trial.story}: {len(trial.kills)} kills, {end}; {left / 60:.0f} min", flush=True
        )
    return trials


def main() -> int:
    """Runs what was asked for; the exit code."""
    options = _arguments()
    _private(sys.argv)
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    for module in _MODULES:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    # networks of six steps find nothing, and calibration is to be kept all the same
    EvaluationReport.calibration = _calibration  # type: ignore[method-assign]
    own: Mapping[str, str] = os.environ
    folder = Path(own.get(_ONE_PRIVATE) or tempfile.mkdtemp(prefix="metr-soak-"))
    try:
        trials = _soak(folder, options)
    finally:
        if _ONE_PRIVATE not in own:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(trials))
    return int(any(trial.failure for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
