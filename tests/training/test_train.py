"""The verb train: a run folder from nothing, resumed, and what it refuses to mix."""

import math
import os
import shutil
import signal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console, RenderableType

from metr.checkpoint import load_checkpoint
from metr.config import merge, read_yaml
from metr.data.datasets_file import parse_data_arguments
from metr.errors import CheckpointError, ConfigError, DataError, MetrError
from metr.evaluation.runner import EvaluationRunner
from metr.model import METR
from metr.serialization import read_json
from metr.training.config import RunConfig, load_recipe
from metr.training.finetune import finetune
from metr.training.logger import read_metrics
from metr.training.train import plan, train
from small_runs import interrupt_at

from tiny import NAMES, TinyRun, write_text_model


def copied(run: TinyRun, place: Path) -> Path:
    return Path(shutil.copytree(run.folder, place / "run"))


def test_the_run_folder_holds_everything(tiny_run: TinyRun) -> None:
    held = {path.name for path in tiny_run.folder.iterdir()}
    assert held >= {"config.yaml", "metrics.jsonl", "best", "last", "state"}
    records = read_metrics(tiny_run.folder)
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3]
    (evaluation,) = (record for record in records if record["kind"] == "evaluation")
    own = {"AP", "AP50", *(f"AP {name}" for name in NAMES)}
    # what detection asks by default: all names of training
    assert set(evaluation["metrics"]) == own | {"AP joint vocabulary", "cross-dataset confusion"}


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


