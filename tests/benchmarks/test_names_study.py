"""The study of names that were not trained at a tiny scale."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from metr.model import METR
from metr.structures import Detections

from tiny import NAMES, TinyRun

WORDS: dict[str, Any] = {
    "datasets": {
        "pond": {
            "words": {
                "fish": {"synonym": "carp", "plural": "fishes", "hypernym": "frog"},
                "frog": {"synonym": "toad", "language": "Frosch"},
                "whale": {"synonym": "orca"},
            },
            "absent": ["heron", "turtle"],
        },
        "desk": {"words": {"cup": {"synonym": "mug"}}, "absent": []},
        "not trained": {"words": {"fish": {"synonym": "carp"}}, "absent": ["heron"]},
    },
    "unrelated": ["volcano"],
    "nonsense": ["zxqvw"],
}


@pytest.fixture
def study(study_of: Callable[[str], ModuleType]) -> ModuleType:
    return study_of("names")


def test_words_and_absent_names_are_measured(
    study: ModuleType, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "WORDS", tmp_path / "words.yaml")
    study.WORDS.write_text(yaml.safe_dump(WORDS), encoding="utf-8")
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert study.main(["--run", str(tiny_run.best), "--data", str(tiny_run.datasets[0].parent), *folders]) == 0
    result = json.loads((tmp_path / "results/names.json").read_text())
    assert {"hardware", "torch", "commit", "bars", "kept", "fires"} <= result.keys()
    assert set(result["datasets"]) == {"pond", "desk"}
    pond = result["datasets"]["pond"]
    assert set(pond["kinds"]) == set(study.KINDS)
    asked = {row["word"] for rows in pond["kinds"].values() for row in rows}
    assert asked <= {"carp", "fishes", "toad", "Frosch"}  # "frog" is another name, and whales are not the dataset's
    assert {kind: set(words) for kind, words in pond["absent"].items()} == {
        "related": {"heron"},
        "unrelated": {"volcano"},
        "nonsense": {"zxqvw"},
    }
    assert all(0 <= share <= 100 for words in pond["absent"].values() for share in words.values())
    assert result["commit"] in (tmp_path / "results/names.md").read_text()


def test_a_word_is_scored_as_the_name(study: ModuleType, tiny_run: TinyRun) -> None:
    model = METR.from_pretrained(tiny_run.best, device="cpu")
    one = study.encoded(model, str(tiny_run.datasets[0]))
    assert one.names == NAMES["pond"]
    own = study.by_name(model, one, {})
    assert set(own) == set(one.names)
    assert study.by_name(model, one, {"fish": "frog"}) == own
    assert set(study.by_name(model, one, {"fish": "carp"})) == set(one.names)


def test_an_absent_word_fires_where_it_would_be_shown(
    study: ModuleType, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = METR.from_pretrained(tiny_run.best, device="cpu")
    one = study.encoded(model, str(tiny_run.datasets[0]))
    names = (*one.names, "heron", "newt")
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])

    def found(*labels: str) -> Detections:
        numbers = torch.tensor([names.index(label) for label in labels])
        return Detections(boxes=boxes, scores=torch.tensor([0.95, 0.9, 0.2]), labels=numbers, names=names)

    # the frog hides the heron at its place; the last one is too weak to be shown
    answers = {1: found("frog", "heron", "newt"), 2: found("newt", "frog", "heron")}
    monkeypatch.setattr(study, "ask", lambda *_: answers)
    assert study.firing(model, one, {"related": ["heron", "newt", "frog"]}) == {"related": {"heron": 0.0, "newt": 50.0}}


def test_the_share_kept_is_of_the_sums(study: ModuleType) -> None:
    rows = [
        {"name": "a", "word": "b", "taught": True, "own": 60.0, "ap": 30.0},
        {"name": "c", "word": "d", "taught": False, "own": 20.0, "ap": 30.0},
    ]
    kinds = {kind: rows if kind == "synonym" else [] for kind in study.KINDS}
    absent = {"related": {"x": 20.0, "y": 0.0}, "unrelated": {"z": 8.0}, "nonsense": {"q": 0.0}}
    one = {"images": 5, "kinds": kinds, "absent": absent}
    kept, fires = study.kept([one]), study.fires([one])
    assert kept["synonym"] == {"all": 75.0, "taught": 50.0, "new": 150.0, "names": 2}
    assert kept["plural"] == {"all": None, "taught": None, "new": None, "names": 0}
    assert fires == {"related": 10.0, "unrelated": 8.0, "nonsense": 0.0}
    goals = study.goals({"kept": kept, "fires": fires})
    assert [goal.get("reached", goal.get("met")) for goal in goals] == [False, True, False, True]
    facts = {"hardware": "none", "torch": "2", "commit": "c"}
    page = study.page({**facts, "datasets": {"sea": one}, "kept": kept, "fires": fires, "bars": goals})
    assert '"b" for a (60.0 to 30.0)' in page
    assert '"x" in sea (20 %)' in page
    assert "- unrelated words fire in 8.0 % of images (at most 5: missed)" in page


def test_every_word_of_the_study_can_be_asked(study: ModuleType) -> None:
    words = yaml.safe_load(study.WORDS.read_text(encoding="utf-8"))
    for name, own in words["datasets"].items():
        asked = own["words"]
        assert {kind for kinds in asked.values() for kind in kinds} <= {*study.KINDS}, name
        for kind in study.KINDS:
            called = [kinds.get(kind, trained) for trained, kinds in asked.items()]
            assert len({*called}) == len(called), (name, kind)
        for absent in (own["absent"], words["unrelated"], words["nonsense"]):
            assert len({*absent}) == len(absent), name
            assert not {*absent} & asked.keys(), name
