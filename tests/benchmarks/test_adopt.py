"""The study of adopted detectors runs in miniature, goes on where it stopped, and says which goals were missed."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoConfig

from tiny import TinyRun, as_overrides

ARMS = ["imagenet", "transformers", "adopted"]
TINY = ("model.encoder.layers=1", "model.encoder.fusion_blocks=1", "train.loop.steps=2", "train.loop.evaluate_every=0")


@pytest.fixture
def adopt(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("adopt")


@pytest.fixture
def results(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("adopt_results")


@pytest.fixture
def arguments(tiny_run: TinyRun, tmp_path: Path) -> list[str]:
    """The command in miniature: datasets of the demo, of which two share a name."""
    places = {"data": tiny_run.datasets[0].parent, "out": tmp_path / "runs", "results": tmp_path / "results"}
    given = ["--profile", "tiny", *(part for name, path in places.items() for part in (f"--{name}", str(path)))]
    return given + [part for one in (*as_overrides(tiny_run), *TINY) for part in ("--set", one)]


def study_in(adopt: ModuleType, tiny_run: TinyRun, out: Path, profile: str = "tiny") -> Any:
    return adopt.Study(
        name="adopt",
        profile=profile,
        data=tiny_run.datasets[0].parent,
        out=out,
        overrides=(*as_overrides(tiny_run), *TINY),
        console=Console(quiet=True),
    )


@pytest.mark.slow
def test_every_run_once_and_a_page_from_the_numbers(
    adopt: ModuleType, results: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adopt.main(arguments) == 0
    stem = tmp_path / "results/adopt-tiny"
    told = json.loads(stem.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert told["complete"]
    assert told["transformers"]
    assert all(one["commit"] not in {"", "unknown"} for one in told["commits"])
    assert sorted((one["share"], one["arm"], one["steps"]) for one in told["runs"]) == sorted(
        (share, arm, 2) for share in (0.5, 1.0) for arm in ARMS
    )
    (source,) = told["sources"]
    assert set(source["before"]) == {"pond", "meadow"}
    assert set(source["rehearsed"]["datasets"]) == {"desk", "pond", "meadow"}
    # asked for all names METR is its source, image by image
    for one in source["before"].values():
        assert one["joint"] == pytest.approx(one["source"], abs=results.ALIKE)
    assert [bar["reached"] for bar in told["bars"][:2]] == [True, True]
    page = stem.with_suffix(".md").read_text()
    assert page == results.page(told), "the page is made from the JSON file alone"
    assert "| desk | 50% | 2 | 2 | 1 |" in page
    runs = tmp_path / "runs"
    labels = json.loads((runs / "rt_detr/source/model/config.json").read_text())["id2label"].values()
    assert len(set(labels)) == len(labels) == 8
    assert {"pond leaf", "meadow leaf", "fish"} <= set(labels)
    assert not [*runs.rglob("checkpoint-*")], "nothing is kept to go on from"
    # nothing is done twice; other settings are refused
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("report.json")}
    assert adopt.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("report.json")} == before
    capsys.readouterr()
    assert adopt.main([*arguments, "--set", "loader.batch_size=1"]) == 1
    assert "the run was made with" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(
    adopt: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call is stopped in the first run that it begins with, after the training and before the report."""
    written = adopt.Run._write
    seen: list[str] = []

    def stopping(self: Any, name: str, values: Any) -> None:
        if name == adopt.runner.REPORT and self.title not in seen:
            seen.append(self.title)
            raise KeyboardInterrupt
        written(self, name, values)

    monkeypatch.setattr(adopt.Run, "_write", stopping)
    calls = 0
    while adopt.main(arguments) == 130:
        calls += 1
        assert calls < 12
    assert calls == len(seen) == 9  # source, adopted, six fine-tunings, rehearsal
    assert json.loads((tmp_path / "results/adopt-tiny.json").read_text())["complete"]


