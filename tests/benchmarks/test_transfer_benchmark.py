"""The transfer benchmark runs from end to end in miniature, goes on where it stopped, and shows what got worse."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from metr.data.images import read_image

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def transfer(benchmark_of: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_of("transfer")


@pytest.fixture
def run(transfer: ModuleType, command_of: Callable[[ModuleType], Callable[..., int]]) -> Callable[..., int]:
    return command_of(transfer)


def results(transfer: ModuleType, gains: dict[tuple[str, float], float], seeds: tuple[int, ...] = (0,)) -> list:
    """Runs of both arms: 10 AP more a seed from the backbone alone, and so much more when pretrained."""
    from transfer_runs import RunResult

    return [
        RunResult(
            left_out=name,
            share=share,
            seed=seed,
            arm=arm,
            images=round(200 * share),
            steps=5,
            ap=10.0 + 10 * seed + (gain if arm == "pretrained" else 0.0),
            ap50=50.0,
            training_seconds=1.0,
        )
        for (name, share), gain in gains.items()
        for seed in seeds
        for arm in ("imagenet", "pretrained")
    ]


@pytest.mark.slow
def test_every_run_once_and_both_arms_alike(
    run: Callable[..., int], transfer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--set", "train.loop.steps=2") == 0
    stem = tmp_path / "results/transfer-trial"
    told = json.loads(stem.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    assert told["complete"]
    assert [(one["left_out"], one["share"], one["arm"]) for one in told["runs"]] == [
        (name, share, arm)
        for name in ("chess_pieces", "playing_cards")
        for share in (0.1, 1.0)
        for arm in ("imagenet", "pretrained")
    ]
    assert {(one["share"], one["images"], one["steps"]) for one in told["runs"]} == {(0.1, 1, 2), (1.0, 4, 2)}
    assert [bar["aim"] for bar in told["bars"]] == [5.0, 1.5, -1.0]
    assert "| **mean** | 100%" in stem.with_suffix(".md").read_text()
    assert min(read_image(stem.with_suffix(".png")).shape[:2]) > 100
    runs = tmp_path / "runs"
    assert {path.name for path in runs.iterdir()} == {"without-chess_pieces-playing_cards", *transfer_names()}
    report = json.loads((runs / "without-chess_pieces-playing_cards/report.json").read_text())
    assert not any("chess" in one or "cards" in one for one in report["data"])
    # both arms go through the same pictures, in the same augmentation
    configs = [
        (runs / f"chess_pieces/1-0-{arm}/recipe.yaml").read_text().partition("optimizer")[0]
        for arm in ("imagenet", "pretrained")
    ]
    assert configs[0].split("train:")[0] == configs[1].split("train:")[0]
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("report.json")}
    capsys.readouterr()
    assert run() == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("report.json")} == before
    assert "pretraining without" not in capsys.readouterr().out


def transfer_names() -> set[str]:
    return {"chess_pieces", "playing_cards"}


def test_stopped_it_says_how_to_go_on(
    run: Callable[..., int],
    transfer: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*_: object) -> bool:
        raise KeyboardInterrupt

    for run_all in (lambda *_: False, stopped):
        monkeypatch.setattr(transfer, "run_all", run_all)
        assert run() == 130
        assert "not done yet; to go on, give the same command again" in capsys.readouterr().out
    assert not (tmp_path / "results").exists(), "nothing can be compared yet"
    # what is finished is written, and said to be a part
    part = results(transfer, {("chess_pieces", 0.1): 7.0})
    monkeypatch.setattr(transfer, "finished", lambda *_: part)
    assert run() == 130
    told = json.loads((tmp_path / "results/transfer-trial.json").read_text())
    assert not told["complete"]
    assert told["bars"] == [], "one of two datasets is missing"
    assert "(not complete)" in (tmp_path / "results/transfer-trial.md").read_text()


def test_aims_and_regressions(transfer: ModuleType, tmp_path: Path) -> None:
    gains = {("a", 0.1): 8.0, ("b", 0.1): 3.0, ("a", 1.0): 4.5, ("b", 1.0): -1.5}
    comparison = transfer.Comparison.of(results(transfer, gains, seeds=(0, 1, 2)), ("a", "b"))
    assert [(bar.found, bar.reached) for bar in comparison.bars] == [
        (pytest.approx(5.5), True),
        (pytest.approx(1.5), True),
        (pytest.approx(-1.5), False),
    ]
    from transfer_runs import Profile

    profile = Profile.checked(transfer.read_yaml(BENCHMARKS / "profiles/transfer-trial.yaml"))
    page = transfer.as_markdown(comparison, profile)
    assert "| a | 10% | 20 | 200 | 3 | 20.0 (10.0 to 30.0) | 28.0 (18.0 to 38.0) | +8.0 |" in page
    assert "Worse with pretraining: b at 100% (-1.5)." in page
    assert "- least gain of a dataset at 100%: -1.5 (aim -1.0), **not reached**" in page
    transfer.draw_curves(comparison, tmp_path / "curves.png")
    assert min(read_image(tmp_path / "curves.png").shape[:2]) > 100
    # a seed of which one arm is missing is left out
    partial = transfer.Comparison.of(results(transfer, gains, seeds=(0, 1))[:-1], ("a", "b"))
    assert [point.seeds for point in partial.points] == [(0, 1), (0, 1), (0, 1), (0,)]


@pytest.mark.parametrize("name", ["trial", "gpu"])
def test_profiles_are_whole(transfer: ModuleType, name: str) -> None:
    from metr.engine.recipe import RunConfig
    from transfer_runs import Profile, _Cell, _cells, _tree

    profile = Profile.checked(transfer.read_yaml(BENCHMARKS / f"profiles/transfer-{name}.yaml"))
    assert set(profile.left_out) < set(transfer.DATASETS)
    assert profile.seeds.keys() == profile.steps.keys()
    assert "coco_mini" not in profile.left_out
    RunConfig.checked(profile.pretrain)
    for cell in _cells(profile):
        assert isinstance(cell, _Cell)
        recipe = RunConfig.checked(_tree(cell, profile))
        assert recipe.train.loop.steps == profile.steps[cell.share]
        assert (recipe.train.loop.evaluate_every, recipe.train.loop.patience) == (0, 0)
        assert recipe.augmentation.resize == RunConfig.checked(profile.pretrain).augmentation.resize
