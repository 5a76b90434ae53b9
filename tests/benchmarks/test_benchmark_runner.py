"""What all studies run on: runs are resumable, say what made them, and runs of different settings are never mixed."""

import io
import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from rich.console import Console

from metr.config import read_yaml
from metr.data.joint import open_joint
from metr.errors import CheckpointError, ConfigError

from tiny import TinyRun

CONFIGURATION = {"train": {"optimizer": {"learning_rate": 6e-4}, "loop": {"steps": 200, "log_every": 20}}}
QUIET = Console(quiet=True)


@pytest.fixture
def runner(study_of: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = study_of("runner")
    monkeypatch.setattr(module, "commit", lambda: "abc1234")
    return module


def run_of(
    runner: ModuleType, folder: Path, configuration: Any = None, found: Mapping[str, Any] | None = None, **more: Any
) -> Any:
    settings = {"arm": "with", "configuration": CONFIGURATION if configuration is None else configuration, **more}
    return runner.Run(folder=folder, title="a run", settings=settings, work=lambda: found)


def changed(steps: int = 200, log_every: int = 20) -> dict[str, Any]:
    train = CONFIGURATION["train"]
    return {"train": {**train, "loop": {"steps": steps, "log_every": log_every}}}


def test_a_run_says_what_made_it(runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(runner, tmp_path / "run", where=tmp_path, sizes=(1, 2))
    run.check()
    assert not run.finished
    assert not run.folder.exists(), "asking leaves no trace"
    assert not run.execute(QUIET)
    # stopped and gone on with, back and forth
    for commit in ("def5678", "abc1234"):
        monkeypatch.setattr(runner, "commit", lambda commit=commit: commit)
        assert not run.execute(QUIET)
    assert not run.finished
    found = {"ap": 12.5, "training_seconds": 3.0}
    done = run_of(runner, run.folder, found=found, where=tmp_path, sizes=(1, 2))
    assert done.execute(QUIET)
    assert done.finished
    report = json.loads((run.folder / "report.json").read_text())
    assert (report["ap"], report["training_seconds"], report["commit"]) == (12.5, 3.0, "abc1234, def5678")
    assert report["settings"]["configuration"] == CONFIGURATION
    assert run.report() == report
    assert runner.reports([run, run_of(runner, tmp_path / "other")]) == [{**found, "commit": "abc1234, def5678"}]
    run.check()
    # finished it is not run again
    assert run.execute(QUIET)
    assert run.report() == report


@pytest.mark.parametrize("finished", [False, True])
def test_runs_of_other_settings_are_refused(runner: ModuleType, tmp_path: Path, finished: bool) -> None:
    run = run_of(runner, tmp_path / "run", found={"steps": 200} if finished else None)
    assert run.execute(QUIET) is finished
    run_of(runner, run.folder, changed(log_every=1)).check()  # decides nothing
    study = runner.Study(name="any", profile="trial", data=tmp_path, out=tmp_path, console=QUIET)
    for other, named in (
        (run_of(runner, run.folder, changed(steps=7)), "train.loop.steps 200, now 7"),
        (run_of(runner, run.folder, share=0.5), "share None, now 0.5"),
        (run_of(runner, run.folder, {"train": {}}), "train.optimizer.learning_rate 0.0006, now None"),
    ):
        for refusing in (other.check, lambda other=other: runner.run_all(study, [other], [])):
            with pytest.raises(ConfigError, match=named) as error:
                refusing()
            assert "another --out, or remove this folder" in (error.value.hint or "")
    assert json.loads((run.folder / "run.json").read_text())["settings"]["configuration"] == CONFIGURATION
    many = run_of(runner, run.folder, **{f"more{number}": number for number in range(9)})
    with pytest.raises(ConfigError, match=r"more4 None, now 4 and 4 more"):
        many.check()


def test_a_file_that_was_cut_short_is_named(runner: ModuleType, tmp_path: Path) -> None:
    run = run_of(runner, tmp_path / "run", found={"ap": 9})
    run.execute(QUIET)
    (run.folder / "report.json").write_text('{"ap": 9')
    with pytest.raises(CheckpointError, match=r"report\.json"):
        run.report()
    (run.folder / "run.json").write_text('{"settings"')
    with pytest.raises(CheckpointError, match=r"run\.json"):
        run.check()


def test_a_run_that_another_process_does_is_waited_for(runner: ModuleType, tmp_path: Path) -> None:
    """It is not done twice, and nobody else writes into its folder meanwhile."""
    done: list[str] = []
    began, go_on = threading.Event(), threading.Event()

    def work() -> dict[str, int]:
        done.append("work")
        began.set()
        assert go_on.wait(60)
        return {"ap": 9}

    page = io.StringIO()
    run = runner.Run(folder=tmp_path / "run", title="a run", settings={}, work=work)
    with ThreadPoolExecutor(2) as both:  # each with a lock of its own, as two processes
        first = both.submit(run.execute, QUIET)
        assert began.wait(60)
        second = both.submit(run.execute, Console(file=page))
        while "another process is at it, waiting: a run" not in page.getvalue():
            time.sleep(0.01)
        assert not second.done()
        go_on.set()
        assert first.result(60)
        assert second.result(60)
    assert done == ["work"]
    assert run.report()["ap"] == 9


def test_independent_runs_are_shared_by_processes(runner: ModuleType, tmp_path: Path) -> None:
    """Whoever finds a run taken does the next one, and waits only at the end; in order, it would wait at once."""
    made: list[tuple[str, str]] = []
    began, go_on = threading.Event(), threading.Event()

    def runs_of(process: str) -> list[Any]:
        def work(name: str) -> dict[str, int]:
            made.append((process, name))
            if name == "first":
                began.set()
                assert go_on.wait(60)
            return {"ap": 9}

        names = ("first", "second", "third")
        return [runner.Run(folder=tmp_path / name, title=name, settings={}, work=partial(work, name)) for name in names]

    def shared(process: str) -> bool:
        study = runner.Study(name="any", profile="trial", data=tmp_path, out=tmp_path, console=QUIET)
        return bool(runner.run_all(study, runs_of(process), independent=True))

    with ThreadPoolExecutor(2) as both:
        one = both.submit(shared, "one")
        assert began.wait(60)
        two = both.submit(shared, "two")
        while len(made) < 3:
            time.sleep(0.01)
        assert not two.done()
        go_on.set()
        assert one.result(60)
        assert two.result(60)
    assert made == [("one", "first"), ("two", "second"), ("two", "third")]


def test_a_study_ends_where_a_run_was_stopped(runner: ModuleType, tmp_path: Path) -> None:
    study = runner.Study(name="any", profile="trial", data=tmp_path, out=tmp_path, console=QUIET)

    def interrupted() -> None:
        raise KeyboardInterrupt

    first, last = (run_of(runner, tmp_path / name, found={}) for name in ("first", "last"))
    settings = {"arm": "between"}
    for work in (lambda: None, interrupted):
        between = runner.Run(folder=tmp_path / "between", title="between", settings=settings, work=work)
        assert not runner.run_all(study, [first, between, last])
        assert [run.finished for run in (first, between, last)] == [True, False, False]
    assert runner.run_all(study, [first, between, last], [last])


def test_the_exit_status_says_how_it_ended(runner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> bool:
        raise KeyboardInterrupt

    assert runner.exit_status(lambda: True) == 0
    assert capsys.readouterr().out == ""
    for work in (lambda: False, interrupted):
        assert runner.exit_status(work) == 130
        assert "not done yet; to go on, give the same command again" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["multifield", "rehearsal", "transfer", "transfer_detectors", "checkpoint"])
def test_data_is_asked_for_and_missing_datasets_are_named(
    study_of: Callable[[str], ModuleType], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        study_of(name).main([])
    said = " ".join(capsys.readouterr().err.split())
    assert "expected --data FOLDER, a folder with one folder for each dataset: aquarium, bccd" in said
    present = {"aquarium", "chess_pieces", "coco_mini", "doc_tables", "endangered_animals", "playing_cards"}
    for dataset in present:
        (tmp_path / dataset).mkdir()
    assert study_of(name).main(["--data", str(tmp_path), "--out", str(tmp_path / "runs")]) == 1
    assert "expected the datasets bccd\n" in capsys.readouterr().out


def test_seconds_are_those_of_the_last_step(runner: ModuleType, tmp_path: Path) -> None:
    assert runner.training_seconds(tmp_path) == 0
    records = [{"kind": "train", "step": step, "seconds": 1.5 * step} for step in (1, 2)]
    records.append({"kind": "evaluation", "step": 2, "evaluation_seconds": 9.0})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    assert runner.training_seconds(tmp_path) == 3


def test_the_protocol_trains_on_all_of_train_where_there_is_no_val(
    study_of: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        (tmp_path / "cards" / split / "images").mkdir(parents=True)
        (tmp_path / "cards" / split / "labels").mkdir()
        for number in range(3):
            cv2.imwrite(str(tmp_path / "cards" / split / "images" / f"{number}.png"), np.zeros((8, 8, 3), np.uint8))
            (tmp_path / "cards" / split / "labels" / f"{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "cards/data.yaml").write_text("names: [ace]\ntrain: train/images\ntest: test/images\n")
    (source,) = open_joint([study_of("runner").argument("cards", tmp_path / "cards")]).sources
    assert (source.name, {split: len(found) for split, found in source.splits.items()}) == (
        "cards",
        {"train": 3, "val": 3},
    )


def test_words_go_with_datasets_but_for_names_of_others(
    runner: ModuleType, study_of: Callable[[str], ModuleType], tiny_run: TinyRun, tmp_path: Path
) -> None:
    study = runner.Study(name="any", profile="trial", data=tmp_path, out=tmp_path / "run", console=QUIET)
    words = {"pond": {"synonyms": {"fish": ["trout", "book"]}, "absent": ["book", "ostrich", "frog"]}}
    first, second, third = study_of("study_data").with_words(study, tiny_run.data, words)
    assert [second, third] == tiny_run.data[1:]
    pond, desk, _ = open_joint([first, second, third]).sources
    assert pond.config.synonyms == {"fish": ("trout",)}, "a book is something else on the desk"
    assert pond.config.absent == ("book", "ostrich")
    assert desk.config.absent == ()


def test_every_dataset_of_words_has_names_and_none_is_absent_and_meant() -> None:
    words = read_yaml(Path(__file__).resolve().parents[2] / "benchmarks/words.yaml")
    assert len(words) == 24
    for dataset, own in words.items():
        meant = [word for several in own.get("synonyms", {}).values() for word in several]
        assert len(meant) == len(set(meant)), dataset
        assert not {*meant, *own.get("synonyms", {})} & set(own["absent"]), dataset
        assert all(isinstance(word, str) and word.strip() == word for word in (*meant, *own["absent"])), dataset
