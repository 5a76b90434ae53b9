"""What every study runs on: its command line, its runs, the hardware they ran on.

A study is a list of `Run`s, one after the other. Each has a folder of its own. `run.json` is written there before the
first step: the settings that decide the result, and every commit that worked on it. `report.json` is written when the
run is finished; then it is not run again. A study that is stopped goes on where it was when its command is given again,
and a run that was begun with other settings is refused.
"""

import argparse
import json
import platform
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from metr.checkpoint import load_checkpoint
from metr.cli.output import show_log
from metr.config import Config, Tree, merge, parse_overrides, read_yaml
from metr.data.dataset_config import DatasetConfig
from metr.data.datasets_file import DatasetSource
from metr.data.formats.registry import recognise
from metr.data.joint import open_joint
from metr.data.records import TEST, TRAIN, VAL, plan_splits
from metr.devices import resolved_device
from metr.errors import ConfigError, DataError, MetrError
from metr.evaluation.results import EvaluationConfig
from metr.run_directory import RunDirectory
from metr.serialization import read_json
from metr.text.cache import cache_root
from metr.training.config import RunConfig, load_recipe
from metr.training.logger import read_metrics
from metr.training.train import train

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DATASETS = ("aquarium", "bccd", "chess_pieces", "coco_mini", "doc_tables", "endangered_animals", "playing_cards")
REPORT, BEGUN, LOCK = "report.json", "run.json", "run.lock"

# last words of settings that decide how a run is logged, saved and fed, and nothing of its result
_DECIDE_NOTHING = frozenset(
    {"checkpoint_every", "curves", "images", "log_every", "prefetch", "progress_seconds", "tensorboard", "workers"}
)
# differing settings that a message lists
_LISTED = 5
_CPU_FACTS = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as its command line asks for it; result files are called after its name and profile.

    Datasets are in `data`, runs in `out`; `overrides` (`section.key=value`) change the configuration of every run.
    """

    name: str
    profile: str
    data: Path
    out: Path
    results: Path = RESULTS
    overrides: tuple[str, ...] = ()
    console: Console = field(default_factory=Console)

    @property
    def stem(self) -> Path:
        """The path of the result files without their suffix."""
        return self.results / f"{self.name}-{self.profile}"

    def read_profile(self) -> Tree:
        """What the profile's YAML file says."""
        return read_yaml(HERE / "profiles" / f"{self.name}-{self.profile}.yaml")

    def datasets(self, names: Sequence[str] = DATASETS) -> list[str]:
        """Datasets as METR's verbs take them; see `argument`.

        Raises:
            DataError: some of them are not in the folder.
        """
        if missing := [name for name in names if not (self.data / name).is_dir()]:
            hint = "name the folder that holds them, one folder each, with --data"
            raise DataError(f"expected the datasets {', '.join(missing)}", where=self.data, hint=hint)
        return [argument(name, self.data / name) for name in names]

    def configuration(self, tree: Mapping[str, Any]) -> Tree:
        """A run's part of the configuration with the overrides laid over it."""
        return merge(tree, parse_overrides(self.overrides))

    def recipe(self, tree: Mapping[str, Any], *first: str) -> RunConfig:
        """The whole configuration of a training run of size `nano`; overrides `first` yield to those of the command."""
        return load_recipe("nano", changes=merge(tree, parse_overrides(first), parse_overrides(self.overrides)))


def argument(name: str, folder: Path) -> str:
    """A dataset as METR's verbs take it: name=folder.

    The protocol trains on all of a train split. Where a dataset has train and test alone, METR would hold a part of
    train out as val: then this is a datasets file, kept in METR's cache, that evaluates on test.
    """
    own = list(recognise(folder).splits)
    if plan_splits(own, None, folder).parts.keys() != {TRAIN, TEST}:
        return f"{name}={folder}"
    dataset = {"name": name, "path": str(folder.resolve()), "splits": {TRAIN: TRAIN, VAL: TEST}}
    text = json.dumps({"datasets": [dataset]}, indent=1)
    file = cache_root() / "benchmarks" / f"{name}-{sha256(text.encode()).hexdigest()[:8]}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return str(file)


def distinct_datasets(study: Study, names: Sequence[str]) -> list[str]:
    """Datasets as METR's verbs take them; a category that several have is called after its dataset in each."""
    arguments = study.datasets(names)
    sources = open_joint(arguments).sources
    often = Counter(name for source in sources for name in set(source.categories))
    return [_renamed(study, one, source, often) for one, source in zip(arguments, sources, strict=True)]