@pytest.mark.parametrize("given", ["{0}", "pets={0}", "{0}/../other.yaml"])
def test_a_run_is_not_written_into_a_dataset(given: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    pond, recipe = shutil.copytree(tiny_run.data[0], tmp_path / "pond"), load_recipe("nano", tiny_run.recipe)
    (tmp_path / "other.yaml").write_text("datasets: [pond]")
    files = sorted(pond.rglob("*"))
    with pytest.raises(ConfigError, match=r"this is the dataset (pond|pets), not a folder for a run"):
        train([given.format(pond), tiny_run.data[1]], tmp_path / "other" / ".." / "pond", recipe)
    with pytest.raises(ConfigError, match=r"this is the dataset (pond|pets), not a folder for a run"):
        finetune(given.format(pond), tiny_run.folder, pond, overrides=("train.loop.steps=1",))
    assert sorted(pond.rglob("*")) == files


def test_resuming_with_other_datasets_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    run, recipe = copied(tiny_run, tmp_path), load_recipe("nano", tiny_run.recipe)
    before = (run / "config.yaml").read_bytes()
    lake = f"lake={tiny_run.data[0]}"
    with pytest.raises(ConfigError, match="the run was begun with other datasets: ") as caught:
        train([lake, *tiny_run.data[2:]], run, recipe, resume=True)
    for part in (f"desk ({tiny_run.data[1]}) is not given", f"lake ({tiny_run.data[0]}) is new", run / "datasets.yaml"):
        assert str(part) in str(caught.value)
    assert "meadow" not in str(caught.value)
    listing = tmp_path / "mine.yaml"
    listing.write_text(yaml.safe_dump({"datasets": [{"path": path} for path in tiny_run.data[:2]]}))
    listing.write_text(listing.read_text() + f"- {{path: {tiny_run.data[2]}, weight: 2, renames: {{snail: slug}}}}\n")
    with pytest.raises(ConfigError, match=r"meadow: renames.snail None, now 'slug'; meadow: weight 1.0, now 2.0\n"):
        train(str(listing), run, recipe, resume=True)
    assert (run / "config.yaml").read_bytes() == before


def test_a_dataset_that_is_gone_is_told_with_the_file_that_names_it(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny_run, tmp_path)
    listing = run / "datasets.yaml"
    listing.write_text(listing.read_text().replace(str(tiny_run.data[1]), str(tmp_path / "gone")))
    with pytest.raises(
        DataError, match=r"the dataset .* is no longer here\n  try: if it was moved, change its path in"
    ):
        train(None, run, resume=True)
    listing.write_text(listing.read_text().replace(str(tmp_path / "gone"), str(tiny_run.data[1])))
    assert train(None, run, resume=True).step == 3


def test_the_plan_of_a_resumed_run_refuses_other_names(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny_run, tmp_path)
    (run / "datasets.yaml").unlink()
    with pytest.raises(ConfigError, match="names only there: book, cup, scissors; only here: none"):
        plan([*tiny_run.data[:1], *tiny_run.data[2:]], resumed=run)


def test_curves_are_drawn_while_it_trains(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr("metr.training.curves.plot_curves", lambda run: drawn.append(len(read_metrics(run))))
    overrides = [
        "train.loop.steps=2",
        "train.loop.evaluate_every=1",
        "train.loop.log_every=1",
        "train.loop.curves=true",
    ]
    train(tiny_run.data[0], tmp_path / "run", load_recipe("nano", tiny_run.recipe, overrides))
    assert drawn == [2, 4, 4], "at each evaluation, with its own record, and at the end"


def test_resuming_a_run_that_keeps_no_datasets(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Then all has to be given again, and other names are still refused."""
    run, recipe = copied(tiny_run, tmp_path), load_recipe("nano", tiny_run.recipe)
    (run / "datasets.yaml").unlink()
    (run / "training.json").unlink()
    with pytest.raises(ConfigError, match="the run does not say which datasets it was begun with\n  try: give the"):
        train(None, run, resume=True)
    with pytest.raises(ConfigError, match="names only there: book, cup, scissors; only here: none\n  try: resume with"):
        train([*tiny_run.data[:1], *tiny_run.data[2:]], run, recipe, resume=True)
    assert train(tiny_run.data, run, resume=True).step == 3


def test_resuming_with_another_text_encoder_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    write_text_model(tmp_path / "text", seed=1)
    recipe = load_recipe("nano", tiny_run.recipe, [f"text.source={tmp_path / 'text'}"])
    with pytest.raises(ConfigError, match="the run has the text encoder bert sha256:"):
        train(tiny_run.data, copied(tiny_run, tmp_path), recipe, resume=True)


def test_resuming_with_a_network_of_another_size_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny_run, tmp_path)
    recipe = load_recipe("nano", tiny_run.recipe, ["model.width=64"])
    for given in ({"config": recipe}, {"overrides": ["model.width=64"]}):
        with pytest.raises(ConfigError, match=r"keeps its network .* model\.width 32, now 64\n  try: leave"):
            train(tiny_run.data, run, resume=True, **given)
    # and where the configuration itself was changed by hand, the saved state tells
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("  width: 32\n", "  width: 64\n"))
    with pytest.raises(ConfigError, match=r"model\.width 32, now 64\n  try: put the first value back in .*config.yaml"):
        train(None, run, resume=True)
    # without that, as older versions left it, the weights do
    (run / "state/settings.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected \[64, 8, 1, 1\], found \[32"):
        train(None, run, resume=True)


def test_resuming_nothing_is_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=f"{place}: there is nothing to resume: .*\n  try: leave --resume out"):
            train(tiny_run.data, place, tiny_run.recipe, resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_how_unannotated_categories_were_treated_stays_with_the_weights(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = load_recipe("nano", tiny_run.recipe, ["train.loop.steps=1", "unannotated=ignore"])
    train(tiny_run.data[:1], tmp_path / "run", recipe)
    assert load_checkpoint(tmp_path / "run").training["unannotated"] == "ignore"


def test_resuming_needs_nothing_but_the_folder(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on as if the first command had been given again, from any folder, and to the same result."""
    monkeypatch.chdir(tiny_run.datasets[0].parent)
    given = ["pond", "steppe=meadow"]
    overrides = ["train.loop.steps=4", "loader.batch_size=3"]
    how: dict[str, Any] = {"config": tiny_run.recipe, "size": "nano", "overrides": overrides}
    how |= {"fraction": 0.5, "seed": 3}
    train(given, tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        assert train(given, tmp_path / "run", **how).interrupted
    monkeypatch.chdir(tmp_path)
    kept = (tmp_path / "run/config.yaml").read_bytes()
    outcome = train(None, "run", resume=True)
    assert (outcome.step, outcome.interrupted) == (4, False)
    assert (tmp_path / "run/config.yaml").read_bytes() == kept
    ours, theirs = (load_checkpoint(tmp_path / name / "last") for name in ("whole", "run"))
    assert all(torch.equal(value, theirs.weights[key]) for key, value in ours.weights.items())
    assert ours.vocabulary == theirs.vocabulary
    assert theirs.training["data"]["pond"]["trained_on"] == 2
    # the listing is a datasets file like any other
    specs = parse_data_arguments([str(tmp_path / "run/datasets.yaml")])
    assert [(one.name, one.path) for one in specs] == [("pond", tiny_run.datasets[0]), ("steppe", tiny_run.datasets[2])]


def test_what_a_listing_says_of_a_dataset_is_kept(tiny_run: TinyRun, tmp_path: Path) -> None:
    listing = tmp_path / "mine.yaml"
    entry = {"name": "lake", "path": tiny_run.data[0], "weight": 2.0, "renames": {"fish": "trout"}}
    entry |= {
        "prompts": {"trout": "a trout"},
        "exhaustive": ["trout"],
        "format": "coco",
        "splits": {"train": ["train"], "val": ["val"]},
    }
    listing.write_text(yaml.safe_dump({"datasets": [entry, tiny_run.data[1]]}))
    train(str(listing), tmp_path / "run", tiny_run.recipe, overrides=["train.loop.steps=1"])
    before, after = (parse_data_arguments([str(file)]) for file in (listing, tmp_path / "run/datasets.yaml"))
    assert before == after
    assert train(None, tmp_path / "run", resume=True, overrides=["train.loop.steps=2"]).step == 2


def test_only_what_is_asked_for_changes_a_resumed_run(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copied(tiny_run, tmp_path)
    with caplog.at_level("INFO"):
        assert train(None, run, resume=True, size="nano", overrides=["train.loop.steps=4"]).step == 4
    said = [line for line in caplog.text.splitlines() if "resumed with another configuration" in line]
    assert len(said) == 1
    assert said[0].endswith("train.loop.steps: 3 -> 4")
    config = RunConfig.checked(read_yaml(run / "config.yaml"))
    assert config == load_recipe("nano", tiny_run.recipe, ["train.loop.steps=4"]), "nothing else follows the steps"
    caplog.clear()
    with caplog.at_level("INFO"):
        train(None, run, resume=True)
    assert "another configuration" not in caplog.text
    for given, told in (({"size": "small"}, "size 'nano', now 'small'"), ({"seed": 5}, "seed 0, now 5")):
        with pytest.raises(ConfigError, match=f"the run was begun with {told}\n  try: give the same as at first or"):
            train(None, run, resume=True, **given)


def test_a_run_goes_on_for_more_epochs(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny_run, tmp_path)
    assert train(None, run, resume=True, epochs=0.6).step == 4, "0.6 of 12 images, two a step"
    with pytest.raises(ConfigError, match="--epochs: steps and epochs exclude each other"):
        train(None, run, resume=True, epochs=1, overrides=["train.loop.steps=9"])


def test_a_dataset_that_has_changed_is_said(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    meadow = Path(shutil.copytree(tiny_run.datasets[2], tmp_path / "meadow"))
    train([tiny_run.data[0], str(meadow)], tmp_path / "run", tiny_run.recipe, overrides=["train.loop.steps=1"])
    train(None, tmp_path / "run", resume=True)
    assert "have changed" not in caplog.text
    (image,) = sorted(meadow.rglob("train/**/*.jpg"))[:1]
    (label,) = meadow.rglob(f"{image.stem}.txt")
    for path in (image, label):
        shutil.copy(path, path.with_stem("another"))
    train(None, tmp_path / "run", resume=True)
    assert "meadow: its files have changed since the run was here last (" in caplog.text
    assert ", now train 5, val 3)" in caplog.text
    assert "pond: its files" not in caplog.text
    caplog.clear()
    train(None, tmp_path / "run", resume=True)
    assert "have changed" not in caplog.text, "it is said once"


def test_the_shown_loss_goes_on_where_it_was(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = copied(tiny_run, tmp_path)
    before = read_json(run / "state/state.json")["smoothed"]
    assert before
    train(None, run, resume=True, overrides=["train.loop.steps=4"])
    record = read_metrics(run)[-1]
    after = read_json(run / "state/state.json")["smoothed"]
    assert after.keys() == before.keys()
    total = sum(before.values())
    step = next(one["total"] for one in read_metrics(run) if one["kind"] == "train" and one["step"] == 4)
    assert sum(after.values()) == pytest.approx(0.9 * total + 0.1 * step, rel=1e-4), record


@pytest.mark.parametrize("epochs", [0.5, 3, 4.8])
def test_epochs_in_place_of_steps(tiny_run: TinyRun, tmp_path: Path, epochs: float) -> None:
    config = load_recipe("nano", tiny_run.recipe, ["train.schedule.warmup_steps=1"])
    shown = page(plan(tiny_run.data, config, epochs=epochs))
    steps = math.ceil(epochs * 12 / 2)
    assert f"steps: {steps} of 2 images" in shown
    assert f"{steps * 2 / 12:.1f} epoch".replace(".0", "") in shown


def test_a_part_of_each_dataset(tiny_run: TinyRun, tmp_path: Path) -> None:
    shown = page(plan(tiny_run.data, tiny_run.recipe, fraction=0.5))
    assert "2 val 3 33%" in shown
    with pytest.raises(ConfigError, match="train: shots and fraction exclude each other"):
        plan(tiny_run.data, tiny_run.recipe, fraction=0.5, shots=1)
    train(tiny_run.data, tmp_path / "run", tiny_run.recipe, shots=1, seed=2, overrides=["train.loop.steps=1"])
    assert RunConfig.checked(read_yaml(tmp_path / "run/config.yaml")).train.loop.seed == 2
    facts = load_checkpoint(tmp_path / "run").training["data"]
    assert all(1 <= facts[name]["trained_on"] <= 4 for name in NAMES)


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
    asked = ["train.loop.steps=30", "loader.mixture=equal", "train.loop.precision=fp32"]
    shown = page(plan(tiny_run.data, tiny_run.recipe, overrides=asked))
    for part in (
        "pond", "desk", "meadow", "4 4 val 3 33% 5.0", "3 4 val 3 33% 5.0", "names: 10, 1 of them in several datasets",
        "unannotated: negative", "steps: 30 of 2 images, 60 images in all, 5 epochs; evaluated at the end",
        "warm-up: all steps; weights averaged over about 1 step; checkpoints at evaluations and at the end",
        "device: cpu, fp32, processes: 1",
        "64 x 64 pixels (stretch)", "hybrid encoder, 1 decoder layer, width 32, 24 queries",
        "configuration: the recipe nano, but for", "train.loop.steps: 10000 -> 30", "loader.mixture: sqrt -> equal",
    ):  # fmt: skip
        assert part in shown, part
    assert "configuration: the recipe small, unchanged" in page(plan(tiny_run.datasets[0], size="small"))
    assert "spelt alike" not in shown


def test_a_plan_names_what_is_spelt_alike(tiny_run: TinyRun, tmp_path: Path) -> None:
    lines = f"[{tiny_run.data[0]}, {{path: {tiny_run.data[1]}, renames: {{cup: Frogs}}}}]"
    (tmp_path / "all.yaml").write_text(f"datasets: {lines}")
    assert 'learnt apart and spelt alike: "frog" and "Frogs";' in page(plan(str(tmp_path / "all.yaml"), size="small"))


def test_names_that_the_language_model_reads_alike_are_told(tiny_run: TinyRun, tmp_path: Path) -> None:
    line = f"{{path: {tiny_run.data[1]}, renames: {{cup: 螺丝, book: 螺母}}}}"
    (tmp_path / "all.yaml").write_text(f"datasets: [{line}]", encoding="utf-8")
    for data, told in ((str(tmp_path / "all.yaml"), True), (tiny_run.data[1], False)):
        console = Console(width=120, file=StringIO(), record=True)
        train([data], tmp_path / f"run-{told}", tiny_run.recipe, overrides=["train.loop.steps=1"], console=console)
        shown = " ".join(console.export_text().split())
        assert ('cannot tell them apart: "螺母" = "螺丝".' in shown) is told


@pytest.mark.parametrize(
    ("count", "parallel", "shown"),
    [
        ("1", "fsdp", "processes: 1 (fsdp: nothing to shard)"),
        ("2", "ddp", "processes: 2 (ddp)"),
        ("2", "fsdp", "processes: 2 (fsdp)"),
    ],
)
def test_a_plan_says_what_each_process_keeps(
    count: str, parallel: str, shown: str, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    assert shown in page(plan(tiny_run.data, tiny_run.recipe, overrides=[f"train.parallel={parallel}"]))


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
