"""The datasets file that is left to edit: it says what was given, and every suggestion in it can be taken up."""

import json
import re
from pathlib import Path

import pytest
from inspection_datasets import SPELLING, dataset_facts, name_facts, save_noise, write_csv

from metr.data.datasets_file import DatasetConfig, DatasetSource, open_dataset, parse_data_arguments
from metr.errors import ConfigError
from metr.inspection.coverage import Homonym
from metr.inspection.datasets_file import (
    Suggestion,
    check_target,
    datasets_file_text,
    is_cryptic,
    suggestions_of,
    write_datasets_file,
)
from metr.inspection.label_report import inspect_datasets
from metr.inspection.similar_names import similar_names


def opened(tmp_path: Path, **options: object) -> DatasetSource:
    lines = ["a.png,0,0,5,5,RBC", "a.png,1,1,9,9,'odd: #name'", "b.png,0,0,5,5,Platelets"]
    root = write_csv(tmp_path / "old data" / "cells", {"train": lines, "valid": ["c.png,,,,,"]})
    return open_dataset(DatasetConfig(**{"name": "cells", "path": root, **options}), tmp_path / "cache")


def uncommented(text: str) -> str:
    """Every suggestion below a dataset taken up."""
    return re.sub(r"^(    (?:  )?)# ", r"\1", text, flags=re.MULTILINE)


def written(tmp_path: Path, *sources: DatasetSource) -> Path:
    inspection = inspect_datasets(sources, SPELLING)
    path = tmp_path / "lists" / "data.yaml"
    write_datasets_file(path, sources, inspection.suggestions, inspection.coverage)
    return path


OPTIONS = {
    "boxes": "xyxy",
    "weight": 0.123456789,
    "splits": {"train": ("train", "valid")},
    "prompts": {"Platelets": "a platelet: small #1"},
    "synonyms": {"red cell": ("erythrocyte", "no: 7")},
    "absent": ("worm", "'odd: #word'"),
    "renames": {"RBC": "red cell"},
    "exhaustive": ("red cell", "Platelets"),
}


def test_no_key_is_forgotten() -> None:
    """A key that is added has to be written too; `only`, `drop` and `ignore` have a test of their own."""
    assert DatasetConfig.model_fields.keys() == OPTIONS.keys() | {"name", "path", "format", "only", "drop", "ignore"}


@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_the_listing_gives_the_same_datasets(tmp_path: Path, options: dict[str, object]) -> None:
    source = opened(tmp_path, **options)
    path = written(tmp_path, source)
    (spec,) = parse_data_arguments([str(path)])
    assert spec.path.resolve() == source.config.path.resolve()
    assert spec.model_copy(update={"path": source.config.path}) == source.config.model_copy(update={"format": "csv"})
    again = open_dataset(spec, tmp_path / "cache")
    assert again.categories == source.categories
    assert [len(split) for split in again.splits.values()] == [len(split) for split in source.splits.values()]


def test_paths_are_relative_to_the_listing(tmp_path: Path) -> None:
    source = opened(tmp_path)
    assert "    path: ../old data/cells\n" in written(tmp_path, source).read_text()
    written(tmp_path, source).parent.rename(tmp_path / "moved")
    (spec,) = parse_data_arguments([str(tmp_path / "moved/data.yaml")])
    assert spec.path.resolve() == source.root


def test_every_suggestion_can_be_taken_up(tmp_path: Path) -> None:
    lines = ["a.png,0,0,5,5,red blood cell", "a.png,0,0,5,5,platelet", "b.png,0,0,5,5,WBC"]
    other = open_dataset(
        DatasetConfig(name="other: 2", path=write_csv(tmp_path / "other", {"train": lines, "val": ["c.png,,,,,"]})),
        tmp_path / "cache",
    )
    path = written(tmp_path, opened(tmp_path), other)
    path.write_text(uncommented(path.read_text()))
    cells, other_spec = parse_data_arguments([str(path)])
    assert cells.renames == {"RBC": "red blood cell"}
    assert cells.splits == {"train": "train", "val": "valid"}
    assert cells.exhaustive == ("'odd: #name'", "Platelets", "RBC")
    assert other_spec.name == "other: 2"
    assert other_spec.renames == {"platelet": "Platelets"}
    assert other_spec.prompts == {"WBC": "WBC"}
    # names that are renamed away can no longer be listed as exhaustive
    path.write_text(re.sub(r"^    exhaustive: .*\n", "", path.read_text(), flags=re.MULTILINE))
    cells, other_spec = parse_data_arguments([str(path)])
    assert "red blood cell" in open_dataset(cells, tmp_path / "cache").categories
    assert "Platelets" in open_dataset(other_spec, tmp_path / "cache").categories


def test_suggestions_join_what_is_given(tmp_path: Path) -> None:
    source = opened(tmp_path, renames={"RBC": "RBCs"}, prompts={"Platelets": "platelet"})
    suggestions = [
        Suggestion(kind="rename", dataset="cells", name="RBCs", value="red blood cell", why="so\nit seems"),
        Suggestion(kind="prompt", dataset="cells", name="RBCs", value="a red cell", why="x"),
        Suggestion(kind="rename", dataset="elsewhere", name="RBCs", value="no", why="x"),
    ]
    coverage = inspect_datasets([source], SPELLING).coverage
    text = datasets_file_text(tmp_path / "data.yaml", [source], suggestions, coverage)
    path = tmp_path / "data.yaml"
    path.write_text(text)
    (spec,) = parse_data_arguments([str(path)])
    assert (spec.renames, spec.prompts) == ({"RBC": "RBCs"}, {"Platelets": "platelet"})
    path.write_text(uncommented(text))
    (spec,) = parse_data_arguments([str(path)])
    # the name in the files is what is renamed
    assert spec.renames == {"RBC": "red blood cell"}
    assert spec.prompts == {"Platelets": "platelet", "RBCs": "a red cell"}