def _renamed(study: Study, argument: str, source: DatasetSource, often: Mapping[str, int]) -> str:
    """A dataset with other names for those that others have too, as a datasets file in the folder of runs."""
    renames = {name: f"{source.name} {name}" for name in source.categories if often[name] > 1}
    return datasets_file(study, source.renamed(renames).config) if renames else argument


def datasets_file(study: Study, config: DatasetConfig) -> str:
    """A dataset with these options as a datasets file in the folder of runs; gives the file's path."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    values["path"] = str(Path(config.path).resolve())
    file = study.out.with_name(f"{study.out.name}-datasets") / f"{config.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"datasets": [values]}, indent=1), encoding="utf-8")
    return str(file)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a study.

    Attributes:
        folder: Where it is kept.
        title: What it is, in a few words.
        settings: All that decides its result; its training configuration under `configuration`.
        work: Does it, or goes on where it was stopped; gives its report, or None where it was interrupted.
    """

    folder: Path
    title: str
    settings: Mapping[str, Any]
    work: Callable[[], Mapping[str, Any] | None]

    @property
    def finished(self) -> bool:
        """Whether its report is there."""
        return (self.folder / REPORT).is_file()

    def report(self) -> Tree:
        """What it found, with `commit` and `settings`.

        Raises:
            CheckpointError: there is no report, or it cannot be read.
        """
        return read_json(self.folder / REPORT)

    def check(self) -> None:
        """Refuses to mix runs of different settings; does nothing where it was not begun yet.

        Options that METR has had only since then were as they are by default.

        Raises:
            ConfigError: it was begun with other settings than those asked for now.
            CheckpointError: what it keeps cannot be read.
        """
        if not (begun := self._begun()):
            return
        before, now = dict(_leaves(begun["settings"])), dict(_leaves(_plain(self.settings)))
        before = {key: value for key, value in _leaves(_plain({"configuration": RunConfig()})) if key in now} | before
        other = [
            f"{key.removeprefix('configuration.')} {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key.rpartition(".")[2] not in _DECIDE_NOTHING
        ]
        if other:
            more = f" and {len(other) - _LISTED} more" if len(other) > _LISTED else ""
            hint = "name another --out, or remove this folder; or ask for the same settings as at first"
            raise ConfigError(f"the run was made with {', '.join(other[:_LISTED])}{more}", where=self.folder, hint=hint)

    def execute(self, console: Console, wait: bool = True) -> bool | None:
        """Does what is left to do; False where it was interrupted.

        Where another process does it, waits for it, or gives None at once.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not wait:
                return None
            console.print(f"another process is at it, waiting: {self.title}", markup=False)
            lock.acquire()
        try:
            return self._execute(console)
        finally:
            lock.release()

    def _execute(self, console: Console) -> bool:
        if self.finished:
            return True
        console.rule(self.title)
        self.check()
        commits = list(dict.fromkeys([*self._begun().get("commits", []), commit()]))
        self._write(BEGUN, {"commits": commits, "settings": self.settings})
        found = self.work()
        if found is not None:
            self._write(REPORT, {**found, "commit": ", ".join(commits), "settings": self.settings})
        return found is not None

    def _begun(self) -> Tree:
        """What it was begun with; empty where it was not."""
        path = self.folder / BEGUN
        return read_json(path) if path.is_file() else {}

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes a file that is there whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f".{name}.new"
        new.write_text(json.dumps(_plain(values), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(self.folder / name)


def run_all(
    study: Study, runs: Sequence[Run], chosen: Sequence[Run] | None = None, *, independent: bool = False
) -> bool:
    """Does the runs in their order, as far as they are not finished; False where it was stopped.

    A run that another process does is waited for before the next one begins, as that may need it.

    Args:
        study: Where progress is shown.
        runs: All runs of the study; every one is checked before the first begins.
        chosen: The ones to do, if not all.
        independent: No run needs another one. Those that other processes do are then waited for at the end.

    Raises:
        MetrError: a run was begun with other settings, or data or configuration do not fit.
    """
    for run in runs:
        run.check()
    try:
        left = list(runs if chosen is None else chosen)
        for run in tuple(left) if independent else ():
            done = run.execute(study.console, wait=False)
            if done is not None:
                left.remove(run)
            if done is False:
                return False
        return all(run.execute(study.console) for run in left)
    except KeyboardInterrupt:
        return False


def reports(runs: Sequence[Run]) -> list[Tree]:
    """The reports of the runs that are finished, without their settings."""
    found = [run.report() for run in runs if run.finished]
    return [{key: value for key, value in one.items() if key != "settings"} for one in found]


def training_run(
    study: Study,
    folder: Path,
    recipe: RunConfig,
    data: Sequence[str],
    title: str,
    quick: EvaluationConfig | None = None,
    **more: Any,
) -> Run:
    """A run that trains METR on datasets (name=folder); `quick` says how evaluations during training are made.
    `more` goes to `metr.train`: `allow_empty` where a split may have lost most of its boxes, a `start`.

    The checkpoint to use is `folder / "last"`, not the best: choosing by the images that are reported would flatter.
    """

    def work() -> Tree | None:
        resume = RunDirectory(folder).resumable
        asked = more if not resume else {key: value for key, value in more.items() if key != "start"}
        outcome = train(data, folder, recipe, resume=resume, console=study.console, evaluation=quick, **asked)
        if outcome.interrupted:
            return None
        return {"data": list(load_checkpoint(folder / "last").vocabulary.datasets), **training_cost(folder)}

    names = [one.partition("=")[0] for one in data]
    return Run(folder=folder, title=title, settings={"datasets": names, "configuration": recipe}, work=work)


def training_cost(folder: Path) -> Tree:
    """Steps, images seen and seconds of steps of a METR's training, however often it was stopped."""
    trained = load_checkpoint(folder / "last").training
    seconds = training_seconds(folder)
    return {"steps": trained["step"], "images_seen": trained["images"], "training_seconds": seconds}


