"""Joint training that begins with a detector: its network and names stay, and the schedule is fresh."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from metr.checkpoint import load_checkpoint
from metr.config import read_yaml
from metr.errors import ConfigError, MetrError
from metr.model import METR
from metr.run_directory import RunDirectory
from metr.training.start import check_kept, described_start, start_recipe
from metr.training.train import plan, train
from small_runs import interrupt_at

from tiny import NAMES, TinyRun

SHORT = ("train.loop.steps=2", "train.loop.device=cpu", "loader.workers=0", "train.loop.curves=false")
SHORT += ("train.loop.images=false", "loader.batch_size=2")
OLD = tuple(dict.fromkeys(name for names in NAMES.values() for name in names))


def new_data(run: TinyRun, place: Path) -> list[str]:
    """The pond with other names, of which one is a known one in capitals."""
    listing = place / "new.yaml"
    names = {"fish": "trout", "frog": "Frog"}
    entry = {"name": "lake", "path": str(run.datasets[0]), "renames": names}
    listing.write_text(json.dumps({"datasets": [entry]}))
    return [str(listing), run.data[1]]


@pytest.fixture(scope="module")
def start(tiny_run: TinyRun) -> METR:
    return METR.from_pretrained(tiny_run.folder, device="cpu")


def test_names_network_and_image_size_are_the_starts(tiny_run: TinyRun, start: METR, tmp_path: Path) -> None:
    out, said = tmp_path / "run", io.StringIO()
    console = Console(file=said, width=400)
    rates = ("train.optimizer.learning_rate=1e-12", "train.ema.enabled=false")
    train(new_data(tiny_run, tmp_path), out, start=tiny_run.folder, overrides=[*SHORT, *rates], console=console)
    made = load_checkpoint(out)
    assert made.vocabulary.names == (*OLD, "trout", "Frog"), "first the start's, then the new ones"
    assert made.detection.names == (), "it looks for all of them"
    torch.testing.assert_close(made.text_embeddings[: len(OLD)], start.checkpoint.text_embeddings)
    before, after = dict(start.network.named_parameters()), made.weights
    assert start.network.state_dict().keys() == after.keys()
    moved = [key for key in before if not torch.allclose(before[key], after[key], atol=1e-6)]
    assert moved == [], "at no rate to speak of it is the start itself"
    assert made.preprocessing == start.checkpoint.preprocessing
    assert made.training["finetuned_from"]["step"] == 3
    assert made.training["recipe"]["train"]["optimizer"]["learning_rate"] == 1e-12
    told = said.getvalue()
    assert f"begins with METR ({tiny_run.folder}): 64 x 64, {len(OLD)} names kept" in told
    assert 'learnt as new names: "trout"' in told
    assert f"5 of the checkpoint's {len(OLD)} names are in none of this data" in told
    assert "the recipe start, but for" in told
    request = json.loads((out / "training.json").read_text())
    assert (request["from"], "size" in request) == (str(tiny_run.folder), False)


def test_the_recipe_follows_the_start_and_has_a_schedule_of_its_own(start: METR) -> None:
    recipe = start_recipe(start.checkpoint)
    assert recipe.model == start.checkpoint.model
    assert recipe.augmentation.resize == start.resize
    assert recipe.loader.batch_size == 2
    trained = start.checkpoint.training["recipe"]["train"]["optimizer"]
    assert recipe.train.optimizer.model_dump(mode="json") == trained
    assert recipe.train.loop.steps == 10_000
    assert recipe.text.source == start.checkpoint.text_encoder["source"]
    line = described_start(start, recipe)
    assert "rate 6e-4 (backbone x 0.5), batches of 2" in line
    short = start_recipe(start.checkpoint, overrides=["train.loop.steps=100"])
    assert short.train.schedule.warmup_steps == 5


def test_names_in_another_spelling_are_taken_as_the_starts(tiny_run: TinyRun, tmp_path: Path) -> None:
    data, out = new_data(tiny_run, tmp_path), tmp_path / "run"
    train(data, out, start=str(tiny_run.folder), same_names="yes", overrides=SHORT)
    made = load_checkpoint(out)
    assert made.vocabulary.names == (*OLD, "trout")
    assert made.vocabulary.names_of("lake")[1] == "frog"
    assert made.detection.aliases == {"Frog": "frog"}
    assert json.loads((out / "training.json").read_text())["same_names"] == {"lake": {"Frog": "frog"}}
    # the datasets are kept as they were given, so the run goes on with the same names
    train(None, out, resume=True, overrides=["train.loop.steps=3"])
    assert load_checkpoint(out / "last").vocabulary == made.vocabulary


def test_it_resumes_without_naming_the_start(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, settings = [tiny_run.data[0]], [*SHORT, "train.loop.steps=4", "train.loop.checkpoint_every=1"]
    train(data, tmp_path / "whole", start=tiny_run.folder, overrides=settings)
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        assert train(data, tmp_path / "part", start=tiny_run.folder, overrides=settings).interrupted
    train(None, tmp_path / "part", resume=True)
    whole, part = (load_checkpoint(tmp_path / name / "last").weights for name in ("whole", "part"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)
    with pytest.raises(ConfigError, match="a run cannot begin with itself"):
        train(None, tmp_path / "part", start=tmp_path / "part", resume=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": "small"}, r"(?s)--size: .* has a size of its own.*give one of --size and --from"),
        ({"overrides": ["model.width=64"]}, r"(?s)model: .*model\.width=64 \(the checkpoint's: 32\) would change"),
        ({"overrides": ["model.decoder.heads=2"]}, r"model\.decoder\.heads=2 \(the checkpoint's: 4\) would change"),
        ({"overrides": ["model.backbone.pixel_mean=[0,0,0]"]}, r"model\.backbone\.pixel_mean=\[0\.0, 0\.0, 0\.0\]"),
        ({"overrides": ["model.encoder.kind=plain"]}, r"model\.encoder\.kind=plain \(the checkpoint's: hybrid\)"),
        ({"overrides": ["model.decoder.layer=3"]}, r"model\.decoder\.layer"),
        ({"overrides": ["text.source=bundled:foo"]}, r"text: .*text\.source=bundled:foo \(the checkpoint's: "),
        ({"overrides": ["text.templates=['a {}']"]}, r"text: .*text\.templates=\['a \{\}'\]"),
        ({"overrides": ["model.categories.whitening=0.7"]}, r"model\.categories\.whitening=0\.7 \(the checkpoint's: "),
        ({"overrides": ["model.categories.prior=0.1"]}, r"model\.categories\.prior=0\.1 \(the checkpoint's: "),
        ({"start": "nowhere"}, "nowhere: no such checkpoint, folder or file here"),
        ({"start": None, "same_names": "yes"}, r"--same-names: is about the names of a detector to begin with"),
        ({"start": None, "prompts": "given"}, r"--prompts: is about the names of a detector"),
    ],
)
def test_what_contradicts_the_start(options: dict, told: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    given = {"start": tiny_run.folder, "overrides": []} | options
    given["overrides"] = [*SHORT, *given["overrides"]]
    with pytest.raises(MetrError, match=told):
        train(tiny_run.data, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_settings_that_leave_the_network_as_it_was(start: METR) -> None:
    free = [
        "model.denoising.groups=1",
        "model.decoder.look_forward=twice",
        "model.backbone.freeze_stages=2",
        "model.categories.threshold=0.3",
    ]
    check_kept(start, start_recipe(start.checkpoint, overrides=free).model, "training", "stop")


def test_the_plan_says_what_it_begins_with(tiny_run: TinyRun, tmp_path: Path) -> None:
    out = io.StringIO()
    page = plan([tiny_run.data[0]], start=tiny_run.folder, overrides=SHORT)
    Console(file=out, width=200).print(page)
    assert f"begins with METR ({tiny_run.folder}): 64 x 64" in out.getvalue()
    assert RunDirectory(tiny_run.folder).config.is_file()
    assert read_yaml(RunDirectory(tiny_run.folder).config)["model"]["width"] == 32
