"""What a command asks a detector for."""

from pathlib import Path

import pytest

from metr.errors import ConfigError
from metr.inference.request import check_labels, names_to_find


def test_names_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("# of the sea\nshark\n\n starfish \n", encoding="utf-8")
    assert names_to_find(None, tmp_path / "names.txt") == ["shark", "starfish"]
    (tmp_path / "names.yaml").write_text("RBC: [red blood cell, erythrocyte]\nshark: big fish\n", encoding="utf-8")
    expected = {"RBC": ["red blood cell", "erythrocyte"], "shark": ["big fish"]}
    assert names_to_find(None, tmp_path / "names.yaml") == expected
    (tmp_path / "list.yml").write_text("[shark, starfish]", encoding="utf-8")
    assert names_to_find(None, tmp_path / "list.yml") == ["shark", "starfish"]
    # YAML takes these for numbers and truth values
    (tmp_path / "words.yml").write_text("[no, 007, 12:30, null]", encoding="utf-8")
    assert names_to_find(None, tmp_path / "words.yml") == ["no", "007", "12:30", "null"]
    (tmp_path / "words.yml").write_text("no: yes\n1: [2, off]\n", encoding="utf-8")
    assert names_to_find(None, tmp_path / "words.yml") == {"no": ["yes"], "1": ["2", "off"]}
    assert names_to_find("shark, star fish", None) == ["shark", "star fish"]
    assert names_to_find(None, None) is None


@pytest.mark.parametrize("text", ["", "a: {b: c}", "a: []", "[[1], 2]", "3", "a: [b", "a: [[1]]", "? [a]\n: b", "no: "])
def test_files_that_name_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "names.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"(?s)names\.yaml: .*\n  try: write one name a line"):
        names_to_find(None, tmp_path / "names.yaml")
    with pytest.raises(ConfigError, match=r"no\.txt: no such file of names"):
        names_to_find(None, tmp_path / "no.txt")
    (tmp_path / "names.txt").write_text("RBC: [red blood cell]", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"looks like YAML: RBC: \[red blood cell\]\n  try: end the file's name in \.yaml"
    ):
        names_to_find(None, tmp_path / "names.txt")
    with pytest.raises(ConfigError, match="found both"):
        names_to_find("shark", tmp_path / "names.yaml")


def test_labels_are_one_of_three() -> None:
    assert [check_labels(one) for one in ("names", "scores", "none")] == ["names", "scores", "none"]
    with pytest.raises(ConfigError, match=r"no kind of labels 'name'\n  try: .*'names'"):
        check_labels("name")
