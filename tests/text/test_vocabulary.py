"""The union of label spaces by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metr.errors import CheckpointError, ConfigError, DataError
from metr.text.vocabulary import Vocabulary

BLOOD = ("RBC", "WBC")
ZOO = ("bear", "elephant")
STREET = ("person", "bear", "Bear", " dining table ")


def test_union_is_by_exact_name_in_the_order_seen() -> None:
    vocabulary = Vocabulary.union({"zoo": ZOO, "street": STREET, "blood": BLOOD})
    assert vocabulary.names == ("bear", "elephant", "person", "Bear", "dining table", "RBC", "WBC")
    assert len(vocabulary) == 7
    assert vocabulary.rows("street").tolist() == [2, 0, 3, 4]
    assert vocabulary.annotated("street").tolist() == [True, False, True, True, True, False, False]
    assert vocabulary.names_of("street") == ("person", "bear", "Bear", "dining table")
    assert vocabulary.index_of(" dining table") == 4


def test_a_dataset_may_hold_a_name_twice() -> None:
    vocabulary = Vocabulary.union({"chess": ["pieces", "king", "king "]})
    assert vocabulary.rows("chess").tolist() == [0, 1, 1]


def test_a_dataset_may_hold_nothing() -> None:
    vocabulary = Vocabulary.union({"zoo": ZOO, "empty": []})
    assert vocabulary.rows("empty").tolist() == []
    assert not vocabulary.annotated("empty").any()


names = st.text("abcAB -", min_size=1, max_size=3).filter(str.strip)


@given(st.dictionaries(st.sampled_from("xyz"), st.lists(names, max_size=6), min_size=1))
def test_rows_give_every_dataset_its_own_names(datasets: dict[str, list[str]]) -> None:
    vocabulary = Vocabulary.union(datasets)
    assert set(vocabulary.names) == {name.strip() for held in datasets.values() for name in held}
    for dataset, held in datasets.items():
        assert [vocabulary.names[row] for row in vocabulary.rows(dataset)] == [name.strip() for name in held]
        annotated = {name for name, known in zip(vocabulary.names, vocabulary.annotated(dataset), strict=True) if known}
        assert annotated == {name.strip() for name in held}
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


def test_prompts_join_and_travel() -> None:
    prompts = {"blood": {"RBC": "red blood cell"}, "zoo": {"bear ": " brown bear"}, "street": {"bear": "brown bear"}}
    vocabulary = Vocabulary.union({"zoo": ZOO, "street": STREET, "blood": BLOOD}, prompts)
    assert vocabulary.prompts == {"RBC": "red blood cell", "bear": "brown bear"}
    assert Vocabulary.from_dict(vocabulary.to_dict()) == vocabulary


def test_conflicting_prompts_name_both_datasets() -> None:
    prompts = {"zoo": {"bear": "polar bear"}, "street": {"bear": "teddy bear"}}
    with pytest.raises(DataError, match="'bear' is 'polar bear' in zoo but 'teddy bear' in street"):
        Vocabulary.union({"zoo": ZOO, "street": STREET}, prompts)


def test_prompts_for_what_is_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'bear'"):
        Vocabulary.union({"zoo": ZOO}, {"zoo": {"baer": "brown bear"}})
    with pytest.raises(ConfigError, match="did you mean 'zoo'"):
        Vocabulary.union({"zoo": ZOO}, {"zo": {"bear": "brown bear"}})
    with pytest.raises(ConfigError, match="prompt for 'bear' is empty"):
        Vocabulary.union({"zoo": ZOO}, {"zoo": {"bear": " "}})


def test_misspelt_words_get_a_hint() -> None:
    vocabulary = Vocabulary.union({"zoo": ZOO})
    with pytest.raises(DataError, match="did you mean 'elephant'"):
        vocabulary.index_of("elefant")
    with pytest.raises(DataError, match="did you mean 'zoo'"):
        vocabulary.rows("zooo")
    with pytest.raises(DataError, match="made of names"):
        Vocabulary.of(ZOO).annotated("zoo")


def test_plain_names() -> None:
    vocabulary = Vocabulary.of(["cat", " dog "], {"dog": "a small dog"})
    assert vocabulary.names == ("cat", "dog")
    assert vocabulary.prompts == {"dog": "a small dog"}
    assert vocabulary.datasets == {}


@pytest.mark.parametrize(
    ("given_names", "message"),
    [([], "at least one"), (["cat", " "], "empty"), (["cat", "cat "], "given twice: 'cat'")],
)
def test_plain_names_are_checked(given_names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Vocabulary.of(given_names)


def test_empty_names_of_a_dataset_are_refused() -> None:
    with pytest.raises(DataError, match="zoo: the category with label 1"):
        Vocabulary.union({"zoo": ["bear", "  "]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["bear", "bear"]}, "twice"),
        ({"names": "bear"}, "'names'"),
        ({"names": [1]}, "'names.0'"),
        ({"datasets": {"zoo": ["lion"]}}, "lion"),
        ({"prompts": {"lion": "a lion"}}, "lion"),
        ({"prompts": None}, "'prompts'"),
        ({"more": 1}, "'more'"),
    ],
)
def test_a_damaged_file_is_explained(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Vocabulary.from_dict(Vocabulary.union({"zoo": ZOO}).to_dict() | change)


def test_an_extended_vocabulary_keeps_its_rows() -> None:
    old = Vocabulary.union({"sea": ["fish", "crab"], "wood": ["bear"]}, {"sea": {"crab": "a crab on sand"}})
    more = Vocabulary.union({"zoo": ["bear", "lion"], "wood": ["deer"]}, {"zoo": {"lion": "a lion"}})
    both = old.extended(more)
    assert both.names == ("fish", "crab", "bear", "lion", "deer")
    assert both.datasets == {"sea": ("fish", "crab"), "wood": ("deer",), "zoo": ("bear", "lion")}
    assert both.prompts == {"crab": "a crab on sand", "lion": "a lion"}
    assert old.extended(old) == old
