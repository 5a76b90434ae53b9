"""The study of names that were not trained at a tiny scale, and the words that it asks for."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from metr.errors import ConfigError
from metr.model import METR

from tiny import NAMES, TinyRun

WORDS: dict[str, Any] = {
    "datasets": {
        "pond": {
            "names": {
                "fish": {"synonym": ["carp", "trout"], "plural": "fishes"},
                "frog": {"synonym": "toad", "language": ["Frosch", "grenouille"]},
            },
            "absent_related": ["heron", "newt"],
        },
        "desk": {"names": {"cup": {"synonym": "mug"}}, "absent_related": ["lamp"]},
        "not trained": {"names": {"fish": {"synonym": "carp"}}, "absent_related": []},
    },
    "absent_unrelated": ["volcano"],
    "absent_nonsense": ["zxqvw"],
}


@pytest.fixture
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("names")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.yaml"
    path.write_text(yaml.safe_dump(WORDS), encoding="utf-8")
    return path


def test_words_and_absent_names_are_measured(study: ModuleType, tiny_run: TinyRun, words: Path, tmp_path: Path) -> None:
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    data = ["--data", str(tiny_run.datasets[0].parent), "--words", str(words), "--profile", "tiny"]
    assert study.main(["--model", str(tiny_run.best), *data, *folders]) == 0
    result = json.loads((tmp_path / "results/names-tiny.json").read_text())
    assert {"hardware", "torch", "commit", "aims", "steps"} <= result.keys()
    assert list(result["datasets"]) == ["desk", "pond"]
    pond = result["datasets"]["pond"]
    asked = {(one["kind"], one["name"], one["word"]) for one in pond["words"]}
    every = {("synonym", "fish", "carp"), ("synonym", "fish", "trout"), ("synonym", "frog", "toad")}
    every |= {("plural", "fish", "fishes"), ("language", "frog", "Frosch"), ("language", "frog", "grenouille")}
    assert asked <= every  # those without objects are not scored
    before: dict[str, set[float]] = {}
    for one in pond["words"]:
        before.setdefault(one["name"], set()).add(one["before"])
    assert all(len(values) == 1 for values in before.values())
    assert {kind: set(rates) for kind, rates in pond["absent"].items()} == {
        "related": {"heron", "newt"},
        "unrelated": {"volcano"},
        "nonsense": {"zxqvw"},
    }
    assert all(0 <= rate <= 100 for rates in pond["absent"].values() for rate in rates.values())
    assert result["commit"] in (tmp_path / "results/names-tiny.md").read_text()


def test_a_word_in_the_place_of_a_name_is_scored_as_the_name(study: ModuleType, tiny_run: TinyRun) -> None:
    model = METR.from_pretrained(tiny_run.best, device="cpu")
    one = study.encoded(model, str(tiny_run.datasets[0]))
    # the same word in another case is the trained name: nothing changes
    same = [name.upper() for name in one.names]
    (plain, renamed) = (study.ask(model, one, one.names), study.ask(model, one, same, one.names))
    assert plain.keys() == renamed.keys()
    for image, found in plain.items():
        assert renamed[image].names == found.names == one.names
        assert renamed[image].scores.tolist() == found.scores.tolist()
    rounds = [("plural", {name: name.upper() for name in one.names})]
    assert all(word["before"] == word["after"] for word in study.by_word(model, one, rounds))
    # what is shown of a name is a percentage of the images that show it
    shown = [
        model.thresholds(None, (*one.names, "zxqvw")).shown(found)
        for found in study.ask(model, one, (*one.names, "zxqvw")).values()
    ]
    firing = sum("zxqvw" in {found.names[label] for label in found.labels.tolist()} for found in shown)
    assert study.fires(model, one, ["zxqvw"]) == {"zxqvw": 100 * firing / len(shown)}


def test_words_take_turns(study: ModuleType, words: Path, tiny_run: TinyRun) -> None:
    found = study.read_words(words, METR.from_pretrained(tiny_run.best, device="cpu"))
    assert list(found["datasets"]) == ["desk", "pond"]
    assert found["datasets"]["pond"]["rounds"] == [
        ("synonym", {"fish": "carp", "frog": "toad"}),
        ("synonym", {"fish": "trout"}),
        ("plural", {"fish": "fishes"}),
        ("language", {"frog": "Frosch"}),
        ("language", {"frog": "grenouille"}),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"whale": {"synonym": "orca"}}, "expected names of training"),
        ({"fish": {"meaning": "carp"}}, "expected kinds"),
        ({"fish": {"hypernym": "frog"}}, r"found \['frog'\] twice"),
        ({"fish": {"plural": "animals"}, "frog": {"plural": "animals"}}, "plural.*found .*'animals'"),
    ],
)
def test_words_that_cannot_be_asked_are_refused(study: ModuleType, names: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study.rounds(names, NAMES["pond"], "words.yaml (datasets.pond)")


def test_absent_names_are_not_those_of_the_dataset(study: ModuleType, tiny_run: TinyRun, tmp_path: Path) -> None:
    model, path = METR.from_pretrained(tiny_run.best, device="cpu"), tmp_path / "words.yaml"
    for absent, message in ((["frog"], "names of the dataset"), (["heron", "heron"], "once")):
        path.write_text(yaml.safe_dump({"datasets": {"pond": {"names": {}, "absent_related": absent}}}))
        with pytest.raises(ConfigError, match=message):
            study.read_words(path, model)
    path.write_text(yaml.safe_dump({"datasets": {"sea": {"names": {}, "absent_related": []}}}))
    with pytest.raises(ConfigError, match="expected datasets of training"):
        study.read_words(path, model)


def test_the_share_kept_is_of_the_sums(study: ModuleType) -> None:
    words = [
        {"kind": "synonym", "name": "a", "word": "b", "before": 60.0, "after": 30.0},
        {"kind": "synonym", "name": "c", "word": "d", "before": 20.0, "after": 30.0},
        {"kind": "plural", "name": "a", "word": "as", "before": 0.0, "after": 10.0},
    ]
    absent = {"related": {"x": 20.0, "y": 0.0}, "unrelated": {"z": 8.0}, "nonsense": {}}
    found = study.summary([{"dataset": "one", "images": 5, "words": words, "absent": absent}])
    assert found["kinds"]["synonym"] == {"words": 2, "before": 40.0, "after": 30.0, "kept": 75.0}
    assert found["kinds"]["plural"]["kept"] is None
    assert found["kinds"]["language"] == {"words": 0, "before": None, "after": None, "kept": None}
    assert found["absent"] == {"related": 10.0, "unrelated": 8.0, "nonsense": None}
    assert [(one["found"], one["reached"]) for one in found["aims"]] == [(75.0, False), (90.0, True), (92.0, False)]
    facts = {"profile": "p", "steps": 3, "hardware": "none", "torch": "2", "commit": "c"}
    page = study.page({**facts, **found})
    assert "| one | a | synonym | b | 60.0 | 30.0 |" in page
    assert "| one | related | x | 20.0 |" in page
    assert "| one | related | y |" not in page
