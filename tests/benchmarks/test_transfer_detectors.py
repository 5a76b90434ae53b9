"""The study of detectors: arms begin with what they say, see the same, go on where they stopped, are judged."""

import json
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from metr.data.images import read_image
from metr.model import METR

from tiny import TinyRun, as_overrides

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
EXAMPLE = BENCHMARKS.parent / "examples/finetune_detector.py"
LEFT_OUT = "bccd"
# sizes that all tiny networks share; what makes them families stays
TINY = (
    "train.loop.steps=2",
    "train.loop.checkpoint_every=1",
    "model.encoder.layers=1",
    "model.encoder.fusion_blocks=1",
    "model.decoder.layers=2",
)
# RF-DETR has no other backbone
WINDOWED = {
    "layers": [1, 2],
    "options": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "window_block_indexes": [0]},
}


@pytest.fixture
def bench(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("transfer_detectors")


@pytest.fixture(scope="session")
def home(seven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seven datasets, and runs that the tests share."""
    folder = tmp_path_factory.mktemp("detectors")
    (folder / "data").symlink_to(seven, target_is_directory=True)
    return folder


def profile_of(bench: ModuleType, name: str = "trial", **changes: Any) -> Any:
    study = bench.Study(name="transfer-detectors", profile=name, data=Path(), out=Path())
    return bench.Profile.checked(study.read_profile()).model_copy(update=changes)


def short(bench: ModuleType) -> Any:
    """The trial profile with two steps for every detector."""
    detectors = profile_of(bench).detectors
    alike = {name: one.model_copy(update={"steps": None}) for name, one in detectors.items()}
    return profile_of(bench, steps=2, detectors=alike)


def study_in(bench: ModuleType, tiny_run: TinyRun, home: Path, detector: str = "") -> Any:
    tiny = [*as_overrides(tiny_run), *TINY]
    if detector == "rf_detr":
        model = json.loads(next(one for one in tiny if one.startswith("model={")).removeprefix("model="))
        model |= {"backbone": WINDOWED, "queries": model["queries"] | {"number": 12}}  # it has 16 places
        tiny = [f"model={json.dumps(model)}", *(one for one in tiny if "model={" not in one)]
    return bench.Study(
        name="transfer-detectors",
        profile="trial",
        data=home / "data",
        out=home / "runs",
        overrides=tuple(tiny),
        console=Console(quiet=True),
    )


@pytest.fixture
def bench_of(bench: ModuleType, tiny_run: TinyRun, home: Path) -> Callable[[str], Any]:
    """The tiny bench of a detector, its pretrainings shared by the tests."""
    return lambda detector: bench.Bench(detector, study_in(bench, tiny_run, home), short(bench))


def same(first: Any, second: Any, prefix: str = "") -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    keys = [key for key in ours if key.startswith(prefix)]
    assert keys
    return all(torch.equal(ours[key], theirs[key]) for key in keys)


def test_backbone_alone_is_the_backbone_and_nothing_else(bench_of: Callable[[str], Any]) -> None:
    from metr.conversion.export import build

    dab = bench_of("dab_detr")
    names, network, target = dab.left_out.vocabulary.names, dab.untrained.network, dab.target
    own, untrained = dab.start("own", 1), dab.start("untrained", 1)
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
    # queries: nearly all in the centre, and METR's
    queries = own.model.query_refpoint_embeddings.weight
    assert queries.sigmoid().sub(0.5).abs().max() < 0.1
    assert torch.equal(untrained.model.query_refpoint_embeddings.weight, network.learned_places.box.weight)
    assert own.config.to_dict() == untrained.config.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["dab_detr", "deformable_detr", "rt_detr"])
def test_pretrained_arms_begin_with_what_was_pretrained(bench_of: Callable[[str], Any], detector: str) -> None:
    one = bench_of(detector)
    assert all(run.execute(one.study.console) for run in one.pretrained.values())
    prefix = one.target.backbone
    untrained, joint, metr = (one.start(arm, 0) for arm in ("untrained", "joint", "metr"))
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
    from detector_training import SampledImages
    from metr.data.loading import build_train_loader

    one = bench_of("dab_detr")
    loader, images = one.recipe.loader, one.split(training=True)
    drawn = SampledImages([images], loader, 2, 0)
    assert len(drawn) == 2 * loader.batch_size
    batch = one.collate([drawn[number] for number in range(loader.batch_size)])
    first = next(iter(build_train_loader([images], loader.model_copy(update={"workers": 0}), seed=0)))
    backbone = one.untrained.network.backbone
    torch.testing.assert_close(batch["pixel_values"], (first.images - backbone.mean) / backbone.std)
    for row, label in enumerate(batch["labels"]):
        here = first.targets.is_object[row]
        assert torch.equal(label["boxes"], first.targets.boxes[row, here])
        assert torch.equal(label["class_labels"], first.targets.labels[row, here])


def test_answers_are_evaluated_by_metr(bench_of: Callable[[str], Any]) -> None:
    from detector_training import evaluate_detector

    one = bench_of("dab_detr")
    val, names = one.split(training=False), one.left_out.vocabulary.names

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

    result = evaluate_detector(Oracle(1, 1), val, names, one.collate)
    assert result.ap == pytest.approx(100)
    assert result.images == len(val)


def test_a_run_that_stopped_goes_on_and_ends_alike(bench_of: Callable[[str], Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from detector_training import TRAINED, SampledImages, last_checkpoint

    one = bench_of("dab_detr")
    trainer = one.config.trainer.model_copy(update={"checkpoint_every": 2})
    one.config = one.config.model_copy(update={"trainer": trainer})
    images = one.split(training=True)

    class Stopping(SampledImages):
        def __getitem__(self, number: int) -> Any:
            if number == 6:
                raise KeyboardInterrupt
            return super().__getitem__(number)

    def go(kind: type[SampledImages], name: str) -> Path:
        seconds = one._train(one.start("own", 0), kind([images], one.recipe.loader, 4, 0), tmp_path / name, 0)
        assert seconds > 0
        return tmp_path / name / TRAINED

    with pytest.raises(KeyboardInterrupt):
        go(Stopping, "stopped")
    assert (last_checkpoint(tmp_path / "stopped") or "").endswith("checkpoint-2")
    resumed, whole = (load_file(go(SampledImages, name) / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    # what ended, but was not evaluated, is not trained again
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
    profile = short(bench)
    only = profile.model_copy(update={"detectors": {"dab_detr": profile.detectors["dab_detr"]}})
    monkeypatch.setattr(bench.Study, "read_profile", lambda _: only.model_dump(mode="json"))
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
    assert "the run was made with augmentation.flip 0.5, now 0.1" in said
    # one arm that is lost is run again, and its pretraining is not
    (home / "runs/dab_detr/0-metr/report.json").unlink()
    assert bench.main(arguments) == 0
    again = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("report.json")}
    assert {path.parent.name for path in reports if again[path] != reports[path]} == {"0-metr"}


def test_stopped_it_says_how_to_go_on(
    bench: ModuleType, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(home / "data"), "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(bench.runner, "run_all", lambda *_: False)
    assert bench.main(arguments) == 130
    assert "not done yet; to go on, give the same command again" in capsys.readouterr().out
    assert not (tmp_path / "results").exists(), "nothing can be compared yet"


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["deformable_detr", "rt_detr", "d_fine", "rf_detr"])
def test_every_detector_runs(bench: ModuleType, tiny_run: TinyRun, home: Path, detector: str) -> None:
    one = bench.Bench(detector, study_in(bench, tiny_run, home, detector), short(bench))
    assert bench.runner.run_all(one.study, one.runs)
    found = bench.runner.reports(list(one.arms.values()))
    assert [run["arm"] for run in found] == ["own", "untrained", "joint", "metr"]
    assert all(run["training_seconds"] > 0 for run in found)


@pytest.mark.parametrize("name", ["trial", "gpu"])
def test_profiles_are_whole(bench: ModuleType, name: str) -> None:
    from metr.config import merge
    from metr.conversion.targets import find_target
    from metr.training.config import RunConfig, load_recipe

    profile = profile_of(bench, name)
    assert profile.left_out in bench.DATASETS
    assert tuple(profile.detectors) == bench.DETECTORS
    for detector, config in profile.detectors.items():
        recipe = load_recipe("nano", None, (), merge(merge(profile.pretrain, config.pretrain), {"model": config.model}))
        assert isinstance(recipe, RunConfig)
        target = find_target(detector)
        assert target.fits(recipe.model), "all of METR moves"
        assert recipe.augmentation.resize.size % 32 == 0
        positions = recipe.model.encoder.positions
        wanted = {"rt_detr": "counted", "d_fine": "counted", "deformable_detr": "centred"}
        assert positions == wanted.get(detector, positions)


@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")  # Trainer's default, also without a GPU
@pytest.mark.parametrize("target", ["rt_detr", "deformable_detr"])
def test_the_example_transfers_trains_evaluates_and_saves(
    target: str, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 50
    out = tmp_path / "out"
    words = [str(tiny_run.folder), str(tiny_run.datasets[0]), str(out), "--to", target, "--steps", "1"]
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *words])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    from transformers import AutoModelForObjectDetection

    said = capsys.readouterr().out
    assert "together" in said, "the table of what was moved"
    assert "go on with" not in said, "the example goes on itself"
    assert f"checkpoints go to {out}-training" in said
    assert said.index("evaluating before the first step") < said.index("AP on val: ")
    assert f"the trained detector is in {out}-trained" in said
    begun = AutoModelForObjectDetection.from_pretrained(out)
    model = AutoModelForObjectDetection.from_pretrained(f"{out}-trained")
    assert same(model, AutoModelForObjectDetection.from_pretrained(f"{out}-training/checkpoint-1"))
    assert not same(model, begun), "what was transferred stays beside what was trained from it"
    assert set(model.config.id2label.values()) == {"fish", "frog", "leaf", "turtle"}
    for folder in ("trained", "training/checkpoint-1"):
        assert (Path(f"{out}-{folder}") / "preprocessor_config.json").is_file(), "a detector with its image processor"


def results(gains: dict[str, dict[str, float]], seeds: tuple[int, ...] = (0,)) -> Iterator[Any]:
    for detector, aps in gains.items():
        for arm, ap in aps.items():
            for seed in seeds:
                before = 4.0 if arm == "metr" else None
                facts = {"images": 200, "steps": 5, "ap50": 50.0, "ap_before": before, "training_seconds": 1.0}
                yield {"detector": detector, "arm": arm, "seed": seed, "ap": ap + 10 * seed, "commit": "abc", **facts}


def result_of(bench: ModuleType, found: Iterator[Any], detectors: Sequence[str], before: Sequence[Any]) -> Any:
    """A result as the study writes it."""
    runs = list(found)
    rows = bench.table_rows(runs)
    facts = {"profile": "trial", "complete": True, "hardware": "a machine", "torch": "2", "transformers": "5"}
    shown = {"commit": "abc", "training_seconds": 60.0, "settings": {"left_out": "bccd"}, "pretraining": before}
    goals = bench.goals(rows) if len(rows) == len(detectors) else []
    return {**facts, **shown, "runs": runs, "rows": rows, "bars": goals}


def pretrained(images: int = 3600, **seconds: tuple[float, ...]) -> list[Any]:
    return [
        {"detector": name, "kind": kind, "images": images, "training_seconds": one, "commit": "abc"}
        for name, several in seconds.items()
        for kind, one in zip(("metr", "joint"), several, strict=False)
    ]


def test_aims_are_against_the_better_backbone(bench: ModuleType, tmp_path: Path) -> None:
    found = {
        "rt_detr": {"own": 10.0, "untrained": 8.0, "joint": 20.0, "metr": 18.0},
        "deformable_detr": {"own": 2.0, "untrained": 5.0, "joint": 4.0, "metr": 4.5},
        "dab_detr": {"own": 1.0, "untrained": 4.0, "joint": 2.0, "metr": 6.5},
    }
    before = pretrained(rt_detr=(120.0, 60.0), dab_detr=(7.0,))
    result = result_of(bench, results(found, (0, 1)), tuple(found), before)
    assert [(bar["found"], bar["reached"]) for bar in result["bars"]] == [
        (pytest.approx(8.0), True),
        (pytest.approx(-0.5), False),
        (pytest.approx(2.5), True),
        (pytest.approx(10 / 3), True),
        (pytest.approx(1.0), True),
    ]
    page = bench.page(result)
    assert "| DAB-DETR | 6.0 (1.0 to 11.0) | 9.0 (4.0 to 14.0) |" in page
    assert "- gain of Deformable DETR: -0.5 (aim: above 0), **not reached**" in page
    assert "- mean gain: +3.3 (aim +3.0), reached" in page
    assert "RT-DETR behind own pretraining, concatenated labels (-2.0)" in page
    assert "RT-DETR 2.0 and 1.0." in page
    assert "after 5 steps of transformers' Trainer on its 200 training images" in page, "not the profile's"
    assert "in the same order, for the same steps. METR" in page
    assert "pretrained on 3,600 images sampled from the other datasets, the same ones." in page
    bench.report.draw_bars(tmp_path / "bars.png", bench.bars(result["rows"]), bench.TITLES)
    assert min(read_image(tmp_path / "bars.png").shape[:2]) > 100
    # a seed of which an arm is missing is left out, and no goal is judged before all detectors are there
    partial = bench.table_rows([*results(found, (0, 1))][:-1])
    assert [row["seeds"] for row in partial] == [[0, 1], [0, 1], [0]]
    assert len(bench.table_rows([*results(found)][:-1])) == 2


BOTH = {name: {"own": 1.0, "untrained": 4.0, "joint": 2.0, "metr": 6.5} for name in ("rt_detr", "dab_detr")}


def test_steps_and_images_that_differ_are_said(bench: ModuleType) -> None:
    uneven = [one | {"steps": 9} if one["arm"] == "metr" else one for one in results({"dab_detr": BOTH["dab_detr"]})]
    several = pretrained(3600, dab_detr=(1.0,)) + pretrained(80, rt_detr=(1.0,))
    page = bench.page(result_of(bench, uneven, ("dab_detr",), several))
    assert "after 5 to 9 steps" in page
    assert "**not for the same steps: DAB-DETR (own 5, untrained 5, joint 5, metr 9)**" in page
    assert (
        "pretrained on 3,600 (DAB-DETR) or 80 (RT-DETR) images sampled from the other datasets, the same ones." in page
    )
    longer = [one | {"steps": 9} if one["detector"] == "rt_detr" else one for one in results(BOTH)]
    assert "after 9 (RT-DETR) or 5 (DAB-DETR) steps of" in bench.page(result_of(bench, longer, tuple(BOTH), several))
    several += pretrained(90, dab_detr=(1.0,))
    page = bench.page(result_of(bench, uneven, ("dab_detr",), several))
    assert "on 90 to 3,600 (DAB-DETR) or 80 (RT-DETR) images" in page
    assert "**not the same number for METR and the detector**" in page
