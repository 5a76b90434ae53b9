"""The verb finetune: all weights, new names beside the old, what is rehearsed, and what it refuses."""

import json
import shutil
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from metr.checkpoint import load_checkpoint
from metr.config import read_yaml
from metr.data.config import AugmentationConfig
from metr.data.datasets_file import open_dataset, parse_data_arguments
from metr.errors import CheckpointError, ConfigError, DataError, MetrError, ModelError
from metr.evaluation.runner import evaluate
from metr.model import METR
from metr.text.encoder import TextEncoder
from metr.training.config import RunConfig, load_recipe
from metr.training.finetune import FinetuneOutcome, finetune, finetune_plan
from metr.training.finetune_data import FinetuneData, FinetuneOptions, open_finetune_data
from metr.training.finetune_recipe import RECIPE, finetune_recipe
from metr.training.logger import read_metrics
from metr.training.taken_names import taken_names
from small_runs import interrupt_at

from tiny import NAMES, TinyRun

OLD = tuple(dict.fromkeys(name for names in NAMES.values() for name in names))
SHORT = ("train.loop.device=cpu", "train.loop.steps=2", "train.loop.curves=false", "loader.workers=0")
SHORT += ("loader.batch_size=2", "train.loop.log_every=1", "train.loop.evaluate_every=0")


def new_data(run: TinyRun, place: Path) -> list[str]:
    """A fourth dataset: the pond under another name, with two names that nobody knows and one that is known."""
    place.mkdir(exist_ok=True)
    listing = place / "lake.yaml"
    names = "{fish: trout, frog: toad, leaf: leaf, turtle: turtle}"
    listing.write_text(f"datasets: [{{name: lake, path: {run.datasets[0]}, renames: {names}}}]")
    return [str(listing)]


def tuned(
    run: TinyRun, place: Path, name: str = "mine", *, overrides: Sequence[str] = (), resume: bool = False, **more: Any
) -> FinetuneOutcome:
    options = FinetuneOptions(overrides=(*SHORT, *overrides), **({"compare": False} | more))
    return finetune(new_data(run, place), run.folder, place / name, options, resume=resume)


def opened(run: TinyRun, place: Path, **options: Any) -> FinetuneData:
    trained = load_checkpoint(run.folder).vocabulary
    return open_finetune_data(new_data(run, place), trained, FinetuneOptions(**options))


