"""What is killed: commands on small data, how each goes on after a kill, and what must be the same in the end."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from metr.checkpoint import find_checkpoint, load_checkpoint
from metr.demo import write_demo_datasets, write_unseen
from metr.errors import CheckpointError
from metr.run_directory import RunDirectory
from metr.training.logger import read_metrics

from tiny import write_recipe, write_text_model

TIMES = {"seconds", "images_per_second", "waiting_fraction", "waiting", "memory_gib", "evaluation_seconds"}
"""What may differ from run to run."""
_KEPT = "detections.partial-*.jsonl"
"""What a killed detection had found, which the next one keeps on purpose."""
_DIGEST = re.compile(r"[0-9a-f]{24,}")


@dataclass(frozen=True)
class Home:
    """The data that all stories share, and the run that some begin with."""

    path: Path

    @property
    def data(self) -> list[Path]:
        """Three datasets; a train image of the second cannot be read; the third is an archive."""
        return [self.path / "data/pond", self.path / "data/desk", self.path / "meadow.zip"]

    @property
    def recipe(self) -> Path:
        return self.path / "tiny.yaml"

    @property
    def unseen(self) -> Path:
        return self.path / "unseen"

    @property
    def trained(self) -> Path:
        """The run that fine-tuning, evaluation and detection begin with."""
        return self.path / "whole-train" / "work" / "run"

    def fill(self) -> None:
        """Writes everything but the trained run."""
        write_demo_datasets(self.path / "data", 0, 3, 1)
        write_unseen(self.path / "unseen", 0, 2)
        write_text_model(self.path / "text")
        write_recipe(self.recipe, self.path / "text")
        images = sorted((self.path / "data/desk").rglob("*.jpg"))
        damaged = images[0]
        damaged.write_bytes(damaged.read_bytes()[:400])
        shutil.make_archive(str(self.path / "meadow"), "zip", self.path / "data", "meadow")


class Story:
    """One command that writes into `place/work`.

    Args:
        name: What it is called.
        home: The data.
    """

    def __init__(self, name: str, home: Home) -> None:
        self.name, self.home = name, home

    def prepare(self, place: Path) -> None:
        """Makes what the command begins with."""
        (place / "work").mkdir(parents=True)

    def arguments(self, place: Path) -> list[object]:
        """The command, and after a kill the command that goes on."""
        raise NotImplementedError

    def check_killed(self, place: Path) -> None:
        """Checks what must hold after every kill.

        Raises:
            MetrError: something cannot be read.
        """


class Training(Story):
    """`metr train` or `metr finetune`: goes on with `--resume` once a state is saved, else with the same command."""

    def __init__(self, name: str, home: Home, verb: str, given: list[object], settings: Mapping[str, Any]) -> None:
        super().__init__(name, home)
        self.verb, self.given, self.settings = verb, given, settings

    def arguments(self, place: Path) -> list[object]:
        out = place / "work" / "run"
        if RunDirectory(out).resumable:
            return [self.verb, "--resume", "-o", out]
        settings = [word for key, value in self.settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        return [self.verb, *self.given, "-o", out, *settings]

    def check_killed(self, place: Path) -> None:
        run = RunDirectory(place / "work" / "run")
        try:
            folder = find_checkpoint(run.path)
        except CheckpointError:
            assert not run.resumable, "a state without a checkpoint"
        else:
            load_checkpoint(folder)
        read_metrics(run.path)


class Using(Story):
    """A command on a copy of a trained run, which is given again after a kill."""

    def __init__(self, name: str, home: Home, *words: object) -> None:
        super().__init__(name, home)
        self.words = words

    def prepare(self, place: Path) -> None:
        super().prepare(place)
        shutil.copytree(self.home.trained / "last", place / "work" / "model")

    def arguments(self, place: Path) -> list[object]:
        verb, *words = self.words
        return [verb, place / "work" / "model", *words, "-o", place / "work" / "out"]

    def check_killed(self, place: Path) -> None:
        load_checkpoint(place / "work" / "model")


def stories(home: Home) -> dict[str, Story]:
    """All stories; "train" comes first, because others begin with its result."""
    loop = {f"train.loop.{key}": value for key, value in {"steps": 6, "images": True, "checkpoint_every": 2}.items()}
    base = {"train.loop.evaluate_every": 3, "train.ema.tau": 2, "train.schedule.warmup_steps": 2, **loop}
    workers = {**base, "loader.workers": 2, "train.loop.checkpoint_every": 1}
    pseudo = {"unannotated": "pseudo_label", "train.loop.accumulation": 2, "train.loop.vocabulary_sample": 6}
    pseudo |= {
        "train.loop.evaluate_every": 2,
        "augmentation.flip": 0.5,
        "train.loop.steps": 5,
        "train.loop.log_every": 2,
    }
    small = yaml.safe_load(home.recipe.read_text(encoding="utf-8"))
    tuned = {**base, "loader.workers": 1, "loader.batch_size": 2, "train.loop.log_every": 1, "train.loop.patience": 5}
    tuned["train.loop.curves"] = False
    tuned |= {"augmentation.resize": small["augmentation"]["resize"], "train.loop.device": "cpu"}
    train: list[object] = [*home.data, "--config", home.recipe]
    finetune: list[object] = [home.data[0], "--from", home.trained, "--rehearse", home.data[2]]
    every: list[Story] = [
        Training("train", home, "train", train, base),
        Training("train, workers", home, "train", train, workers),
        Training("train, pseudo-labels", home, "train", train, {**base, **pseudo}),
        Training("train, curves", home, "train", train, {**base, "train.loop.curves": True}),
        Training("finetune", home, "finetune", finetune, tuned),
        Using("evaluate --store", home, "evaluate", *home.data, "--store"),
        Using("detect", home, "detect", home.unseen, "--threshold", 0.0),
    ]
    return {story.name: story for story in every}


def differences(whole: Path, place: Path) -> Iterator[str]:
    """What differs between the folders that an uninterrupted command and a killed one left, in lines."""
    ours, theirs = (_listing(folder) for folder in (whole, place))
    for name in sorted(ours.keys() | theirs.keys()):
        first, second = ours.get(name, []), theirs.get(name, [])
        if len(first) != len(second):
            yield f"{name} is {'left behind' if len(first) < len(second) else 'missing'}"
            continue
        unmatched = [_content(path, whole) for path in first]
        for path in second:
            content = _content(path, place)
            if content not in unmatched:
                yield f"{name} differs"
                break
            unmatched.remove(content)


def _listing(folder: Path) -> dict[str, list[Path]]:
    """All files and folders below by their names, digests left out: they follow paths and times."""
    places = [folder / "work", folder / "tmp"]
    names: dict[str, list[Path]] = {}
    for path in (path for place in places for path in sorted(place.rglob("*")) if not path.match(_KEPT)):
        names.setdefault(_DIGEST.sub("#", path.relative_to(folder).as_posix()), []).append(path)
    return names


def _content(path: Path, folder: Path) -> object:
    """What must be the same: bytes, or values without times; paths of `folder` are neutral."""
    if not path.is_file() or path.name == "manifest.json" or path.parent.parent.name == "unpacked":
        return None  # times of change
    data = path.read_bytes()
    if path.name == "log.txt":
        return data.endswith(b"\n")
    if path.suffix == ".arrow":  # where an archive was unpacked is in it
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
            rows = reader.read_all()
        return _neutral(f"{rows.to_pylist()} {rows.schema.metadata}", folder)
    if path.suffix == ".safetensors":  # its header is in any order
        start = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:start]), data[start:]
    if path.suffix not in {".json", ".jsonl", ".yaml", ".md"}:
        return data
    text = _neutral(data.decode(), folder)
    if path.suffix == ".json":
        return _untimed(json.loads(text))
    return [_untimed(json.loads(line)) for line in text.splitlines()] if path.suffix == ".jsonl" else text


def _neutral(text: str, folder: Path) -> str:
    return _DIGEST.sub("#", text.replace(str(folder), "HERE"))


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if key not in TIMES}
    return [_untimed(item) for item in value] if isinstance(value, list) else value
