"""What the runs of a benchmark keep about themselves: the commits that made them, and the settings that decided them.

A run has a folder of its own. `run.json` in it is written before the first step, `report.json` when it is finished;
then it is not run again. A run that was begun with other settings than those that are asked for now is refused, be it
finished or not; the commit may be another one, and is told.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import commit
from metr.config import Tree, merge, read_yaml
from metr.errors import ConfigError
from metr.serialization import read_json

REPORT, BEGUN, RECIPE = "report.json", "run.json", "recipe.yaml"
UNKNOWN = "unknown"
# the last words of settings that decide how a run is told, kept and fed, and nothing that it finds
_DECIDE_NOTHING = frozenset(
    {"checkpoint_every", "curves", "log_every", "prefetch", "progress_seconds", "tensorboard", "workers"}
)

# settings that differ which a message lists
_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run by its folder.

    Attributes:
        folder: Where it is.
        settings: What decides it, as it is asked for now; its configuration under `configuration`.
        beside: Configurations as YAML, the resolved one last, that tell with what a run was begun that has no run.json:
            there was a time when runs kept neither settings nor commit.
    """

    folder: Path
    settings: Tree
    beside: tuple[Path, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.folder / REPORT).is_file()

    def check(self) -> None:
        """Whether it was begun with what is asked for, as far as it tells.

        Raises:
            ConfigError: it was begun with something else.
        """
        asked = dict(_leaves(_plain(self.settings)))
        kept = self._told
        if "settings" in kept:
            began = dict(_leaves(kept["settings"]))
            keys = sorted(began.keys() | asked.keys())
        else:
            began = dict(_leaves(self._settings_beside))
            keys = sorted(began.keys() & asked.keys())
        other = [key for key in keys if began.get(key) != asked.get(key) and _decides(key)]
        if other:
            told = [f"{_short(key)} {began.get(key)!r}, now {asked.get(key)!r}" for key in other[:_LISTED]]
            named = ", ".join(told) + (f" and {len(other) - _LISTED} more" if len(other) > _LISTED else "")
            hint = "name another --out, or remove this folder; or ask for the same settings as at first"
            raise ConfigError(f"the run was made with {named}", where=self.folder, hint=hint)

    def begin(self) -> None:
        """Notes commit and settings, before the first step and whenever it goes on.

        Raises:
            ConfigError: it was begun with other settings.
        """
        self.check()
        # what is there without a note was made by a commit that nobody knows
        before = self._told.get("commits", [UNKNOWN] if _holds_something(self.folder) else [])
        commits = list(dict.fromkeys([*before, commit()]))
        self._write(BEGUN, {"commits": commits, "settings": self.settings})

    def finish(self, told: Mapping[str, Any]) -> None:
        """Writes what it found; from here on it is finished."""
        made_from = ", ".join(self._told["commits"])
        self._write(REPORT, {**told, "commit": made_from, "settings": self.settings})

    def report(self) -> Tree:
        """What a finished run found, with the commits that made it (`unknown` where it does not tell).

        Raises:
            CheckpointError: the report cannot be read.
        """
        return {"commit": UNKNOWN} | read_json(self.folder / REPORT)

    @property
    def _told(self) -> Tree:
        """What the folder itself tells."""
        for name in (REPORT, BEGUN):
            if (self.folder / name).is_file():
                return read_json(self.folder / name)
        return {}

    @property
    def _settings_beside(self) -> Tree:
        """What a folder without a note of its own tells: the facts of its report, and configurations."""
        if not _holds_something(self.folder):
            return {}
        found = [read_yaml(path) for path in self.beside if path.is_file()]
        return _plain(self._told | {"configuration": merge({}, *found)})

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        """A file that is there whole, or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = self.folder / f".{name}.new"
        fresh.write_text(json.dumps(_plain(values), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        fresh.replace(self.folder / name)


def commits_of(made: Sequence[tuple[str, str]]) -> str:
    """The commits that made some runs, given as (name, commit)."""
    return " and ".join(dict.fromkeys(maker for _, maker in made))


def runs_by_commit(made: Sequence[tuple[str, str]]) -> str:
    """Which commit made which run, given as (name, commit); nothing where it is the same for all."""
    names: dict[str, list[str]] = {}
    for name, maker in made:
        names.setdefault(maker, []).append(name)
    if len(names) <= 1:
        return ""
    told = "\n".join(f"- {maker}: {'; '.join(several)}" for maker, several in names.items())
    return f"Not all runs are of one commit:\n\n{told}"


def told_range(numbers: Iterable[float]) -> str:
    """A number, or the least and the largest of several."""
    values = sorted(set(numbers))
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _plain(values: Mapping[str, Any]) -> Tree:
    """The values as JSON gives them back."""
    plain: Tree = json.loads(json.dumps(values, default=str))
    return plain


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        place = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from _leaves(value, place)
        else:
            yield place, value


def _decides(key: str) -> bool:
    return key.rpartition(".")[2] not in _DECIDE_NOTHING


def _short(key: str) -> str:
    return key.removeprefix("configuration.")


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