@pytest.fixture(scope="module")
def mine(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector fine-tuned for two steps, with backbone and encoder frozen, compared with before."""
    place = tmp_path_factory.mktemp("finetuned")
    old = (tiny_run.data[1],)
    outcome = tuned(tiny_run, place, overrides=["train.freeze=encoder"], compare=True, rehearse_evaluate=old)
    assert (outcome.training.step, outcome.training.interrupted) == (2, False)
    return place / "mine"


def test_it_is_the_checkpoints_network_with_all_its_weights(mine: Path, tiny_run: TinyRun) -> None:
    before, after = load_checkpoint(tiny_run.best), load_checkpoint(mine / "last")
    assert after.model == before.model
    assert after.weights.keys() == before.weights.keys()
    for key, value in before.weights.items():
        if key.startswith(("backbone.", "encoder.")):
            assert torch.equal(after.weights[key], value), key
        elif value.is_floating_point():
            # two steps at a low rate: close to where it began, and not anew
            torch.testing.assert_close(after.weights[key], value, atol=5e-3, rtol=0)
    assert any(not torch.equal(after.weights[key], value) for key, value in before.weights.items())
    config = RunConfig.checked(read_yaml(mine / "config.yaml"))
    assert (config.train.freeze, config.augmentation.resize.size, config.model.width) == ("encoder", 64, 32)
    assert config.criterion == load_recipe("nano", tiny_run.recipe).criterion


def test_old_names_come_first_and_stay_as_they_were(mine: Path, tiny_run: TinyRun) -> None:
    before, after = load_checkpoint(tiny_run.best), load_checkpoint(mine)
    assert after.vocabulary.names == (*OLD, "trout", "toad")
    assert after.vocabulary.datasets == {**NAMES, "lake": ("trout", "toad", "leaf", "turtle")}
    assert torch.equal(after.text_embeddings[: len(OLD)], before.text_embeddings)
    encoder = TextEncoder(load_recipe("nano", tiny_run.recipe).text)
    torch.testing.assert_close(after.text_embeddings[len(OLD) :], encoder.embed(["trout", "toad"]))
    assert after.text_encoder == before.text_encoder
    assert after.training["finetuned_from"]["step"] == 3
    assert after.training[RECIPE] == before.training[RECIPE], "of pretraining, for a second fine-tuning"
    model = METR.from_pretrained(mine)
    found = model.predictor().detect(tiny_run.unseen[0])
    assert found.names == model.default_names == ("trout", "toad", "leaf", "turtle"), "those that it was trained on now"
    assert model.detect(tiny_run.unseen[0], model.names).names == after.vocabulary.names


def test_before_and_after_are_told(mine: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    told = json.loads((mine / "comparison.json").read_text())
    assert [(one["dataset"], one["role"]) for one in told["datasets"]] == [("lake", "new"), ("desk", "evaluated")]
    desk = told["datasets"][1]
    report = evaluate(tiny_run.folder, [tiny_run.data[1]], tmp_path / "judged")
    assert desk["before"]["own"] == pytest.approx(report.datasets[0].ap("own"))
    after = evaluate(mine, [tiny_run.data[1]], tmp_path / "judged")
    assert desk["after"] == {
        "own": pytest.approx(after.datasets[0].ap("own")),
        "default": None,  # it does not look for desk's names
        "joint": pytest.approx(after.datasets[0].ap("joint")),
    }
    assert told["mean"]["old"]["after"] == desk["after"]
    assert told["before"]["names"] == told["after"]["names"] == len(OLD) + 2
    request = json.loads((mine / "finetuning.json").read_text())
    assert request["new"] == {"lake": 4}
    assert request["rehearsed"] == {}
    # training saw and judged the new dataset alone
    records = read_metrics(mine)
    assert set(records[0]["epochs"]) == {"lake"}
    assert set(records[-1]["metrics"]) == {"AP", "AP50", "AP lake"}


def test_a_second_run_is_no_third_network(mine: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    """What was fine-tuned is fine-tuned again, on a dataset that the first checkpoint knew."""
    options = FinetuneOptions(overrides=SHORT, compare=False)
    finetune([tiny_run.data[1]], mine, tmp_path / "again", options)
    again = load_checkpoint(tmp_path / "again")
    assert again.vocabulary == load_checkpoint(mine).vocabulary
    assert again.training["finetuned_from"]["finetuned_from"]["step"] == 3


def test_names_that_nothing_shows_are_not_presumed_absent(tiny_run: TinyRun, tmp_path: Path) -> None:
    for rehearse, known in (((), set()), ((tiny_run.data[1],), {"book", "cup", "scissors"})):
        joint = opened(tiny_run, tmp_path, rehearse=rehearse).joint
        lake, *others = joint.training(AugmentationConfig(), "negative")
        absent = {name for name, here in zip(joint.vocabulary.names, lake.assumed_negative, strict=True) if here}
        assert absent == known
        assert len(others) == len(rehearse)
        for one in others:
            absent = {name for name, here in zip(joint.vocabulary.names, one.assumed_negative, strict=True) if here}
            assert absent == {"trout", "toad", "leaf", "turtle"}


def test_rehearsed_datasets_have_their_fraction_of_the_samples(tiny_run: TinyRun, tmp_path: Path) -> None:
    data = opened(tiny_run, tmp_path, rehearse=tuple(tiny_run.data[1:]), rehearse_fraction=0.4)
    assert data.roles == {"lake": "new", "desk": "rehearsed", "meadow": "rehearsed"}
    assert data.mixture("sqrt") == {
        "lake": pytest.approx(0.6),
        "desk": pytest.approx(0.2),
        "meadow": pytest.approx(0.2),
    }
    own = {"lake": 0.5, "desk": 0.5, "meadow": 0.0}
    assert data.mixture(own) is own
    assert opened(tiny_run, tmp_path).mixture("sqrt") == "sqrt"
    assert data.images == 4, "the new ones count"
    part = open_finetune_data(
        new_data(tiny_run, tmp_path),
        load_checkpoint(tiny_run.folder).vocabulary,
        FinetuneOptions(fraction=0.5, rehearse=(tiny_run.data[1],)),
    )
    assert part.joint.lengths == {"lake": 2, "desk": 4}, "what is rehearsed stays whole"
    assert (part.images, len(part.new_splits["lake"])) == (2, 3)


def test_rehearsal_is_trained_and_told(tiny_run: TinyRun, tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=StringIO())
    outcome = finetune(
        new_data(tiny_run, tmp_path),
        tiny_run.folder,
        tmp_path / "run",
        console=console,
        overrides=[*SHORT, "train.loop.steps=4"],
        fraction=0.5,
        rehearse=[tiny_run.data[1]],
        rehearse_fraction=0.5,
    )
    assert outcome.comparison is not None
    assert [(one.dataset, one.role) for one in outcome.comparison.changes] == [("lake", "new"), ("desk", "rehearsed")]
    epochs = [one["epochs"] for one in read_metrics(tmp_path / "run") if one["kind"] == "train"][-1]
    assert set(epochs) == {"lake", "desk"}
    assert epochs["lake"] * 2 + epochs["desk"] * 4 == pytest.approx(8)
    said = " ".join(console.export_text().split())
    assert "configuration: the defaults, but for" in said
    assert " more in config.yaml" in said
    assert "2 images: 4 steps of 2 at" in said
    assert "5 of the checkpoint's 10 names are in none of this data" in said
    told = ("before fine-tuning", "AP before and after", "rehearsed", "mean of 1 new", "mean of 1 old", "chosen by")
    for part in told:
        assert part in said


@pytest.mark.trains
def test_resumed_equals_uninterrupted(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {
        "overrides": ["train.loop.steps=4", "train.optimizer.layer_decay=0.7", "train.freeze=half"],
        "rehearse": (tiny_run.data[1],),
        "shots": 1,
        "seed": 3,
        "compare": True,
    }
    whole = tuned(tiny_run, tmp_path, "whole", **how)
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        first = tuned(tiny_run, tmp_path, "parts", **how)
    assert (first.training.step, first.training.interrupted, first.comparison) == (2, True, None)
    told = (tmp_path / "parts/before.json").stat().st_mtime_ns
    second = tuned(tiny_run, tmp_path, "parts", resume=True, **how)
    assert second.training.step == 4
    assert (tmp_path / "parts/before.json").stat().st_mtime_ns == told, "evaluated once"
    ours, theirs = (load_checkpoint(tmp_path / name / "last").weights for name in ("whole", "parts"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert whole.comparison is not None
    assert second.comparison == whole.comparison
    assert read_yaml(tmp_path / "parts/config.yaml")["train"]["loop"]["seed"] == 3
    with pytest.raises(ConfigError, match=r"the run was begun with .*seed 3, now 0\n  try: give the same"):
        tuned(tiny_run, tmp_path, "parts", resume=True, **how | {"seed": 0})


@pytest.mark.trains
def test_resuming_needs_nothing_but_the_folder(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {
        "overrides": ["train.loop.steps=4", "train.freeze=half"],
        "rehearse": (tiny_run.data[1],),
        "rehearse_evaluate": (tiny_run.data[2],),
        "rehearse_fraction": 0.4,
        "fraction": 0.5,
        "seed": 3,
        "compare": True,
    }
    whole = tuned(tiny_run, tmp_path, "whole", **how)
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        tuned(tiny_run, tmp_path, "parts", **how)
    out = tmp_path / "parts"
    config, request = ((out / name).read_bytes() for name in ("config.yaml", "finetuning.json"))
    outcome = finetune(None, None, out, resume=True)
    assert outcome.training.step == 4
    assert outcome.comparison == whole.comparison
    ours, theirs = (load_checkpoint(tmp_path / name / "last").weights for name in ("whole", "parts"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert ((out / "config.yaml").read_bytes(), (out / "finetuning.json").read_bytes()) == (config, request)
    for given, told in (
        ({"rehearse_fraction": 0.5}, "rehearse_fraction 0.4, now 0.5"),
        ({"fraction": 0.25}, "fraction 0.5, now 0.25"),
        ({"rehearse": (tiny_run.data[2],)}, r"other datasets: desk \(.*\) is not given; meadow \(.*\) is new"),
        ({"overrides": ("model.queries.number=30",)}, r"model\.queries\.number 24, now 30"),
    ):
        with pytest.raises(ConfigError, match=told):
            finetune(None, None, out, resume=True, **given)
    with pytest.raises(ConfigError, match=r"the run was begun with other datasets: lake: renames"):
        finetune(f"lake={tiny_run.data[0]}", None, out, resume=True)


def test_what_follows_the_steps_of_fine_tuning(tiny_run: TinyRun, tmp_path: Path) -> None:
    base = load_checkpoint(tiny_run.folder)
    own = finetune_recipe(base, 20)
    short = finetune_recipe(base, 20, None, ["train.loop.steps=60"])
    assert (own.train.loop.steps, own.train.schedule.warmup_steps, own.train.loop.evaluate_every) == (300, 30, 30)
    assert (short.train.schedule.warmup_steps, short.train.loop.evaluate_every) == (6, 10)
    assert (own.train.loop.patience, short.train.loop.patience) == (5, 0), "a length that is asked for is trained"
    assert 1 / (1 - short.train.ema.decay) == pytest.approx(12, rel=1e-3)


def test_epochs_of_the_new_images(tiny_run: TinyRun, tmp_path: Path) -> None:
    settings = [each for each in SHORT if "steps" not in each]
    data = new_data(tiny_run, tmp_path)
    how: dict[str, Any] = {"overrides": settings, "compare": False, "epochs": 3}
    assert finetune(data, tiny_run.folder, tmp_path / "alone", **how).training.step == 6, "4 images, 2 a step"
    more = how | {"rehearse": (tiny_run.data[1],), "rehearse_fraction": 0.5}
    outcome = finetune(data, tiny_run.folder, tmp_path / "both", **more)
    assert outcome.training.step == 12, "half of the samples are rehearsed"
    with pytest.raises(ConfigError, match="steps and epochs exclude each other"):
        finetune(data, tiny_run.folder, tmp_path / "none", epochs=3, overrides=["train.loop.steps=2"])


def test_the_seed_of_a_file_counts_unless_one_is_given(tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {loop: {seed: 7, steps: 1}}")
    settings = [each for each in SHORT if "steps" not in each]
    for given, seed in (({}, 7), ({"seed": 2}, 2)):
        place = tmp_path / f"seed-{seed}"
        options: dict[str, Any] = {"config": tmp_path / "mine.yaml", "overrides": settings, "compare": False} | given
        finetune(new_data(tiny_run, tmp_path), tiny_run.folder, place, **options)
        assert read_yaml(place / "config.yaml")["train"]["loop"]["seed"] == seed


def test_new_names_can_be_told_apart_first(tiny_run: TinyRun, tmp_path: Path) -> None:
    overrides = ["train.loop.steps=1", "train.optimizer.learning_rate=1e-12", "train.ema.enabled=false"]
    tuned(tiny_run, tmp_path, "apart", overrides=overrides, decorrelate_names=True)
    before, after = METR.from_pretrained(tiny_run.best), METR.from_pretrained(tmp_path / "apart/last")
    text = after.embed(after.vocabulary)
    old, new = (model.network.category_extraction.projection(text) for model in (before, after))
    torch.testing.assert_close(new[: len(OLD)], old[: len(OLD)], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(new[len(OLD) :], old[len(OLD) :], atol=1e-3)


def test_settings_that_would_make_another_network(tiny_run: TinyRun, tmp_path: Path) -> None:
    what = (
        r"model: fine-tuning keeps the checkpoint's network, which model.width=64 \(the checkpoint's: 32\) would change"
    )
    with pytest.raises(ConfigError, match=what) as caught:
        tuned(tiny_run, tmp_path, overrides=["model.width=64"])
    assert "expected [64" in str(caught.value)
    assert "metr train" in str(caught.value)
    assert not (tmp_path / "mine").exists()
    # what changes no shape is the user's
    tuned(tiny_run, tmp_path, overrides=["model.denoising.groups=1", "model.backbone.freeze_stages=2"])
    assert load_checkpoint(tmp_path / "mine").model.denoising.groups == 1


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (
            "text.source=bundled:foo",
            r"text\.source=bundled:foo \(the checkpoint's: .*\) would change: no such bundled model",
        ),
        ("text.source=nowhere", r"text\.source=nowhere \(the checkpoint's: .*\)"),
        ("text.templates=['a {}']", r"text\.templates=\['a \{\}'\] \(the checkpoint's: "),
        ("text.pooling=cls", r"text\.pooling=cls \(the checkpoint's: auto\)"),
    ],
)
def test_settings_that_would_make_another_text_encoder(
    tiny_run: TinyRun, tmp_path: Path, setting: str, told: str
) -> None:
    data, what = [tiny_run.data[1]], rf"text: fine-tuning keeps the checkpoint's text encoder, which {told}"
    with pytest.raises(ConfigError, match=what):  # whose names need no encoder
        finetune(data, tiny_run.folder, tmp_path / "out", overrides=[*SHORT, setting], compare=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=what):
        finetune_plan(data, tiny_run.folder, overrides=[*SHORT, setting])


def test_the_same_text_encoder_may_be_named_otherwise(tiny_run: TinyRun) -> None:
    finetune_plan([tiny_run.data[1]], tiny_run.folder, overrides=[*SHORT, "text.pooling=mean"])


def test_names_that_are_read_alike_are_told_of_the_data_at_hand(tiny_run: TinyRun, tmp_path: Path) -> None:
    frog = f"datasets: [{{name: lake, path: {tiny_run.datasets[0]}, renames: {{frog: frog_}}}}]"
    (tmp_path / "lake.yaml").write_text(frog)
    options: dict[str, Any] = {"overrides": SHORT, "compare": False, "same_names": "no"}
    said = []
    for number, data in enumerate([tmp_path / "lake.yaml", tiny_run.data[1]]):
        console = Console(width=2000, record=True, file=StringIO())
        source = [tiny_run.folder, tmp_path / "0"][number]
        finetune(str(data), source, tmp_path / str(number), console=console, **options)
        said.append(console.export_text())
    assert 'reads these names alike, so the detector cannot tell them apart: "frog_" = "frog". What to try' in said[0]
    assert "prompts: {name: in other words}" in said[0]
    assert "text.source" not in said[0], "it stays the checkpoint's"
    assert "reads these names alike" not in said[1], "old names of datasets that do not take part"


def test_what_is_no_checkpoint(tiny_run: TinyRun, tmp_path: Path) -> None:
    data = new_data(tiny_run, tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a checkpoint \(config.json and model.safetensors\) or a run"):
        finetune(data, tiny_run.datasets[0], tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(MetrError, match="expected a folder for the run"):
        finetune(data, tmp_path / "nowhere", tmp_path / "file")
    with pytest.raises(ConfigError, match="begun with metr train, and metr finetune cannot go on with it"):
        finetune(data, tiny_run.folder, tiny_run.folder, resume=True)
    tuned(tiny_run, tmp_path)
    with pytest.raises(ConfigError, match="a run cannot begin with itself"):
        finetune(data, tmp_path / "mine", tmp_path / "mine", resume=True)
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint"):
        finetune(data, tmp_path / "nowhere", tmp_path / "out")


def test_a_text_encoder_that_is_gone_or_elsewhere(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    for checkpoint in (run / "best", run / "last"):
        values = json.loads((checkpoint / "config.json").read_text())
        values["text_encoder"]["source"] = str(tmp_path / "gone")
        (checkpoint / "config.json").write_text(json.dumps(values))
    options = FinetuneOptions(overrides=SHORT, compare=False)
    with pytest.raises(ModelError, match="gone"):
        finetune(new_data(tiny_run, tmp_path), run, tmp_path / "out", options)
    # names of the checkpoint need none
    finetune([tiny_run.data[1]], run, tmp_path / "old names", options)
    # and it may have moved
    elsewhere = (*SHORT, f"text.source={tiny_run.text_model}")
    moved = FinetuneOptions(overrides=elsewhere, compare=False)
    finetune(new_data(tiny_run, tmp_path), run, tmp_path / "moved", moved)
    assert load_checkpoint(tmp_path / "moved").text_encoder["source"] == str(tiny_run.text_model)


def test_data_that_does_not_fit(tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = load_checkpoint(tiny_run.folder).vocabulary
    desk = tiny_run.data[1]
    with pytest.raises(DataError, match="2 datasets are called 'desk'"):
        open_finetune_data([desk, desk], trained)
    with pytest.raises(DataError, match="2 datasets are called 'desk'"):
        open_finetune_data([f"desk={tiny_run.data[2]}"], trained, FinetuneOptions(rehearse=(desk,)))
    with pytest.raises(DataError, match="no dataset is named"):
        open_finetune_data([], trained)
    with pytest.raises(ConfigError, match=r"finetune: 'rehearse_fraction': .*less than 1, found 1"):
        finetune([desk], tiny_run.folder, tmp_path / "out", rehearse_fraction=1.0)
    with pytest.raises(ConfigError, match="finetune: unknown key 'shot'\n  try: did you mean 'shots'"):
        finetune([desk], tiny_run.folder, tmp_path / "out", shot=1)
    open_finetune_data([f"pond={desk}"], trained)
    assert "pond: the checkpoint knows a dataset of this name with other categories" in caplog.text
    open_finetune_data([desk], trained, FinetuneOptions(shots=50))
    assert "desk: categories with fewer than 50 objects: " in caplog.text


@pytest.mark.parametrize(
    ("new", "options", "told"),
    [
        (["desk"], {"rehearse": ("desk",)}, "both as new and with --rehearse"),
        (["lake", "desk"], {"rehearse": ("lake", "desk")}, "both as new and with --rehearse"),
        (["desk"], {"rehearse_evaluate": ("desk",)}, "both as new and with --rehearse-evaluate"),
        (
            ["lake"],
            {"rehearse": ("desk",), "rehearse_evaluate": ("desk",)},
            "both with --rehearse and with --rehearse-evaluate",
        ),
    ],
)
def test_a_dataset_has_one_part_in_a_fine_tuning(
    tiny_run: TinyRun, new: list[str], options: dict[str, tuple[str, ...]], told: str
) -> None:
    trained, places = load_checkpoint(tiny_run.folder).vocabulary, {"lake": tiny_run.data[0], "desk": tiny_run.data[1]}
    given = FinetuneOptions(**{key: tuple(places[name] for name in names) for key, names in options.items()})
    with pytest.raises(DataError) as refused:
        open_finetune_data([places[name] for name in new], trained, given)
    assert f"is given {told}" in str(refused.value)
    assert "weight" not in str(refused.value), "the way to take more of a dataset does not help here"


@pytest.mark.parametrize("more", [{}, {"rehearse_evaluate": True}])
@pytest.mark.parametrize("fraction", [0.3, 0.5])
def test_a_fraction_of_rehearsal_needs_something_to_rehearse(
    tiny_run: TinyRun, tmp_path: Path, more: dict[str, Any], fraction: float
) -> None:
    old = dict.fromkeys(more, (tiny_run.data[1],))
    for call in (
        lambda options: finetune(new_data(tiny_run, tmp_path), tiny_run.folder, tmp_path / "out", options),
        lambda options: finetune_plan(new_data(tiny_run, tmp_path), tiny_run.folder, options),
    ):
        with pytest.raises(ConfigError, match=r"--rehearse-fraction: .* nothing is rehearsed\n  try: --rehearse DATA"):
            call(FinetuneOptions(rehearse_fraction=fraction, overrides=SHORT, **old))


def respelt(run: TinyRun, place: Path) -> list[str]:
    """The pond with two trained names in another spelling and one that nobody knows."""
    listing = place / "respelt.yaml"
    names = "{fish: Fishes, frog: FROG, turtle: toad}"
    prompts = "{FROG: a green frog, toad: a brown toad}"
    listing.write_text(f"datasets: [{{name: lake, path: {run.datasets[0]}, renames: {names}, prompts: {prompts}}}]")
    return [str(listing)]


def take(run: TinyRun, place: Path, name: str = "run", **more: Any) -> FinetuneOutcome:
    options: dict[str, Any] = {"overrides": SHORT, "compare": False} | more
    return finetune(respelt(run, place), run.folder, place / name, **options)


def test_names_that_mean_a_trained_one_are_taken_as_it(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=200, record=True, file=StringIO())
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)
        first = take(tiny_run, tmp_path, same_names="yes", console=console)
    assert first.training.interrupted
    outcome = take(tiny_run, tmp_path, resume=True, console=console)  # the choice need not be given again
    said = console.export_text()
    assert 'lake: "FROG" is taken as "frog", which the checkpoint knows' in said
    assert 'learnt as new names: "toad" as "a brown toad" (nearest: ' in said
    assert '"a green frog" for "frog"' in caplog.text, "it was trained without the prompt"
    names = ("frog", "fish", "leaf", "toad")
    assert sorted(outcome.default_names) == sorted(names)
    assert outcome.known == len(OLD) + 1
    tuned = load_checkpoint(tmp_path / "run")
    assert tuned.vocabulary.names == (*OLD, "toad")
    assert sorted(tuned.vocabulary.names_of("lake")) == sorted(names)
    assert tuned.vocabulary.prompts == {"toad": "a brown toad"}
    assert tuned.detection.names == outcome.default_names
    assert tuned.detection.aliases == {"FROG": "frog", "Fishes": "fish"}
    assert torch.equal(tuned.text_embeddings[: len(OLD)], load_checkpoint(tiny_run.best).text_embeddings)
    assert json.loads((tmp_path / "run/finetuning.json").read_text())["same_names"] == {
        "lake": {"FROG": "frog", "Fishes": "fish"}
    }
    # the same dataset, evaluated and tuned to again, needs no renames
    report = evaluate(tmp_path / "run", respelt(tiny_run, tmp_path))
    assert report.names == len(OLD) + 1
    finetune(respelt(tiny_run, tmp_path), tmp_path / "run", tmp_path / "again", overrides=SHORT, compare=False)
    assert load_checkpoint(tmp_path / "again").vocabulary == tuned.vocabulary
    with pytest.raises(ConfigError, match=r"the run was begun with same_names"):
        take(tiny_run, tmp_path, resume=True, same_names="no")


def test_where_nobody_can_be_asked_names_stay_apart_and_it_is_said(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    take(tiny_run, tmp_path)
    assert "'FROG' as 'frog' (the same but for case, hyphens or spaces)" in caplog.text
    assert "--same-names yes takes them as one" in caplog.text
    tuned = load_checkpoint(tmp_path / "run")
    assert set(tuned.vocabulary.names) == {*OLD, "FROG", "Fishes", "toad"}
    assert tuned.detection.aliases == {}
    caplog.clear()
    take(tiny_run, tmp_path, "no", same_names="no")
    assert "--same-names" not in caplog.text


def test_remembered_names_of_old_data_stay_whatever_is_done_with_new_names(tiny_run: TinyRun, tmp_path: Path) -> None:
    take(tiny_run, tmp_path, same_names="yes")
    model = METR.from_pretrained(tmp_path / "run", device="cpu")
    lake = respelt(tiny_run, tmp_path)
    sources = [open_dataset(one) for one in parse_data_arguments([tiny_run.data[1], *lake])]
    console = Console(width=200, record=True, file=StringIO())
    remembered = {"FROG": "frog", "Fishes": "fish"}
    assert taken_names(sources, 1, model, "no", console) == {"lake": remembered}, "its names were trained so"
    assert "is learnt as a new name" not in console.export_text()

    # of new data nothing is taken, on purpose; but what is no longer so is said
    assert taken_names(sources, 2, model, "no", console) == {}
    said = console.export_text()
    assert 'lake: "FROG" is learnt as a new name; until now it stood for "frog"' in said
    assert 'lake: "Fishes" is learnt as a new name; until now it stood for "fish"' in said

    # and so it is in a whole run, which resumes with the same
    options: dict[str, Any] = {"overrides": SHORT, "compare": False, "rehearse": tuple(lake), "same_names": "no"}
    finetune([tiny_run.data[1]], tmp_path / "run", tmp_path / "more", **options)
    tuned = load_checkpoint(tmp_path / "more")
    assert tuned.vocabulary.names == model.vocabulary.names
    assert tuned.detection.aliases == remembered


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("typed", "taken"), [("\n", True), ("y\n", True), ("n\n", False), ("", True)])
def test_on_a_terminal_it_asks(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, taken: bool
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    console = Console(width=200, record=True, file=StringIO())
    model = METR.from_pretrained(tiny_run.folder, device="cpu")
    sources = [open_dataset(one) for one in parse_data_arguments(respelt(tiny_run, tmp_path))]
    found = taken_names(sources, len(sources), model, "ask", console)
    assert found == ({"lake": {"FROG": "frog", "Fishes": "fish"}} if taken else {})
    assert "The checkpoint knows names in another spelling: 'FROG' as 'frog'" in console.export_text()


def test_the_default_names_are_those_of_the_last_fine_tuning(mine: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    rehearsed = FinetuneOptions(overrides=SHORT, compare=False, rehearse=(tiny_run.data[2],))
    finetune([tiny_run.data[1]], mine, tmp_path / "again", rehearsed)
    desk, meadow = NAMES["desk"], NAMES["meadow"]
    assert load_checkpoint(tmp_path / "again").detection.names == (*desk, *meadow), "new names, then rehearsed ones"
    every = FinetuneOptions(overrides=SHORT, compare=False, rehearse=tuple(tiny_run.data[1:]))
    finetune([tiny_run.data[0]], tiny_run.folder, tmp_path / "every", every)
    assert load_checkpoint(tmp_path / "every").detection.names == (), "all of them"
    assert METR.from_pretrained(tmp_path / "every").default_names == OLD


def test_a_prompt_for_a_trained_name_is_used_if_asked(tiny_run: TinyRun, tmp_path: Path) -> None:
    trained = load_checkpoint(tiny_run.folder).vocabulary
    listing = tmp_path / "desk.yaml"
    listing.write_text(f"datasets: [{{name: desk, path: {tiny_run.datasets[1]}, prompts: {{cup: a tea cup}}}}]")
    for choice, prompts in (("trained", {}), ("given", {"cup": "a tea cup"})):
        data = open_finetune_data([str(listing)], trained, FinetuneOptions(prompts=choice))
        assert data.joint.vocabulary.prompts == prompts
