"""The benchmark of detectors: arms begin with what they say, see the same, go on where they stopped, are judged."""

import json
import runpy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from metr.conversion.targets.single_scale import spread_logits
from metr.model import METR

from tiny import TinyRun, as_overrides

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
EXAMPLE = BENCHMARKS.parent / "examples/finetune_deformable_detr.py"
LEFT_OUT = "bccd"
# sizes that all tiny networks share; what makes them families stays
TINY = (
    "train.loop.steps=2",
    "train.loop.checkpoint_every=1",
    "model.encoder.layers=1",
    "model.encoder.fusion_blocks=1",
)


@pytest.fixture
def bench(benchmark_of: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_of("transfer_detectors")


@pytest.fixture(scope="session")
def home(seven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seven datasets, and runs that the tests share."""
    folder = tmp_path_factory.mktemp("detectors")
    (folder / "data").symlink_to(seven, target_is_directory=True)
    return folder


def profile_of(bench: ModuleType, **changes: Any) -> Any:
    whole = bench.load_profile("trial")
    short = {name: one.model_copy(update={"steps": None}) for name, one in whole.detectors.items()}
    return whole.model_copy(update={"steps": 2, "detectors": short, **changes})


def place_of(bench: ModuleType, tiny_run: TinyRun, home: Path) -> Any:
    overrides = (*as_overrides(tiny_run), *TINY)
    return bench.Workplace(
        data=home / "data", out=home / "runs", datasets=bench.DATASETS, overrides=overrides, console=Console(quiet=True)
    )


@pytest.fixture
def bench_of(bench: ModuleType, tiny_run: TinyRun, home: Path) -> Callable[[str], Any]:
    """The tiny bench of a detector, its pretrainings shared by the tests."""
    from transfer_detectors_runs import Bench

    return lambda detector: Bench(detector, place_of(bench, tiny_run, home), profile_of(bench))


def same(first: Any, second: Any, prefix: str = "") -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    keys = [key for key in ours if key.startswith(prefix)]
    assert keys
    return all(torch.equal(ours[key], theirs[key]) for key in keys)


def test_backbone_alone_is_the_backbone_and_nothing_else(bench_of: Callable[[str], Any]) -> None:
    from metr.conversion.export import build

    dab = bench_of("dab_detr")
    names, network, target = dab.left_out.vocabulary.names, dab.family.untrained.network, dab.family.target
    own, untrained = dab.beginning("own", 1), dab.beginning("untrained", 1)
    raw = build(target, network, names, 1)  # another seed than that of METR
    changed = {key for key, value in raw.state_dict().items() if not torch.equal(value, own.state_dict()[key])}
    assert changed
    assert all(key.startswith(target.backbone) for key in changed)
    given = {key: value for key, value in network.state_dict().items() if key.startswith("backbone.network.")}
    for key, value in given.items():
        found = own.state_dict().get(target.backbone + key.removeprefix("backbone.network."))
        # frozen norms count no batches
        assert key.endswith("num_batches_tracked") if found is None else torch.equal(found, value), key
    assert same(own, untrained, target.backbone)
    # queries: nearly all in the centre, and spread
    queries = own.model.query_refpoint_embeddings.weight
    assert queries.sigmoid().sub(0.5).abs().max() < 0.1
    torch.testing.assert_close(untrained.model.query_refpoint_embeddings.weight.detach(), spread_logits(len(queries)))
    assert own.config.to_dict() == untrained.config.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["dab_detr", "deformable_detr", "rt_detr"])
def test_pretrained_arms_begin_with_what_was_pretrained(bench_of: Callable[[str], Any], detector: str) -> None:
    one = bench_of(detector)
    prefix = one.family.target.backbone
    untrained, joint, metr = (one.beginning(arm, 0) for arm in ("untrained", "joint", "metr"))
    checkpoint = METR.from_pretrained(one.home / "pretrained-metr/last", device="cpu")
    assert not one.home.joinpath("pretrained-joint/checkpoint-1").exists()
    data = json.loads((one.home / "pretrained-metr/report.json").read_text())["data"]
    assert len(data) == 6
    assert not any(LEFT_OUT in argument for argument in data)
    assert json.loads((one.home / "pretrained-joint/report.json").read_text())["data"] == [
        argument.partition("=")[0] for argument in data
    ]
    assert LEFT_OUT not in checkpoint.vocabulary.datasets
    key = "encoder.layers.0.attention.value.weight"
    theirs = {
        "dab_detr": "model.encoder.layers.0.self_attn.v_proj",
        "deformable_detr": "model.encoder.layers.0.self_attn.value_proj",
        "rt_detr": "model.encoder.aifi.0.layers.0.self_attn.v_proj",
    }
    moved = metr.state_dict()[f"{theirs[detector]}.weight"]
    assert torch.equal(moved, checkpoint.network.state_dict()[key])
    assert not torch.equal(moved, untrained.state_dict()[f"{theirs[detector]}.weight"])
    assert not same(joint, metr, prefix) or same(joint, untrained, prefix), "the backbone may be frozen"
    # of the detector's own pretraining everything stays but the heads of labels, which are others
    from transformers import AutoModelForObjectDetection

    kept = AutoModelForObjectDetection.from_pretrained(one.home / "pretrained-joint/model").state_dict()
    anew = [key for key, value in joint.state_dict().items() if not torch.equal(value, kept[key])]
    assert anew
    assert all("class_embed" in key or "score_head" in key for key in anew)
    assert all(torch.equal(joint.state_dict()[key], untrained.state_dict()[key]) for key in anew)
    labels = len(one.left_out.vocabulary.names)
    assert joint.config.num_labels == metr.config.num_labels == labels
    assert joint.config.id2label == dict(enumerate(one.left_out.vocabulary.names))


def test_images_are_those_of_metr(bench_of: Callable[[str], Any]) -> None:
    from metr.data.loading import build_train_loader
    from transfer_detectors_starts import chosen
    from transfer_detectors_training import DrawnImages

    one = bench_of("dab_detr")
    loader, images = one.recipe.loader, chosen(one.left_out, one.recipe, training=True)
    drawn = DrawnImages([images], loader, 2, 0)
    assert len(drawn) == 2 * loader.batch_size
    batch = one.collate([drawn[number] for number in range(loader.batch_size)])
    first = next(iter(build_train_loader([images], loader.model_copy(update={"workers": 0}), seed=0)))
    backbone = one.family.untrained.network.backbone
    torch.testing.assert_close(batch["pixel_values"], (first.images - backbone.mean) / backbone.std)
    for row, label in enumerate(batch["labels"]):
        here = first.targets.is_object[row]
        assert torch.equal(label["boxes"], first.targets.boxes[row, here])
        assert torch.equal(label["class_labels"], first.targets.labels[row, here])


def test_answers_are_judged_by_metr(bench_of: Callable[[str], Any]) -> None:
    from transfer_detectors_starts import chosen
    from transfer_detectors_training import judged

    one = bench_of("dab_detr")
    val, names = chosen(one.left_out, one.recipe, training=False), one.left_out.vocabulary.names

    class Oracle(torch.nn.Linear):
        """Knows the image that is shown, and finds everything."""

        def forward(self, pixel_values: torch.Tensor) -> Any:
            known = [val[number] for number in range(len(val))]
            shown = [
                next(e for e in known if torch.equal(one.collate([e])["pixel_values"][0], p)) for p in pixel_values
            ]
            logits, boxes = torch.full((len(shown), 30, len(names)), -9.0), torch.rand(len(shown), 30, 4)
            for row, example in enumerate(shown):
                found = example.targets
                boxes[row, : found.boxes.shape[1]] = found.boxes[0]
                logits[row, range(found.labels.shape[1]), found.labels[0]] = 3.0
            return type("Output", (), {"logits": logits, "pred_boxes": boxes})

    result = judged(Oracle(1, 1), val, names, one.collate)
    assert result.ap == pytest.approx(100)
    assert result.images == len(val)


def test_a_run_that_stopped_goes_on_and_ends_alike(bench_of: Callable[[str], Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from transfer_detectors_starts import chosen
    from transfer_detectors_training import TRAINED, DrawnImages, Work, last_checkpoint, train_detector

    one = bench_of("dab_detr")
    kept_images = chosen(one.left_out, one.recipe, training=True)
    settings = one.config.trainer.model_copy(update={"checkpoint_every": 2})

    class Stopping(DrawnImages):
        def __getitem__(self, number: int) -> Any:
            if number == 6:
                raise KeyboardInterrupt
            return super().__getitem__(number)

    def go(images: type[DrawnImages], name: str) -> Path:
        work = Work(
            folder=tmp_path / name,
            steps=4,
            seed=0,
            settings=settings,
            batch_size=2,
            workers=0,
            device=torch.device("cpu"),
            backbone=one.family.target.backbone,
        )
        drawn = images([kept_images], one.recipe.loader, 4, 0)
        seconds = train_detector(one.beginning("own", 0), drawn, one.collate, work, Console(quiet=True))
        assert seconds > 0
        return work.folder / TRAINED

    with pytest.raises(KeyboardInterrupt):
        go(Stopping, "stopped")
    assert (last_checkpoint(tmp_path / "stopped") or "").endswith("checkpoint-2")
    resumed, whole = (load_file(go(DrawnImages, name) / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    # what ended, but was not judged, is not trained again
    again = load_file(go(Stopping, "whole") / "model.safetensors")
    assert all(torch.equal(again[key], whole[key]) for key in whole)


@pytest.mark.slow
def test_finished_arms_are_not_run_again(
    bench: ModuleType,
    tiny_run: TinyRun,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    profile = profile_of(bench)
    detectors = {"dab_detr": profile.detectors["dab_detr"]}
    monkeypatch.setattr(bench, "load_profile", lambda _: profile.model_copy(update={"detectors": detectors}))
    arguments = ["--data", str(home / "data"), "--out", str(home / "runs"), "--results", str(home / "results")]
    arguments += ["--detectors", "dab_detr"]
    arguments += [part for override in (*as_overrides(tiny_run), *TINY) for part in ("--set", override)]
    assert bench.main(arguments) == 0
    stem = home / "results/transfer-detectors-trial"
    told = json.loads(stem.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert told["complete"]
    assert [one["arm"] for one in told["runs"]] == ["own", "untrained", "joint", "metr"]
    assert [one["ap_before"] is None for one in told["runs"]] == [True, True, True, False]
    assert [(one["kind"], one["images"]) for one in told["pretraining"]] == [("metr", 4), ("joint", 4)]
    assert all(one["commit"] not in {"", "unknown"} for one in (*told["runs"], *told["pretraining"]))
    assert "| DAB-DETR |" in stem.with_suffix(".md").read_text()
    reports = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("report.json")}
    weights = {path: path.stat().st_mtime_ns for path in (home / "runs/dab_detr").rglob("model.safetensors")}
    capsys.readouterr()
    assert bench.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("report.json")} == reports
    assert all(path.stat().st_mtime_ns == when for path, when in weights.items())
    assert bench.main([*arguments, "--set", "augmentation.flip=0.1"]) == 1, "finished runs are not taken for others"
    said = " ".join(capsys.readouterr().out.split())
    assert "the run was made with augmentation.flip None, now 0.1" in said
    # one arm that is lost is run again, and its pretraining is not
    (home / "runs/dab_detr/0-metr/report.json").unlink()
    assert bench.main(arguments) == 0
    again = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("report.json")}
    assert {path.parent.name for path in reports if again[path] != reports[path]} == {"0-metr"}


def test_stopped_it_says_how_to_go_on(
    bench: ModuleType, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> bool:
        raise KeyboardInterrupt

    arguments = ["--data", str(home / "data"), "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(bench, "run_all", stopped)
    assert bench.main(arguments) == 130
    assert "not done yet; to go on, give the same command again" in capsys.readouterr().out
    assert not (tmp_path / "results").exists(), "nothing can be compared yet"


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["deformable_detr", "rt_detr"])
def test_every_detector_runs(bench: ModuleType, tiny_run: TinyRun, home: Path, detector: str) -> None:
    place, profile = place_of(bench, tiny_run, home), profile_of(bench)
    assert bench.run_all(place, profile, (detector,))
    found = [one for one in bench.finished(place, profile) if one.detector == detector]
    assert [one.arm for one in found] == ["own", "untrained", "joint", "metr"]
    assert all(asdict(one)["training_seconds"] > 0 for one in found)


@pytest.mark.parametrize("name", ["trial", "gpu"])
def test_profiles_are_whole(bench: ModuleType, name: str) -> None:
    from metr.config import merge
    from metr.conversion.targets import find_target
    from metr.training.recipe import RunConfig, load_recipe

    profile = bench.load_profile(name)
    assert profile.left_out in bench.DATASETS
    assert tuple(profile.detectors) == bench.DETECTORS
    for detector, config in profile.detectors.items():
        recipe = load_recipe("nano", None, (), merge(merge(profile.pretrain, config.pretrain), {"model": config.model}))
        assert isinstance(recipe, RunConfig)
        target = find_target(detector)
        assert target.fits(recipe.model), "all of METR moves"
        assert recipe.augmentation.resize.size % 32 == 0
        wanted = {"rt_detr": "counted", "deformable_detr": "centred"}.get(detector, recipe.model.encoder.positions)
        assert recipe.model.encoder.positions == wanted


@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")  # Trainer's default, also without a GPU
def test_the_example_transfers_trains_and_saves(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 30
    out = tmp_path / "out"
    words = [str(tiny_run.folder), str(tiny_run.datasets[0]), str(out), "--steps", "1"]
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *words])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    from transformers import AutoModelForObjectDetection

    assert "the detector is in" in capsys.readouterr().out
    model = AutoModelForObjectDetection.from_pretrained(out)
    started = AutoModelForObjectDetection.from_pretrained(out / "training/checkpoint-1")
    assert same(model, started)
    assert set(model.config.id2label.values()) == {"fish", "frog", "leaf", "turtle"}
