"""The benchmark of the index runs at a tiny scale, and finds in the index what its dataset was made of."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="memory is read from /proc")


@pytest.mark.slow
def test_index_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import index

    def at_once(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return work(*arguments, **options)

    monkeypatch.setattr(index, "_apart", at_once)  # starting processes takes longer than the work
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


def test_the_made_up_dataset_is_as_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import index_source

    monkeypatch.setattr(index_source, "BLOCK", 100)
    source = index_source.write_source(tmp_path / "a", scale=1e-4, seed=3)
    content = json.loads(source.annotations.read_text())
    assert len(content["images"]) == len({image["id"] for image in content["images"]}) == source.images == 170
    boxes = content["annotations"]
    assert [box["id"] for box in boxes] == list(range(1, 2501))
    assert sum(box["bbox"][2] == 0 for box in boxes) == source.degenerate
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

    # the same seed gives the same file; what is there already is found
    again = index_source.write_source(tmp_path / "b", scale=1e-4, seed=3, images=False)
    assert again.annotations.read_bytes() == source.annotations.read_bytes()
    assert index_source.write_source(tmp_path / "a", scale=1e-4, seed=3) == source


def test_index_benchmark_without_proc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import index

    monkeypatch.setattr(index, "MEMORY", tmp_path / "nothing")
    assert index.main(["--scale", "0.0001"]) == 1
    assert "run it on Linux" in capsys.readouterr().out
