"""The verb train: a run folder from nothing, resumed, and what it refuses to mix."""

import os
import shutil
import signal
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console, RenderableType

from metr.checkpoint import load_checkpoint
from metr.config import merge, read_yaml
from metr.errors import CheckpointError, ConfigError, DataError, MetrError
from metr.evaluation.runner import EvaluationRunner
from metr.model import METR
from metr.training.config import RunConfig, load_recipe
from metr.training.logger import read_metrics
from metr.training.train import plan, train

from tiny import NAMES, TinyRun, write_text_model


def copied(run: TinyRun, place: Path) -> Path:
    return Path(shutil.copytree(run.folder, place / "run"))


def test_the_run_folder_holds_everything(tiny_run: TinyRun) -> None:
    held = {path.name for path in tiny_run.folder.iterdir()}
    assert held >= {"config.yaml", "metrics.jsonl", "best", "last", "state"}
    records = read_metrics(tiny_run.folder)
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3]
    (evaluation,) = (record for record in records if record["kind"] == "evaluation")
    assert set(evaluation["metrics"]) == {"AP", "AP50", *(f"AP {name}" for name in NAMES)}


def test_the_saved_configuration_is_the_recipe(tiny_run: TinyRun) -> None:
    recipe = load_recipe("nano", tiny_run.recipe)
    assert RunConfig.checked(read_yaml(tiny_run.folder / "config.yaml")) == recipe
    # and is a recipe itself: the run can be repeated from it
    assert load_recipe("base", tiny_run.folder / "config.yaml") == recipe


def test_the_network_sees_every_dataset_and_its_names(tiny_run: TinyRun) -> None:
    checkpoint = load_checkpoint(tiny_run.folder / "last")
    assert checkpoint.vocabulary.datasets == NAMES
    assert checkpoint.text_embeddings.shape == (10, 16)
    assert checkpoint.preprocessing["size"] == 64
    (record,) = (one for one in read_metrics(tiny_run.folder) if one["kind"] == "train" and one["step"] == 3)
    assert set(record["epochs"]) == set(NAMES)


def test_resuming_goes_on_and_learns(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny_run, tmp_path)
    before = load_checkpoint(run / "last").weights
    outcome = train(tiny_run.data, run, load_recipe("nano", tiny_run.recipe, ["train.loop.steps=4"]), resume=True)
    assert (outcome.step, outcome.interrupted) == (4, False)
    assert [one["step"] for one in read_metrics(run) if one["kind"] == "train"] == [1, 2, 3, 4]
    after = load_checkpoint(run / "last").weights
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert METR.from_pretrained(run / "last").checkpoint.training["step"] == 4


def test_a_run_is_not_overwritten_and_that_is_said_first(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = load_recipe("nano", tiny_run.recipe)
    with pytest.raises(MetrError, match="a run is in this folder already\n  try: resume it with --resume"):
        train(["no/such/dataset"], tiny_run.folder, recipe)
    (tmp_path / "file").touch()
    with pytest.raises(MetrError, match="expected a folder for the run, found a file"):
        train(["no/such/dataset"], tmp_path / "file", recipe)


def test_resuming_with_other_datasets_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    run, recipe = copied(tiny_run, tmp_path), load_recipe("nano", tiny_run.recipe)
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="names only there: book, cup, scissors; only here: none\n  try: resume with"):
        train([*tiny_run.data[:1], *tiny_run.data[2:]], run, recipe, resume=True)
    assert (run / "config.yaml").read_bytes() == before


def test_resuming_with_another_text_encoder_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    write_text_model(tmp_path / "text", seed=1)
    recipe = load_recipe("nano", tiny_run.recipe, [f"text.source={tmp_path / 'text'}"])
    with pytest.raises(ConfigError, match="the run has the text encoder bert sha256:"):
        train(tiny_run.data, copied(tiny_run, tmp_path), recipe, resume=True)


def test_resuming_with_a_network_of_another_size_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = load_recipe("nano", tiny_run.recipe, ["model.width=64"])
    with pytest.raises(CheckpointError, match=r"expected \[64, 8, 1, 1\], found \[32") as caught:
        train(tiny_run.data, copied(tiny_run, tmp_path), recipe, resume=True)
    assert "(config.yaml of the run)" in str(caught.value)