def as_overrides(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """A configuration as `section=values`, for verbs that take no mapping."""
    return tuple(f"{section}={json.dumps(values)}" for section, values in tree.items())


def training_seconds(folder: Path) -> float:
    """Seconds of a run's training steps by its metrics.jsonl, however often it was stopped."""
    return round(max((float(record.get("seconds", 0.0)) for record in read_metrics(folder)), default=0.0), 3)


def option_parser(about: str | None, profiles: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A command that is explained by its module's docstring; with profiles, the options of a `Study`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if profiles:
        parser.add_argument("--profile", choices=profiles, default=profiles[0])
        parser.add_argument("--data", type=Path, metavar="FOLDER", help=f"holds {', '.join(DATASETS)}")
        parser.add_argument("--out", type=Path, help="the folder of all runs; runs/STUDY-PROFILE by default")
        parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every METR")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of result files")
    return parser


def parse_study(
    parser: argparse.ArgumentParser, name: str, arguments: Sequence[str] | None
) -> tuple[Study, dict[str, Any]]:
    """The study that a command line asks for, and the values of the options that are its own."""
    given = vars(parser.parse_args(arguments))
    if given["data"] is None:
        parser.error(f"expected --data FOLDER, a folder with one folder for each dataset: {', '.join(DATASETS)}")
    common = {key: given.pop(key) for key in ("profile", "data", "results")}
    out = given.pop("out") or Path("runs") / f"{name}-{common['profile']}"
    return Study(name=name, out=out, overrides=tuple(given.pop("set")), **common), given


def exit_status(work: Callable[[], bool]) -> int:
    """Works, and gives the exit status: 0, 1 after one message where something is wrong, 130 where it was stopped."""
    console = Console()
    show_log()
    try:
        done = work()
    except MetrError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        done = False
    if not done:
        console.print("not done yet; to go on, give the same command again")
    return 0 if done else 130


def circumstances(benchmark: str, commits: str, device: str = "auto") -> Tree:
    """What every result says of itself: the study, hardware, torch, and the commits that made it."""
    where = hardware(resolved_device(device))
    return {"benchmark": benchmark, "hardware": where, "torch": torch.__version__, "commit": commits}


def hardware(device: torch.device) -> str:
    """The accelerator's name, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if _CPU_FACTS.is_file():
        facts = (line.partition(":") for line in _CPU_FACTS.read_text(encoding="utf-8").splitlines())
        name = next((value.strip() for key, _, value in facts if key.strip() == "model name"), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def commit() -> str:
    """The commit that is checked out, with "+" where files were changed since; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    described = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def _plain(values: Mapping[str, Any]) -> Tree:
    """The values as JSON gives them back."""
    plain: Tree = json.loads(
        json.dumps(values, default=lambda it: it.model_dump() if isinstance(it, Config) else str(it))
    )
    return plain


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        place = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from _leaves(value, place)
        else:
            yield place, value