def test_long_lists_of_names_are_wrapped(tmp_path: Path) -> None:
    lines = [f"a.png,0,0,5,5,a name of words {number}" for number in range(40)]
    root = write_csv(tmp_path / "many", {"train": lines, "val": ["b.png,,,,,"]})
    source = open_dataset(DatasetConfig(name="many", path=root), tmp_path / "cache")
    path = written(tmp_path, source)
    assert max(map(len, path.read_text().splitlines())) <= 130
    path.write_text(uncommented(path.read_text()))
    assert parse_data_arguments([str(path)])[0].exhaustive == source.categories


def test_no_list_of_names_where_the_files_tell_it_of_each_image(tmp_path: Path) -> None:
    """With such a list, what is unknown would be taught as absent. A list that the user gave stays."""
    root = tmp_path / "captions"
    for name in "abcde":
        save_noise(root / "images" / f"{name}.png", seed=ord(name))
    lines = [
        {
            "filename": f"{name}.png",
            "height": 30,
            "width": 40,
            "grounding": {"regions": [{"bbox": box, "phrase": name}]},
        }
        for name, box in zip("abcde", [[1, 1, 9, 9]] * 5, strict=True)
    ]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_dataset(DatasetConfig(name="captions", path=root), tmp_path / "cache")
    path = written(tmp_path, source)
    entry = path.read_text().partition("datasets:")[2]
    assert "# exhaustive:" not in entry
    assert "  # its files say of each image what is annotated" in entry
    path.write_text(uncommented(path.read_text()))
    assert parse_data_arguments([str(path)])[0].exhaustive is None
    given = open_dataset(DatasetConfig(name="captions", path=root, exhaustive=["a"]), tmp_path / "cache")
    text = written(tmp_path, given).read_text()
    assert "    exhaustive: [a]\n" in text
    assert "its files say" not in text


def test_a_dropped_box_leaves_the_list_of_names(tmp_path: Path) -> None:
    lines = ["a.png,0,0,5,5,cat", "a.png,3,3,3,9,dog", "b.png,0,0,5,5,cat"]
    root = write_csv(tmp_path / "pets", {"train": lines, "val": ["c.png,,,,,"]})
    source = open_dataset(DatasetConfig(name="pets", path=root), tmp_path / "cache")
    assert "    # exhaustive: [cat, dog]\n" in written(tmp_path, source).read_text()


def test_a_split_held_out_by_chance_is_not_written(tmp_path: Path) -> None:
    root = write_csv(tmp_path / "pets", {"annotations": [f"{name}.png,0,0,5,5,cat" for name in "abcdefgh"]})
    source = open_dataset(DatasetConfig(name="pets", path=root), tmp_path / "cache")
    assert set(source.splits) == {"train", "val"}
    assert "splits: {" not in written(tmp_path, source).read_text()


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    check_target(tmp_path / "new.yaml", force=False)
    (tmp_path / "data.yaml").write_text("datasets: [a]")
    with pytest.raises(ConfigError, match="--force"):
        check_target(tmp_path / "data.yaml", force=False)
    check_target(tmp_path / "data.yaml", force=True)
    (tmp_path / "yolo.yaml").write_text("names: [a]\ntrain: images")
    with pytest.raises(ConfigError, match="no datasets file"):
        check_target(tmp_path / "yolo.yaml", force=True)
    with pytest.raises(ConfigError, match=r"data\.yaml"):
        check_target(tmp_path / "data.txt", force=True)


# Suggestions ----------------------------------------------------------------------------------------------------------


def test_one_suggestion_a_name() -> None:
    facts = [
        dataset_facts("a", [name_facts("RBC", 90), name_facts("Car", 3), "XYZ", name_facts("king", 9)]),
        dataset_facts("b", [name_facts("red blood cell", 5), name_facts("car", 8), name_facts("king", 9)]),
        dataset_facts("my-cards", [name_facts("queen")]),
    ]
    owners = {name: tuple(one.name for one in facts if name in one.names) for one in facts for name in one.names}
    homonyms = [
        Homonym(name="king", dataset="a", others=("king",), other="b", reasons=("so",)),
        Homonym(name="queen", dataset="my-cards", others=("white-queen",), other="b", reasons=("so",)),
    ]
    found = suggestions_of(facts, similar_names(owners, None, 0.7), homonyms)
    assert [(one.kind, one.dataset, one.name, one.value) for one in found] == [
        ("rename", "a", "king", "king (a)"),
        ("prompt", "my-cards", "queen", "queen (my cards)"),
        ("rename", "a", "Car", "car"),
        ("rename", "a", "RBC", "red blood cell"),
        ("prompt", "a", "XYZ", "XYZ"),
    ]


def test_cryptic_names() -> None:
    assert [name for name in ("RBC", "12", "wbc", "tv", "car", "class 1", "пёс", "DOGS") if is_cryptic(name)] == [
        "RBC",
        "12",
        "wbc",
        "DOGS",
    ]
