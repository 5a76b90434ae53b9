"""The page of a training run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metr.errors import CheckpointError, DataError
from metr.report import write_run_page

from read_page import one, read_page
from tiny import CommandLine, TinyRun


@pytest.fixture
def run(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """A copy of the tiny run, with the images that training draws, and with a log."""
    shutil.copytree(tiny_run.folder, tmp_path / "joint")
    for name in ("train_batch.jpg", "val_images.jpg"):
        Image.fromarray(np.full((40, 60, 3), 120, dtype=np.uint8)).save(tmp_path / "joint" / name)
    (tmp_path / "joint/log.txt").write_text(
        "2026-01-02 03:04:05 command: metr train pond -o joint\n"
        "2026-01-02 04:04:05 command: metr train --resume -o joint\n"
    )
    return tmp_path / "joint"


def test_the_command_shows_a_run(metr: CommandLine, run: Path, tiny_run: TinyRun) -> None:
    ended = metr("report", run)
    assert ended.code == 0, ended.err
    assert f"{run / 'report.html'} is one file of" in ended.words
    page = read_page(run / "report.html")
    assert one(page, "h1").text == "Training run joint"
    rows = {row[0].text: row for row in one(page, "table", id="data-table").rows}
    assert rows.keys() == {"pond", "desk", "meadow"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = next(record["epochs"] for record in reversed(records) if record.get("epochs"))
    assert {name: float(row[5].attributes["data-value"]) for name, row in rows.items()} == seen
    titles = [title.text for title in page.every("h3")]
    assert {"AP on val", "Loss", "Data seen", "Learning rate", "First batch", "Val images"} <= set(titles)
    tiles = {
        tile.children[0].text: tile.children[1].text
        for tile in page.every("div")
        if tile.attributes.get("class") == "tile"
    }
    assert tiles["steps"] == "3"
    assert (run / "config.yaml").read_text().strip() == "".join(one(page, "pre").own).strip()
    facts = page.text
    assert "metr train pond -o joint" in facts
    assert "resumed 1 time" in facts
    assert "https:" not in (run / "report.html").read_text()


def test_an_evaluation_in_the_folder_is_part_of_it(metr: CommandLine, run: Path, tiny_run: TinyRun) -> None:
    assert metr("evaluate", run, tiny_run.data[0]).code == 0
    page = read_page(write_run_page(run))
    told = json.loads((run / "evaluation/evaluation.json").read_text())
    mean = one(page, "dd", data_mean="own")
    assert float(mean.attributes["data-value"]) == told["mean"]["own"]["ap"]
    links = [link.attributes["href"] for link in one(page, "nav").every("a")]
    assert "#training" in links
    assert "#errors" in links
    assert "#worst" not in links


def test_other_evaluations_are_beside_it(metr: CommandLine, run: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    assert metr("evaluate", run, tiny_run.data[0], "-o", tmp_path / "pond").code == 0
    values = json.loads((tmp_path / "pond/evaluation.json").read_text())
    assert values["trained_on"] == ["pond", "desk", "meadow"]
    bare = metr("report", run, "--compare", f"pond={tmp_path / 'pond'}")
    assert "expected an evaluation.json" in bare.err, "the run itself has not been evaluated"
    shutil.copytree(tmp_path / "pond", run / "evaluation")
    (tmp_path / "alone.json").write_text(json.dumps({**values, "trained_on": ["pond"]}))
    ended = metr("report", run, "--compare", f"pond alone={tmp_path / 'alone.json'}")
    assert ended.code == 0, ended.err
    (row,) = one(read_page(run / "report.html"), "table", id="gifts").rows
    assert [cell.text for cell in row] == ["desk, meadow", "pond alone", "+0.0"]
    values["datasets"][0]["split"] = "test"
    (tmp_path / "alone.json").write_text(json.dumps(values))
    apart = metr("report", run, "--compare", f"a={tmp_path / 'alone.json'}", "-o", tmp_path / "none.html")
    assert "none of the splits that this run was evaluated on: pond (val)" in apart.err
    assert not (tmp_path / "none.html").exists()


def test_a_comparison_in_the_folder_is_part_of_it(run: Path) -> None:
    changes = [
        {
            "dataset": "<b>old",
            "role": "old",
            "before": {"own": 50.0, "joint": None},
            "after": {"own": 45.5, "joint": 1.0},
        }
    ]
    (run / "comparison.json").write_text(json.dumps({"datasets": changes}))
    text = write_run_page(run).read_text()
    assert "Before and after" in text
    assert "<bdi>&lt;b&gt;old</bdi>" in text
    assert 'data-value="45.5"' in text
    (run / "comparison.json").write_text('{"datasets": [{"dataset": 3}]}')
    with pytest.raises(DataError, match="not a comparison"):
        write_run_page(run)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("name: </pre><script>alert(1)</script>\n")
    page = read_page(write_run_page(tmp_path / "run", tmp_path / "elsewhere/page.html"))
    assert "Nothing is logged yet." in page.text
    assert one(page, "pre").text == "name: </pre><script>alert(1)</script>"
    assert [script.attributes for script in page.every("script")] == [{}]


def test_a_folder_that_is_no_run(metr: CommandLine, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected the folder of a training run"):
        write_run_page(tmp_path)
    assert metr("report", tmp_path / "gone").code == 1
