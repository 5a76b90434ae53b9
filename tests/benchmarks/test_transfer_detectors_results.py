"""What the benchmark of detectors makes of its runs: aims, what differed between them, and runs of older commits."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from rich.console import Console

from metr.data.images import read_image
from metr.errors import ConfigError


@pytest.fixture
def bench(benchmark_of: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_of("transfer_detectors")


def results(gains: dict[str, dict[str, float]], seeds: tuple[int, ...] = (0,)) -> Iterator[Any]:
    from transfer_detectors_runs import RunResult

    for detector, aps in gains.items():
        for arm, ap in aps.items():
            for seed in seeds:
                before = 4.0 if arm == "metr" else None
                facts = {"images": 200, "steps": 5, "ap50": 50.0, "ap_before": before, "training_seconds": 1.0}
                yield RunResult(detector=detector, arm=arm, seed=seed, ap=ap + 10 * seed, **facts)


def test_aims_are_against_the_better_backbone(bench: ModuleType, tmp_path: Path) -> None:
    found = {
        "rt_detr": {"own": 10.0, "untrained": 8.0, "joint": 20.0, "metr": 18.0},
        "deformable_detr": {"own": 2.0, "untrained": 5.0, "joint": 4.0, "metr": 4.5},
        "dab_detr": {"own": 1.0, "untrained": 4.0, "joint": 2.0, "metr": 6.5},
    }
    profile = bench.load_profile("trial")
    comparison = bench.Comparison.of([*results(found, (0, 1))], tuple(profile.detectors))
    assert [(bar.found, bar.reached) for bar in comparison.bars] == [
        (pytest.approx(8.0), True),
        (pytest.approx(-0.5), False),
        (pytest.approx(2.5), True),
        (pytest.approx(10 / 3), True),
    ]
    page = bench.as_markdown(comparison, profile, pretrained(rt_detr=(120.0, 60.0), dab_detr=(7.0,)))
    assert "| DAB-DETR | 6.0 (1.0 to 11.0) | 9.0 (4.0 to 14.0) |" in page
    assert "- gain of Deformable DETR: -0.5 (aim: above 0), **not reached**" in page
    assert "- mean gain: +3.3 (aim +3.0), reached" in page
    assert "RT-DETR behind own pretraining, concatenated labels (-2.0)" in page
    assert "RT-DETR 2.0 and 1.0." in page
    assert "after 5 steps of transformers' Trainer on its 200 training images" in page, "not the profile's"
    assert "and is trained alike. METR" in page
    assert "pretrained on 3,600 images drawn from the other datasets, the same ones." in page
    bench.draw_bars(comparison, tmp_path / "bars.png")
    assert min(read_image(tmp_path / "bars.png").shape[:2]) > 100
    # nothing is judged before all is there, and a seed of which an arm is missing is left out
    partial = bench.Comparison.of([*results(found, (0, 1))][:-1], tuple(profile.detectors))
    assert [row.seeds for row in partial.rows] == [(0, 1), (0, 1), (0,)]
    some = bench.Comparison.of([*results(found)][:-1], tuple(profile.detectors))
    assert (len(some.rows), some.bars) == (2, ())


def pretrained(images: int | None = 3600, **seconds: tuple[float, ...]) -> list[Any]:
    from transfer_detectors_runs import KINDS, Pretraining

    return [
        Pretraining(detector=name, kind=kind, images=images, training_seconds=one, commit="abc")
        for name, several in seconds.items()
        for kind, one in zip(KINDS, several, strict=False)
    ]


BOTH = {name: {"own": 1.0, "untrained": 4.0, "joint": 2.0, "metr": 6.5} for name in ("rt_detr", "dab_detr")}


def test_steps_and_images_that_differ_are_said(bench: ModuleType) -> None:
    found = {"dab_detr": {"own": 1.0, "untrained": 4.0, "joint": 2.0, "metr": 6.5}}
    uneven = [replace(one, steps=9) if one.arm == "metr" else one for one in results(found)]
    profile, comparison = bench.load_profile("trial"), bench.Comparison.of(uneven, ("dab_detr",))
    several = pretrained(3600, dab_detr=(1.0,)) + pretrained(80, rt_detr=(1.0,))
    page = bench.as_markdown(comparison, profile, several)
    assert "after 5 to 9 steps" in page
    one_longer = [replace(one, steps=9) if one.detector == "rt_detr" else one for one in results(BOTH)]
    both = bench.Comparison.of(one_longer, tuple(BOTH))
    assert "after 9 (RT-DETR) or 5 (DAB-DETR) steps of" in bench.as_markdown(both, profile, several)
    assert "but **not for the same steps: DAB-DETR (own 5, untrained 5, joint 5, metr 9)**" in page
    assert "pretrained on DAB-DETR 3,600 or RT-DETR 80 images drawn from the other datasets, the same ones." in page
    several += pretrained(90, dab_detr=(1.0,))
    page = bench.as_markdown(comparison, profile, several)
    assert "on DAB-DETR 90 to 3,600 or RT-DETR 80 images" in page
    assert "**not the same number for METR and the detector itself**" in page
    assert "pretrained on images drawn from the other datasets." in bench.as_markdown(
        comparison, profile, pretrained(None, dab_detr=(1.0,))
    )


def test_runs_that_kept_no_settings_are_read(bench: ModuleType, tmp_path: Path) -> None:
    """Folders as commit 93f6dad left them: their configuration is beside them, in the detector's folder."""
    from transfer_detectors_runs import _tree, arm_run, pretraining_run

    profile = bench.load_profile("trial").model_copy(update={"steps": 2})
    profile.detectors["dab_detr"] = profile.detectors["dab_detr"].model_copy(update={"steps": None})
    assert bench.load_profile("trial").steps_of("dab_detr") == 300, "its own"
    place = bench.Workplace(
        data=tmp_path, out=tmp_path / "runs", datasets=bench.DATASETS, overrides=(), console=Console(quiet=True)
    )
    (tmp_path / "runs/dab_detr").mkdir(parents=True)
    recipe = tmp_path / "runs/dab_detr/recipe.yaml"
    recipe.write_text(yaml.safe_dump(_tree("dab_detr", profile)))
    facts = {"images": 200, "steps": 2, "ap": 9.0, "ap50": 50.0, "ap_before": None, "training_seconds": 1.0}
    for arm in ("own", "untrained", "joint", "metr"):
        run = arm_run(place, profile, "dab_detr", arm, 0)
        write_report(run.folder, {"detector": "dab_detr", "arm": arm, "seed": 0, **facts})
    for kind in ("metr", "joint"):
        run = pretraining_run(place, profile, "dab_detr", kind)
        write_report(run.folder, {"data": [], "training_seconds": 60.0})
    records = [{"kind": "train", "step": step, "images": 8 * step} for step in (1, 2)]
    records.append({"kind": "evaluation", "step": 3, "metrics": {}})  # the third was not logged
    (run.folder.with_name("pretrained-metr") / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(r)}\n" for r in records)
    )
    assert [(one.arm, one.commit, one.steps) for one in bench.finished(place, profile)] == [
        (arm, "unknown", 2) for arm in ("own", "untrained", "joint", "metr")
    ]
    assert [(one.kind, one.images, one.commit) for one in bench.pretrainings(place, profile)] == [
        ("metr", 24, "unknown"),
        ("joint", None, "unknown"),
    ]
    assert bench.run_all(place, profile, ("dab_detr",)), "nothing is left to be run"
    for other, named in (({"steps": 3}, "steps 2, now 3"), ({"pretrain": {"loader": {"batch_size": 9}}}, "8, now 9")):
        with pytest.raises(ConfigError, match=named):
            bench.run_all(place, profile.model_copy(update=other), ("rt_detr",))
    assert yaml.safe_load(recipe.read_text()) == _tree("dab_detr", profile), "what is refused leaves no trace"


def write_report(folder: Path, report: Any) -> None:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