def test_resuming_nothing_starts_afresh_and_says_so(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe("nano", tiny_run.recipe, ["train.loop.steps=1", "unannotated=ignore"])
    with caplog.at_level("INFO"):
        assert train(tiny_run.data[:1], tmp_path / "run", recipe, resume=True).step == 1
    assert f"nothing to resume in {tmp_path / 'run'}: training starts afresh" in caplog.text
    # how unannotated categories were treated stays with the weights
    assert load_checkpoint(tmp_path / "run").training["unannotated"] == "ignore"


def test_stopped_in_the_last_evaluation_it_is_not_done(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("nano", tiny_run.recipe, ["train.loop.steps=1"])
    with monkeypatch.context() as patch:
        patch.setattr(EvaluationRunner, "report", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        outcome = train(tiny_run.data[:1], tmp_path / "run", recipe)
    assert (outcome.step, outcome.interrupted, outcome.metrics) == (1, True, {})
    outcome = train(tiny_run.data[:1], tmp_path / "run", recipe, resume=True)
    assert (outcome.step, outcome.interrupted, outcome.best_step) == (1, False, 1)


def test_a_dataset_without_a_training_split(tiny_run: TinyRun, tmp_path: Path) -> None:
    pond = Path(shutil.copytree(tiny_run.datasets[0], tmp_path / "pond"))
    for path in (*pond.glob("annotations/*train*"), pond / "train"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=f"{pond}: no 'train' split\n  try: it has val"):
        train([str(pond)], tmp_path / "run", load_recipe("nano", tiny_run.recipe))


def test_a_broken_training_image_is_skipped_and_listed(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pond = Path(shutil.copytree(tiny_run.datasets[0], tmp_path / "pond"))
    broken = min((pond / "train").rglob("*.jpg"))
    broken.write_bytes(broken.read_bytes()[:200])
    outcome = train([str(pond)], tmp_path / "run", load_recipe("nano", tiny_run.recipe))
    assert outcome.step == 3
    assert f"skipped: {broken}" in caplog.text
    assert read_metrics(tmp_path / "run")[-2]["unreadable"] == 1


def test_a_mapping_of_changes_is_laid_over_a_recipe(tiny_run: TinyRun) -> None:
    tree = read_yaml(tiny_run.recipe)
    changes = {"model": {"width": 64}}
    assert load_recipe("nano", tiny_run.recipe, changes=changes).model.width == 64
    assert merge(tree, changes)["model"]["decoder"] == tree["model"]["decoder"]


def page(renderable: RenderableType) -> str:
    """What a terminal shows, in one line of single spaces."""
    console = Console(width=120, file=StringIO(), record=True)
    console.print(renderable)
    return " ".join(console.export_text().split())


def test_a_plan_shows_what_training_would_do(tiny_run: TinyRun) -> None:
    shown = page(plan(tiny_run.data, tiny_run.recipe, overrides=["train.loop.steps=30", "loader.mixture=equal"]))
    for part in (
        "pond", "desk", "meadow", "4 4 val 3 33% 5.0", "3 4 val 3 33% 5.0", "names: 10, 1 of them in several datasets",
        "unannotated: negative", "steps: 30 of 2 images, 60 images in all; evaluated every 1,000 steps",
        "device: cpu, fp32, processes: 1",
        "64 x 64 pixels (stretch)", "hybrid encoder, 1 decoder layers, width 32, 24 queries",
        "It differs from the recipe nano in:", "train.loop.steps: 10000 -> 30", "loader.mixture: sqrt -> equal",
    ):  # fmt: skip
        assert part in shown, part
    assert "It is the recipe small, unchanged." in page(plan(tiny_run.datasets[0], size="small"))


def test_a_plan_finds_the_mistakes_of_a_run(tiny_run: TinyRun) -> None:
    with pytest.raises(DataError, match="nowhere"):
        plan("nowhere")
    with pytest.raises(ConfigError, match="unknown tracker 'paper'"):
        plan(tiny_run.data, overrides=["train.loop.trackers=[paper]"])
    with pytest.raises(ConfigError, match="the average of the weights, which is off"):
        plan(tiny_run.data, overrides=["unannotated=pseudo_label", "train.ema.enabled=false"])


def test_from_python_it_reads_as_the_verb_does(tiny_run: TinyRun, tmp_path: Path) -> None:
    console = Console(width=100, file=StringIO(), record=True)
    outcome = train(
        tiny_run.datasets[0],
        str(tmp_path / "run"),
        str(tiny_run.recipe),
        overrides=["train.loop.steps=1"],
        console=console,
    )
    assert outcome.step == 1
    shown = console.export_text()
    assert "configuration: the recipe nano, but for\n" in shown
    assert "  text.source: bundled:minilm -> " in shown
    assert " more in config.yaml\n" in shown
    assert f"configuration: {tmp_path / 'run' / 'config.yaml'}; log: {tmp_path / 'run' / 'log.txt'}\n" in shown
    assert "learning_rate" not in shown, "it is the recipe's"
