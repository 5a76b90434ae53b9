"""The studies of a step and of the index run at a tiny scale, and their numbers belong together."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tiny import TinyRun, as_overrides

TINY = "--size 64 --repeats 1 --layers 1 --backbone resnet18 --names 7 --queries 20 --feed-forward 32 --threads 1"
on_linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="memory is read from /proc")


@pytest.fixture
def step(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("step")


@pytest.fixture
def index(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("index")


def test_step_writes_ratios_parts_and_bars(
    step: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step.main([*TINY.split(), "--device", "cpu", "--results", str(tmp_path)]) == 0
    assert "Deformable DETR" in capsys.readouterr().out
    result = json.loads((tmp_path / "step-cpu.json").read_text())
    assert {"hardware", "torch", "transformers", "commit", "settings", "denoising"} <= result.keys()
    assert set(result["bars"]) == {"training_ratio", "inference_ratio", "matching_share"}
    for bar in result["bars"].values():
        assert bar["met"] == (bar["value"] <= bar["bar"])
    for what in ("training", "inference"):
        seconds = result["seconds"][what]
        # one counted round: its ratio is that of the times
        ratio = seconds["METR"] / seconds["Deformable DETR"]
        assert result["bars"][f"{what}_ratio"]["value"] == pytest.approx(ratio)
        assert [len(values) for values in result["rounds"][what].values()] == [1] * len(seconds)
    parts = result["parts"]
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert all(part["seconds"] > 0 for part in parts.values())
    assert parts["matching"]["share"] == result["bars"]["matching_share"]["value"]


def test_step_refuses_a_device_that_is_not_there(
    step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step.main([*TINY.split(), "--device", "cuda", "--results", str(tmp_path)]) == 1
    assert "--device" in capsys.readouterr().out


@pytest.mark.slow
@on_linux
def test_index_is_measured(
    index: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at_once(work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    monkeypatch.setattr(index, "apart", at_once)  # starting processes takes longer than the work
    monkeypatch.setattr(index, "find_spec", lambda _: None)
    options = f"--scale 0.0005 --workers 2 --records 50 --scratch {tmp_path} --results {tmp_path / 'results'}"
    assert index.main(options.split()) == 0
    assert "not installed" in capsys.readouterr().out

    result = json.loads((tmp_path / "results" / "index-cpu.json").read_text())
    assert {"hardware", "commit", "settings", "pycocotools"} <= result.keys()
    assert set(result["bars"]) == {"build_peak_bytes", "open_seconds", "worker_bytes"}
    for bar in result["bars"].values():
        assert bar["met"] == (bar["value"] <= bar["bar"])
    metr = result["metr"]
    assert (metr["source"]["images"], metr["source"]["boxes"]) == (850, 12_500)
    assert (metr["build"]["format"], metr["open"]["reused"]) == ("objects365", True)
    assert metr["build"]["peak_bytes"] >= metr["build"]["peak_bytes_before"] > 0
    assert len(metr["workers"]["beyond_empty_bytes"]) == 2
    # nothing is left but the result
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_the_synthetic_dataset_is_as_described(
    index: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "BLOCK", 100)
    source = index.write_source(tmp_path / "a", 1e-4, 3)
    content = json.loads(index.annotation_file(tmp_path / "a").read_text())
    assert len(content["images"]) == len({image["id"] for image in content["images"]}) == source["images"] == 170
    boxes = content["annotations"]
    assert [box["id"] for box in boxes] == list(range(1, 2501))
    assert sum(box["bbox"][2] == 0 for box in boxes) == source["degenerate"]
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for box in boxes:
        x, y, width, height = box["bbox"]
        limit = sizes[box["image_id"]]
        assert min(x, y) >= 0
        assert x + width <= limit[0] + 0.01
        assert y + height <= limit[1] + 0.01
    owners = [box["image_id"] for box in boxes]
    apart = sum(one > other for one, other in pairwise(owners))
    assert 0.05 < apart / len(boxes) < 0.4
    for image in content["images"]:
        assert (
            tmp_path / "a" / "train" / Path(image["file_name"]).parent.name / Path(image["file_name"]).name
        ).is_file()

    # the same seed gives the same file
    index.write_source(tmp_path / "b", 1e-4, 3, False)
    first, second = (index.annotation_file(tmp_path / name).read_bytes() for name in "ab")
    assert first == second
    assert not (tmp_path / "b" / "train").exists()


def test_index_needs_proc(
    index: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(index, "MEMORY", tmp_path / "nothing")
    assert index.main(["--scale", "0.0001"]) == 1
    assert "run it on Linux" in capsys.readouterr().out


def test_sharding_counts_what_a_process_keeps(
    study_of: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study_of("sharding").main(["--sizes", "nano", "--results", str(tmp_path)]) == 0
    assert "written" in capsys.readouterr().out
    (kept,) = json.loads((tmp_path / "sharding.json").read_text())["processes"]["1"].values()
    assert kept["weights"] == kept["average"] == 4 * kept["parameters"], "float32"
    assert kept["gradients"] <= kept["weights"]
    assert kept["moments"] == pytest.approx(2 * kept["gradients"], rel=0.01)


def test_each_of_two_sharded_processes_keeps_a_half() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "sharding.json"
    processes = json.loads(path.read_text())["processes"]
    for size, kept in processes["1"].items():
        for part in ("weights", "gradients", "moments", "average"):
            assert processes["2"][size][part] == pytest.approx(kept[part] / 2, rel=0.01)


@pytest.mark.slow
def test_gpu_pieces_run_on_a_cpu(
    study_of: Callable[[str], ModuleType], tmp_path: Path, tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = study_of("gpu")
    sets = [f"--set={one}" for one in as_overrides(tiny_run)]
    data = ["--data", *tiny_run.data]
    tiny = ["--tiny", "--device", "cpu", "--results", str(tmp_path), "--pieces", "speed", "kernel", "training"]
    assert gpu.main([*tiny, *data, *sets]) == 0, capsys.readouterr().out
    results = {piece: json.loads((tmp_path / f"gpu-{piece}-cpu.json").read_text()) for piece in tiny[-3:]}
    assert all(one["hardware"] and one["commit"] and one["settings"]["size"] == 64 for one in results.values())
    contenders = results["speed"]["result"]["contenders"]
    assert set(contenders) == {"METR", "Deformable DETR", "RT-DETR"}
    for name, found in contenders.items():
        assert "error" not in found, (name, found)
        for what in ("training", "inference"):
            assert found[what]["images_per_second"] > 0
            assert found[what]["flops"] > 0
            assert found[what]["bytes"] > 0
    assert results["kernel"]["result"]["forward_and_backward"]["plain"]["seconds"] > 0
    assert 0 <= results["training"]["result"]["waiting_fraction"] <= 1


def test_shares_of_the_chips_peak(study_of: Callable[[str], ModuleType]) -> None:
    gpu = study_of("gpu")
    limits = {"name": "H100", **gpu.CHIPS["H100"]}
    found = gpu.roofline({"flops": 989.4e12, "bytes": 3350e9}, 2.0, "bf16", limits)
    assert found["share_of_peak_flops"] == pytest.approx(0.5)
    assert found["share_of_peak_bandwidth"] == pytest.approx(0.5)
    assert gpu.roofline({"flops": 1.0, "bytes": 1.0}, 1.0, "bf16", None)["share_of_peak_flops"] is None