def test_a_source_that_finds_too_little_is_told_and_not_tuned(
    adopt: ModuleType, results: ModuleType, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in(adopt, tiny_run, tmp_path)
    profile = study.read_profile()
    profile["sources"][0]["least_ap"] = 15.0
    monkeypatch.setattr(adopt.Study, "read_profile", lambda _: profile)
    begun: list[str] = []
    found = {"training_seconds": 60.0, "steps": 2, "images_seen": 4, "commit": "abc", "datasets": {}, "notes": []}
    found["datasets"] = {"pond": {"unclipped": 9.0, "source": 10.0, "own": 10.0, "joint": 10.0}}

    def made(self: Any, _: Any) -> bool:
        begun.append(self.title)
        self._write("report.json", found)
        return True

    monkeypatch.setattr(adopt.Run, "execute", made)
    monkeypatch.setattr(adopt.report, "write_result", lambda stem, result, page: begun.append(page))
    assert adopt.conduct(study)
    assert begun[:2] == ["rt_detr, training of the source", "rt_detr, adopted by METR: before any step"]
    assert len(begun) == 3
    assert "**Not fine-tuned: its mean AP is 10.0, under 15.**" in begun[2]


def source_with(results: ModuleType, own: float, joint: float, adopted: float, after: float) -> Any:
    ap = {"imagenet": 20.0, "transformers": 30.0, "adopted": adopted}
    tuned = [
        {"detector": "rt_detr", "new": "desk", "share": share, "seed": seed, "arm": arm, "ap": ap[arm] + seed}
        | {"images": 9, "steps": 5, "commit": "abc"}
        for share in (0.1, 1.0)
        for seed in (0, 1)
        for arm in ARMS
    ]
    old = {
        "pond": {"unclipped": 39.0, "source": 40.0, "own": own, "joint": joint},
        "meadow": {"unclipped": 30.0, "source": 30.0, "own": 30.5, "joint": 30.0},
    }
    rehearsed = {"pond": (40.0, after), "meadow": (30.0, 30.0), "desk": (1.0, 20.0)}
    reports = {
        "trained": {"training_seconds": 60.0, "steps": 5, "images_seen": 40},
        "adopted": {"datasets": old, "notes": ["the class heads are met"]},
        "rehearsed": {"datasets": {name: {"before": a, "after": b} for name, (a, b) in rehearsed.items()}},
    }
    return results.source_result("rt_detr", reports, tuned, 0.0, 2)


def test_goals_reached_and_missed(results: ModuleType) -> None:
    good = source_with(results, own=40.9, joint=39.9, adopted=29.0, after=35.0)["bars"]
    assert [bar["reached"] for bar in good] == [True] * 5
    assert [bar["found"] for bar in good] == pytest.approx([0.5, -0.1, 9.0, -1.0, 100 * 32.5 / 35])
    bad = source_with(results, own=39.7, joint=40.3, adopted=24.0, after=30.0)["bars"]
    assert [bar["reached"] for bar in bad] == [False] * 5
    facts = {"profile": "trial", "complete": True, "hardware": "a machine", "torch": "2", "transformers": "5"}
    source = source_with(results, own=39.7, joint=40.3, adopted=24.0, after=30.0)
    result = facts | {"commit": "abc", "training_seconds": 60.0, "commits": [], "sources": [source]}
    page = results.page(result)
    assert "- rt_detr: mean AP over the ImageNet backbone: +4.0 (aim +5.0), **not reached**" in page
    assert "| pond | 39.00 | 40.00 | 40.30 | 39.70 |" in page
    assert "| desk | 10% | 9 | 5 | 2 | 20.5 (20.0 to 21.0) |" in page
    assert "The class heads are met." in page
    assert results.bars(result) == {
        "AP, rt_detr": {f"desk, {share}": source["points"][0]["ap"] for share in ("10%", "100%")}
    }


def test_no_goal_of_fine_tuning_before_all_is_done(results: ModuleType) -> None:
    reports = {"trained": {"training_seconds": 60.0, "steps": 5, "images_seen": 40}}
    assert results.source_result("rt_detr", reports, [], 0.0, 2)["bars"] == []


@pytest.mark.parametrize("name", ["trial", "gpu", "tiny"])
def test_profiles_are_whole(adopt: ModuleType, name: str) -> None:
    from metr.config import merge
    from metr.conversion.targets import find_target
    from metr.training.config import load_recipe

    study = adopt.Study(name="adopt", profile=name, data=Path(), out=Path())
    profile = adopt.Profile.checked(study.read_profile())
    assert profile.seeds.keys() == profile.steps.keys()
    assert not set(profile.old) & set(profile.new)
    assert profile.rehearsal.new in profile.new
    # the same images in the same order: one batch, one augmentation
    for part in ("augmentation", "loader"):
        assert profile.pretrain[part] == profile.tuning[part]
    for source in profile.sources:
        if source.options:
            config = AutoConfig.for_model(source.detector, **source.options)
            stride = config.backbone_config.patch_size * config.backbone_config.num_windows
            places = (source.augmentation["resize"]["size"] // config.backbone_config.patch_size) ** 2
            assert source.augmentation["resize"]["size"] % stride == 0
            assert config.num_queries <= places
        else:
            recipe = load_recipe("nano", changes=merge(profile.pretrain, {"model": source.model}))
            assert find_target(source.detector).fits(recipe.model)
