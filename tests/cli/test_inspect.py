"""`metr inspect`: a line for each dataset, its faults, and the names that several share."""

import re
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from metr.cli.inspect import inspect
from metr.errors import MetrError

APP = typer.Typer()
APP.command()(inspect)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


def write_csv(root: Path, *lines: str) -> Path:
    """A dataset of two pictures of 40 x 30."""
    (root / "images").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30)).save(root / "images" / name)
    (root / "train.csv").write_text("\n".join(["a.jpg,1,2,10,20,cat", *lines]), encoding="utf-8")
    (root / "val.csv").write_text("b.jpg,,,,,", encoding="utf-8")
    return root


def row(result: Result, name: str) -> list[str]:
    """The cells of a dataset's line."""
    (line,) = re.findall(rf"^ *{re.escape(name)} .*$", result.output, re.MULTILINE)
    return line.split()


def test_a_line_for_each_dataset(tmp_path: Path) -> None:
    pets = write_csv(tmp_path / "pets", "a.jpg,1,2,10,20,dog")
    cats = write_csv(tmp_path / "cats [x]")
    result = run(pets, f"more={cats}")
    assert result.exit_code == 0, result.output
    header = "dataset format images train val test boxes ignored categories empty faults"
    assert " ".join(result.output.splitlines()[0].split()) == header
    assert row(result, "pets") == ["pets", "csv", "2", "1", "1", "-", "2", "0", "2", "1", "0"]
    assert row(result, "more") == ["more", "csv", "2", "1", "1", "-", "1", "0", "1", "1", "0"]
    assert "2 names in all, 1 of them in several datasets" in result.output
    assert "cat: pets, more" in result.output


def test_faults_are_shown_with_their_count(tmp_path: Path) -> None:
    result = run(write_csv(tmp_path / "pets", *[f"a.jpg,5,{n},5,20,[bold]cat" for n in range(5)]))
    assert "pets: 5 x degenerate box" in result.output
    assert "train.csv:2: [5, 0, 5, 20] in 40 x 30" in result.output
    assert "and 2 more" in result.output


def test_verbose_lists_the_categories(tmp_path: Path) -> None:
    result = run(write_csv(tmp_path / "pets", "a.jpg,1,2,10,20,dog", "a.jpg,1,2,10,20,dog"), "--verbose")
    assert re.search(r"dog +2 +2 +0\s+cat +1 +1 +0", result.output)
    assert "dog" not in run(tmp_path / "pets").output


def test_check_looks_at_the_pictures(tmp_path: Path) -> None:
    root = write_csv(tmp_path / "pets")
    header = "filename,width,height,class,xmin,ymin,xmax,ymax"
    (root / "train.csv").write_text(f"{header}\na.jpg,80,60,cat,1,2,10,20\n", encoding="utf-8")
    assert row(run(root), "pets")[-1] == "0"
    result = run(root, "--check")
    assert "pets: 1 x size differs" in result.output
    assert "annotated as 80 x 60, is 40 x 30" in result.output


@pytest.mark.parametrize("wrong", ["nowhere", "empty", "list.yaml"])
def test_what_cannot_be_read_ends_in_one_message(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "empty").mkdir()
    result = run(write_csv(tmp_path / "pets"), tmp_path / wrong)
    assert isinstance(result.exception, MetrError)
    assert str(tmp_path / wrong) in str(result.exception)


def test_the_real_datasets(shared: Path) -> None:
    result = run(*sorted((shared / "data").iterdir()))
    assert result.exit_code == 0, result.output
    expected = {
        "aquarium": "yolo 199 135 41 23 1,441 0 7 1 2",
        "bccd": "voc 364 205 87 72 4,886 0 3 0 2",
        "chess_pieces": "coco 271 190 53 28 2,594 0 13 1 1",
        "coco_mini": "coco 315 195 120 - 2,943 35 80 4 0",
        "doc_tables": "csv 225 197 28 - 277 0 1 0 0",
        "endangered_animals": "coco 213 153 45 15 327 0 7 0 0",
        "playing_cards": "voc 259 212 - 47 473 0 6 0 0",
    }
    for name, line in expected.items():
        assert " ".join(row(result, name)) == f"{name} {line}"
    assert "115 names in all, 2 of them in several datasets" in result.output
    assert "bear: coco_mini, endangered_animals" in result.output
