"""What runs of benchmarks keep: what made them is told, and runs of different settings are never mixed."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from metr.errors import CheckpointError, ConfigError

CONFIGURATION = {"train": {"optimizer": {"learning_rate": 6e-4}, "loop": {"steps": 200, "log_every": 20}}}


@pytest.fixture
def kept(benchmark_of: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = benchmark_of("kept_runs")
    monkeypatch.setattr(module, "commit", lambda: "abc1234")
    return module


def run_of(kept: ModuleType, folder: Path, configuration: Any = None, **more: Any) -> Any:
    settings = {"arm": "with", "configuration": CONFIGURATION if configuration is None else configuration, **more}
    return kept.Run(folder=folder, settings=settings, beside=(folder / "recipe.yaml", folder / "config.yaml"))


def changed(steps: int = 200, log_every: int = 20) -> dict[str, Any]:
    train = CONFIGURATION["train"]
    return {"train": {**train, "loop": {"steps": steps, "log_every": log_every}}}


def old_folder(folder: Path, **files: Any) -> Path:
    """A run folder of the time before runs kept settings and commit."""
    folder.mkdir()
    for name, tree in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder


def test_a_run_tells_what_made_it(kept: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(kept, tmp_path / "run", where=tmp_path, sizes=(1, 2))
    run.check()
    assert not run.finished
    assert not run.folder.exists(), "asking leaves no trace"
    run.begin()
    # stopped and gone on with, back and forth
    for commit in ("def5678", "abc1234"):
        monkeypatch.setattr(kept, "commit", lambda commit=commit: commit)
        run.begin()
    assert not run.finished
    run.finish({"ap": 12.5, "commit": "unknown", "training_seconds": 3.0})
    assert run.finished
    told = json.loads((run.folder / "report.json").read_text())
    assert (told["ap"], told["training_seconds"], told["commit"]) == (12.5, 3.0, "abc1234, def5678")
    assert told["settings"]["configuration"] == CONFIGURATION
    assert run.report() == told
    run.check()


@pytest.mark.parametrize("finished", [False, True])
def test_runs_of_other_settings_are_refused(kept: ModuleType, tmp_path: Path, finished: bool) -> None:
    run = run_of(kept, tmp_path / "run")
    run.begin()
    if finished:
        run.finish({"steps": 200})
    run_of(kept, run.folder, changed(log_every=1)).check()  # decides nothing
    for other, named in (
        (run_of(kept, run.folder, changed(steps=7)), "train.loop.steps 200, now 7"),
        (run_of(kept, run.folder, decorrelate_names=True), "decorrelate_names None, now True"),
        (run_of(kept, run.folder, {"train": {}}), "train.optimizer.learning_rate 0.0006, now None"),
    ):
        for refusing in (other.check, other.begin):
            with pytest.raises(ConfigError, match=named) as error:
                refusing()
            assert "another --out, or remove this folder" in (error.value.hint or "")
    assert json.loads((run.folder / "run.json").read_text())["settings"]["configuration"] == CONFIGURATION
    many = run_of(kept, run.folder, **{f"more{number}": number for number in range(9)})
    with pytest.raises(ConfigError, match=r"more4 None, now 4 and 4 more"):
        many.check()


def test_old_folders_tell_what_they_can(kept: ModuleType, tmp_path: Path) -> None:
    folder = old_folder(tmp_path / "run", recipe=CONFIGURATION)
    (folder / "report.json").write_text(json.dumps({"arm": "with", "steps": 200, "ap": 9.0}))
    run = run_of(kept, folder, decorrelate_names=False)
    run.check()
    assert run.finished
    assert run.report() == {"arm": "with", "steps": 200, "ap": 9.0, "commit": "unknown"}
    with pytest.raises(ConfigError, match=r"train\.loop\.steps 200, now 7"):
        run_of(kept, folder, changed(steps=7)).check()
    with pytest.raises(ConfigError, match="steps 200, now 100"):
        run_of(kept, folder, steps=100).check()
    # what came of --set is in the resolved configuration alone, which knows more than was asked
    resolved = {
        "train": {"loop": {"steps": 7, "seed": 0}, "optimizer": {"learning_rate": 6e-4}},
        "unannotated": "ignore",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved))
    run_of(kept, folder, changed(steps=7)).check()
    for other in (CONFIGURATION, {**changed(steps=7), "unannotated": "teacher"}):
        with pytest.raises(ConfigError):
            run_of(kept, folder, other).check()
    # without any configuration nothing contradicts
    bare = old_folder(tmp_path / "bare")
    (bare / "report.json").write_text(json.dumps({"ap": 9.0}))
    run_of(kept, bare, changed(steps=7)).check()


def test_an_old_run_that_was_stopped_goes_on(kept: ModuleType, tmp_path: Path) -> None:
    run = run_of(kept, old_folder(tmp_path / "run", recipe=CONFIGURATION))
    with pytest.raises(ConfigError, match="now 7"):
        run_of(kept, run.folder, changed(steps=7)).begin()
    assert not (run.folder / "run.json").exists()
    run.begin()
    run.finish({"ap": 9.0})
    assert run.report()["commit"] == "unknown, abc1234"


def test_a_report_that_was_cut_short_is_named(kept: ModuleType, tmp_path: Path) -> None:
    run = run_of(kept, old_folder(tmp_path / "run"))
    (run.folder / "report.json").write_text('{"ap": 9')
    for reading in (run.check, run.report):
        with pytest.raises(CheckpointError, match=r"report\.json"):
            reading()


def test_commits_are_told_once(kept: ModuleType) -> None:
    made = [("first", "abc"), ("second", "def"), ("third", "abc")]
    assert kept.commits_of(made) == "abc and def"
    assert kept.runs_by_commit(made) == "Not all runs are of one commit:\n\n- abc: first; third\n- def: second"
    assert kept.runs_by_commit(made[:1]) == ""
    assert (kept.told_range([5]), kept.told_range([1500, 5, 70])) == ("5", "5 to 1,500")
